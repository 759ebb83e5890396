"""From scores to an event: 1 where a score is at a threshold, else 0."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges.judge import Judge, Judgements, Response

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


@dataclasses.dataclass(frozen=True)
class Threshold:
    """The event that another judge's score is at least `tau`, or as `comparison` says.

    What is unscored stays so. The score itself is kept as raw output where the judge has none.

    Raises:
      InputError: an unknown comparison, a threshold outside of [0, 1].
    """

    judge: Judge
    tau: float
    comparison: str = ">="

    def __post_init__(self):
        if self.comparison not in _COMPARE or not 0 <= self.tau <= 1:
            raise InputError(
                f"threshold {self.comparison}{self.tau} must be a score in [0, 1]; "
                "give e.g. 0.75, or '<0.3'"
            )

    @classmethod
    def parse(cls, judge: Judge, text: str) -> "Threshold":
        """From "0.75", which means ">=0.75", or a text with another comparison."""
        number = text.strip().lstrip("<>=")
        try:
            return cls(judge, float(number), text.strip().removesuffix(number) or ">=")
        except ValueError:
            raise InputError(
                f"threshold {text!r} must be a score in [0, 1]; give e.g. 0.75, or '<0.3'"
            ) from None

    @property
    def name(self) -> str:
        """The judge's own."""
        return self.judge.name

    @property
    def version(self) -> str:
        """The judge's own."""
        return self.judge.version

    @property
    def on_devices(self) -> bool:
        """The judge's own."""
        return getattr(self.judge, "on_devices", False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The judge's own, and the event."""
        return {**self.judge.settings, "event": f"score {self.comparison} {self.tau}"}

    def __call__(self, responses: Sequence[Response]) -> Judgements:
        judged = self.judge(responses)
        scores = np.asarray(judged.scores, np.float64)
        events = np.where(np.isnan(scores), np.nan, _COMPARE[self.comparison](scores, self.tau))
        raw = [
            f"score {score:.9g}" if text is None and not np.isnan(score) else text
            for text, score in zip(judged.raw, scores, strict=True)
        ]
        return Judgements(events, raw, judged.errors)
