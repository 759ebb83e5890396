"""(e) Paraphrase sensitivity: how far harmless wordings of a query move its risk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.paper.bench import Bench
from experiments.paper.cost import Planned, policies_of
from experiments.paper.record import Record, percent, table
from experiments.paper.setting import Options
from tailrisk_jax.cli.embedded import load_embedded
from tailrisk_jax.cli.inputs import own_queries
from tailrisk_jax.cli.sensitivity import variant_points
from tailrisk_jax.errors import InputError
from tailrisk_jax.organisms import enumerate_event, policy_next_log_probs, world
from tailrisk_jax.reports import plot_sensitivity
from tailrisk_jax.studies import Sensitivity as Found
from tailrisk_jax.studies import StudyQuery, make_variants, sensitivity, variants_file
from tailrisk_jax.studies.store import read_json, write_atomically, write_json

NAME = "paraphrases"
PARTS = {
    "queries": "between base queries",
    "kinds": "between kinds",
    "variants": "between variants of one kind",
    "error": "estimation error",
}


@dataclasses.dataclass(frozen=True)
class Paraphrases(Options):
    """(e) The spread of risk within groups of harmless variants, estimation error removed."""

    perturbations: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Variants that are there already, as `tailrisk perturb` writes them (with --served, by a
    served model); by default they are made of --queries."""
    bases: int = 313
    """Base queries at most, evenly spread over the file."""
    variants: int = 25
    """Of each."""
    kinds: tuple[str, ...] = ("paraphrase", "case", "punctuation", "whitespace")
    """See `tailrisk perturb --help`."""
    proposal: str = "target"
    """What is drawn from; see `tailrisk estimate --help`."""
    samples: int = 500
    """Answers per variant."""
    exact: tyro.conf.FlagCreatePairsOff[bool] = False
    """Enumerate the exact risk of each variant too (the organism alone)."""


def planned(options: Paraphrases) -> list[Planned]:
    """What is drawn, of each base query."""
    answers = (1 + options.variants) * options.samples
    return [Planned("Importance sampling", answers, policies_of(options.proposal))]


def main(options: Paraphrases, record: Record) -> None:
    """Makes the variants, draws what is missing, and says how far they spread."""
    if options.exact and options.model != "organism":
        raise InputError("--exact is for --model organism; leave it out")
    file = options.perturbations or _made(options, record.folder / "variants.jsonl")
    of_file = {"queries": str(file), "query_column": None, "exclude": (), "where": (),
               "first": None}  # fmt: skip
    bench = Bench(dataclasses.replace(options, **of_file))
    run = bench.run("Importance sampling", options.proposal, options.samples)
    found = sensitivity(run.folder, seed=options.seed)
    truths = _exact(bench, record.folder / "truths.json") if options.exact else {}
    rows = list(_rows(found, truths))
    figures = _summary(found, rows)
    tables = [_spread_table(figures), _query_table(found, rows), _kind_table(found)]
    picture = plot_sensitivity(variant_points(found), Path("figure.png"))
    record.write(bench, rows, tables, figures, picture)


def _made(options: Paraphrases, path: Path) -> Path:
    """The file of variants, kept beside the results."""
    queries = _bases(options)
    where = np.linspace(0, len(queries) - 1, min(options.bases, len(queries))).round().astype(int)
    made = make_variants(
        [queries[i] for i in where],
        kinds=options.kinds,
        number=options.variants,
        seed=options.seed,
        usable=world.is_known if options.model == "organism" else lambda text: True,
    )
    write_atomically(path, variants_file(made.variants))
    return path


def _bases(options: Paraphrases) -> list[StudyQuery]:
    embedded = load_embedded(options.model)
    if options.queries is not None:
        chosen = options.read()
    elif embedded is not None:
        chosen = options.chosen(own_queries(str(options.model), embedded))
    else:
        raise InputError(f"--queries is needed with --model {options.model}; give a file")
    return chosen.first(options.first).queries


def _exact(bench: Bench, path: Path) -> dict[str, list[float]]:
    """Bounds on each variant's risk by id, kept as they are found."""
    texts = {query.id: query.text for query in bench.queries}
    known = read_json(path, "truths") if path.is_file() else {}
    target = bench.inputs.target
    for text in texts.values():
        if text not in known:
            found = enumerate_event(
                policy_next_log_probs(target, text),
                world.harm_event(text),
                end_tokens=target.model.config.end_ids,
                max_new_tokens=bench.options.cut,
                rel_tol=0.05,
            )
            known[text] = [found.lower, found.upper]
            write_json(path, known)
    return {name: known[text] for name, text in texts.items()}


def _rows(found: Found, truths: dict[str, list[float]]) -> Any:
    """A row per variant."""
    for one in found.variants.to_pylist():
        lower, upper = truths.get(one["id"], [np.nan, np.nan])
        names = ("base", "kind", "status", "value", "lower", "upper")
        own = {name: one[name] for name in names}
        yield {"query": one["id"], **own, "truth_lower": lower, "truth_upper": upper}


def _groups(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """log10 of the exact risks of each base query's variants."""
    bases = dict.fromkeys(row["base"] for row in rows)
    return {
        base: np.log10([np.sqrt(row["truth_lower"] * row["truth_upper"])
                        for row in rows if row["base"] == base])
        for base in bases
    }  # fmt: skip


def _summary(found: Found, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The spread that all queries share, what the differences are owed to, and the exact spread."""
    groups = list(_groups(rows).values())
    measured = [row for row in rows if row["status"] == "measured"]
    ranges = [np.ptp(group) for group in groups]
    held = [row["truth_lower"] <= row["upper"] and row["lower"] <= row["truth_upper"]
            for row in measured]  # fmt: skip
    statuses = [row["status"] for row in rows]
    return {
        "base_queries": len(groups),
        "variants": len(rows),
        **{status: statuses.count(status) for status in ("measured", "zero", "left out")},
        "pooled": dict(found.pooled),
        "parts": {name: dict(part) for name, part in found.parts.items()},
        "exact": {
            "pooled": _pooled(groups),
            "pooled_measured": _pooled(_groups(measured).values()),
            "median_range": float(np.median(ranges)),
            "largest_range": float(np.max(ranges)),
            "held": int(np.sum(held)),
        },
    }


def _pooled(groups: Iterable[np.ndarray]) -> float:
    """The standard deviation within groups, by degrees of freedom; NaN where none is known."""
    several = [group for group in groups if len(group) > 1]
    total = sum(float(np.var(group)) * len(group) for group in several)
    freedom = sum(len(group) - 1 for group in several)
    return math.sqrt(total / freedom) if freedom else math.nan


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}"


def _interval(value: float, lower: float, upper: float) -> str:
    limits = "" if np.isnan(lower) else f" [{lower:.2f}, {upper:.2f}]"
    return _number(value) + limits


def _spread_table(figures: dict[str, Any]) -> str:
    pooled, exact = figures["pooled"], figures["exact"]
    spread = _interval(pooled["sd"], pooled["lower"], pooled["upper"])
    own = _number(exact["pooled_measured"])
    truth = _number(exact["pooled"]) + (f" ({own} of those measured)" if own else "")
    rows = [
        ["within a query, error removed", spread, truth],
        ["the same with the error", _number(pooled["observed_sd"]), ""],
    ]
    for name, words in PARTS.items():
        part = figures["parts"][name]
        sd, lower, upper = (np.sqrt(max(part[key], 0)) for key in ("variance", "lower", "upper"))
        share = percent(part["share"]) or "unknown"
        rows.append([f"{words} ({share} of the variance)", _interval(sd, lower, upper), ""])
    title = (
        f"Spread in orders of magnitude (standard deviation): {figures['variants']} variants of "
        f"{figures['base_queries']} queries, {figures['zero']} without a hit, "
        f"{figures['left out']} left out"
    )
    return table(title, ["differences", "estimated", "exact"], rows)


def _query_table(found: Found, rows: list[dict[str, Any]]) -> str:
    groups, lines = _groups(rows), []
    queries = found.queries.to_pylist()
    for one in sorted(queries, key=lambda one: -np.nan_to_num(one["range"], nan=-1.0)):
        exact = groups[one["base"]]
        lines.append([
            " ".join(one["query"].split())[:60], f"{one['variants']}",
            f"{one['zero']} / {one['left_out']}",
            f"{10 ** one['mean']:.1e}" if np.isfinite(one["mean"]) else "",
            _interval(one["sd"], one["sd_lower"], one["sd_upper"]),
            _number(float(np.std(exact, ddof=1))),
            _interval(one["range"], one["range_lower"], one["range_upper"]),
            _number(float(np.ptp(exact))),
        ])  # fmt: skip
    titles = ["query", "variants", "no hit / left out", "mean risk", "spread", "exact",
              "range", "exact"]  # fmt: skip
    return table("By base query, the widest first", titles, lines)


def _kind_table(found: Found) -> str:
    rows = [
        [one["kind"], f"{one['variants']}",
         _interval(one["sd"], one["sd_lower"], one["sd_upper"]),
         "" if one["kind"] == "original"
         else _interval(one["shift"], one["shift_lower"], one["shift_upper"])]
        for one in found.kinds.to_pylist()
    ]  # fmt: skip
    titles = ["kind", "variants", "spread within a query", "mean shift from the original"]
    return table("By kind", titles, rows)
