"""Events on text or tokens: judges that need no model. 1 where the event happens, else 0."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges.judge import Judgements, Response


@dataclasses.dataclass(frozen=True)
class RegexEvent:
    """A regular expression (Python's `re.search`, case as written) is found.

    Raises:
      InputError: a pattern that doesn't compile.
    """

    pattern: str
    name = "regex"
    version = "1"

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(
                f"event {self.pattern!r} is not a regular expression ({error}); "
                "escape special characters with a backslash"
            ) from error

    @property
    def settings(self) -> Mapping[str, Any]:
        """The pattern."""
        return {"pattern": self.pattern}

    def __call__(self, responses: Sequence[Response]) -> Judgements:
        found = re.compile(self.pattern).search
        return Judgements.of([found(response.text) is not None for response in responses])


@dataclasses.dataclass(frozen=True)
class KeywordEvent:
    """Any of some words or phrases occurs, or all of them.

    Attributes:
      keywords: words or phrases, blanks around them left out.
      every: all of them are needed, not one.
      whole_words: "cat" isn't found in "catalogue".
      ignore_case: "cat" is found in "CAT".

    Raises:
      InputError: no keyword, or an empty one.
    """

    keywords: tuple[str, ...]
    every: bool = False
    whole_words: bool = True
    ignore_case: bool = True
    name = "keywords"
    version = "1"

    def __post_init__(self):
        if not self.keywords or not all(word.strip() for word in self.keywords):
            raise InputError(
                f"keywords {','.join(self.keywords)!r} has an empty one; give e.g. keywords:a,b"
            )

    @property
    def settings(self) -> Mapping[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)

    def __call__(self, responses: Sequence[Response]) -> Judgements:
        edges = (r"(?<!\w)", r"(?!\w)") if self.whole_words else ("", "")
        flags = re.IGNORECASE if self.ignore_case else 0
        found = [
            re.compile(re.escape(word.strip()).join(edges), flags).search for word in self.keywords
        ]
        needed = all if self.every else any
        return Judgements.of(
            [needed(one(response.text) is not None for one in found) for response in responses]
        )


@dataclasses.dataclass(frozen=True)
class TargetEvent:
    """The response begins with a target string, case as written; blanks before it don't matter.

    Attributes:
      target: the string; None for each query's own, the `target` in its metadata, as AdvBench and
        JailbreakBench have one.

    Raises:
      InputError: an empty target; when called, a query without one.
    """

    target: str | None = None
    name = "target"
    version = "1"

    def __post_init__(self):
        if self.target is not None and not self.target.strip():
            raise InputError("target '' is empty; give e.g. target:'Sure, here is'")

    @property
    def settings(self) -> Mapping[str, Any]:
        """The target, where it is given once."""
        return {"target": self.target or "of each query"}

    def of(self, query_id: str, metadata: Mapping[str, Any]) -> str:
        """The target of a query.

        Raises:
          InputError: it has none.
        """
        target = self.target or str(metadata.get("target") or "")
        if not target.strip():
            raise InputError(
                f"query {query_id!r} has no target in its file; give one for all, target:TEXT, or "
                "queries that have them (AdvBench, JailbreakBench)"
            )
        return target.strip()

    def __call__(self, responses: Sequence[Response]) -> Judgements:
        return Judgements.of(
            [r.text.lstrip().startswith(self.of(r.query_id, r.metadata)) for r in responses]
        )


@dataclasses.dataclass(frozen=True)
class TokensEvent:
    """A sequence of token ids occurs, in one piece, anywhere in the response.

    A response whose tokens aren't known is unscored.

    Raises:
      InputError: no ids, or a negative one.
    """

    ids: tuple[int, ...]
    name = "tokens"
    version = "1"

    def __post_init__(self):
        if not self.ids or min(self.ids) < 0:
            raise InputError(f"tokens {list(self.ids)} must be token ids; give e.g. tokens:17,4")

    @property
    def settings(self) -> Mapping[str, Any]:
        """The ids."""
        return {"ids": list(self.ids)}

    def __call__(self, responses: Sequence[Response]) -> Judgements:
        n = len(self.ids)
        scores = [
            any(r.tokens[i : i + n] == self.ids for i in range(len(r.tokens) - n + 1))
            if r.tokens
            else np.nan
            for r in responses
        ]
        return Judgements.of(scores)
