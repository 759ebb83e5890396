"""Parses the command and turns known errors into one line."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from tailrisk_jax.cli.demo import Demo, demo
from tailrisk_jax.cli.estimate import Estimate, estimate
from tailrisk_jax.errors import InputError

_COMMANDS = {Demo: demo, Estimate: estimate}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `tailrisk`; exits with 0, with 2 on bad input, with 130 on Ctrl-C."""
    options = tyro.cli(
        Demo | Estimate,
        prog="tailrisk",
        description="How likely is a harmful answer? Tail risks by importance sampling.",
        args=argv,
    )
    _use_compilation_cache()
    try:
        _COMMANDS[type(options)](options)
    except InputError as error:
        print(f"tailrisk: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tailrisk: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


def _use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "tailrisk_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
