"""Tables for the terminal."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from tailrisk_jax.estimators import Replicates

_COLOURS = {"ok": "green", "doubtful": "yellow", "unusable": "red"}
_QUERY_WIDTH = 36
_MOST_SHOWN = 5  # components whose mean weights are all shown


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One query where the truth is known; each interval is (lower, upper).

    `monte_carlo_repeats` are the baseline's estimates from equal parts of its samples.
    `efficiency` bounds the exact equal-error ratio against Monte Carlo: how many Monte Carlo draws
    one draw of the proposal is worth.
    """

    query: str
    truth: tuple[float, float]
    value: float
    interval: tuple[float, float]
    monte_carlo: float
    monte_carlo_interval: tuple[float, float]
    monte_carlo_samples: int
    monte_carlo_repeats: tuple[float, ...]
    efficiency: tuple[float, float]
    verdict: str


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """Truth, importance sampling and Monte Carlo side by side."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("query", max_width=_QUERY_WIDTH, no_wrap=True)
    for heading in (
        "exact truth", "estimate", "95% interval", "Monte Carlo", "95% interval", "efficiency",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        table.add_row(
            Text(row.query),
            f"{row.truth[0]:.2e}",
            f"{row.value:.2e}",
            _interval(row.interval),
            f"{row.monte_carlo:.1e}" if row.monte_carlo else "0",
            _interval(row.monte_carlo_interval),
            _ratio(row.efficiency),
            _verdict(row.verdict),
        )
    return table


def estimates_table(columns: Mapping[str, Sequence[Any]]) -> Table:
    """The estimates of a study, from the columns of its estimates.parquet."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("query", max_width=_QUERY_WIDTH, no_wrap=True)
    for heading in ("estimate", "interval", "hits", "ESS", "largest share", "mean weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    names = ("query", "value", "lower", "upper", "hits", "ess_harm", "largest_share",
             "component_mean_weight", "verdict")  # fmt: skip
    for query, value, lower, upper, hits, ess, share, weights, word in zip(
        *(columns[name] for name in names), strict=True
    ):
        table.add_row(
            Text(" ".join(query.split())),
            f"{value:.2e}",
            _interval((lower, upper)),
            f"{hits}",
            f"{ess:.0f}",
            f"{share:.2f}",
            _mean_weights(weights),
            _verdict(word),
        )
    return table


def spread_line(repeats: Replicates) -> str:
    """How far repeats lay apart over the error that they claim: about 1 where that is right."""
    repeats = jax.tree.map(np.asarray, repeats)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = repeats.spread / repeats.claimed
    known = ratios[np.isfinite(ratios)]
    said = f"Spread between {repeats.values.shape[1]} repeats over the error they claim: "
    if not known.size:
        return said + "unknown, no query has a spread."
    return said + (
        f"median {np.median(known):.2f}, {known.min():.2f} to {known.max():.2f} "
        f"over {known.size} queries."
    )


def _mean_weights(weights: Sequence[float]) -> str:
    """One for each component; of many their range."""
    if len(weights) <= _MOST_SHOWN:
        return " ".join(f"{weight:.2g}" for weight in weights)
    known = np.asarray(weights)[~np.isnan(weights)]
    return f"{known.min():.2g} to {known.max():.2g} of {known.size}" if known.size else "none"


def _interval(interval: tuple[float, float]) -> str:
    """No probability exceeds 1, whatever an asymptotic limit says."""
    return f"[{interval[0]:.1e}, {min(interval[1], 1.0):.1e}]"


def _ratio(bounds: tuple[float, float]) -> str:
    lower, upper = (f"{bound:,.0f}" if bound >= 10 else f"{bound:.1f}" for bound in bounds)
    return f"{lower}x" if lower == upper else f"{lower}-{upper}x"


def _verdict(word: str) -> Text:
    return Text(word, style=_COLOURS[word])
