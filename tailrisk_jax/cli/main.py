"""Parses the command and turns known errors into one line."""

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import jax

from tailrisk_jax.cli.compare import Compare, compare_runs
from tailrisk_jax.cli.config import with_config
from tailrisk_jax.cli.demo import Demo, demo
from tailrisk_jax.cli.derived import Judge, Merge, Score, join, judge, score
from tailrisk_jax.cli.direction import Direction, direction
from tailrisk_jax.cli.estimate import Estimate, estimate
from tailrisk_jax.cli.export import Export, export
from tailrisk_jax.cli.forecast import Forecast, forecast
from tailrisk_jax.cli.learn import Learn, learn_adapter
from tailrisk_jax.cli.mesh import OnMesh, on_mesh
from tailrisk_jax.cli.parsing import parse_commands
from tailrisk_jax.cli.persona import Persona, persona
from tailrisk_jax.cli.perturb import Perturb, perturb
from tailrisk_jax.cli.plan import Plan, plan
from tailrisk_jax.cli.processes import exit_now, join_processes, leave_processes
from tailrisk_jax.cli.report import Report, report
from tailrisk_jax.cli.resume import Resume, resume
from tailrisk_jax.cli.sensitivity import Sensitivity, show_sensitivity
from tailrisk_jax.cli.show import Show, show
from tailrisk_jax.cli.tune import Tune, tune
from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import SetAside, stop_writing

_COMMANDS = {
    Demo: demo,
    Estimate: estimate,
    Resume: resume,
    Judge: judge,
    Score: score,
    Merge: join,
    Show: show,
    Compare: compare_runs,
    Forecast: forecast,
    Direction: direction,
    Persona: persona,
    Tune: tune,
    Learn: learn_adapter,
    Perturb: perturb,
    Sensitivity: show_sensitivity,
    Plan: plan,
    Export: export,
    Report: report,
}
_BY_NAME = {command.__name__.lower(): command for command in _COMMANDS}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `tailrisk`; exits with 0, with 2 on bad input, with 130 on Ctrl-C.

    Of several processes, with 3 when another is gone.
    """
    _use_compilation_cache()
    warnings.showwarning = _show_warning
    try:
        words = with_config(sys.argv[1:] if argv is None else argv, _BY_NAME)
        options = parse_commands(words, _BY_NAME)
        join_processes(getattr(options, "processes", None))
        with on_mesh(options.mesh) if isinstance(options, OnMesh) else nullcontext():
            _COMMANDS[type(options)](options)
        leave_processes()
    except InputError as error:
        _fail(" ".join(str(error).split()))
    except OSError as error:
        _fail(f"{error}; check the path, its rights and the disk")
    except KeyboardInterrupt:
        stop_writing()
        print(
            "tailrisk: interrupted; what a run had finished is kept: `tailrisk resume RUN` goes on",
            file=sys.stderr,
            flush=True,
        )
        os._exit(130)  # a judge that waits for its server would hold us up


def _fail(line: str) -> NoReturn:
    """Ends with one line; of several processes the others would be waited for at the exit."""
    print(f"tailrisk: {line}", file=sys.stderr)
    if jax.distributed.is_initialized():
        exit_now(2)
    sys.exit(2)


def _use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "tailrisk_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


_show_any_warning = warnings.showwarning


def _show_warning(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
    """A shard set aside is one line, like an error; other warnings are shown as ever."""
    if issubclass(category, SetAside):
        print(f"tailrisk: {message}", file=sys.stderr)
    else:
        _show_any_warning(message, category, *where, **more)
