"""(d) Persona traits: how likely each question's answer shows the trait, without being asked to."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import numpy as np
import tyro

from experiments.paper.bench import Bench, Drawn, holds, limits_of, middle, words
from experiments.paper.cost import Planned, policies_of
from experiments.paper.record import Record, figure, percent, table
from experiments.paper.setting import Options
from tailrisk_jax.estimators import in_float64, mean_interval

NAME = "persona"
MONTE_CARLO, EXACT = "Monte Carlo", "exact"


@dataclasses.dataclass(frozen=True)
class Persona(Options):
    """(d) The probability that an answer shows a trait, question by question."""

    usual_queries: ClassVar[int] = 20  # of a trait
    proposals: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TERM [+ ..] [..]")] = ()
    """What is drawn from, such as a persona vector or a system prompt that asks for the trait; see
    `tailrisk estimate --help`."""
    samples: int = 500
    """Answers per question from each."""
    monte_carlo: Annotated[int, tyro.conf.arg(metavar="B")] = 10_000
    """Answers per question of Monte Carlo; 0 for none."""


def planned(options: Persona) -> list[Planned]:
    """What is drawn."""
    plain = [Planned(MONTE_CARLO, options.monte_carlo, 0)] if options.monte_carlo else []
    return plain + [Planned(text, options.samples, policies_of(text)) for text in options.proposals]


def main(options: Persona, record: Record) -> None:
    """Draws what is missing, compares and writes."""
    bench = Bench(options)
    runs = {text: bench.run(text, text, options.samples) for text in options.proposals}
    if options.monte_carlo:
        runs[MONTE_CARLO] = bench.monte_carlo(options.monte_carlo)
    rows = [row for name, run in runs.items() for row in _rows(bench, name, run)]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    figures = {name: _summary(_of(columns, name)) for name in runs}
    if bench.truth_known:
        figures[EXACT] = {"mean": float(middle(bench.truth).mean())}
    tables = [_mean_table(figures)]
    if bench.truth_known:
        tables.append(_error_table(bench, columns))
    record.write(bench, rows, tables, figures, _picture(bench, columns))


def _rows(bench: Bench, name: str, run: Drawn) -> Any:
    """A row per question."""
    report = run.report()
    estimate, verdicts = report.estimate, words(report)
    held = holds(estimate, bench.truth)
    mean_weight = np.asarray(estimate.mean_weight)
    for q, query in enumerate(bench.queries):
        yield {
            "proposal": name,
            "query": query.id,
            "samples": int(estimate.num_samples[q]),
            "truth_lower": bench.truth[q, 0],
            "truth_upper": bench.truth[q, 1],
            "value": float(estimate.value[q]),
            "lower": float(estimate.lower[q]),
            "upper": float(estimate.upper[q]),
            "hits": int(estimate.hits[q]),
            "mean_weight": float(mean_weight[q]),
            "verdict": str(verdicts[q]),
            "holds": bool(held[q]),
        }


def _of(columns: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    own = columns["proposal"] == name
    return {key: values[own] for key, values in columns.items()}


def _summary(own: dict[str, np.ndarray]) -> dict[str, Any]:
    """The trait's mean over the questions, with its interval, and what the verdicts say."""
    limits = limits_of(own["lower"], np.minimum(own["upper"], 1.0))
    whole = in_float64(mean_interval, own["value"], limits)
    ok = own["verdict"] == "ok"
    return {
        "mean": float(own["value"].mean()),
        "lower": max(float(whole.lower), 0.0),
        "upper": min(float(whole.upper), 1.0),
        "questions": len(ok),
        "samples": int(own["samples"].max()),
        "without_a_hit": int((own["hits"] == 0).sum()),
        "hold": int(own["holds"].sum()),
        "ok": int(ok.sum()),
        "ok_that_hold": int((own["holds"] & ok).sum()),
    }


def _mean_table(figures: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, one in figures.items():
        if name == EXACT:
            lines.append([EXACT, "", f"{one['mean']:.3e}", "", "", ""])
            continue
        lines.append([
            f"`{name}`", f"{one['samples']:,}", f"{one['mean']:.3e}",
            f"[{one['lower']:.2e}, {one['upper']:.2e}]",
            f"{one['without_a_hit']} of {one['questions']}", f"{one['ok']}",
        ])  # fmt: skip
    titles = ["drawn from", "answers a question", "mean", "95% interval", "without a hit", "ok"]
    return table("The trait, mean over the questions", titles, lines)


def _error_table(bench: Bench, columns: dict[str, np.ndarray]) -> str:
    """Against the exact truth, by its decade."""
    truth = middle(bench.truth)
    decade = bench.decades(truth)
    decades = sorted(set(decade.tolist()), reverse=True)
    lines = []
    for name in dict.fromkeys(columns["proposal"].tolist()):
        own = _of(columns, name)
        error, one = np.abs(own["value"] / truth - 1), _summary(own)
        each = [percent(float(np.median(error[decade == d]))) for d in decades]
        lines.append([
            f"`{name}`", *each, f"{one['hold']} of {one['questions']}",
            f"{one['ok_that_hold']} of {one['ok']}",
        ])  # fmt: skip
    titles = ["drawn from", *(f"1e{d:.0f}" for d in decades), "intervals hold it", "where ok"]
    return table("Median error against the exact truth, by its decade", titles, lines)


def _picture(bench: Bench, columns: dict[str, np.ndarray]) -> bytes:
    """Estimates with intervals, by question, the likeliest first."""
    names = list(dict.fromkeys(columns["proposal"].tolist()))
    level = middle(bench.truth) if bench.truth_known else _of(columns, names[0])["value"]
    order = np.argsort(-level, kind="stable")
    whole, png = figure(max(6.4, 0.18 * len(order) * len(names) ** 0.5), 4.2)
    axes, place = whole.subplots(), np.arange(len(order))
    if bench.truth_known:
        axes.plot(place, level[order], "k_", ms=9, label=EXACT)
    positive = columns["value"][columns["value"] > 0]
    least = min([1e-4, *positive]) / 3
    for number, name in enumerate(names):
        own = _of(columns, name)
        value = np.maximum(own["value"][order], least)
        low = np.maximum(own["lower"][order], least)
        high = np.clip(own["upper"][order], least, 1)
        error = np.maximum([value - low, high - value], 0)
        shift = (number + 0.5) / len(names) * 0.7 - 0.35
        axes.errorbar(place + shift, value, error, fmt="o", ms=2.5, lw=0.7, color=f"C{number}",
                      label=name[:60])  # fmt: skip
    axes.set(yscale="log", ylim=(least, 1.2), xlabel="question, the likeliest first",
             ylabel="probability of the trait")  # fmt: skip
    whole.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=7)
    return png()
