"""(c) Share of queries with a harmful answer: greedy, and among k samples."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.paper.bench import Bench, Drawn, limits_of, middle, words
from experiments.paper.cost import Planned, policies_of
from experiments.paper.record import Record, figure, percent, table
from experiments.paper.setting import Options
from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import (
    Estimate,
    any_of_draws,
    in_float64,
    mean_interval,
)
from tailrisk_jax.forecasting import at_least_one

NAME = "greedy"
COLD = 1e-4  # temperature; a token that leads by 0.001 in logits is drawn with all but e^-10
SURE = 0.99  # probability of an answer at that temperature, from which on it is the greedy one
PAPER = {  # arXiv 2604.22167: greedy, and after 10,000 samples, of 313 StrongREJECT queries
    "Llama-3.2-1B": (0.166, 0.995),
    "Llama-3.1-8B": (0.016, 0.740),
    "Qwen2.5-7B": (0.016, 0.639),
    "Phi-4": (0.010, 0.271),
    "Olmo-3-7B": (0.003, 0.179),
}


@dataclasses.dataclass(frozen=True)
class Greedy(Options):
    """(c) Share of queries with a harmful answer under greedy decoding and among k samples."""

    proposal: str = "target"
    """What is drawn from; see `tailrisk estimate --help`."""
    samples: int = 500
    """Answers per query from it."""
    monte_carlo: Annotated[int, tyro.conf.arg(metavar="B")] = 10_000
    """Answers per query of Monte Carlo; 0 for none."""
    answers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="K [..]")] = (1, 100, 10_000)
    """Numbers of answers k."""


def planned(options: Greedy) -> list[Planned]:
    """What is drawn."""
    parts = [
        Planned("Greedy", 1, 0),
        Planned("Monte Carlo", options.monte_carlo, 0),
        Planned("Importance sampling", options.samples, policies_of(options.proposal)),
    ]
    return [part for part in parts if part.samples]


def main(options: Greedy, record: Record) -> None:
    """Draws what is missing, counts and writes."""
    bench = Bench(options)
    cold = bench.run("Greedy", "target", 1, temperature=COLD)
    plain = bench.monte_carlo(options.monte_carlo) if options.monte_carlo else None
    run = bench.run("Importance sampling", options.proposal, options.samples)
    for drawn in (cold, run):
        _check_event(drawn)
    report = run.report()
    found = {k: _shares(k, bench, plain, report.estimate) for k in sorted(set(options.answers))}
    rows = list(_rows(bench, cold, plain, report))
    score = cold.observed.scores[:, 0]
    sure = np.exp(cold.observed.log_p[:, 0]) >= SURE
    greedy = {"share": float(np.nanmean(score)), "queries": len(score), "sure": int(sure.sum())}
    tables = [_table(greedy, found, options), _paper(greedy, found, bench)]
    figures = {"greedy": greedy, "among": {str(k): one for k, one in found.items()}}
    record.write(bench, rows, tables, figures, _picture(greedy, found))


def _check_event(run: Drawn) -> None:
    scores = run.observed.scores
    if not np.isin(scores[~np.isnan(scores)], (0, 1)).all():
        raise InputError(
            "scores lie between 0 and 1, and a share of queries needs an event; give --threshold, "
            "such as 0.75"
        )


def _shares(k: int, bench: Bench, plain: Drawn | None, estimate: Estimate) -> dict[str, Any]:
    """Mean over the queries of the chance that one of k answers is harmful, by each account."""
    shares: dict[str, Any] = {"exact": None, "monte_carlo": None}
    if bench.truth_known:
        shares["exact"] = [
            float(np.mean(_among(bound, k))) for bound in (middle(bench.truth), *bench.truth.T)
        ]
    if plain is not None:
        own = plain.report().estimate
        value = in_float64(any_of_draws, own.hits, own.num_samples, k)
        if np.isfinite(value).all():
            shares["monte_carlo"] = _mean(value, own, k)
    shares["importance"] = _mean(_among(estimate.value, k), estimate, k)
    return shares


def _among(chance: Any, k: int) -> np.ndarray:
    """The chance of at least one in k; it rises with that of one, so limits stay limits."""
    return in_float64(at_least_one, np.clip(chance, 0.0, 1.0), float(k))


def _mean(value: np.ndarray, estimate: Estimate, k: int) -> list[float]:
    """The mean with its interval."""
    lower, upper = (_among(limit, k) for limit in (estimate.lower, estimate.upper))
    limits = limits_of(np.minimum(lower, value), np.maximum(upper, value))
    whole = in_float64(mean_interval, value, limits)
    return [
        float(np.mean(value)),
        max(float(whole.lower), 0.0),
        min(float(whole.upper), 1.0),
    ]


def _rows(bench: Bench, cold: Drawn, plain: Drawn | None, report: Any) -> Any:
    """A row per query."""
    verdicts, estimate = words(report), report.estimate
    own = None if plain is None else plain.report().estimate
    for q, query in enumerate(bench.queries):
        yield {
            "query": query.id,
            "truth_lower": bench.truth[q, 0],
            "truth_upper": bench.truth[q, 1],
            "greedy": float(cold.observed.scores[q, 0]),
            "greedy_probability": float(np.exp(cold.observed.log_p[q, 0])),
            "mc_hits": -1 if own is None else int(own.hits[q]),
            "mc_samples": 0 if own is None else int(own.num_samples[q]),
            "value": float(estimate.value[q]),
            "lower": float(estimate.lower[q]),
            "upper": float(estimate.upper[q]),
            "verdict": str(verdicts[q]),
        }


def _cell(shares: list[float] | None) -> str:
    if shares is None:
        return ""
    value, lower, upper = shares
    return f"{percent(value)} [{percent(lower)}, {percent(upper)}]"


def _table(greedy: dict[str, Any], found: dict[int, dict[str, Any]], options: Greedy) -> str:
    rows = [["greedy", "", percent(greedy["share"]), ""]]
    for k, shares in found.items():
        exact = "" if shares["exact"] is None else percent(shares["exact"][0])
        rows.append([f"{k:,}", exact, _cell(shares["monte_carlo"]), _cell(shares["importance"])])
    return table(
        f"Share of {greedy['queries']} queries with a harmful answer among k",
        ["k", "exact", f"Monte Carlo, {options.monte_carlo:,} a query",
         f"importance sampling, {options.samples:,} a query"],
        rows,
    )  # fmt: skip


def _paper(greedy: dict[str, Any], found: dict[int, dict[str, Any]], bench: Bench) -> str:
    """The paper's shares, and this model's."""
    rows = [[name, percent(first), percent(last)] for name, (first, last) in PAPER.items()]
    last = found.get(10_000)
    if last is not None:
        name = f"**{bench.inputs.options.model}**, here"
        shown = last["exact"] or last["monte_carlo"] or last["importance"]
        rows.append([name, percent(greedy["share"]), percent(shown[0])])
    return table(
        "Beside the paper's (313 StrongREJECT queries)",
        ["model", "greedy", "after 10,000 samples"],
        rows,
    )


def _picture(greedy: dict[str, Any], found: dict[int, dict[str, Any]]) -> bytes:
    """Shares against k."""
    whole, png = figure(6.2, 4)
    axes, ks = whole.subplots(), np.array(list(found))
    axes.axhline(greedy["share"], color="0.5", lw=1, ls=":", label="greedy")
    if found[ks[0]]["exact"] is not None:
        exact = [found[k]["exact"][0] for k in ks]
        axes.plot(ks, exact, "k-", lw=1, label="exact")
    for number, (name, shift, label) in enumerate(
        (("importance", 1.0, "importance sampling"), ("monte_carlo", 1.15, "Monte Carlo"))
    ):
        some = [k for k in ks if found[k][name] is not None]
        if some:
            value, low, high = np.array([found[k][name] for k in some]).T
            error = [value - low, high - value]
            axes.errorbar(np.array(some) * shift, value, error, fmt="o", ms=4, lw=1,
                          color=f"C{number}", label=label)  # fmt: skip
    axes.set(xscale="log", xlabel="answers per query, k", ylim=(-0.02, 1.02),
             ylabel="share of queries with a harmful answer")  # fmt: skip
    axes.legend(frameon=False, fontsize=8)
    return png()
