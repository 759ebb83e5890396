"""A judge that asks a served language model by a rubric."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailrisk_jax.judges import server as client
from tailrisk_jax.judges.answers import AnswerCache
from tailrisk_jax.judges.judge import Judgements, Response
from tailrisk_jax.judges.rubrics import Rubric, Unreadable
from tailrisk_jax.judges.server import Answer, Server

REQUEST: Mapping[str, Any] = {"temperature": 0, "max_tokens": 1024}


@dataclasses.dataclass(frozen=True)
class RubricJudge:
    """Scores responses by what a served model answers to a rubric.

    Each distinct prompt is asked once: equal responses to a query share an answer, and an answer
    that gave a score is kept and never asked for again. What gave none is NaN, with the reason;
    called again, it is asked again.

    Attributes:
      rubric: what is asked, and how answers are read.
      server: who is asked.
      cache: where answers are kept; None for nowhere.
      request: further fields of each request; a score depends on them.
    """

    rubric: Rubric
    server: Server
    cache: Path | None = None
    request: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(REQUEST))

    @property
    def name(self) -> str:
        """Of the rubric."""
        return f"rubric:{self.rubric.name}"

    @property
    def version(self) -> str:
        """Of the rubric."""
        return self.rubric.version

    @property
    def settings(self) -> Mapping[str, Any]:
        """The served model, the fields of a request, a hash of the wording."""
        return {"model": self.server.model, **self.request, **self.rubric.settings}

    def check(self) -> None:
        """Sees whether the server is there and takes the key, at no cost.

        Raises:
          InputError: it isn't, or doesn't.
        """
        client.check(self.server)

    def __call__(self, responses: Sequence[Response]) -> Judgements:
        """Scores responses.

        Raises:
          InputError: as `server.ask`, or a cache that can't be used; answers so far are kept.
        """
        prompts = [self.rubric.prompt(one.question, one.text) for one in responses]
        judged: dict[str, tuple[float, str | None, str | None]] = {}

        def judge(prompt: str, answer: Answer) -> bool:
            score, error = self._score(answer)
            judged[prompt] = score, answer.text, error
            return error is None

        with contextlib.closing(AnswerCache(self.cache)) as cache:
            wanted = []
            for prompt in dict.fromkeys(prompts):
                kept = cache.get(self._key(prompt))
                if kept is None or not judge(prompt, Answer(kept)):
                    wanted.append(prompt)

            def keep(number: int, answer: Answer) -> None:
                prompt = wanted[number]
                if judge(prompt, answer):
                    cache.put(self._key(prompt), self.server.model, answer.text or "")

            client.ask(self.server, wanted, self.request, keep)
        found = [judged[prompt] for prompt in prompts]
        return Judgements(
            np.asarray([score for score, _, _ in found], np.float64),
            [raw for _, raw, _ in found],
            [error for _, _, error in found],
        )

    def _score(self, answer: Answer) -> tuple[float, str | None]:
        """The score, or NaN and why there is none."""
        if answer.error is not None:
            return np.nan, answer.error
        try:
            return self.rubric.score(answer.text or ""), None
        except Unreadable as unreadable:
            return np.nan, str(unreadable)

    def _key(self, prompt: str) -> str:
        asked = [self.server.model, prompt, dict(self.request)]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
