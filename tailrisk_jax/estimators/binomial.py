"""Tails of the binomial distribution, accurate in float32.

jax.scipy.special.betainc takes differences of log-gamma functions, which at n = 10,000 leaves
errors near 1% in float32. Here the probability of the outcome k is taken by Loader's saddle-point
form, in which nothing large cancels, and the tail as a sum of ratios to it.

Source: C. Loader, Fast and accurate computation of binomial probabilities (2000).
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

_NEWTON_STEPS = 16


def _stirling_error(k: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """log k! - log(sqrt(2 pi k) (k / e)^k), for k >= 1."""
    exact = lax.lgamma(k + 1) - (k + 0.5) * jnp.log(k) + k - 0.5 * math.log(2 * math.pi)
    return jnp.where(k < 5, exact, (1 / 12 - (1 / 360) / k**2) / k)


def _deviance(
    k: Float[Array, "*batch"], mean: Float[Array, "*batch"], gap: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """k log(k / mean) + mean - k, where gap is mean - k without cancellation."""
    near = jnp.log1p(jnp.maximum(gap / k, -0.5))
    return gap - k * jnp.where(jnp.abs(gap) < k / 2, near, jnp.log(mean / k))


def log_pmf(
    k: Float[Array, "*batch"], n: Float[Array, "*batch"], log_odds: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """log P(X = k), X ~ Binomial(n, p), 1 <= k <= n, where log_odds = log p - log(1 - p)."""
    p, q = jax.nn.sigmoid(log_odds), jax.nn.sigmoid(-log_odds)
    failures = jnp.maximum(n - k, 1.0)
    gap = jnp.where(log_odds < 0, n * p - k, failures - n * q)
    inner = (
        _stirling_error(n)
        - _stirling_error(k)
        - _stirling_error(failures)
        - _deviance(k, n * p, gap)
        - _deviance(failures, n * q, -gap)
        + 0.5 * jnp.log(n / (2 * math.pi * k * failures))
    )
    return jnp.where(k == n, n * jax.nn.log_sigmoid(log_odds), inner)


def _tail_ratio(
    k: Float[Array, "*batch"], n: Float[Array, "*batch"], log_odds: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """P(X >= k) / P(X = k), summed term by term until the terms no longer count."""
    odds = jnp.exp(log_odds)

    def add(state):
        j, term, total = state
        term = term * odds * jnp.maximum(n - k - j, 0.0) / (k + j + 1)
        return j + 1, term, total + term

    ones = jnp.ones_like(k * odds)
    _, _, total = lax.while_loop(
        lambda state: jnp.any(state[1] > 1e-8 * state[2]), add, (jnp.zeros(()), ones, ones)
    )
    return total


def tail_log_odds(
    k: Float[Array, "*batch"], n: Float[Array, "*batch"], mass: ArrayLike
) -> Float[Array, "*batch"]:
    """The log-odds of the p at which P(X >= k) = mass, for 1 <= k <= n and mass <= 1/2.

    log P(X >= k) rises with the log-odds and is concave, with slope k (1 - p) P(X = k) / P(X >= k),
    so Newton's method converges from any start: one step from the right of the root, then
    monotonically from its left.
    """

    def step(_, log_odds):
        ratio = _tail_ratio(k, n, log_odds)
        excess = log_pmf(k, n, log_odds) + jnp.log(ratio) - jnp.log(mass)
        return log_odds - excess * ratio / (k * jax.nn.sigmoid(-log_odds))

    return lax.fori_loop(0, _NEWTON_STEPS, step, jnp.log(k / (n - k + 1)))
