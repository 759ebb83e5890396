"""Pictures of how variants of a query move its risk: for a page, and as a file."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from markupsafe import Markup

from tailrisk_jax.reports.svg import (
    ACCENT,
    INK,
    LINE,
    MUTED,
    PANEL,
    drawing,
    inline_svg,
    scientific,
)
from tailrisk_jax.reports.text import shorten

_MARKERS = "os^Dv<>PXh"  # one for each kind, from the start again where there are more
_COLOURS = {INK: "0.1", MUTED: "0.45", LINE: "0.9", ACCENT: "C0", PANEL: "white"}  # in a file
_WHOLE, _HALF, _FILE = (11.0, 3.8), (5.4, 2.4), (11.0, 6.4)  # inches
_ORIGINAL = "original"
_NAME = 30  # characters of a kind's name

_PARTS = {
    "queries": "between queries",
    "kinds": "between kinds",
    "variants": "between variants",
    "error": "estimation error",
}


@dataclasses.dataclass(frozen=True)
class VariantPoints:
    """What the pictures show; arrays are over variants that have an estimate or a limit.

    Attributes:
      group: which base query a variant is of.
      kind: its kind's place in `kinds`.
      value: its risk, or the upper limit of one without a hit.
      zero: whether it is such a limit.
      kinds: names of the kinds; the original's is "original".
      means: of each group, geometric; groups stand in the order of these, the highest first.
      parts: variance, lower and upper limit by component: queries, kinds, variants, error.
    """

    group: Int[np.ndarray, " n"]
    kind: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    zero: Bool[np.ndarray, " n"]
    kinds: Sequence[str]
    means: Float[np.ndarray, " Q"]
    parts: Mapping[str, Mapping[str, float]]


def groups_plot(points: VariantPoints) -> Markup:
    """Each group's risks in a column, as inline SVG."""
    with drawing(*_WHOLE) as (figure, axes):
        _draw_groups(axes, points, {colour: colour for colour in _COLOURS})
        label = f"Risks of {len(points.value)} variants of {len(points.means)} queries."
        return inline_svg(figure, "variants", label)


def parts_plot(points: VariantPoints) -> Markup:
    """The variance components with their intervals, as inline SVG."""
    with drawing(*_HALF) as (figure, axes):
        _draw_parts(axes, points, {colour: colour for colour in _COLOURS})
        return inline_svg(figure, "parts", "What the differences between estimates are owed to.")


def plot_sensitivity(points: VariantPoints, path: Path) -> bytes:
    """Both pictures, one above the other, as the content of a PNG or SVG file of that name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=_FILE, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(2.6, 1))
    _draw_groups(above, points, _COLOURS)
    _draw_parts(below, points, _COLOURS)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.minorticks_off()
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:].lower(), dpi=150)
    return file.getvalue()


def _draw_groups(axes: Any, points: VariantPoints, colours: Mapping[str, str]) -> None:
    """Kinds have markers of their own, side by side; originals are filled, zeros point down."""
    order = np.argsort(-np.nan_to_num(points.means, nan=-np.inf), kind="stable")
    column = np.empty(len(order), int)
    column[order] = 1 + np.arange(len(order))
    shown = [kind for kind in points.kinds if kind != _ORIGINAL]
    width = 0.7 / max(len(shown), 1)
    size = 16 if len(order) <= 60 else 6
    handles = []
    for k, kind in enumerate(points.kinds):
        own = points.kind == k
        original = kind == _ORIGINAL
        place = 0.0 if original else (shown.index(kind) - (len(shown) - 1) / 2) * width
        x, y = column[points.group] + place, points.value
        hit, zero = own & ~points.zero, own & points.zero
        marker = "*" if original else _MARKERS[shown.index(kind) % len(_MARKERS)]
        style: Any = {
            "facecolor": colours[INK] if original else colours[ACCENT],
            "alpha": 1.0 if original else 0.55,
            "linewidth": 0,
            "zorder": 3 if original else 2,
        }
        area = 4 * size if original else size
        handles.append(axes.scatter(x[hit], y[hit], s=area, marker=marker, **style))
        axes.scatter(
            x[zero], y[zero], s=size, marker="v", facecolor=colours[PANEL],
            edgecolor=colours[INK] if original else colours[ACCENT], linewidth=0.8,
        )  # fmt: skip
    axes.hlines(
        points.means, column - 0.42, column + 0.42,
        color=colours[MUTED], lw=0.9, zorder=1,
    )  # fmt: skip
    axes.set(yscale="log", xlim=(0.4, len(order) + 0.6))
    axes.set(xlabel="base query, by its variants' mean", ylabel="risk of each variant")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(visible=False, axis="x")
    axes.grid(visible=True, axis="y", color=colours[LINE])
    axes.set_axisbelow(True)
    scientific(axes.yaxis)
    legend = axes.legend(
        handles, [_plain(kind) for kind in points.kinds], loc="lower left", bbox_to_anchor=(0, 1),
        ncols=min(len(points.kinds), 8), borderaxespad=0, frameon=False,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _plain(kind: str) -> str:
    """A kind's name, which a file may have given, in letters that every font has."""
    name = ascii(shorten(kind, _NAME))[1:-1]
    return f" {name}" if name.startswith("_") else name  # matplotlib hides those


def _draw_parts(axes: Any, points: VariantPoints, colours: Mapping[str, str]) -> None:
    """Standard deviations, which add as squares; a component below 0 is drawn as 0."""
    names = [name for name in _PARTS if np.isfinite(points.parts[name]["variance"])]
    root = lambda field: np.sqrt(  # noqa: E731
        np.maximum([points.parts[name][field] for name in names], 0.0)
    )
    places, sd = -np.arange(len(names)), root("variance")
    axes.barh(places, sd, height=0.55, color=colours[ACCENT], alpha=0.55)
    axes.hlines(places, root("lower"), root("upper"), color=colours[INK], lw=1)
    axes.set_yticks(places, [_PARTS[name] for name in names])
    axes.set(xlabel="standard deviation, orders of magnitude", xlim=(0, None))
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=colours[LINE])
    axes.set_axisbelow(True)
