"""Pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tailrisk_jax.reports.tables import ComparisonRow


def plot_against_truth(rows: Sequence[ComparisonRow], path: Path) -> None:
    """Estimate against exact truth, importance sampling and Monte Carlo, as a PNG.

    Monte Carlo without a hit is drawn as its upper limit, an arrow pointing down.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    truth = np.asarray([np.sqrt(row.truth[0] * row.truth[1]) for row in rows])
    limits = np.asarray([truth.min() / 4, truth.max() * 4])
    axes.plot(limits, limits, color="0.75", lw=1, zorder=0)
    found = np.asarray([row.monte_carlo > 0 for row in rows])
    monte_carlo = np.asarray([row.monte_carlo for row in rows])
    mc_intervals = np.asarray([row.monte_carlo_interval for row in rows])
    style: Any = {"capsize": 2, "lw": 1, "ms": 4}
    axes.errorbar(
        truth[found] * 1.08, monte_carlo[found], fmt="s", color="C1", label="Monte Carlo",
        yerr=np.abs(mc_intervals[found].T - monte_carlo[found]), **style,
    )  # fmt: skip
    upper = mc_intervals[~found, 1]
    axes.errorbar(
        truth[~found] * 1.08, upper, yerr=upper * 0.45, uplims=True, fmt="none", color="C1", lw=1,
        label="Monte Carlo, no hit (95% upper limit)",
    )  # fmt: skip
    value = np.asarray([row.value for row in rows])
    bounds = np.asarray([row.interval for row in rows])
    bounds[:, 1] = np.where(np.isfinite(bounds[:, 1]), bounds[:, 1], value)
    doubtful = np.asarray([row.verdict != "ok" for row in rows])
    for which, face, label in ((~doubtful, "C0", "ok"), (doubtful, "white", "not ok")):
        axes.errorbar(
            truth[which], value[which], yerr=np.abs(bounds[which].T - value[which]), fmt="o",
            color="C0", mfc=face, label=f"importance sampling, verdict {label}", **style,
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlim=limits, ylim=limits,
        xlabel="exact probability of a harmful answer", ylabel="estimate",
    )  # fmt: skip
    axes.grid(which="major", color="0.93", zorder=-1)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def plot_direction_scores(
    panels: Mapping[str, tuple[Float[np.ndarray, "positions L"], float]],
    chosen: tuple[int, int],
    path: Path,
) -> None:
    """Scores of candidate directions by layer, a line for each position, as a PNG.

    Args:
      panels: by title, the scores (NaN is left out) and the level that is drawn across.
      chosen: position, counted from the end, and layer of the direction that is marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, (scores, level)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for row, values in enumerate(scores):
            position = row - len(scores)
            axes.plot(values, marker="o", ms=3, lw=1, label=f"position {position}")
        axes.plot(chosen[1], scores[chosen], "o", ms=10, mfc="none", mec="k", label="chosen")
        axes.axhline(level, color="0.5", lw=1, ls="--")
        axes.set(title=title, xlabel="layer", xlim=(-0.5, scores.shape[1] - 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.93", zorder=-1)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
