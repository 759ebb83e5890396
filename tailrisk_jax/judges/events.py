"""Events on text: judges that need no model."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import Query


class Judge(Protocol):
    """Scores the responses to one query (text or messages).

    Returns [N] in [0, 1], NaN where a response can't be scored.
    """

    def __call__(self, query: Any, texts: Sequence[str]) -> Float[np.ndarray, " N"]: ...


@dataclasses.dataclass(frozen=True)
class RegexEvent:
    """1 where a regular expression (Python's `re.search`, case as written) is found, else 0.

    Raises:
      InputError: a pattern that doesn't compile.
    """

    pattern: str

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(
                f"event {self.pattern!r} is not a regular expression ({error}); "
                "escape special characters with a backslash"
            ) from error

    def __call__(self, query: Query, texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        found = re.compile(self.pattern).search
        return np.asarray([found(text) is not None for text in texts], np.float32)
