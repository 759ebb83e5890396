"""The pictures of a run's page, as inline SVG; the texts in them are ours alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from tailrisk_jax.estimators.diagnostics import LARGEST_SHARE
from tailrisk_jax.reports.baseline import BaselinePoints
from tailrisk_jax.reports.svg import (
    ACCENT,
    DOUBTFUL,
    MUTED,
    OK,
    PANEL,
    UNUSABLE,
    drawing,
    inline_svg,
    scientific,
)

HALF, WHOLE, THIRD = (5.4, 3.3), (11.0, 3.5), (3.6, 2.4)  # inches
_VERDICTS = {"ok": (OK, "o"), "doubtful": (DOUBTFUL, "D"), "unusable": (UNUSABLE, "X")}
_BARS = {"ok": 0.8, "doubtful": 0.8, "unusable": 0.3}  # opacity
_LOWEST = 1e-300  # logarithms stay finite


def interval_plot(columns: Mapping[str, np.ndarray], ranked: Sequence[int]) -> Markup:
    """Estimates and intervals of all queries, in the order of their rank.

    Estimates of zero stand at the bottom, hollow; bars that reach an edge go on beyond it.
    """
    value = columns["value"]
    rank = np.empty(len(value), int)
    rank[np.asarray(ranked, int)] = 1 + np.arange(len(value))
    floor, top = _floor(value) / 10, max(1.0, _greatest(value) * 2)
    lower, upper = _clipped(columns["lower"], columns["upper"], floor, top)
    shown = np.clip(value, floor, top)
    size = 18 if len(value) <= 100 else 7
    with drawing(*WHOLE) as (figure, axes):
        for word, (colour, marker) in _VERDICTS.items():
            own = (columns["verdict"] == word) & np.isfinite(value)
            axes.vlines(
                rank[own], lower[own], upper[own], color=colour, alpha=_BARS[word],
                lw=1.2 if size > 10 else 0.8,
            )  # fmt: skip
            some, none = own & (value > 0), own & (value <= 0)
            axes.scatter(rank[some], shown[some], s=size, color=colour, marker=marker, lw=0)
            axes.scatter(
                rank[none], shown[none], s=size, facecolor=PANEL, edgecolor=colour, marker="v"
            )
        axes.set(yscale="log", ylim=(floor, top), xlim=(0, len(value) + 1))
        axes.set(xlabel="query, by rank of its estimate", ylabel="estimate and interval")
        scientific(axes.yaxis)
        axes.grid(visible=False, axis="x")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes, columns["verdict"])
        label = f"Estimates of {len(value)} queries with their intervals, by rank."
        return inline_svg(figure, "intervals", label)


def baseline_plot(columns: Mapping[str, np.ndarray], baseline: BaselinePoints) -> Markup:
    """Estimates against a baseline's, with both intervals; a query without either is left out.

    A baseline without a hit is drawn at its upper limit, pointing left.
    """
    value, hit = columns["value"], baseline.value > 0
    x = np.where(hit, baseline.value, baseline.upper)
    known = np.isfinite(value) & np.isfinite(x)
    left, floor = _floor(x) / 6, _floor(value) / 6
    top = max(1.0, _greatest(np.concatenate([value, x])) * 2)
    x, y = np.clip(x, left, top), np.clip(value, floor, top)
    across = _clipped(baseline.lower, np.where(hit, baseline.upper, x), left, top)
    up = _clipped(columns["lower"], columns["upper"], floor, top)
    with drawing(*HALF) as (figure, axes):
        axes.plot([_LOWEST, top], [_LOWEST, top], color=MUTED, lw=0.8, ls=(0, (4, 3)))
        for word, (colour, marker) in _VERDICTS.items():
            own = known & (columns["verdict"] == word)
            style: Any = {"color": colour, "lw": 0.8, "alpha": _BARS[word] / 2}
            axes.hlines(y[own], across[0][own], across[1][own], **style)
            axes.vlines(x[own], up[0][own], up[1][own], **style)
            for which, shape in ((own & hit, marker), (own & ~hit, "<")):
                axes.scatter(x[which], y[which], s=14, color=colour, marker=shape, lw=0)
        axes.set(xscale="log", yscale="log", xlim=(left, top), ylim=(floor, top))
        axes.set(xlabel="baseline", ylabel="estimate")
        scientific(axes.xaxis)
        scientific(axes.yaxis)
        _legend(axes, columns["verdict"][known])
        return inline_svg(figure, "baseline", f"Estimates of {known.sum()} queries by baseline.")


def weight_plot(log_weights: Float[np.ndarray, " M"], hit: np.ndarray) -> Markup:
    """How the log-weights of all draws are distributed, and those of hits among them."""
    finite = np.isfinite(log_weights)
    values, hits = log_weights[finite], log_weights[finite & hit]
    edges = np.histogram_bin_edges(values, bins=60)
    with drawing(*HALF) as (figure, axes):
        axes.hist(values, edges, color=MUTED, alpha=0.45, label=f"all {len(values):,} draws")
        axes.hist(hits, edges, color=ACCENT, label=f"{len(hits):,} hits")
        axes.axvline(0, color=MUTED, lw=0.8, ls=(0, (4, 3)))
        axes.set(yscale="log", ylim=(0.7, None), xlabel="log weight, log p - log q", ylabel="draws")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
        label = f"Histogram of the log-weights of {len(values)} draws, {len(hits)} of them hits."
        return inline_svg(figure, "weights", label)


def share_plot(columns: Mapping[str, np.ndarray]) -> Markup:
    """Each query's largest share of one draw by its estimate, beside what the verdict allows."""
    value, share = columns["value"], columns["largest_share"]
    known = np.isfinite(value) & (value > 0) & np.isfinite(share)
    with drawing(*HALF) as (figure, axes):
        for limit in LARGEST_SHARE:
            axes.axhline(limit, color=MUTED, lw=0.8, ls=(0, (4, 3)))
        for word, (colour, marker) in _VERDICTS.items():
            own = known & (columns["verdict"] == word)
            axes.scatter(value[own], share[own], s=14, color=colour, marker=marker, lw=0)
        low, high = _floor(value) / 2, _greatest(value, 1.0) * 2
        axes.set(xscale="log", xlim=(low, high), ylim=(0, 1.04))
        axes.set(xlabel="estimate", ylabel="largest share of one draw")
        scientific(axes.xaxis)
        _legend(axes, columns["verdict"][known])
        label = f"Largest share of one draw in the estimates of {known.sum()} queries."
        return inline_svg(figure, "shares", label)


def convergence_plot(
    number: int,
    counts: Sequence[int],
    value: Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
) -> Markup:
    """One query's estimate from its first n draws, with the interval; limits beyond are cut."""
    n, line = np.asarray(counts), np.asarray(value, float)
    floor, top = _floor(line[-1:]) / 100, min(_greatest(line[-1:], 1.0) * 100, 2.0)
    limits = _clipped(np.asarray(lower, float), np.asarray(upper, float), floor, top)
    with drawing(*THIRD) as (figure, axes):
        axes.fill_between(n, *limits, color=ACCENT, alpha=0.18, lw=0)
        axes.axhline(max(line[-1], floor), color=MUTED, lw=0.8, ls=(0, (4, 3)))
        axes.plot(n, np.where(line > 0, line, np.nan), color=ACCENT, lw=1.6)
        axes.set(xscale="log", yscale="log", ylim=(floor, top), xlabel="draws")
        axes.set(xlim=(1, max(n[-1], 2)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        scientific(axes.yaxis)
        label = f"The running estimate ends at {line[-1]:.2g} after {n[-1]} draws."
        return inline_svg(figure, f"convergence{number}", label)


def _legend(axes: Any, verdicts: np.ndarray) -> None:
    for word, (colour, marker) in _VERDICTS.items():
        axes.scatter([], [], s=16, color=colour, marker=marker, lw=0,
                     label=f"{word} ({np.sum(verdicts == word)})")  # fmt: skip
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)


def _clipped(
    lower: np.ndarray, upper: np.ndarray, floor: float, top: float
) -> tuple[np.ndarray, np.ndarray]:
    """Limits as they are drawn: an unknown one reaches the edge."""
    lower = np.clip(np.nan_to_num(lower, nan=floor), floor, top)
    return lower, np.clip(np.nan_to_num(upper, nan=top), floor, top)


def _floor(values: np.ndarray) -> float:
    positive = values[np.isfinite(values) & (values > 0)]
    return max(float(positive.min()), _LOWEST) if len(positive) else 1e-6


def _greatest(values: np.ndarray, default: float = 0.0) -> float:
    finite = values[np.isfinite(values) & (values > 0)]
    return float(finite.max()) if len(finite) else default
