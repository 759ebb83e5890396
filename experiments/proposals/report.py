"""Tables and plots of results/.

python experiments/proposals/report.py      # tables.md and the pictures, from what run.py wrote
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tailrisk_jax.organisms import load_organism

FOLDER = Path(__file__).parent
FINAL = 2000  # draws of the final estimate, over which a pilot's are spread
DECADES = (-2, -3, -4, -5, -6)


def main() -> None:
    """Writes tables.md, efficiency.png, strength.png and estimates.png."""
    results = FOLDER / "results"
    exact = columns(results / "exact.parquet")
    sampled = columns(results / "sampled.parquet")
    summary = json.loads((results / "summary.json").read_text())
    queries = {q.id: q for q in load_organism().forbidden}
    exact["decade"] = np.array([queries[q].decade for q in exact["query"]])
    exact["drift"] = np.array([queries[q].drift_share for q in exact["query"]])
    exact["truth"] = np.array([queries[q].lower for q in exact["query"]])
    costs = summary["costs"]
    parts = [
        "# Proposals: tables",
        "Made by `report.py` from results/. Medians over the 12 queries of a decade, of the exact "
        "equal-error ratio: enumerated responses, with what they omit estimated; where the bounds "
        "differ by more than 10%, the medians of the lower and upper bounds follow in brackets. "
        "*Cost*: of one draw, in draws of Monte Carlo. *Per compute*: the median over all queries "
        "divided by the cost.",
        "## What was aimed at",
        reach(exact, costs),
        "## The best setting of each family",
        table(exact, costs, best_of_families(exact)),
        "## The same by kind of harm",
        "Medians where at most a tenth of the harm is drift | where more than half is.",
        drift_table(exact, best_of_families(exact)),
        "## Quartiles over the queries of a decade",
        quartiles(exact, best_of_families(exact)),
        "## Every setting",
        table(exact, costs, list(dict.fromkeys(exact["name"]))),
        "## Samples beside exact figures",
        sampled_table(sampled, exact, "drawn"),
        "## Simulated from the leaves, all queries",
        sampled_table(sampled, exact, "leaves"),
    ]
    (FOLDER / "tables.md").write_text("\n\n".join(parts) + "\n")
    plots(exact, sampled)


def columns(path: Path) -> dict[str, Any]:
    """A Parquet file as arrays."""
    read = pq.read_table(path)
    return {name: np.array(read[name].to_pylist()) for name in read.column_names}


def medians(exact: dict[str, Any], name: str, kind: str = "middle") -> np.ndarray:
    """By decade."""
    own = exact["name"] == name
    return np.array([np.median(exact[kind][own & (exact["decade"] == d)]) for d in DECADES])


def best_of_families(exact: dict[str, Any]) -> list[str]:
    """The setting of each family with the largest geometric mean of its medians by decade."""
    out = []
    for family in dict.fromkeys(exact["family"]):
        names = list(dict.fromkeys(exact["name"][exact["family"] == family]))
        out.append(max(names, key=lambda name: np.log(medians(exact, name)).mean()))
    return out


def table(exact: dict[str, Any], costs: dict[str, Any], names: list[str]) -> str:
    """Medians by decade, worst query, cost, per compute."""
    lines = ["| proposal | 1e-2 | 1e-3 | 1e-4 | 1e-5 | 1e-6 | worst | cost | per compute |"]
    lines.append("| :-- |" + " --: |" * 8)
    for name in names:
        own = exact["name"] == name
        low, mid, high = (medians(exact, name, kind) for kind in ("lower", "middle", "upper"))
        cells = [figure(m) + (f" ({figure(a)}-{figure(b)})" if b > 1.1 * a else "")
                 for a, m, b in zip(low, mid, high, strict=True)]  # fmt: skip
        cost = costs[name]["cost"]
        cells += [figure(exact["middle"][own].min()), f"{cost:.1f}"]
        cells.append(figure(np.median(exact["middle"][own]) / cost))
        lines.append(f"| {name.replace('|', ',')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reach(exact: dict[str, Any], costs: dict[str, Any]) -> str:
    """The figures of the issue: the decades' medians against what was asked for.

    For `auto`, the geometric mean over decades of its medians over those of the best.
    """
    honest = [f for f in dict.fromkeys(exact["family"]) if "upper limit" not in f]
    goals = [
        ("tuned single steering", ["tuned steering", "tuned tempered steering"], (-2, -3, -4), 20),
        ("dictionary fitted from pilot draws", ["dictionary, fitted"], (-2, -3, -4, -5), 100),
        (
            "the same with a learned adapter in it",
            [f for f in honest if f.startswith("dictionary with the adapter")],
            (-2, -3, -4, -5),
            100,
        ),
        ("best of all", honest, (-4, -5, -6), 500),
    ]
    lines = ["| aim | asked for | best setting | by decade | cautious | with the pilot counted "
             "| met |", "| :-- | --: | :-- | --: | --: | --: | :-- |"]  # fmt: skip
    for label, families, decades, wanted in goals:
        names = list(dict.fromkeys(exact["name"][np.isin(exact["family"], families)]))
        places = [DECADES.index(d) for d in decades]
        best = max(names, key=lambda name: np.log(medians(exact, name)[places]).mean())
        got = medians(exact, best)[places]
        cautious = medians(exact, best, "cautious")[places]
        pilot = costs[best]["pilot"]
        counted = got * FINAL / (FINAL + pilot)
        met = sum(counted >= wanted)
        lines.append(
            f"| {label} | {wanted} from 1e{decades[0]} to 1e{decades[-1]} | {best} "
            f"| {listed(got)} | {listed(cautious)} | {listed(counted)} "
            f"| {met} of {len(decades)} decades |"
        )
    names = list(dict.fromkeys(exact["name"][np.isin(exact["family"], honest)]))
    for what in ("a draw", "compute"):
        worth = {
            name: medians(exact, name) / (costs[name]["cost"] if what == "compute" else 1)
            for name in names
        }
        best = max(worth, key=lambda name: np.log(worth[name]).mean())
        for auto in (name for name in names if name.startswith("auto")):
            share = np.exp(np.log(worth[auto] / worth[best]).mean())
            lines.append(
                f"| {auto}, per {what} | 0.8 of the best | the best: {best} "
                f"| {listed(worth[auto])} of {listed(worth[best])} | | "
                f"| {'yes' if share >= 0.8 else 'no'}: {share:.2f} |"
            )
    return "\n".join(lines)


def listed(values: np.ndarray) -> str:
    """Figures, one after another."""
    return ", ".join(map(figure, values))


def drift_table(exact: dict[str, Any], names: list[str]) -> str:
    """Opener | drift, by decade."""
    lines = ["| proposal | 1e-2 | 1e-3 | 1e-4 | 1e-5 | 1e-6 |", "| :-- |" + " --: |" * 5]
    for name in names:
        cells = []
        for d in DECADES:
            own = (exact["name"] == name) & (exact["decade"] == d)
            opener, drift = own & (exact["drift"] <= 0.1), own & (exact["drift"] > 0.5)
            cells.append(
                f"{figure(np.median(exact['middle'][opener]))} , "
                f"{figure(np.median(exact['middle'][drift]))}"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quartiles(exact: dict[str, Any], names: list[str]) -> str:
    """First to third quartile of the middle figure."""
    lines = ["| proposal | 1e-2 | 1e-3 | 1e-4 | 1e-5 | 1e-6 |", "| :-- |" + " --: |" * 5]
    for name in names:
        cells = []
        for d in DECADES:
            own = (exact["name"] == name) & (exact["decade"] == d)
            low, high = np.quantile(exact["middle"][own], (0.25, 0.75))
            cells.append(f"{figure(low)} to {figure(high)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sampled_table(sampled: dict[str, Any], exact: dict[str, Any], source: str) -> str:
    """Medians over queries, per proposal and N."""
    lines = [
        "| proposal | N | repeats | relative RMSE | exact | mean bias | coverage | where ok | ok "
        "| ESS of w h | k-hat | sampled ratio / exact: median | largest |",
        "| :-- |" + " --: |" * 12,
    ]
    keys = zip(exact["name"], exact["query"], strict=True)
    middle = dict(zip(keys, exact["middle"], strict=True))
    for name in dict.fromkeys(sampled["name"]):
        for size in sorted(set(sampled["samples"])):
            own = (sampled["name"] == name) & (sampled["samples"] == size)
            own &= sampled["source"] == source
            if not own.any():
                continue
            ratio = np.array([middle[name, query] for query in sampled["query"][own]], float)
            truth = sampled["truth"][own].astype(float)
            wanted = np.sqrt((1 - truth) / (truth * ratio * size))
            off = sampled["sampled_ratio"][own].astype(float) / ratio
            cells = [
                str(size),
                str(sampled["repeats"][own][0]),
                f"{np.median(sampled['rmse'][own].astype(float)):.3f}",
                f"{np.median(wanted):.3f}",
                f"{np.mean(sampled['bias'][own].astype(float)):+.3f}",
                f"{100 * sampled['coverage'][own].astype(float).mean():.0f}%",
                *(where_ok(sampled, own) if source == "drawn" else ("", "")),
                f"{np.median(sampled['ess_harm'][own].astype(float)):.1f}",
                f"{np.nanmedian(sampled['k_hat'][own].astype(float)):.2f}",
                figure(np.nanmedian(off)),
                figure(np.nanmax(off)),
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def where_ok(sampled: dict[str, Any], own: np.ndarray) -> tuple[str, str]:
    """Coverage over all repeats that are judged ok, and their share."""
    shares = sampled["verdict ok"][own].astype(float)
    covered = np.nan_to_num(sampled["covered where ok"][own].astype(float))
    if not shares.sum():
        return "", "0%"
    return f"{100 * (shares @ covered) / shares.sum():.0f}%", f"{100 * shares.mean():.0f}%"


def figure(value: float) -> str:
    """Three digits at most."""
    if not np.isfinite(value):
        return "-"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def plots(exact: dict[str, Any], sampled: dict[str, Any]) -> None:
    """The three pictures."""
    import matplotlib.pyplot as plt

    family = dict(zip(exact["name"], exact["family"], strict=True))
    few = ("unsafe checkpoint", "ablation", "temperature", "mixture", "auto",
           "dictionary, uniform", "dictionary, fitted", "tuned tempered steering",
           "learned adapter", "dictionary with the adapter, fitted")  # fmt: skip
    figure_, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name in (name for name in best_of_families(exact) if family[name] in few):
        axes.plot(range(5), medians(exact, name), marker="o", markersize=3, label=name)
    axes.set(yscale="log", xticks=range(5), xlabel="decade of the truth",
             ylabel="exact equal-error ratio, median of 12")  # fmt: skip
    axes.set_xticklabels([f"1e{d}" for d in DECADES])
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure_.savefig(FOLDER / "efficiency.png", dpi=100)
    plt.close(figure_)

    figure_, panels = plt.subplots(1, 3, figsize=(10, 3.3), layout="constrained", sharey=True)
    families = {"ablation": "intensity", "addition": "coefficient", "temperature": "temperature"}
    for axes, (family, label) in zip(panels, families.items(), strict=True):
        names = list(dict.fromkeys(exact["name"][exact["family"] == family]))
        strengths = [abs(float(name.replace("@", ":").split(":")[-1])) for name in names]
        for d in DECADES:
            values = [medians(exact, name)[DECADES.index(d)] for name in names]
            axes.plot(strengths, values, marker="o", markersize=3, label=f"1e{d}")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(yscale="log", xlabel=label, title=family)
    panels[0].set_ylabel("exact equal-error ratio")
    panels[0].legend(fontsize=7, title="decade", title_fontsize=7)
    figure_.savefig(FOLDER / "strength.png", dpi=100)
    plt.close(figure_)

    own = (sampled["source"] == "drawn") & (sampled["samples"] == 500)
    names = list(dict.fromkeys(sampled["name"][own]))
    figure_, panels = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 3.4), layout="constrained", sharey=True
    )
    for axes, name in zip(np.atleast_1d(panels), names, strict=True):
        mine = own & (sampled["name"] == name)
        truth, value, lower, upper = (
            sampled[key][mine].astype(float) for key in ("truth", "value", "lower", "upper")
        )
        value, lower = np.maximum(value, 1e-9), np.maximum(lower, 1e-9)
        upper = np.where(np.isfinite(upper), upper, 1)
        axes.errorbar(truth, value, [np.maximum(value - lower, 0), np.maximum(upper - value, 0)],
                      fmt="o", markersize=3, linewidth=0.8)  # fmt: skip
        axes.plot([1e-7, 1], [1e-7, 1], color="grey", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlim=(1e-7, 1), ylim=(1e-9, 1), xlabel="truth")
        axes.set_title(name[:44], fontsize=7)
    np.atleast_1d(panels)[0].set_ylabel("estimate and 95% interval, N = 500")
    figure_.savefig(FOLDER / "estimates.png", dpi=100)
    plt.close(figure_)


if __name__ == "__main__":
    main()
