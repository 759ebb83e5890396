"""Distributions of queries' risks whose tails are known, and ways of estimating a risk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import stats

from tailrisk_jax.estimators import clopper_pearson
from tailrisk_jax.forecasting import QueryRisks, query_risks

LOG_P = -np.geomspace(1e-4, 200, 20_000)[::-1]  # where distributions are tabulated
IS_ERROR = 0.2  # relative standard error of an estimate by importance sampling
SAMPLES = 500  # of a Monte Carlo estimate


@dataclasses.dataclass(frozen=True)
class Population:
    """Queries with log p < 0; `exceeds` is P(log p > x), falling from 1 to 0 on LOG_P."""

    name: str
    exceeds: Callable[[np.ndarray], np.ndarray]

    def at(self, chance: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """The log p that a query exceeds with this chance."""
        table = self.exceeds(LOG_P)
        log_chance = np.log(np.maximum(table, 1e-300))
        return np.interp(-np.log(chance), -log_chance, LOG_P)

    def draw(self, rng: np.random.Generator, *shape: int) -> Float[np.ndarray, "*shape"]:
        """log p of queries."""
        return self.at(1 - rng.random(shape))

    def worst(
        self, rng: np.random.Generator, number: float, size: int
    ) -> Float[np.ndarray, " size"]:
        """log p of the worst of `number` queries, `size` times."""
        return self.at(-np.expm1(np.log(1 - rng.random(size)) / number))

    def mean(self) -> float:
        """E[p] = int P(p > t) dt."""
        return float(np.trapezoid(self.exceeds(LOG_P) * np.exp(LOG_P), LOG_P))


def exponential(log_p: np.ndarray) -> np.ndarray:
    """psi - 2.9 below is exponential with scale 0.15: 1.2e-4 at 1/100, 1e-2 at 1/10,000."""
    return np.exp(-np.maximum(-np.log(-log_p) + 2.9, 0) / 0.15)


def log_normal(log_p: np.ndarray) -> np.ndarray:
    """8.7e-5 at 1/100, 1.4e-3 at 1/10,000; almost no mass is cut at p = 1."""
    return stats.norm.sf(log_p, -14, 2)


def less_rare(log_p: np.ndarray) -> np.ndarray:
    """Log-normal too: 6e-3 at 1/10, where Monte Carlo sees hits, and 0.24 at 1/10,000."""
    return stats.norm.sf(log_p, -7, 1.5)


def bimodal(log_p: np.ndarray) -> np.ndarray:
    """One query in 200 is of a kind that is riskier by four orders of magnitude."""
    return 0.995 * stats.norm.sf(log_p, -14, 1.5) + 0.005 * stats.norm.sf(log_p, -5, 1)


POPULATIONS = (
    Population("exponential in psi", exponential),
    Population("log-normal", log_normal),
    Population("log-normal, less rare", less_rare),
    Population("bimodal", bimodal),
)


def exact(rng: np.random.Generator, log_p: np.ndarray) -> QueryRisks:
    """The risks themselves."""
    return query_risks(np.exp(log_p))


def importance(rng: np.random.Generator, log_p: np.ndarray) -> QueryRisks:
    """Unbiased estimates with a log-normal error, which their limits show."""
    sd = np.sqrt(np.log1p(IS_ERROR**2))
    value = np.exp(log_p + sd * rng.normal(size=log_p.shape) - sd**2 / 2)
    z = stats.norm.isf(0.025)
    return query_risks(
        value, stderr=IS_ERROR * value, lower=value * np.exp(-z * sd), upper=value * np.exp(z * sd)
    )


def monte_carlo(rng: np.random.Generator, log_p: np.ndarray) -> QueryRisks:
    """SAMPLES answers to each query."""
    hits = rng.binomial(SAMPLES, np.exp(log_p))
    limits = clopper_pearson(hits, np.full_like(hits, SAMPLES))
    return query_risks(hits / SAMPLES, lower=limits.lower, upper=limits.upper)


ESTIMATES = {"exact": exact, "importance": importance, "Monte Carlo": monte_carlo}
