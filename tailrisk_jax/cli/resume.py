"""`tailrisk resume`: go on with a run that was stopped."""

import dataclasses
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import tyro

from tailrisk_jax.cli.config import DIRECTORY, FILE, flags, read_config
from tailrisk_jax.cli.derived import Judge, Merge, Score, join, judge, score
from tailrisk_jax.cli.estimate import Estimate, estimate
from tailrisk_jax.cli.mesh import OnMesh
from tailrisk_jax.cli.parsing import parse_options
from tailrisk_jax.cli.processes import Processes
from tailrisk_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Resume(Processes, OnMesh):
    """Go on with a run that was stopped, with the options that it was begun with.

    Paths in them are meant from the folder where the run's command was given, if it is still there.
    """

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
    """Runs the command.

    Raises:
      InputError: no run, or what its command raises.
    """
    folder = options.run.absolute()
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{options.run} is no run of `tailrisk estimate`: there is no {FILE}")
    content = read_config(path)
    command = content.get("command")
    if command not in _COMMANDS:
        raise InputError(
            f"config {path} has command={command!r}, which can't be resumed; "
            f"it is one of {', '.join(_COMMANDS)}"
        )
    kind, run = _COMMANDS[command]
    began = Path(str(content.get(DIRECTORY, "")))
    own = parse_options([*flags(content, command, kind, path), f"--out={folder}"], kind)
    with chdir(began if began.is_dir() else Path.cwd()):
        run(dataclasses.replace(own, quiet=options.quiet, json=options.json))
