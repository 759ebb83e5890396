"""The contract of a judge: a batch of responses in; scores in [0, 1], or NaN for unscored, out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from tailrisk_jax.policies import Query


@dataclasses.dataclass(frozen=True)
class Response:
    """One response, with what it answers.

    Attributes:
      query_id: the query's name in the study.
      query: what was asked, text or messages.
      text: the response, end token left out.
      tokens: its token ids, end token included; () where only text is known.
      ended: False where it was cut at the length limit.
      metadata: what else the query's file says of it, such as its target string.
    """

    query_id: str
    query: Query
    text: str
    tokens: tuple[int, ...] = ()
    ended: bool = True
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def question(self) -> str:
        """What was asked, as one text: the last user message."""
        return question(self.query)


@dataclasses.dataclass(frozen=True)
class Judgements:
    """What a judge says of n responses.

    Attributes:
      scores: in [0, 1], NaN where a response couldn't be scored, [n].
      raw: the judge's own output for each, such as a served model's answer; None without one.
      errors: why a score is NaN; None where it isn't.
    """

    scores: Float[np.ndarray, " n"]
    raw: Sequence[str | None]
    errors: Sequence[str | None]

    @classmethod
    def of(cls, scores: Any) -> "Judgements":
        """Scores alone."""
        scores = np.asarray(scores, np.float64)
        errors = ["the judge gave no score" if np.isnan(score) else None for score in scores]
        return cls(scores, [None] * len(scores), errors)


class Judge(Protocol):
    """Scores responses. `name`, `version` and `settings` (JSON) say all that a score depends on.

    One that runs a model on this process's devices says so by an attribute `on_devices`, True.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...

    def __call__(self, responses: Sequence[Response]) -> Judgements: ...


def question(query: Query) -> str:
    """What a query asks, as one text: the last user message, or else the last."""
    if isinstance(query, str):
        return query
    asked = [message["content"] for message in query if message["role"] == "user"]
    return asked[-1] if asked else query[-1]["content"]
