"""`tailrisk compare`: two runs, or a run and a Monte Carlo baseline, query by query."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailrisk_jax.cli.progress import table_console
from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import (
    Comparison,
    baseline_side,
    compare,
    json_text,
    read_baseline,
    run_side,
    store,
)


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare two runs query by query: A - B and A / B with intervals, and the mean difference.

    Runs may be of different models or judges: what differs is said. Where both rest on the same
    draws (`tailrisk judge`, `tailrisk score`) they are compared draw by draw.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """A and B; or A alone, with --baseline."""
    baseline: Path | None = None
    """In place of B: JSON lines {"forbidden_prompt", "response": [..], "score": [..]} of Monte
    Carlo answers, or a run with --proposal target; matched by the text of the queries."""
    threshold: float | None = None
    """Counts answers of the baseline with at least this score, in place of their mean score."""
    out: Path | None = None
    """A Parquet file for the rows."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output, in place of the table."""


def compare_runs(options: Compare) -> None:
    """Runs the command."""
    wanted = 2 if options.baseline is None else 1
    if len(options.runs) != wanted:
        raise InputError(
            f"{len(options.runs)} runs are given; give two, or one and --baseline FILE"
        )
    if options.baseline is None and options.threshold is not None:
        raise InputError("--threshold is for a --baseline; for a run: tailrisk judge --threshold")
    a, unused = run_side(options.runs[0]), []
    if options.baseline is None:
        if options.runs[0].resolve() == options.runs[1].resolve():
            raise InputError(f"run {options.runs[0]} is given twice; give two runs")
        b = run_side(options.runs[1])
    else:
        found = read_baseline(options.baseline, threshold=options.threshold, level=a.level)
        matched = found.match(a.texts)
        b, unused = baseline_side(matched, a), matched.unused
    found = compare(a, b)
    found = dataclasses.replace(found, only_b=[*found.only_b, *unused])
    if options.out is not None:
        buffer = io.BytesIO()
        pq.write_table(found.rows, buffer, compression="zstd")
        store.write_atomically(options.out, buffer.getvalue())
    if options.json:
        print(json_text(_document(found)))
    else:
        _show(table_console(), found)


def _document(found: Comparison) -> dict[str, Any]:
    sides = {
        letter: {"name": side.name, "estimand": side.estimand}
        for letter, side in (("a", found.a), ("b", found.b))
    }
    return {
        **sides,
        "level": found.a.level,
        "differing": found.differing,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "total": None if found.total is None else dataclasses.asdict(found.total),
        "queries": found.rows.to_pylist(),
    }


def _show(console: Console, found: Comparison) -> None:
    say = lambda text: console.print(text, highlight=False, markup=False)  # noqa: E731
    say(f"A: {found.a.name}: {found.a.estimand}\nB: {found.b.name}: {found.b.estimand}")
    if found.a.estimand != found.b.estimand:
        say("A and B estimate different things; the differences below are between those.")
    for name, (of_a, of_b) in found.differing.items():
        say(f"They differ in {name}: {of_a} | {of_b}")
    rows = found.rows.to_pylist()
    console.print(_table(rows))
    for row in rows:
        if row["verdict"] != "ok":
            say(f"{row['query_id']}: {row['why']}")
    for line in _summary(found, rows):
        say(line)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("query", max_width=24, no_wrap=True)
    for heading in ("A", "B", "A - B", "interval", "A / B", "interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("A is", "draws", "verdict"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        ratio, *limits = (_exp(row[f"log_ratio{end}"]) for end in ("", "_lower", "_upper"))
        table.add_row(
            Text(" ".join(row["query"].split())),
            f"{row['a_value']:.1e}",
            f"{row['b_value']:.1e}",
            f"{row['difference']:.1e}",
            f"[{max(row['difference_lower'], -1.0):.1e}, {min(row['difference_upper'], 1.0):.1e}]",
            f"{ratio:.2g}",
            f"[{limits[0]:.2g}, {limits[1]:.2g}]",
            row["finding"],
            row["method"],
            row["verdict"],
        )
    return table


def _summary(found: Comparison, rows: list[dict[str, Any]]) -> list[str]:
    lines, level, total = [], found.a.level, found.total
    for letter, ids in (("A", found.only_a), ("B", found.only_b)):
        if ids:
            named = ", ".join(repr(name[:40]) for name in ids[:8]) + ", .." * (len(ids) > 8)
            lines.append(f"Only in {letter} ({len(ids):,}): {named}")
    shown = sum(row["finding"] != "not shown" for row in rows)
    lines.append(
        f"A differs from B in {shown} of {len(rows)} queries; intervals of {level:.0%} that hold "
        f"one by one would say so in about {(1 - level) * len(rows):.1f} if none did."
    )
    if total is not None:
        lines.append(
            f"Mean over {total.queries} queries: A {total.a:.3e}, B {total.b:.3e}, A - B "
            f"{total.difference:.3e} [{total.lower:.3e}, {total.upper:.3e}] ({total.method})."
        )
        if total.silent:
            lines.append(
                f"In {total.silent} of them no draw of either side scored above 0; that interval "
                "is blind to harm which they didn't show."
            )
    return lines


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
