"""Backtests of forecasts: fits, tail sizes, bands, calibration and splits.

python experiments/forecasting/run.py       # 3 minutes of CPU; writes tables.md
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import tyro
from populations import ESTIMATES, IS_ERROR, POPULATIONS, SAMPLES, monte_carlo

from tailrisk_jax.estimators import in_float64
from tailrisk_jax.forecasting import (
    FITS,
    Forecast,
    QueryRisks,
    fit_log_normal,
    fit_tail,
    forecast,
    log_normal_quantile,
    log_p_of,
    psi_of,
    query_risks,
    tail_quantile,
)
from tailrisk_jax.organisms import load_organism

HERE = Path(__file__).parent
FACTORS = (10, 100, 1000)
DEMO = "the demo's mixture"  # its estimates in experiments/proposals
TAUS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclasses.dataclass(frozen=True)
class Options:
    """How much."""

    out: Path = HERE / "tables.md"
    fits: int = 2000
    """Repeats for the fits, without bands."""
    repeats: int = 150
    """Repeats for whole forecasts."""
    splits: int = 100
    resamples: int = 400
    seed: int = 0


def main(options: Options) -> None:
    """Writes the tables."""
    started = time.process_time()
    parts = [
        fits_table(options),
        published_table(options),
        top_table(options),
        estimates_table(options),
        *forecast_tables(options),
        organism_table(options),
        groups_table(options),
    ]
    text = "# Forecasting: tables\n\n" + "\n\n".join(parts)
    text += f"\n\nCPU: {time.process_time() - started:.0f} s.\n"
    options.out.write_text(text)
    print(text)


def quantiles(log_p: np.ndarray, number: float, top: int) -> dict[str, np.ndarray]:
    """log Q_p(n) by every fit and the baseline, over rows of log p."""
    psi = in_float64(psi_of, log_p)
    found = {}
    for fit in FITS:
        tail = in_float64(fit_tail, psi, top=top, fit=fit)
        found[fit] = in_float64(log_p_of, in_float64(tail_quantile, tail, number))
    baseline = in_float64(fit_log_normal, log_p)
    return {**found, "log-normal": in_float64(log_normal_quantile, baseline, number)}


def errors(found: np.ndarray, truth: Any, worst: np.ndarray) -> list[str]:
    """Signed error and shares, in %: too high, within an order of magnitude of the worst."""
    decades = (found - truth) / np.log(10)
    return [
        f"{np.median(decades):+.2f}",
        f"{np.sqrt(np.mean(decades**2)):.2f}",
        percent(decades > 0),
        percent(np.abs(found - worst) < np.log(10)),
    ]


def fits_table(options: Options) -> str:
    """100 queries, the 10 riskiest fitted."""
    rng, rows = np.random.default_rng(options.seed), []
    for population in POPULATIONS:
        log_p = population.draw(rng, options.fits, 100)
        for factor in FACTORS:
            number = 100.0 * factor
            truth = population.at(np.asarray(1 / number))
            worst = population.worst(rng, number, options.fits)
            for name, found in quantiles(log_p, number, 10).items():
                rows.append([population.name, f"{factor}x", name, *errors(found, truth, worst)])
    return table(
        "Fits: 100 exact risks, 10 fitted. Error of Q_p(n) in orders of magnitude",
        ["queries", "factor", "fit", "median", "RMS", "too high, %", "worst within 10x, %"], rows,
    )  # fmt: skip


def estimates_table(options: Options) -> str:
    """100 queries estimated in three ways, 10 fitted, 100 times the queries; nothing refused."""
    rng, rows = np.random.default_rng(options.seed + 5), []
    for population in POPULATIONS:
        log_p = population.draw(rng, options.fits, 100)
        number = 1e4
        truth = population.at(np.asarray(1 / number))
        worst = population.worst(rng, number, options.fits)
        for kind, estimate in ESTIMATES.items():
            seen = np.reshape(estimate(rng, log_p.ravel()).log_p, log_p.shape)
            found = quantiles(seen, number, 10)
            for name in ("peaks", "ols", "log-normal"):
                known = np.isfinite(found[name])
                row = [population.name, kind, name, percent(~known)]
                if known.any():
                    row += errors(found[name][known], truth, worst[known])
                rows.append(row)
    return table(
        "Estimates: 100 queries, 10 fitted, 100x, no forecast refused. Importance: relative error "
        f"{IS_ERROR}; Monte Carlo: {SAMPLES} answers",
        ["queries", "estimates", "fit", "impossible, %", "median", "RMS", "too high, %",
         "worst within 10x, %"], rows,
    )  # fmt: skip


def published_table(options: Options) -> str:
    """The setting of Jones et al.: 900 queries, the 10 riskiest fitted, 90,000 forecast."""
    rng, rows = np.random.default_rng(options.seed + 6), []
    for population in POPULATIONS:
        log_p = population.draw(rng, options.fits, 900)
        truth = population.at(np.asarray(1 / 9e4))
        worst = population.worst(rng, 9e4, options.fits)
        found = quantiles(log_p, 9e4, 10)
        for name in ("ols", "peaks", "log-normal"):
            rows.append([population.name, name, *errors(found[name], truth, worst)])
    return table(
        "The setting of Jones et al. (2025): 900 exact risks, 10 fitted, 100x",
        ["queries", "fit", "median", "RMS", "too high, %", "worst within 10x, %"], rows,
    )  # fmt: skip


def top_table(options: Options) -> str:
    """How many of 300 queries to fit, by maximum likelihood, at 100 times the queries."""
    rng, rows = np.random.default_rng(options.seed + 1), []
    for population in POPULATIONS:
        log_p = population.draw(rng, options.fits // 2, 300)
        number = 3e4
        truth = population.at(np.asarray(1 / number))
        worst = population.worst(rng, number, len(log_p))
        for top in (10, 15, 30, 60, 120):
            found = quantiles(log_p, number, top)["peaks"]
            rows.append([population.name, str(top), *errors(found, truth, worst)])
    return table(
        "Size of the tail: 300 exact risks, peaks, 100x",
        ["queries", "fitted", "median", "RMS", "too high, %", "worst within 10x, %"], rows,
    )  # fmt: skip


def forecasts(
    risks: QueryRisks, numbers: list[float], options: Options, seed: int, **more: Any
) -> Forecast:
    return in_float64(
        forecast, jax.random.key(seed), risks, numbers, thresholds=TAUS,
        num_resamples=options.resamples, **more,
    )  # fmt: skip


def forecast_tables(options: Options) -> list[str]:
    """Whole forecasts of 100 queries: bands, verdicts, and the calibration of P(worst > tau)."""
    rng = np.random.default_rng(options.seed + 2)
    numbers = [100.0 * factor for factor in FACTORS]
    rows, predicted, came = [], {}, {}
    for population in POPULATIONS:
        mean = population.mean()
        truth = np.exp(population.at(1 / np.asarray(numbers)))
        for kind, estimate in ESTIMATES.items():
            seen: list[dict[str, Any]] = []
            for repeat in range(options.repeats):
                risks = estimate(rng, population.draw(rng, 100))
                found = forecasts(risks, numbers, options, repeat, top=10)
                worst = np.exp([population.worst(rng, n, 1)[0] for n in numbers])
                usable = found.support.code < 2
                with np.errstate(invalid="ignore", divide="ignore"):
                    near = np.abs(np.log10(found.worst.value / worst)) < 1
                    seen.append({
                        "usable": usable,
                        "ok": found.support.code == 0,
                        "holds": inside(found.worst, truth),
                        "drawn": inside(found.drawn, worst),
                        "mean": np.broadcast_to(inside(found.mean, mean), 3),
                        "near": near,
                        "over": found.worst.value > truth,
                    })  # fmt: skip
                for d in np.flatnonzero(usable):
                    predicted.setdefault((population.name, kind), []).append(found.exceeds[d])
                    came.setdefault((population.name, kind), []).append(worst[d] > np.asarray(TAUS))
            stacked = {name: np.stack([one[name] for one in seen]) for name in seen[0]}
            for d, factor in enumerate(FACTORS):
                used = stacked["usable"][:, d]
                rows.append(
                    [population.name, kind, f"{factor}x", percent(~used),
                     percent(stacked["ok"][:, d])]
                    + [percent(stacked[name][used, d])
                       for name in ("holds", "drawn", "mean", "over", "near")]
                )  # fmt: skip
    bands = table(
        "Forecasts: 100 queries, 10 fitted, peaks, 95% bands; of the forecasts not refused, in %",
        ["queries", "estimates", "factor", "refused", "ok", "band holds Q", "holds the worst",
         "holds E[p]", "too high", "worst within 10x"], rows,
    )  # fmt: skip
    return [bands, calibration_table(predicted, came)]


def calibration_table(predicted: dict[Any, Any], came: dict[Any, Any]) -> str:
    edges = (0.0, 0.05, 0.2, 0.5, 0.8, 0.95, 1.0 + 1e-9)
    rows = []
    for key, chances in predicted.items():
        chance, outcome = np.ravel(chances), np.ravel(came[key])
        row = [*key]
        for low, high in itertools.pairwise(edges):
            own = (chance >= low) & (chance < high)
            if own.any():
                row.append(f"{chance[own].mean():.2f}: {outcome[own].mean():.2f} ({own.sum()})")
            else:
                row.append("")
        rows.append([*row, f"{np.mean((chance - outcome) ** 2):.3f}"])
    return table(
        "Calibration of P(worst > tau), tau from 1e-4 to 1e-1, all factors: mean forecast: share "
        "that came (number)",
        ["queries", "estimates", "0-5%", "5-20%", "20-50%", "50-80%", "80-95%", "95-100%",
         "Brier"], rows,
    )  # fmt: skip


def organism_table(options: Options) -> str:
    """60 queries: a forecast from 18 of the worst of the other 42."""
    organism = load_organism()
    bounds = np.asarray([organism.truth(query) for query in organism.forbidden])
    truth = np.sqrt(bounds.prod(axis=1))
    demo = demo_estimates([query.id for query in organism.forbidden])
    rng, rows = np.random.default_rng(options.seed + 3), []
    kinds = {
        "exact": query_risks(truth),
        f"importance, {SAMPLES} draws": demo,
        f"Monte Carlo, {SAMPLES} draws": monte_carlo(rng, np.log(truth)),
    }
    splits = [rng.permutation(len(truth)) for _ in range(options.splits)]
    for name, risks in kinds.items():
        for top in (5, 10):
            seen = {"usable": [], "holds": [], "near": [], "decades": [], "log-normal": []}
            for split, order in enumerate(splits):
                train, rest = order[:18], order[18:]
                own = jax.tree.map(lambda x, train=train: np.asarray(x)[train], risks)
                found = forecasts(own, [42.0], options, split, top=top)
                worst = truth[rest].max()
                decades = np.log10(found.drawn.value[0] / worst)
                seen["usable"].append(found.support.code[0] < 2)
                seen["holds"].append(inside(found.drawn, worst)[0])
                seen["near"].append(abs(decades) < 1)
                seen["decades"].append(decades)
                baseline = np.log10(found.log_normal.worst[0] / worst)
                seen["log-normal"].append(abs(baseline) < 1)
            used = np.asarray(seen["usable"])
            part = {key: np.asarray(value)[used] for key, value in seen.items()}
            median = f"{np.median(part['decades']):+.2f}" if used.any() else ""
            rows.append(
                [name, str(top), percent(~used), percent(part["holds"]), percent(part["near"]),
                 median, percent(seen["log-normal"])]
            )  # fmt: skip
    return table(
        "Organism: 18 of its 60 queries forecast the worst of the other 42 (median of the worst "
        "against exact truth), in %",
        ["estimates", "fitted", "refused", "band holds the worst", "within 10x",
         "median error, decades", "log-normal within 10x"], rows,
    )  # fmt: skip


def demo_estimates(ids: list[str]) -> QueryRisks:
    """One estimate of each query under the demo's proposal, from experiments/proposals."""
    rows = pq.read_table(HERE.parent / "proposals/results/sampled.parquet").to_pylist()
    chosen = {
        row["query"]: row
        for row in rows
        if (row["source"], row["name"], row["samples"]) == ("leaves", DEMO, SAMPLES)
    }
    value, lower, upper = (
        np.asarray([chosen[id][name] for id in ids]) for name in ("value", "lower", "upper")
    )
    return query_risks(value, lower=lower, upper=upper)


def groups_table(options: Options) -> str:
    """300 base queries of 5 variants: split by base query, and, wrongly, by query."""
    rng, rows = np.random.default_rng(options.seed + 4), []
    base_queries = 300
    for label, spread in (("alike", 0.02), ("unlike, a third of the tail's scale", 0.05)):
        seen: dict[tuple[str, str], list[np.ndarray]] = {}
        for repeat in range(options.splits // 2):
            scores = -2.9 + 0.15 * rng.exponential(size=base_queries)
            psi = scores[:, None] + spread * rng.normal(size=(base_queries, 5))
            risk, group = np.exp(-np.exp(-psi)), np.repeat(np.arange(base_queries), 5)
            flat = risk.ravel()
            for split in ("by base query", "by query"):
                if split == "by base query":
                    train = np.isin(group, rng.permutation(base_queries)[:90])
                else:
                    train = np.isin(np.arange(1500), rng.permutation(1500)[:450])
                worst = flat[~train].max()
                for bands, groups in (("by base query", group[train]), ("by query", None)):
                    found = forecasts(
                        query_risks(flat[train]), [float(np.sum(~train))], options, repeat,
                        groups=groups,
                    )  # fmt: skip
                    usable = found.support.code[0] < 2
                    decades = np.log10(found.drawn.value[0] / worst)
                    held = inside(found.drawn, worst)[0]
                    near = abs(decades) < 1
                    seen.setdefault((split, bands), []).append(np.asarray([usable, held, near]))
        for (split, bands), values in seen.items():
            usable, held, near = np.asarray(values).T
            rows.append(
                [label, split, bands, percent(~usable), percent(held[usable]),
                 percent(near[usable])]
            )  # fmt: skip
    return table(
        "Variants: 300 base queries of 5 variants, 30% forecast the worst of the rest, a tenth "
        "fitted, in %",
        ["variants", "split", "bands", "refused", "band holds the worst", "within 10x"], rows,
    )  # fmt: skip


def inside(band: Any, truth: Any) -> np.ndarray:
    return (band.lower <= truth) & (truth <= band.upper)


def percent(share: Any) -> str:
    return f"{100 * np.mean(share):.0f}" if np.size(share) else ""


def table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return f"**{title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
