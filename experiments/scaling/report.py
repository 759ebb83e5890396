"""Tables of the results, and the exponents with which what was measured grows."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import linregress

from experiments.scaling.setting import LONG, OnCpu, OnTpu, Point
from experiments.scaling.tpu import PAIRS, program
from experiments.tables import spread, table
from tailrisk_jax.planning import phase_seconds, topology
from tailrisk_jax.planning.analytic import Phase

MIB, GIB = 2**20, 2**30
PARTS = ("draw", "score")
LARGE = 4  # MiB; beside less, the process's other memory counts
WORDS = {"new_tokens": "new tokens", "rows": "rows at once, relative"}


class Growth(NamedTuple):
    """y ~ x^exponent: by least squares on logarithms with its standard error, and at the end.

    Attributes:
      exponent, error: over all values; the error is NaN for fewer than three.
      last: between the last two.
    """

    exponent: float
    error: float
    last: float

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.2f}"
        return f"{self.exponent:.2f}{error}; {self.last:.2f}"


def growth(x: Sequence[float], y: Sequence[float]) -> Growth:
    """Of positive values."""
    if min(y) <= 0:
        return Growth(math.nan, math.nan, math.nan)
    log_x, log_y = ([math.log(value) for value in values] for values in (x, y))
    last = (log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])
    if len(x) < 3:
        return Growth(last, math.nan, last)
    fit: Any = linregress(log_x, log_y)
    return Growth(fit.slope, fit.stderr, last)


def sizes(series: str, points: Sequence[Point]) -> list[float]:
    """The values that an axis takes."""
    return [getattr(point, "samples" if series == LONG else series) for point in points]


class OfCpu:
    """What cpu.json holds, by point."""

    def __init__(self, content: dict[str, Any]):
        self.content, self.results = content, content["results"]
        self.setting = OnCpu.of(content["setting"])

    def seconds(self, point: Point, part: str) -> list[float]:
        """One per round."""
        return [run[part] for run in self.results["seconds"][str(point)]]

    def analysed(self, point: Point, part: str) -> float:
        """MiB by XLA's analysis: of one block, times those that run at once."""
        of_block = self.results["programs"][str(point)][part]
        at_once = min(of_block["blocks"], self.content["hardware"]["cores"])
        return of_block["bytes"] * at_once / MIB

    def peak(self, point: Point, part: str) -> float | None:
        """MiB by which the process grew."""
        found = self.results["peaks"][str(point)][part]
        return None if found is None else found / MIB

    def tables(self) -> dict[str, str]:
        """By the name of their place in the README."""
        return {
            "cpu-growth": f"{self._growth()}\n\n{self._where()}",
            "cpu-prompt": self._prompt(),
            "cpu-points": "\n\n".join(self._points(series) for series in self.setting.series),
            "cpu-memory": self._memory(),
            "cpu-compile": self._compile(),
        }

    def _growth(self) -> str:
        rows = []
        for series, points in self.setting.series.items():
            x = sizes(series, points)
            cells = [_name(series), f"{x[0]:g} to {x[-1]:g}"]
            for part in PARTS:
                medians = [statistics.median(self.seconds(point, part)) for point in points]
                cells.append(str(growth(x, medians)))
            for part in PARTS:
                cells.append(str(growth(x, [self.analysed(point, part) for point in points])))
            rows.append(cells)
        header = ["axis", "values", "draw: seconds", "score: seconds", "draw: MiB", "score: MiB"]
        return table(header, rows)

    def _points(self, series: str) -> str:
        points = self.setting.series[series]
        rows = []
        for size, point in zip(sizes(series, points), points, strict=True):
            cells = [f"{size:g}", spread(self.seconds(point, "prefill"), 3)]
            cells += [spread(self.seconds(point, part)) for part in PARTS]
            for part in PARTS:
                peak = self.peak(point, part)
                cells += [f"{self.analysed(point, part):.1f}"]
                cells += ["" if peak is None else f"{peak:.1f}"]
            rows.append(cells)
        header = [_name(series), "prefill alone, s", "draw, s", "score, s"]
        header += [f"{part}, MiB: {by}" for part in PARTS for by in ("XLA", "process")]
        return table(header, rows)

    def _memory(self) -> str:
        """How far the process's own peaks are from XLA's analysis."""
        rows = []
        for part in PARTS:
            ratios = [
                peak / self.analysed(point, part)
                for point in self.setting.points
                if (peak := self.peak(point, part)) and self.analysed(point, part) >= LARGE
            ]
            rows.append([part, spread(ratios) if ratios else ""])
        return table(
            [f"peak over analysis, where that is {LARGE} MiB or more", "median (least to most)"],
            rows,
        )

    def _prompt(self) -> str:
        """Drawing as so much per prompt and so much per sample."""
        rows = []
        for series in ("samples", LONG):
            points, queries = self.setting.series[series], self.setting.base.queries
            medians = [statistics.median(self.seconds(point, "draw")) for point in points]
            milliseconds = [1000 * value / queries for value in medians]
            fit: Any = linregress(sizes(series, points), milliseconds)
            alone = [value for point in points for value in self.seconds(point, "prefill")]
            prefill = 1000 * statistics.median(alone) / queries
            rows.append(
                [
                    str(points[0].prompt),
                    f"{fit.slope:.2f} ± {fit.stderr:.2f}",
                    f"{fit.intercept:.1f} ± {fit.intercept_stderr:.1f}",
                    f"{prefill:.2f}",
                    f"{prefill / fit.slope:.1f}",
                ]
            )
        header = [
            "prompt", "per sample, ms", "per query, ms", "prefilling one prompt, ms",
            "prefill / sample",
        ]  # fmt: skip
        return table(header, rows)

    def _compile(self) -> str:
        points, found = self.setting.compiled, self.results["compiling"]
        parts = ("prefill", *PARTS)
        columns = {
            part: [[run[part] for run in found[str(point)]] for point in points] for part in parts
        }
        rows = [
            [str(point.layers), *(spread(columns[part][i]) for part in parts)]
            for i, point in enumerate(points)
        ]
        depths = [point.layers for point in points]
        medians = [list(map(statistics.median, columns[part])) for part in parts]
        rows.append(["exponent; last doubling", *(str(growth(depths, one)) for one in medians)])
        return table(["layers", *(f"{part}, s" for part in parts)], rows)

    def _where(self) -> str:
        rounds = min(map(len, self.results["seconds"].values()))
        at = self.setting.base
        others = [x for own in self.results.get("others_cores", {}).values() for x in own]
        busy = max((x for x in others if x is not None), default=None)
        setting = self.setting
        text = (
            f"Base: {at.samples} samples, {at.queries} queries, prompt {at.prompt}, "
            f"{at.new_tokens} new tokens, {at.layers} layers of width {setting.width}, "
            f"vocabulary {setting.vocab:,}, float32; {rounds} rounds, seed {setting.seed}. "
        )
        if busy is not None:
            text += f"Other processes used up to {busy} cores meanwhile. "
        return text + _about(self.content)


class OfTpu:
    """What tpu.json holds, by point and program, beside the formula's figures."""

    def __init__(self, content: dict[str, Any]):
        self.content, self.results = content, content["results"]
        self.setting = OnTpu()

    def seen(self, point: Point, name: str) -> tuple[Phase, dict[str, Any]] | None:
        """Formula and compiler of one of a point's four programs, None where it wasn't compiled."""
        [phase] = [phase for phase in self.setting.phases(point) if phase.name == name]
        found = self.results.get(program(point, phase))
        if found is None:
            return None
        return phase, found | {"flops": found["step_flops"] * phase.steps}

    def along(self, axis: str, name: str) -> Iterator[tuple[float, Phase, dict[str, Any]]]:
        """What of an axis was compiled: value, formula and compiler."""
        points = self.setting.series[axis]
        for size, point in zip(sizes(axis, points), points, strict=True):
            found = self.seen(point, name)
            if found is not None:
                yield size, *found

    def tables(self) -> dict[str, str]:
        """By the name of their place in the README."""
        return {
            "tpu-growth": f"{self._growth()}\n\n{self._where()}",
            "tpu-draw": self._programs(PAIRS[0]),
            "tpu-score": self._programs(PAIRS[1]),
            "tpu-compile": self._compile(),
        }

    def _growth(self) -> str:
        rows = []
        for axis in self.setting.series:
            cells = []
            for name in ("decode", "score"):
                found = list(self.along(axis, name))
                if len(found) < 2:
                    cells += ["", "", ""]
                    continue
                x = [size for size, *_ in found]
                above = [seen["memory"] - phase.memory.parameters for _, phase, seen in found]
                whole = [phase.runs * seen["flops"] for _, phase, seen in found]
                least = [phase_seconds(phase, self._topology) for _, phase, _ in found]
                cells += [str(growth(x, values)) for values in (above, whole, least)]
            values = sizes(axis, self.setting.series[axis])
            rows.append([_name(axis), ", ".join(f"{value:g}" for value in values), *cells])
        kinds = ("memory", "operations", "least seconds")
        header = [f"{name}: {kind}" for name in ("decode", "score") for kind in kinds]
        return table(["axis", "values", *header], rows)

    def _programs(self, pair: slice) -> str:
        names = [phase.name for phase in self.setting.phases(self.setting.base)[pair]]
        points = {"base": self.setting.base}
        for axis, series in self.setting.series.items():
            named = zip(sizes(axis, series), series, strict=True)
            points |= {f"{_name(axis)} {size:g}": p for size, p in named if p != points["base"]}
        rows = []
        for name, point in points.items():
            both = [self.seen(point, one) for one in names]
            cells = [name]
            for phase, seen in filter(None, both):
                held = phase.memory.parameters
                ratios = (
                    phase.memory.total / seen["memory"],
                    (phase.memory.total - held) / (seen["memory"] - held),
                    phase.work.flops / seen["flops"],
                )
                cells += [
                    f"{seen['memory'] / GIB:.2f} ({seen['temporaries'] / GIB:.2f})",
                    f"{seen['flops'] / 1e12:,.1f}",
                    ", ".join(f"{ratio:.2f}" for ratio in ratios),
                    f"{phase.runs:,}",
                ]
            if None not in both:
                rows.append(cells)
        columns = ("GiB (temporaries)", "TFLOP", "formula / compiler", "calls")
        return table(["", *(f"{name}: {column}" for name in names for column in columns)], rows)

    def _compile(self) -> str:
        axis = "layers"
        points = self.setting.series[axis]
        rows = []
        for phase in self.setting.phases(self.setting.base):
            found = {
                size: one["processor_seconds"] for size, _, one in self.along(axis, phase.name)
            }
            cells = [f"{found[n]:.1f}" if n in found else "" for n in sizes(axis, points)]
            grown = str(growth(list(found), list(found.values()))) if len(found) > 1 else ""
            rows.append([phase.name, *cells, grown])
        depths = [f"{point.layers} layers" for point in points]
        return table(["processor seconds", *depths, "exponent; last doubling"], rows)

    @property
    def _topology(self):
        return topology(self.setting.topology)

    def _where(self) -> str:
        setting, at = self.setting, self.setting.base
        return (
            f"{setting.model}'s shapes in bfloat16 on {setting.topology}, mesh {setting.layout}; "
            f"base: {at.samples} samples, {at.queries} queries, prompt {at.prompt}, "
            f"{at.new_tokens} new tokens, {at.layers} layers, {setting.policies} policies; "
            f"{setting.draw_rows:,} rows drawn and {setting.score_rows:,} scored at once. "
            f"{_about(self.content)}"
        )


def read(path: Path) -> dict[str, Any] | None:
    """A results file, None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def _name(axis: str) -> str:
    return WORDS.get(axis, axis)


def _about(content: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    where = f"{content['hardware']['cpu']}, {content['hardware']['cores']} cores"
    status = "" if content["status"] == "complete" else f" {content['status'].upper()}."
    return f"{where}; {packages}; {', '.join(content['dates'])}.{status}"
