"""Responses to scores in [0, 1], or NaN for unscored."""

from tailrisk_jax.judges.events import RegexEvent
from tailrisk_jax.judges.judge import Judge, Judgements, Response, question

__all__ = ["Judge", "Judgements", "RegexEvent", "Response", "question"]
