"""(b) Error against the number of samples: Monte Carlo, untuned and tuned proposals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.paper.bench import LEAST_HITS, Bench, Drawn, Method, holds, middle, words
from experiments.paper.cost import Planned, policies_of
from experiments.paper.record import Record, figure, percent, table
from experiments.paper.setting import Options

NAME = "samples"
MONTE_CARLO = "Monte Carlo"


@dataclasses.dataclass(frozen=True)
class Samples(Options):
    """(b) Error of repeated estimates against the number of answers that each has."""

    proposals: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TERM [+ ..] [..]")] = ()
    """Untuned ones; see `tailrisk estimate --help`."""
    tune: Annotated[tuple[Method, ...], tyro.conf.arg(metavar="choose|search|windows [..]")] = ()
    """Tuned ones, by `tailrisk tune --method`; search is the paper's."""
    steer: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STEERING [..]")] = ()
    """What search searches over, such as ablation:direction.safetensors; the organism has its
    own."""
    candidates: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TERM [..]")] = ()
    """What choose and windows choose from; the organism has its own."""
    pilot: int | None = None
    """Answers per pilot query, by default 500."""
    pilot_share: float | None = None
    """Of the queries, by default 0.1 but 5 at least."""
    sizes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [..]")] = (50, 200, 500, 1000)
    """Answers per estimate."""
    repeats: int = 4
    """Estimates at the largest N; the same answers make more at the smaller ones."""
    monte_carlo: Annotated[int, tyro.conf.arg(metavar="B")] = 10_000
    """Answers per query of the baseline."""


def planned(options: Samples) -> list[Planned]:
    """What is drawn; tuned proposals are taken to have two policies, and pilots are left out."""
    draws = options.repeats * max(options.sizes)
    return [
        Planned(MONTE_CARLO, options.monte_carlo, 0),
        *(Planned(text, draws, policies_of(text)) for text in options.proposals),
        *(Planned(f"tuned by {method}", draws, 2) for method in options.tune),
    ]


def main(options: Samples, record: Record) -> None:
    """Tunes and draws what is missing, compares and writes."""
    bench = Bench(options)
    baseline = bench.monte_carlo(options.monte_carlo)
    texts = {text: text for text in options.proposals}
    for method in options.tune:
        searched = {"steer": options.steer} if method == "search" else {}
        texts[f"tuned by {method}"] = bench.tuned(method, **searched)
    draws = options.repeats * max(options.sizes)
    runs = {name: bench.run(name, text, draws) for name, text in texts.items()}
    reference = _Reference(bench, baseline)
    if reference.exact:
        runs = {MONTE_CARLO: baseline, **runs}
    rows = [row for name, run in runs.items() for row in _rows(options, reference, name, run)]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    tables = [_table(columns, reference), _named(bench)]
    record.write(bench, rows, tables, _summary(columns), _picture(columns))


class _Reference:
    """What estimates are held against: the exact truth, or the Monte Carlo baseline.

    Attributes:
      bounds: [Q, 2]; twice the baseline's value where there is no truth.
      variance: of the baseline's value, 0 of the truth.
      tells: whether it can judge an estimate.
    """

    def __init__(self, bench: Bench, baseline: Drawn):
        self.exact = bench.truth_known
        if self.exact:
            self.bounds, self.value = bench.truth, middle(bench.truth)
            self.variance = np.zeros(len(self.value))
            self.tells = np.ones(len(self.value), bool)
        else:
            found = baseline.report().estimate
            self.value = np.asarray(found.value, float)
            self.bounds = np.repeat(self.value[:, None], 2, axis=1)
            self.variance = np.asarray(found.stderr, float) ** 2
            self.tells = np.asarray(found.hits) >= LEAST_HITS
        self.decade = bench.decades(self.value)


def _rows(options: Samples, reference: _Reference, name: str, run: Drawn) -> Iterator[Any]:
    """A row per query and N."""
    for size in sorted(set(options.sizes)):
        if run.observed.scores.shape[1] < 2 * size:
            continue
        report = run.parts(size)
        estimate = report.estimate
        value, verdicts = np.asarray(estimate.value), words(report)
        held = holds(estimate, reference.bounds[:, None])
        truth = reference.value[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            square = np.mean((value - truth) ** 2, axis=1) - reference.variance
            error = np.sqrt(np.maximum(square, np.var(value, axis=1, ddof=1))) / reference.value
            plain = np.sqrt((1 - reference.value) / reference.value / size)
        for q, query in enumerate(run.observed.queries):
            ok = verdicts[q] == "ok"
            yield {
                "proposal": name,
                "samples": size,
                "query": query.id,
                "reference": reference.value[q],
                "decade": reference.decade[q],
                "told": bool(reference.tells[q]),
                "repeats": value.shape[1],
                "error": error[q],
                "bias": value[q].mean() / reference.value[q] - 1,
                "monte_carlo_error": plain[q],
                "no_hit": float(np.mean(estimate.hits[q] == 0)),
                "holds": float(held[q].mean()),
                "ok": float(ok.mean()),
                "ok_holds": float(held[q][ok].mean()) if ok.any() else float("nan"),
            }


def _names(columns: dict[str, np.ndarray]) -> list[str]:
    return list(dict.fromkeys(columns["proposal"].tolist()))


def _decades(columns: dict[str, np.ndarray]) -> list[int]:
    return sorted({int(d) for d in columns["decade"][columns["told"]]}, reverse=True)


def _figures(columns: dict[str, np.ndarray], own: np.ndarray) -> dict[str, float]:
    """Medians of errors and means of shares over these rows."""
    error, plain = columns["error"][own], columns["monte_carlo_error"][own]
    weights = columns["ok"][own]
    held = np.nan_to_num(columns["ok_holds"][own]) @ weights
    with np.errstate(divide="ignore"):
        worth = float(np.median((plain / error) ** 2))
    return {
        "error": float(np.median(error)),
        "worth": worth,
        "no_hit": float(columns["no_hit"][own].mean()),
        "holds": float(columns["holds"][own].mean()),
        "ok": float(weights.mean()),
        "ok_holds": float(held / weights.sum()) if weights.any() else float("nan"),
    }


def _table(columns: dict[str, np.ndarray], reference: _Reference) -> str:
    decades, lines = _decades(columns), []
    for name in _names(columns):
        mine = (columns["proposal"] == name) & columns["told"]
        for size in sorted(set(columns["samples"][mine].tolist())):
            own = mine & (columns["samples"] == size)
            whole = _figures(columns, own)
            each = [_figures(columns, own & (columns["decade"] == d))["error"] for d in decades]
            lines.append([
                name, f"{size:,}", f"{int(np.median(columns['repeats'][own]))}",
                *(f"{error:.2f}" for error in each), percent(whole["no_hit"]),
                percent(whole["holds"]), percent(whole["ok"]), percent(whole["ok_holds"]),
            ])  # fmt: skip
    titles = ["proposal", "N", "repeats", *(f"1e{d}" for d in decades), "without a hit",
              "intervals hold it", "ok", "of these hold it"]  # fmt: skip
    against = "the exact truth" if reference.exact else "Monte Carlo, its own error taken off"
    return table(f"Relative error (RMS; medians over queries, by decade) against {against}",
                 titles, lines)  # fmt: skip


def _named(bench: Bench) -> str:
    """What was drawn from."""
    rows = [[name, f"`{run.proposal}`"] for name, run in bench.runs.items()]
    return table("Proposals", ["name", "text"], rows)


def _summary(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        name: {
            str(size): _figures(columns, mine & (columns["samples"] == size))
            for size in sorted(set(columns["samples"][mine].tolist()))
        }
        for name in _names(columns)
        for mine in [(columns["proposal"] == name) & columns["told"]]
        if mine.any()
    }


def _picture(columns: dict[str, np.ndarray]) -> bytes:
    """Median error against N, a panel for each decade; Monte Carlo's exact one dashed."""
    decades = _decades(columns)
    whole, png = figure(3.2 * max(len(decades), 1), 3.6)
    panels = whole.subplots(1, max(len(decades), 1), squeeze=False, sharey=True)[0]
    sizes = np.array(sorted(set(columns["samples"].tolist())))
    for axes, decade in zip(panels, decades, strict=False):
        mine = columns["told"] & (columns["decade"] == decade)
        plain = [np.median(columns["monte_carlo_error"][mine & (columns["samples"] == n)])
                 for n in sizes]  # fmt: skip
        axes.plot(sizes, plain, "k--", lw=1, label="Monte Carlo, exact")
        for number, name in enumerate(_names(columns)):
            own = mine & (columns["proposal"] == name)
            some = [n for n in sizes if (own & (columns["samples"] == n)).any()]
            error = [np.median(columns["error"][own & (columns["samples"] == n)]) for n in some]
            axes.plot(some, error, "o-", ms=3, lw=1, color=f"C{number}", label=name[:44])
        axes.set(xscale="log", yscale="log", xlabel="answers per query")
        axes.set_title(f"risk in 1e{decade}", fontsize=9)
        axes.grid(color="0.93", zorder=-1)
    panels[0].set_ylabel("relative error (RMS)")
    whole.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                 frameon=False, fontsize=7)  # fmt: skip
    return png()
