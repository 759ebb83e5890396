"""Events on text: judges that need no model."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges.judge import Judgements, Response


@dataclasses.dataclass(frozen=True)
class RegexEvent:
    """1 where a regular expression (Python's `re.search`, case as written) is found, else 0.

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
