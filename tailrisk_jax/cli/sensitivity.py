"""`tailrisk sensitivity`: how far variants of a query move its risk, in orders of magnitude."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailrisk_jax.cli.progress import table_console
from tailrisk_jax.errors import InputError
from tailrisk_jax.reports import SensitivitySection, VariantPoints, plot_sensitivity
from tailrisk_jax.studies import Sensitivity as Found
from tailrisk_jax.studies import json_text, sensitivity, store

_PARTS = {
    "queries": "between base queries",
    "kinds": "between kinds, in all queries alike",
    "variants": "between variants of one kind",
    "error": "estimation error",
}
_ENDINGS = (".png", ".svg")


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Say how far harmless variants of a query move its risk.

    The run is of a file that `tailrisk perturb` wrote. Spreads are standard deviations and ranges
    of log10 of the risk, with the estimates' own error removed.
    """

    run: tyro.conf.Positional[Path]
    """Its folder."""
    perturbations: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Which query is a variant of which: what `tailrisk perturb` wrote, or JSON lines {"prompt":
    .., "variants": [..]}. Not needed where the run's own query file said it."""
    by_kind: tyro.conf.FlagCreatePairsOff[bool] = False
    """A table by kind too: the spread within each, and its mean shift from the original."""
    sort: Literal["spread", "over-original"] = "spread"
    """Which queries come first: of the largest spread, or with the variant that exceeds its
    original by most."""
    top: int = 20
    """Queries in the table."""
    seed: int = 0
    """Of the draws behind the intervals."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.png|svg")] = None
    """A picture: all risks by query, and what their differences are owed to."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """All of it as JSON on standard output, in place of the tables."""


def show_sensitivity(options: Sensitivity) -> None:
    """Runs the command."""
    if options.out is not None and options.out.suffix.lower() not in _ENDINGS:
        raise InputError(f"--out {options.out} must end in .png or .svg; name a picture")
    if options.top < 1:
        raise InputError(f"--top {options.top} must be 1 or more")
    found = sensitivity(options.run, options.perturbations, seed=options.seed)
    if options.out is not None:
        store.write_atomically(options.out, plot_sensitivity(variant_points(found), options.out))
    if options.json:
        print(json_text(_document(found)))
        return
    _show(table_console(), found, options)


def section(found: Found) -> SensitivitySection:
    """What a run's page shows of it."""
    return SensitivitySection(variant_points(found), _ranked(found, "sd"), _summary(found))


def variant_points(found: Found) -> VariantPoints:
    """What the pictures need."""
    rows = [row for row in found.variants.to_pylist() if row["status"] != "left out"]
    bases = {base: q for q, base in enumerate(found.queries["base"].to_pylist())}
    kinds = found.kinds["kind"].to_pylist()
    zero = np.asarray([row["status"] == "zero" for row in rows])
    return VariantPoints(
        group=np.asarray([bases[row["base"]] for row in rows]),
        kind=np.asarray([kinds.index(row["kind"]) for row in rows]),
        value=np.asarray([row["upper" if row["status"] == "zero" else "value"] for row in rows]),
        zero=zero,
        kinds=kinds,
        means=10.0 ** found.queries["mean"].to_numpy(),
        parts=found.parts,
    )


def _document(found: Found) -> dict[str, Any]:
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    tables = {name: fields[name].to_pylist() for name in ("queries", "kinds", "variants")}
    return fields | tables


def _show(console: Console, found: Found, options: Sensitivity) -> None:
    say = lambda text: console.print(text, highlight=False, markup=False)  # noqa: E731
    say(found.estimand)
    rows = _ranked(found, "sd" if options.sort == "spread" else "over_original")
    console.print(_query_table(rows[: options.top]))
    if len(rows) > options.top:
        say(f"{len(rows) - options.top:,} more queries: --top {len(rows)}")
    if options.by_kind:
        console.print(_kind_table(found.kinds.to_pylist()))
    console.print(_part_table(found))
    for line in _summary(found):
        say(line)
    if options.out is not None:
        say(f"Picture written to {options.out}")


def _query_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("query", "variants", "mean risk", "spread", "interval", "range", "interval",
                   "over original", "interval", "P(10x)", "riskiest")  # fmt: skip
    for row in rows:
        table.add_row(
            Text(" ".join(row["query"].split())),
            _counts(row),
            f"{10 ** row['mean']:.1e}" if np.isfinite(row["mean"]) else "-",
            _figure(row["sd"]),
            _interval(row["sd_lower"], row["sd_upper"]),
            _figure(row["range"]),
            _interval(row["range_lower"], row["range_upper"]),
            _figure(row["over_original"]),
            _interval(row["over_lower"], row["over_upper"]),
            _figure(row["tenfold"]),
            Text(row["riskiest"].removeprefix(f"{row['base']}/") or "-"),
        )
    return table


def _kind_table(rows: list[dict[str, Any]]) -> Table:
    table = _table("kind", "variants", "spread within a query", "interval", "shift from original",
                   "interval", "queries")  # fmt: skip
    for row in rows:
        original = row["kind"] == "original"
        table.add_row(
            Text(row["kind"]),
            _counts(row),
            _figure(row["sd"]),
            _interval(row["sd_lower"], row["sd_upper"]),
            "" if original else _figure(row["shift"]),
            "" if original else _interval(row["shift_lower"], row["shift_upper"]),
            f"{row['shift_queries']:,}",
        )
    return table


def _part_table(found: Found) -> Table:
    table = _table("differences", "standard deviation", "interval", "share of the variance")
    for name, words in _PARTS.items():
        part = found.parts[name]
        sd, low, high = (
            np.sqrt(np.maximum(part[field], 0.0)) for field in ("variance", "lower", "upper")
        )
        share = "-" if np.isnan(part["share"]) else f"{part['share']:.0%}"
        table.add_row(words, _figure(sd), _interval(low, high), share)
    return table


def _ranked(found: Found, column: str) -> list[dict[str, Any]]:
    """The base queries, the largest first, those without the figure last."""
    rows = found.queries.to_pylist()
    return sorted(rows, key=lambda row: -np.nan_to_num(row[column], nan=-np.inf))


def _summary(found: Found) -> list[str]:
    pooled, level, rows = found.pooled, found.level, found.queries.to_pylist()
    lines = [
        f"Within a query the risk of variants spreads by {_figure(pooled['sd'])} orders of "
        f"magnitude {_interval(pooled['lower'], pooled['upper'])} (standard deviation, "
        f"estimation error removed; with it {_figure(pooled['observed_sd'])}). Intervals are of "
        f"{level:.0%}."
    ]
    shown = sum(row["sd_lower"] > 0 for row in rows)
    lines.append(
        f"In {shown:,} of {len(rows):,} queries the variants differ by more than estimation error "
        f"explains; of {len(rows):,} without any difference {(1 - level) / 2:.1%} would seem to."
    )
    zeros, left_out, doubtful = (
        sum(row[name] for row in rows) for name in ("zero", "left_out", "doubtful")
    )
    if doubtful:
        ok = found.pooled_ok
        lines.append(
            f"Doubtful: {doubtful:,} of {pooled['count']:,.0f} estimates. One that misses harm is "
            "too low by more than its error, which looks like spread; without these it is "
            f"{_figure(ok['sd'])} {_interval(ok['lower'], ok['upper'])}."
        )
    if zeros:
        lines.append(
            f"Without a hit: {zeros:,}; these variants count by their upper limit, in the range "
            "and over the original alone, so that spreads and shares are rather too small."
        )
    if left_out:
        lines.append(
            f"Left out: {left_out:,}; the verdict on these variants is unusable, or no error or "
            "limit is known (--json says why)."
        )
    if len(rows) < 10 and np.isfinite(found.parts["queries"]["upper"]):
        lines.append(
            f"The intervals of the differences rest on {len(rows)} queries: they are too narrow."
        )
    if found.absent:
        lines.append(f"In the file, not in the run: {found.absent:,} variants.")
    if found.outside:
        named = ", ".join(found.outside[:5]) + ", .." * (len(found.outside) > 5)
        lines.append(f"In the run, in no group: {len(found.outside):,} queries: {named}")
    return lines


def _table(first: str, *others: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column(first, max_width=36, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _counts(row: dict[str, Any]) -> str:
    """Variants, and how many of them are no plain estimates."""
    names = {"doubtful": "doubtful", "zero": "zero", "left_out": "out"}
    parts = [f"{row[name]} {word}" for name, word in names.items() if row[name]]
    return ", ".join([f"{row['variants']}", *parts])


def _figure(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def _interval(lower: float, upper: float) -> str:
    return "" if np.isnan(lower) else f"[{lower:.2f}, {upper:.2f}]"
