"""`tailrisk show`: the results of a run, as they were written."""

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import tyro

from tailrisk_jax.cli.outcome import show_table
from tailrisk_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Show:
    """Show the estimates of a run."""

    run: tyro.conf.Positional[Path]
    """Its folder."""


def show(options: Show) -> None:
    """Runs the command."""
    show_table(read_estimates(options.run).to_pydict())


def read_estimates(folder: Path):
    """A run's estimates.parquet.

    Raises:
      InputError: there is none, or it is damaged.
    """
    path = folder / "estimates.parquet"
    try:
        return pq.read_table(path)
    except FileNotFoundError:
        raise InputError(
            f"run {folder} has no estimates.parquet; finish it with: tailrisk resume {folder}"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} can't be read ({error}); make it anew: tailrisk estimate {folder}"
        ) from error
