"""`tailrisk resume`: go on with a run that was stopped."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from tailrisk_jax.cli.config import FILE, flags, read_config
from tailrisk_jax.cli.derived import Judge, Merge, Score, join, judge, score
from tailrisk_jax.cli.estimate import Estimate, estimate
from tailrisk_jax.studies import read_study


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run that was stopped, with the options that it was begun with."""

    run: tyro.conf.Positional[Path]
    """Its folder."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no table, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output, in place of the table."""


_COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "estimate": (Estimate, estimate),
    "judge": (Judge, judge),
    "score": (Score, score),
    "merge": (Merge, join),
}


def resume(options: Resume) -> None:
    """Runs the command."""
    read_study(options.run)
    path = options.run / FILE
    content = read_config(path)
    kind, run = _COMMANDS[content.get("command", "estimate")]
    words = [*flags(content, content["command"], kind, path), "--out", str(options.run)]
    own = tyro.cli(kind, args=words)
    run(dataclasses.replace(own, quiet=options.quiet, json=options.json))
