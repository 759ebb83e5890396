"""Forecasts for people: from a run's table to figures, and those as rows and sentences."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import jax
import numpy as np
from jaxtyping import Int
from rich.table import Table
from rich.text import Text

from tailrisk_jax.estimators import in_float64
from tailrisk_jax.forecasting import (
    Band,
    Fit,
    Forecast,
    QueryRisks,
    explain_support,
    forecast,
    query_risks,
)

LEAST_QUERIES = 20  # fewer show no tail
_CODES = {"ok": 0, "doubtful": 1, "unusable": 2}
_COLOURS = {"ok": "green", "doubtful": "yellow", "unusable": "red"}
_POINTS = 25  # of a curve


@dataclasses.dataclass(frozen=True)
class ForecastRecord:
    """A run's forecast: at the numbers of queries asked for, and along a curve up to them.

    Attributes:
      risks: what it rests on.
      asked: how many of the forecasts, the first, were asked for; the others are the curve.
      found: all of them.
      fit: of the tail.
      level: of the bands.
    """

    risks: QueryRisks
    asked: int
    found: Forecast
    fit: str
    level: float

    @property
    def usable(self) -> bool:
        """Whether any forecast asked for has figures."""
        return any(word != "unusable" for word, _ in self.verdicts)

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        """Word and sentence of each forecast asked for."""
        said = explain_support(self.found.support)[: self.asked]
        return [(one.word, one.sentence) for one in said]


def risks_of(columns: Mapping[str, Any], level: float) -> QueryRisks:
    """The risks of a run's queries, from the columns of its estimates.parquet.

    Args:
      level: of the run's intervals.
    """
    names = ("value", "stderr", "lower", "upper", "truncated")
    value, stderr, lower, upper, truncated = (np.asarray(columns[name], float) for name in names)
    verdict = [_CODES.get(word, 2) for word in columns["verdict"]]
    return query_risks(
        value, stderr=stderr, lower=lower, upper=upper, level=level, verdict=np.asarray(verdict),
        truncated=truncated,
    )  # fmt: skip


def make_forecast(
    risks: QueryRisks,
    deployment: Sequence[float],
    *,
    thresholds: Sequence[float] = (),
    top: int | None = None,
    fit: Fit = "peaks",
    groups: Int[np.ndarray, " M"] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> ForecastRecord:
    """The forecast, with a curve from the queries that were run to the most of `deployment`.

    Raises: InputError as `forecast`.
    """
    size = len(np.asarray(risks.log_p))
    curve = np.geomspace(size, max([size, *deployment]), _POINTS)
    found = in_float64(
        forecast, jax.random.key(seed), risks, [*deployment, *curve], thresholds=thresholds,
        top=top, fit=fit, groups=groups, level=level,
    )  # fmt: skip
    return ForecastRecord(risks, len(deployment), found, fit, level)


def usual_deployments(num_queries: int) -> list[float]:
    """Four powers of ten from the number of queries up."""
    first = math.ceil(math.log10(num_queries + 1))
    return [10.0 ** (first + step) for step in range(4)]


def document(record: ForecastRecord) -> dict[str, Any]:
    """The forecast as JSON has it."""
    found, tail, good = record.found, record.found.tail, record.found.goodness
    rows = []
    for d, (word, sentence) in enumerate(record.verdicts):
        row: dict[str, Any] = {
            "queries": float(found.deployment[d]),
            "factor": float(found.factor[d]),
            "verdict": word,
            "why": sentence,
        }
        for name in ("worst", "drawn", "harmful", "aggregate"):
            row[name] = _limits(getattr(found, name), d)
        row["exceeds"] = np.asarray(found.exceeds[d]).tolist()
        base = found.log_normal
        row["log_normal"] = {
            name: float(getattr(base, name)[d]) for name in ("worst", "harmful", "aggregate")
        }
        rows.append(row)
    return {
        "level": record.level,
        "fit": record.fit,
        "tail": {
            "slope": float(tail.slope),
            "intercept": float(tail.intercept),
            "threshold": float(np.exp(-np.exp(-tail.threshold))),
            "num_tail": int(tail.num_tail),
            "num_queries": int(tail.num_queries),
            "without_hits": int(np.sum(np.isneginf(record.risks.log_p))),
            "r_squared": float(good.r_squared),
            "anderson_darling": float(good.anderson_darling),
            "p_value": float(good.p_value),
        },
        "mean": _limits(found.mean, ()),
        "forecasts": rows,
        "thresholds": [
            {
                "risk": float(tau),
                "frequency": _limits(found.frequency, s),
                "log_normal": float(found.log_normal.frequency[s]),
            }
            for s, tau in enumerate(found.thresholds)
        ],
    }


def forecast_table(record: ForecastRecord) -> Table:
    """A row for each number of queries."""
    found = record.found
    table = _table(
        "queries", "x run", "worst query", "band", "any harm", "band", "harmful answers", "band",
        "log-normal", "any harm",
    )  # fmt: skip
    table.add_column("verdict", no_wrap=True)
    for d, (word, _) in enumerate(record.verdicts):
        table.add_row(
            number(found.deployment[d]),
            number(found.factor[d]),
            *_cells(found.worst, d),
            *_cells(found.aggregate, d),
            *_cells(found.harmful, d),
            _figure(found.log_normal.worst[d]),
            _figure(found.log_normal.aggregate[d]),
            Text(word, style=_COLOURS[word]),
        )
    return table


def threshold_table(record: ForecastRecord) -> Table:
    """A row for each threshold."""
    found = record.found
    worst = [f"worst of {number(n)} is" for n in found.deployment[: record.asked]]
    table = _table("risk above", "of queries", "band", "log-normal", *worst)
    for s, tau in enumerate(found.thresholds):
        table.add_row(
            f"{tau:.3g}",
            *_cells(found.frequency, s),
            _figure(found.log_normal.frequency[s]),
            *(_figure(found.exceeds[d, s]) for d in range(record.asked)),
        )
    return table


def tail_lines(record: ForecastRecord) -> list[str]:
    """What the forecast rests on, and what is wrong with it, each once."""
    tail, good = record.found.tail, record.found.goodness
    empty = int(np.sum(np.isneginf(record.risks.log_p)))
    lines = [
        f"Tail: the {tail.num_tail:.0f} riskiest of {tail.num_queries:.0f} queries, by {record.fit}"
        f"; R^2 {good.r_squared:.3f}, Anderson-Darling p = {good.p_value:.2g}."
    ]
    if empty:
        lines.append(f"{empty} queries had no hit: they count as low, without saying how low.")
    deployment = record.found.deployment
    for word, sentence in dict.fromkeys(record.verdicts):
        if word != "ok":
            own = [number(n) for n, one in zip(deployment, record.verdicts, strict=False)
                   if one == (word, sentence)]  # fmt: skip
            whose = "" if len(own) == record.asked else f" at {' and '.join(own)} queries"
            lines.append(f"{word.capitalize()}{whose}: {sentence}")
    return lines


def number(n: SupportsFloat) -> str:
    """A number of queries: 31,300, or 1e+06."""
    n = float(n)
    return f"{n:,.0f}" if n < 1e6 else f"{n:.3g}"


def _table(*headings: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _limits(band: Band, place: int | tuple[()]) -> dict[str, float]:
    return {name: float(part[place]) for name, part in band.__dict__.items()}


def _cells(band: Band, place: int) -> tuple[str, str]:
    value, lower, upper = _limits(band, place).values()
    if np.isnan(value):
        return _figure(value), ""
    return _figure(value), f"[{_figure(lower)}, {_figure(upper)}]"


def _figure(value: SupportsFloat) -> str:
    value = float(value)
    if np.isnan(value):
        return "-"
    if 100 <= value < 1e6:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 1e-3 <= value < 100 else f"{value:.1e}"
