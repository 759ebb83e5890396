"""The command line: `tailrisk demo`, `tailrisk estimate`."""

from tailrisk_jax.cli.main import main

__all__ = ["main"]
