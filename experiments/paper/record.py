"""Result files of an experiment: rows, tables, a picture, and a summary of what they rest on."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from experiments import tables
from experiments.machine import hardware
from experiments.paper.bench import Bench
from experiments.paper.setting import Options, plain
from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import json_text
from tailrisk_jax.studies.provenance import session
from tailrisk_jax.studies.store import write_atomically, write_json

SUMMARY, TABLES, ROWS, PICTURE = "summary.json", "tables.md", "rows.csv", "figure.png"


class Record:
    """Writes an experiment's folder; summary.json says "running", "done" or why it failed."""

    def __init__(self, name: str, options: Options):
        self.folder = options.out / name
        self.summary: dict[str, Any] = {
            "experiment": name,
            "status": "running",
            "session": session(plain(options)),
            "hardware": hardware(),
        }

    @contextlib.contextmanager
    def kept(self) -> Iterator[Record]:
        """The summary is written at the start and at the end, with the status."""
        self._save()
        try:
            yield self
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            self.summary["status"] = "interrupted" if interrupted else f"failed: {error}"
            self._save()
            raise
        self.summary["status"] = "done"
        self._save()

    def write(
        self,
        bench: Bench,
        rows: Sequence[dict[str, Any]],
        shown: Sequence[str],
        figures: dict[str, Any],
        picture: bytes,
    ) -> None:
        """The rows, tables and picture; the figures go into the summary."""
        write_atomically(self.folder / ROWS, csv_bytes(rows))
        write_atomically(self.folder / TABLES, ("\n\n".join(shown) + "\n").encode())
        write_atomically(self.folder / PICTURE, picture)
        self.summary |= {
            "identity": bench.inputs.identity(),
            "queries": bench.inputs.selection.record(),
            "runs": {name: run.record() for name, run in bench.runs.items()},
            "figures": figures,
        }

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SUMMARY, _plain(self.summary))


def _plain(content: Any) -> Any:
    return json.loads(json_text(content))


def csv_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    """Rows of one form as a table; numbers in four digits.

    Raises:
      InputError: there are none.
    """
    if not rows:
        raise InputError("the experiment has no rows; give it queries")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    if isinstance(value, bool | int | str):
        return value
    number = float(value)
    return "" if math.isnan(number) else f"{number:.4g}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A titled Markdown table; the first column is of words."""
    return f"**{title}**\n\n{tables.table(columns, rows)}"


def percent(share: float) -> str:
    """A share, two digits below 10% and one decimal above 90%; "" for NaN."""
    if math.isnan(share):
        return ""
    if share < 0.1:
        return f"{100 * share:.2g}%"
    return f"{100 * share:.1f}%" if 0.9 < share < 1 else f"{100 * share:.0f}%"


def figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure and the function that makes a PNG of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    whole = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(whole)

    def png() -> bytes:
        buffer = io.BytesIO()
        whole.savefig(buffer, dpi=110, metadata={"Software": None})
        return buffer.getvalue()

    return whole, png
