"""Pictures of the results, all axes logarithmic; grey lines grow linearly."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.scaling.report import GIB, LONG, PARTS, WORDS, OfCpu, OfTpu, sizes
from experiments.scaling.setting import AXES

COLOURS = {"draw": "C0", "score": "C1", "decode": "C0"}


def plot_cpu(of: OfCpu, path: Path) -> None:
    """Seconds and memory along each axis, and compile time along depth."""
    figure, panels = _figure(len(AXES), alone=1)
    for column, axis in enumerate(AXES):
        top, bottom = panels[:, column]
        for part in PARTS:
            for series in (axis, LONG) if axis == "samples" else (axis,):
                points = of.setting.series[series]
                x, colour = sizes(series, points), COLOURS[part]
                of_long = {"mfc": "white", "ls": "--"} if series == LONG else {}
                runs = [of.seconds(point, part) for point in points]
                label = f"{part}, prompt {points[0].prompt}" if axis == "samples" else part
                _spread(top, x, runs, label=label, color=colour, **of_long)
                analysed = [of.analysed(point, part) for point in points]
                bottom.plot(x, analysed, "o", ms=4, color=colour, label=label, **of_long)
                peaks = [of.peak(point, part) or float("nan") for point in points]
                bottom.plot(x, peaks, "_", ms=10, color="black", label=None)
        top.set_title(WORDS.get(axis, axis), fontsize=10)
    _linear(panels[:, :-1])
    panels[0, 0].set_ylabel("seconds (median, least to most)")
    panels[1, 0].set_ylabel("MiB: XLA (points), process (bars)")
    panels[0, 0].legend(fontsize=6, frameon=False)
    points, top = of.setting.compiled, panels[0, -1]
    for part in PARTS:
        runs = [[run[part] for run in of.results["compiling"][str(point)]] for point in points]
        _spread(top, [p.layers for p in points], runs, label=part, color=COLOURS[part])
    top.set_ylim(bottom=top.get_ylim()[0] / 4, top=top.get_ylim()[1] * 4)
    top.set_title("layers: compile, s", fontsize=10)
    panels[1, -1].set_visible(False)
    figure.savefig(path, dpi=100)


def plot_tpu(of: OfTpu, path: Path) -> None:
    """Memory above the parameters and operations of the study, by formula and by compiler."""
    figure, panels = _figure(len(of.setting.series))
    for column, (axis, points) in enumerate(of.setting.series.items()):
        x = sizes(axis, points)
        for name in ("decode", "score"):
            phases = [
                next(phase for phase in of.setting.phases(point) if phase.name == name)
                for point in points
            ]
            seen = list(of.along(axis, name))
            formula = (
                [(p.memory.total - p.memory.parameters) / GIB for p in phases],
                [p.runs * p.work.flops for p in phases],
            )
            compiled = (
                [(one["memory"] - p.memory.parameters) / GIB for _, p, one in seen],
                [p.runs * one["flops"] for _, p, one in seen],
            )
            for panel, line, dots in zip(panels[:, column], formula, compiled, strict=True):
                panel.plot(x, line, color=COLOURS[name], lw=1, label=f"{name}, formula")
                panel.plot(
                    [size for size, *_ in seen], dots, "o", ms=4, color=COLOURS[name],
                    label=f"{name}, compiler",
                )  # fmt: skip
        panels[0, column].set_title(WORDS.get(axis, axis), fontsize=10)
    _linear(panels)
    panels[0, 0].set_ylabel("GiB of a chip above parameters")
    panels[1, 0].set_ylabel("operations of a chip, whole study")
    panels[0, 0].legend(fontsize=6, frameon=False)
    figure.savefig(path, dpi=100)


def _figure(columns: int, *, alone: int = 0) -> tuple[Figure, Any]:
    """Two rows of panels that share their scale along a row, but for some at the end."""
    figure = Figure(figsize=(2.3 * (columns + alone), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, columns + alone)
    for panel in panels.flat:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.grid(color="0.93", zorder=-1)
        panel.tick_params(labelsize=7, which="both")
    for first, *others in panels[:, :columns]:
        for panel in others:
            panel.sharey(first)
            panel.tick_params(labelleft=False, which="both")
    return figure, panels


def _spread(panel: Any, x: Sequence[float], runs: Sequence[Sequence[float]], **style: Any) -> None:
    """Medians with a bar from the least to the most."""
    medians = [statistics.median(values) for values in runs]
    below = [m - min(values) for m, values in zip(medians, runs, strict=True)]
    above = [max(values) - m for m, values in zip(medians, runs, strict=True)]
    panel.errorbar(x, medians, yerr=(below, above), marker="o", ms=4, lw=1, capsize=2, **style)


def _linear(panels: Any) -> None:
    """A line of slope one through the middle of each, behind what is drawn."""
    for panel in panels.flat:
        (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
        x = [left, right]
        middle = (low * high) ** 0.5 / (left * right) ** 0.5
        panel.plot(x, [middle * value for value in x], color="0.75", lw=1, zorder=0)
        panel.set_xlim(left, right)
        panel.set_ylim(low, high)
