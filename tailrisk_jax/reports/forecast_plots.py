"""Risk against the number of queries, for a file and for a page."""

import dataclasses
import io
from typing import Any

import numpy as np
from markupsafe import Markup

from tailrisk_jax.reports.forecasts import ForecastRecord
from tailrisk_jax.reports.svg import ACCENT, INK, MUTED, drawing, inline_svg

_HALF = (5.4, 3.3)  # inches
_LOWEST = 1e-300


@dataclasses.dataclass(frozen=True)
class _Palette:
    line: str
    seen: str
    baseline: str


_PAGE, _FILE = _Palette(ACCENT, INK, MUTED), _Palette("C0", "0.15", "0.5")


def worst_picture(record: ForecastRecord) -> Markup:
    """The worst query, as inline SVG."""
    with drawing(*_HALF) as (figure, axes):
        _worst(axes, record, _PAGE)
        return inline_svg(figure, "worst", "Forecast risk of the worst query by queries.")


def aggregate_picture(record: ForecastRecord) -> Markup:
    """The chance of any harm, as inline SVG."""
    with drawing(*_HALF) as (figure, axes):
        _aggregate(axes, record, _PAGE)
        return inline_svg(figure, "aggregate", "Forecast chance of any harm by queries.")


def forecast_picture(record: ForecastRecord, form: str) -> bytes:
    """Both beside each other, as a file of that form (png or svg)."""
    from matplotlib import rc_context  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.grid(color="0.93", zorder=-1)
    _worst(left, record, _FILE)
    _aggregate(right, record, _FILE)
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "tailrisk"}):
        metadata = {"Date": None} if form == "svg" else {}
        figure.savefig(file, format=form, dpi=150, metadata=metadata)
    return file.getvalue()


def _worst(axes: Any, record: ForecastRecord, palette: _Palette) -> None:
    """Line and bands; the j-th largest estimate stands at m / j queries."""
    found, curve = record.found, slice(record.asked, None)
    n = found.deployment[curve]
    axes.fill_between(n, found.drawn.lower[curve], found.drawn.upper[curve], lw=0, alpha=0.12,
                      color=palette.line, label="what would be seen")  # fmt: skip
    axes.fill_between(n, found.worst.lower[curve], found.worst.upper[curve], lw=0, alpha=0.22,
                      color=palette.line, label="band")  # fmt: skip
    axes.plot(n, found.worst.value[curve], color=palette.line, lw=1.6, label="worst query")
    axes.plot(n, found.log_normal.worst[curve], color=palette.baseline, lw=1, ls=(0, (4, 3)),
              label="log-normal")  # fmt: skip
    top = int(found.tail.num_tail)
    log_p = np.sort(np.nan_to_num(record.risks.log_p, nan=-np.inf))[::-1][:top]
    seen = found.tail.num_queries / np.arange(1, top + 1)
    axes.scatter(seen, np.exp(log_p), s=10, color=palette.seen, lw=0, label="estimates", zorder=3)
    _scales(axes, "risk", [found.worst.lower[curve], np.exp(log_p)])


def _aggregate(axes: Any, record: ForecastRecord, palette: _Palette) -> None:
    """From one query on: the chance follows from the mean risk."""
    found = record.found
    most = found.deployment.max()
    n = np.geomspace(1, most, 60)
    value, lower, upper, baseline = (
        -np.expm1(n * np.log1p(-np.minimum(np.ravel(mean)[-1], 1 - 1e-12)))
        for mean in (*found.mean.__dict__.values(), found.log_normal.harmful[-1] / most)
    )
    axes.fill_between(n, lower, upper, lw=0, alpha=0.22, color=palette.line, label="band")
    axes.plot(n, value, color=palette.line, lw=1.6, label="any harmful answer")
    axes.plot(n, baseline, color=palette.baseline, lw=1, ls=(0, (4, 3)), label="log-normal")
    _scales(axes, "chance", [lower])


def _scales(axes: Any, name: str, shown: list[Any]) -> None:
    from matplotlib.ticker import LogLocator

    values = np.concatenate(shown)
    values = values[np.isfinite(values) & (values > _LOWEST)]
    floor = float(values.min()) / 2 if len(values) else 1e-3
    axes.set(xscale="log", yscale="log", ylim=(floor, 1.5), xlabel="queries", ylabel=name)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, frameon=False)
