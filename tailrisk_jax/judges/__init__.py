"""Responses to scores in [0, 1], or NaN for unscored."""

from tailrisk_jax.judges.events import Judge, RegexEvent

__all__ = ["Judge", "RegexEvent"]
