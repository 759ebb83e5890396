"""Judges named on the command line."""

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge, RegexEvent


def make_judge(judge: str | None, event: str | None) -> Judge | None:
    """The judge that the options name, if any.

    Raises:
      InputError: both are given, or one that isn't understood.
    """
    if judge is not None and event is not None:
        raise InputError("--judge and --event are both given; give one")
    if event is not None:
        return RegexEvent(event)
    return None
