"""Tables and pictures of what checkpoint.py found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from report import figure

TABLES = "tables.md"
INTRODUCTION = """\
**Everything here is sampled**: no answers are enumerated. Harm that a proposal misses is missing
from its spread and from its own error too, so the first two ratios overstate a proposal that
misses some; only the errors against the baseline can show it, as far as the baseline is precise.

- Medians over the queries that the baseline can tell (10 hits at least); bias, coverage and
  verdicts are means.
- *Relative RMSE*: of the repeats against the baseline's value, with the baseline's own variance
  taken off, and never below what the repeats' spread shows.
- *Bias*: in shares of the value, with its standard error, the baseline's part in it.
- *Coverage*: intervals (95%) that hold the baseline's value; *agrees*: intervals of the difference
  from the baseline that hold 0, which allow for the baseline's error; *where ok*: of repeats whose
  verdict is ok.
- *Ratio*: Monte Carlo draws that one draw is worth. *Spread*: from the spread of the repeats;
  *own*: from what each repeat says of its error; *errors*: from the errors against the baseline,
  with a lower limit (95%, by what was drawn) in brackets.
- *Too low*: queries where all draws of the proposal together lie below the baseline by more than
  two standard errors of the difference. By chance 1 in 40 do, and one query for all proposals,
  since they share the baseline. Of such a query, believe no ratio.
- *Cost*: of a draw in draws of Monte Carlo, policies that decode plus policies that score; *in
  tokens*: the same with the length of answers counted. *Per compute*: the ratio by spread over the
  cost."""


def write(columns: dict[str, list[Any]], summary: dict[str, Any], folder: Path) -> None:
    """tables.md, estimates.png and efficiency.png."""
    found = {name: np.array(values) for name, values in columns.items()}
    labels = _labels(summary)
    found["proposal"] = np.array([labels[name] for name in columns["proposal"]])
    tells = found["tells"]
    decades = sorted({int(d) for d in found["decade"][tells]}, reverse=True)
    parts = ["# Proposals on a checkpoint: tables", INTRODUCTION, _about(found, summary)]
    if tells.any():
        parts += [
            "## Efficiency by decade of the baseline's value",
            _efficiency(found, decades),
            "## All queries that the baseline can tell",
            _figures(found, tells),
        ]
        for decade in decades if len(decades) > 1 else ():
            own = tells & (found["decade"] == decade)
            count = len(set(found["query"][own]))
            parts += [f"### 1e{decade}: {count} queries", _figures(found, own)]
    if not tells.all():
        parts += ["## Where the baseline can't tell", _untold(found)]
    (folder / TABLES).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    _plot_estimates(found, folder / "estimates.png")
    if tells.any():
        _plot_efficiency(found, decades, folder / "efficiency.png")


def _about(found: dict[str, Any], summary: dict[str, Any]) -> str:
    seeds, baseline = summary["seeds"], summary["baseline"]
    queries, samples = len(set(found["query"])), baseline["samples"]
    drawn = f"{min(samples):,.0f}" + (f" to {max(samples):,.0f}" * (min(samples) < max(samples)))
    source = f"seed {seeds['baseline']}"
    if seeds["baseline"] is None:
        source = f"from {baseline['from']}"
    return (
        f"Model {summary['identity']['model']['name']}; {summary['estimand']}. {queries} queries. "
        f"Baseline: {drawn} draws of Monte Carlo each, {source}; it can tell {baseline['tells']}. "
        f"Proposals: seed {seeds['proposals']}."
    )


def _labels(summary: dict[str, Any]) -> dict[str, str]:
    """Of the proposals: files without their folders, where all stay different."""
    labels = {}
    for name, proposal in summary["proposals"].items():
        labels[name] = name
        for file in proposal["files"]:
            labels[name] = labels[name].replace(file, Path(file).name)
    return labels if len(set(labels.values())) == len(labels) else {name: name for name in labels}


def _names(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(found["proposal"].tolist()))


def _cell(name: str) -> str:
    return name.replace("|", "\\|")


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if known.size else math.nan


def _efficiency(found: dict[str, Any], decades: list[int]) -> str:
    """By spread, with what the draws say themselves in brackets, at the largest N."""
    size = found["samples"].max()
    titles = [f"1e{decade}" for decade in decades]
    columns = ["proposal", *titles, "worst", "too low", "cost", "in tokens", "per compute"]
    lines = [
        f"By spread (own error in brackets), N = {size}.", "",
        "| " + " | ".join(columns) + " |", "| :-- |" + " --: |" * (len(columns) - 1),
    ]  # fmt: skip
    for name in _names(found):
        mine = (found["proposal"] == name) & (found["samples"] == size) & found["tells"]
        cells = []
        for decade in decades:
            own = mine & (found["decade"] == decade)
            ratio, said = _median(found["ratio"][own]), _median(found["own_ratio"][own])
            cells.append(f"{figure(ratio)} ({figure(said)})")
        ratios, cost = found["ratio"][mine], found["cost"][mine][0]
        least = ratios[~np.isnan(ratios)].min(initial=math.inf)
        low = np.sum(found["bias"][mine] + 2 * found["bias_error"][mine] < 0)
        cells += [figure(least), f"{low} of {mine.sum()}", f"{cost:.1f}"]
        cells.append(figure(found["token_cost"][mine][0]))
        cells.append(figure(_median(ratios) / cost))
        lines.append(f"| {_cell(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figures(found: dict[str, Any], rows: np.ndarray) -> str:
    """Medians and means over these rows, per proposal and N."""
    columns = ["proposal", "N", "repeats", "relative RMSE", "bias", "coverage", "agrees",
               "where ok", "ok", "doubtful", "unusable", "ESS", "ESS of w h", "k-hat of w h",
               "ratio: spread", "own", "errors", "per compute"]  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "| :-- |" + " --: |" * (len(columns) - 1)]
    for name in _names(found):
        for size in sorted(set(found["samples"].tolist())):
            own = rows & (found["proposal"] == name) & (found["samples"] == size)
            mid = {key: _median(found[key][own].astype(float))
                   for key in ("repeats", "rmse", "ess", "ess_harm", "k_hat_harm", "ratio",
                               "own_ratio", "error_ratio", "error_ratio_lower")}  # fmt: skip
            mean = {key: f"{100 * found[key][own].mean():.0f}%"
                    for key in ("coverage", "agreement", "ok", "doubtful", "unusable")}  # fmt: skip
            error = np.sqrt(np.sum(found["bias_error"][own] ** 2)) / own.sum()
            cells = [
                str(size),
                f"{mid['repeats']:.0f}",
                f"{mid['rmse']:.3f}",
                f"{found['bias'][own].mean():+.3f} ({error:.3f})",
                mean["coverage"],
                mean["agreement"],
                _where_ok(found, own),
                mean["ok"],
                mean["doubtful"],
                mean["unusable"],
                figure(mid["ess"]),
                figure(mid["ess_harm"]),
                f"{mid['k_hat_harm']:.2f}",
                figure(mid["ratio"]),
                figure(mid["own_ratio"]),
                f"{figure(mid['error_ratio'])} ({figure(mid['error_ratio_lower'])})",
                figure(mid["ratio"] / found["cost"][own][0]),
            ]
            lines.append(f"| {_cell(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _where_ok(found: dict[str, Any], own: np.ndarray) -> str:
    """Agreement over all repeats that are judged ok."""
    shares = found["ok"][own]
    if not shares.sum():
        return "-"
    return f"{100 * shares @ np.nan_to_num(found['agreement_ok'][own]) / shares.sum():.0f}%"


def _untold(found: dict[str, Any]) -> str:
    """Queries with too few baseline hits, and what the proposals make of them."""
    size = found["samples"].max()
    lines = [
        f"Fewer than 10 hits of the baseline: in no median above. Estimates: each proposal's over "
        f"all its draws, and the share of its repeats of N = {size} that agree with the baseline.",
        "",
        "| query | hits | draws | upper limit | "
        + " | ".join(_cell(name) for name in _names(found)) + " |",
        "| :-- |" + " --: |" * (3 + len(_names(found))),
    ]  # fmt: skip
    mine = ~found["tells"] & (found["samples"] == size)
    for query in dict.fromkeys(found["query"][mine].tolist()):
        own = np.flatnonzero(mine & (found["query"] == query))
        first = own[0]
        cells = [f"{found['baseline_hits'][first]}", f"{found['baseline_samples'][first]:,}",
                 f"{found['baseline_upper'][first]:.1e}"]  # fmt: skip
        cells += [f"{found['value'][row]:.1e}, {100 * found['agreement'][row]:.0f}%" for row in own]
        lines.append(f"| {_cell(query)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _plot_estimates(found: dict[str, Any], path: Path) -> None:
    """One estimate of each query, with its interval, against the baseline with its own."""
    import matplotlib.pyplot as plt

    size, names = found["samples"].max(), _names(found)
    across = min(4, len(names))
    picture, panels = plt.subplots(
        math.ceil(len(names) / across), across, squeeze=False, sharex=True, sharey=True,
        figsize=(3.4 * across, 3.6 * math.ceil(len(names) / across)), layout="constrained",
    )  # fmt: skip
    shown = np.where(found["tells"], found["baseline"], found["baseline_upper"])
    least = min(shown.min(), found["first_value"][found["first_value"] > 0].min(initial=1)) / 5
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(panels.flat, names, strict=False):
        own = (found["proposal"] == name) & (found["samples"] == size)
        for tells, style in ((True, "o"), (False, "<")):
            mine = own & (found["tells"] == tells)
            x, value = shown[mine], np.maximum(found["first_value"][mine], least)
            low = np.clip(found["first_lower"][mine], least, None)
            high = np.minimum(found["first_upper"][mine], 1)
            y_error = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
            limits = found["baseline_lower"][mine], found["baseline_upper"][mine]
            x_error = [np.maximum(x - limits[0], 0), np.maximum(limits[1] - x, 0)]
            axes.errorbar(
                x, value, y_error, x_error if tells else None, fmt=style, markersize=3,
                linewidth=0.7, color="C0" if tells else "C7",
                label="baseline" if tells else "its upper limit: under 10 hits",
            )  # fmt: skip
        axes.plot([least, 1], [least, 1], color="grey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", ylim=(least / 1.5, 1.5), xlabel="Monte Carlo baseline")
        axes.set_title(name[:48], fontsize=7)
    for axes in panels[:, 0]:
        axes.set_ylabel(f"estimate and 95% interval, N = {size}")
    panels.flat[0].legend(fontsize=6)
    picture.savefig(path, dpi=100)
    plt.close(picture)


def _plot_efficiency(found: dict[str, Any], decades: list[int], path: Path) -> None:
    """Ratios by decade: medians by spread (lines) and own error (dashed), and each query."""
    import matplotlib.pyplot as plt

    size = found["samples"].max()
    places = [10.0 ** (decade + 0.5) for decade in decades]
    picture, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for number, name in enumerate(_names(found)):
        mine = (found["proposal"] == name) & (found["samples"] == size) & found["tells"]
        colour = f"C{number % 10}"
        for key, style in (("ratio", "-"), ("own_ratio", "--")):
            middle = [_median(found[key][mine & (found["decade"] == d)]) for d in decades]
            label = name[:60] if style == "-" else None
            axes.plot(places, middle, style, marker="o", markersize=4, color=colour, label=label)
        axes.plot(found["baseline"][mine], found["ratio"][mine], ".", color=colour, alpha=0.4)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        xscale="log", yscale="log", xlabel="baseline's value (medians: middle of the decade)",
        ylabel=f"equal-error ratio, sampled, N = {size}\n(dashed: by its own error)",
    )  # fmt: skip
    axes.set_xlim(10.0 ** (decades[0] + 1), 10.0 ** decades[-1])
    axes.xaxis.set_minor_formatter("")
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    picture.savefig(path, dpi=100)
    plt.close(picture)
