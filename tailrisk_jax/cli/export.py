"""`tailrisk export`: a run in a format of another tool."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from tailrisk_jax.studies import write_inspect_log


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a run as a log of Inspect AI (`inspect view` opens it); needs the extra "inspect".

    Each answer is an epoch of its query, with its score; NaN is unscored. The answers are the
    proposal's: their plain mean score says nothing of the model. The estimates are in the results.
    """

    run: tyro.conf.Positional[Path]
    """Its folder."""
    out: Path
    """The file, such as run.eval."""
    samples: int | None = None
    """The first so many answers of each query; by default all."""
    format: Literal["inspect"] = "inspect"
    """Whose format."""


def export(options: Export) -> None:
    """Runs the command."""
    draws = write_inspect_log(options.run, options.out, options.samples)
    print(f"{draws:,} answers written to {options.out}; see them with: inspect view start")
