"""Repeated estimates held against Monte Carlo's, where no exact truth is known.

The baseline has an error of its own, which all repeats share: E[(v - b)^2] is the estimate's mean
squared error plus the variance of b. That is taken off, and a query with too few baseline hits is
left out of every median. All figures are sampled: harm that neither side has drawn is in none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from tailrisk_jax.estimators import Interval, difference_interval, in_float64
from tailrisk_jax.studies import Observations, Weighting, report_of

LEAST_HITS = 10  # of the baseline, for a query whose figures count
LEVEL = 0.95
Z = 1.96
WORDS = ("ok", "doubtful", "unusable")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Monte Carlo of Q queries.

    Attributes:
      name: where it is from.
      value, stderr, lower, upper, hits, num_samples: as in `Estimate`, [Q].
      length: mean tokens of an answer, NaN where that isn't known, [Q].
    """

    name: str
    value: np.ndarray
    stderr: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    hits: np.ndarray
    num_samples: np.ndarray
    length: np.ndarray

    @property
    def tells(self) -> np.ndarray:
        """Whether it has hits enough to judge an estimate by, [Q]."""
        return (self.hits >= LEAST_HITS) & np.isfinite(self.stderr)

    @property
    def variance(self) -> np.ndarray:
        """Of one draw's score, [Q]; for an event P - P^2."""
        return self.num_samples * self.stderr**2

    @property
    def decade(self) -> np.ndarray:
        """d where 10^d <= value < 10^(d+1); NaN where it can't tell, [Q]."""
        with np.errstate(divide="ignore"):
            return np.where(self.tells, np.floor(np.log10(self.value)), np.nan)


def held_against(
    reference: Reference, observed: Observations, weighting: Weighting, sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for each query and N; all sizes share the draws, which are cut into repeats.

    rmse, bias and their limits are shares of the baseline's value. Equal-error ratios, in Monte
    Carlo draws per draw: `ratio` from the spread of the repeats, `own_ratio` from what each repeat
    says of its own error, `error_ratio` from the errors against the baseline. The first two can't
    see harm that the proposal misses; the third can, as far as the baseline is precise enough.
    """
    reports = {size: report_of(observed, weighting, level=LEVEL, size=size) for size in sizes}
    seconds = {size: _second_moments(observed, size) for size in sizes}
    for q, query in enumerate(observed.queries):
        for size in sizes:
            report = dataclasses.replace(reports[size], components=None)  # K before Q there
            told, second = jax.tree.map(lambda array, q=q: array[q], (report, seconds[size]))
            yield {
                "query": query.id,
                "samples": size,
                "baseline": reference.value[q],
                "baseline_lower": reference.lower[q],
                "baseline_upper": reference.upper[q],
                "baseline_hits": int(reference.hits[q]),
                "baseline_samples": int(reference.num_samples[q]),
                "tells": bool(reference.tells[q]),
                "decade": reference.decade[q],
                **_errors(reference, q, told, second),
                **_coverage(reference, q, told),
                **_diagnostics(told),
            }


def _second_moments(observed: Observations, size: int) -> np.ndarray:
    """Each repeat's estimate of E[h^2], [Q, R]."""
    scores, log_weights = observed.scores, observed.log_weights
    scored = observed.present & ~np.isnan(scores)
    squares = np.where(scored & (scores > 0), np.exp(log_weights) * scores**2, 0.0)
    count = scores.shape[1] // size
    sums, sizes = (
        x[:, : count * size].reshape(len(x), count, size).sum(axis=-1) for x in (squares, scored)
    )
    with np.errstate(invalid="ignore"):
        return sums / sizes


def _errors(reference: Reference, q: int, told: Any, second: np.ndarray) -> dict[str, Any]:
    """Of the repeats of one query at one N."""
    estimate = told.estimate
    known = np.isfinite(estimate.value)
    value, stderr, size = (
        np.asarray(x, np.float64)[known]
        for x in (estimate.value, estimate.stderr, estimate.num_samples)
    )
    truth, shared = reference.value[q], reference.stderr[q] ** 2
    repeats, squares = len(value), (value - truth) ** 2
    own = value.var(ddof=1) if repeats > 1 else np.nan
    off = value.mean() - truth
    mse = squares.mean() - shared
    of_squares = max(squares.var(ddof=1), 2 * own**2) if repeats > 1 else np.nan  # 2: if normal
    half = Z * np.sqrt(of_squares / repeats + 4 * off**2 * shared + 2 * shared**2)
    mse, least, most = max(mse, own), max(mse - half, 0.0), max(mse + half, own)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = reference.variance[q] / size.mean()
        fourth = ((value - value.mean()) ** 4).mean()
        spread = (fourth - own**2 * (repeats - 3) / (repeats - 1)) / repeats / own**2
        spread = max(spread, 2 / (repeats - 1))
        factor = np.exp(Z * np.sqrt(spread + shared / truth**2))
        ratio = unit / own if own > 0 else np.nan
        said = (second[known] - value**2) / (size * stderr**2)
        row = {
            "repeats": repeats,
            "value": value.mean(),
            "rmse": np.sqrt(mse) / truth,
            "rmse_lower": np.sqrt(least) / truth,
            "rmse_upper": np.sqrt(most) / truth,
            "bias": off / truth,
            "bias_error": np.sqrt(own / repeats + shared) / truth,
            "ratio": ratio,
            "ratio_lower": ratio / factor,
            "ratio_upper": ratio * factor,
            "own_ratio": np.median(said[np.isfinite(said)]) if np.isfinite(said).any() else np.nan,
            "error_ratio": unit / mse,
            "error_ratio_lower": unit / most,
            "error_ratio_upper": unit / least,
        }
    return {name: float(figure) for name, figure in row.items()} | {"repeats": repeats}


def _coverage(reference: Reference, q: int, told: Any) -> dict[str, Any]:
    """Shares of the repeats: whose interval holds the baseline's value, which has an error of its
    own, and whose difference from it has an interval that holds 0, which allows for that."""
    estimate, truth = told.estimate, reference.value[q]
    difference = in_float64(
        difference_interval,
        estimate.value,
        Interval(lower=estimate.lower, upper=estimate.upper),
        truth,
        Interval(lower=reference.lower[q], upper=reference.upper[q]),
    )
    held = (estimate.lower <= truth) & (truth <= estimate.upper)
    agrees = (difference.lower <= 0) & (difference.upper >= 0)
    ok = np.asarray(told.verdict.code) == WORDS.index("ok")
    return {
        "coverage": float(held.mean()),
        "agreement": float(agrees.mean()),
        "agreement_ok": float(agrees[ok].mean()) if ok.any() else np.nan,
    }


def _diagnostics(told: Any) -> dict[str, Any]:
    """Medians and shares over the repeats, and the first repeat's estimate."""
    estimate, codes = told.estimate, np.asarray(told.verdict.code)
    shares = {word: float(np.mean(codes == code)) for code, word in enumerate(WORDS)}
    return {
        "ess": float(np.median(estimate.ess)),
        "ess_harm": float(np.median(estimate.ess_harm)),
        "k_hat": float(np.median(told.k_hat)),
        "k_hat_harm": float(np.median(told.k_hat_harm)),
        "no_hit": float(np.mean(estimate.hits == 0)),
        **shares,
        **{
            f"first_{name}": float(getattr(estimate, name)[0])
            for name in ("value", "lower", "upper")
        },
    }
