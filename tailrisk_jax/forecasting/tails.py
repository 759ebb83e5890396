"""The tail of the risks of queries: one straight line, fitted in four ways.

The risk p of a random query is put on the scale psi = -log(-log p), on which tails are taken to be
exponential:

    log P(Psi > psi) = a psi + b,    a < 0,

so that the worst of n queries lies near Q_psi(n) = -(log n + b) / a. Everything here takes log p,
and loses nothing at risks that underflow.

Source: Jones et al. 2025, arXiv 2502.16797.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.scipy.special import digamma
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from tailrisk_jax.errors import InputError

Fit = Literal["peaks", "ols", "midpoint", "digamma"]
"""How the line is fitted; see `fit_tail`."""
FITS: tuple[str, ...] = get_args(Fit)
"""Its values."""

HIGHEST = 0.999  # risks above count as this one: hundreds of draws don't tell them apart
_FARTHEST, _NODES = 40.0, 200  # of the mean over a tail; what lies beyond has mass exp(-40)


@struct.dataclass
class Tail:
    """log P(Psi > psi) = slope psi + intercept, above `threshold`; over the leading axes.

    Attributes:
      slope, intercept: a and b; the scale of the tail is -1 / a.
      threshold: psi of the lowest estimate that was fitted.
      num_tail: how many were; fewer than asked for where fewer are above 0.
      num_queries: m, with those whose estimate is 0, without those that have none.
    """

    slope: Float[Array, "*batch"]
    intercept: Float[Array, "*batch"]
    threshold: Float[Array, "*batch"]
    num_tail: Float[Array, "*batch"]
    num_queries: Float[Array, "*batch"]


def psi_of(log_p: Float[ArrayLike, "*batch"]) -> Float[Array, "*batch"]:
    """psi = -log(-log p), of log p.

    Edges: p = 0 gives -inf, p above HIGHEST its psi (6.9), NaN NaN.
    """
    log_p = jnp.minimum(jnp.asarray(log_p, float), math.log(HIGHEST))
    return -jnp.log(-log_p)


def log_p_of(psi: Float[ArrayLike, "*batch"]) -> Float[Array, "*batch"]:
    """log p = -exp(-psi), the inverse of `psi_of` below HIGHEST; -inf gives -inf."""
    return -jnp.exp(-jnp.asarray(psi, float))


def default_top(num_queries: int) -> int:
    """How many of the riskiest queries are fitted: a tenth, but at least 10.

    The measure of it is experiments/forecasting: fewer make the forecast noisier, more let in
    queries that are not of the tail.
    """
    return max(10, num_queries // 10)


def fit_tail(psi: Float[ArrayLike, "*batch M"], *, top: int, fit: Fit = "peaks") -> Tail:
    """Fits the line to the `top` largest psi.

    With psi_(1) >= psi_(2) >= .. the estimates of m queries and k = top:

        peaks     maximum likelihood of the exponential peaks over psi_(k): the scale is
                  s = mean_{j<k}(psi_(j) - psi_(k)), a = -1 / s, b = log(k / m) + psi_(k) / s
        ols       least squares of log(j / m) on psi_(j), j <= k: Jones et al.'s
        midpoint  the same with log((j - 1/2) / m) (Gabaix & Ibragimov 2011)
        digamma   the same with digamma(j) - digamma(m + 1), the mean of log P(Psi > psi_(j))

    In an exponential tail ols forecasts too high, the others nearly without bias
    (experiments/forecasting).

    Edges. NaN is a query without an estimate: left out. -inf is an estimate of 0, which is known
    only to be low: it counts in m and is never fitted, so with fewer than `top` above 0 those are
    fitted alone. No spread in what is fitted: slope -inf. Fewer than two: NaN.
    Raises: InputError where top is less than 2 or more than M, or fit is unknown.
    Source: Jones et al. 2025, arXiv 2502.16797; Smith 1987, Annals of Statistics 15 (peaks).
    """
    psi = jnp.asarray(psi, float)
    check_top(top, psi.shape[-1])
    if fit not in FITS:
        raise InputError(f"fit is {fit!r}; give one of {', '.join(FITS)}")
    there = ~jnp.isnan(psi)
    largest = jax.lax.top_k(jnp.where(there, psi, -jnp.inf), top)[0]
    return line_through(largest, jnp.sum(there, axis=-1).astype(psi.dtype), fit)


def line_through(
    largest: Float[Array, "*batch k"], num_queries: Float[Array, "*batch"], fit: Fit
) -> Tail:
    """`fit_tail` of the k largest of `num_queries` psi, the largest first."""
    fitted = largest > -jnp.inf
    count = jnp.sum(fitted, axis=-1).astype(largest.dtype)
    threshold = jnp.min(largest, axis=-1, where=fitted, initial=jnp.inf)
    above = jnp.where(fitted, largest - threshold[..., None], 0.0)  # nothing large cancels
    log_m = jnp.log(num_queries)
    if fit == "peaks":
        slope = (1 - count) / jnp.sum(above, axis=-1)
        level = jnp.log(count) - log_m
    else:
        rank = jnp.arange(1.0, largest.shape[-1] + 1, dtype=largest.dtype)
        positions = {
            "ols": jnp.log(rank) - log_m[..., None],
            "midpoint": jnp.log(rank - 0.5) - log_m[..., None],
            "digamma": digamma(rank) - digamma(num_queries + 1)[..., None],
        }[fit]
        mean_x, mean_y = (
            jnp.sum(jnp.where(fitted, x, 0.0), axis=-1) / count for x in (above, positions)
        )
        x = jnp.where(fitted, above - mean_x[..., None], 0.0)
        y = jnp.where(fitted, positions - mean_y[..., None], 0.0)
        slope = jnp.sum(x * y, axis=-1) / jnp.sum(x * x, axis=-1)
        level = mean_y - slope * mean_x  # of the line at the threshold
    enough, spread = count >= 2, jnp.max(above, axis=-1) > 0
    slope = jnp.where(enough, jnp.where(spread, slope, -jnp.inf), jnp.nan)
    return Tail(
        slope=slope,
        intercept=jnp.where(spread, level - slope * threshold, jnp.inf),
        threshold=jnp.where(enough, threshold, jnp.nan),
        num_tail=count,
        num_queries=num_queries,
    )


def in_tail(tail: Tail, psi: Float[Array, "*batch M"]) -> Bool[Array, "*batch M"]:
    """Whether a query is of the tail: psi at the threshold, up to rounding, or above."""
    threshold = tail.threshold[..., None]
    return psi >= threshold - 8 * jnp.finfo(psi.dtype).eps * jnp.abs(threshold)


def tail_quantile(tail: Tail, num_queries: Float[ArrayLike, "*batch"]) -> Float[Array, "*batch"]:
    """Q_psi(n) = -(log n + b) / a, which a query exceeds with probability 1 / n.

    The worst of n queries lies below it with probability (1 - 1/n)^n, about 0.37, and its median
    is at n / log 2. `tail` and n broadcast. Edges: the threshold where the slope is -inf.
    """
    log_n = jnp.log(jnp.asarray(num_queries, float))
    return jnp.where(
        jnp.isneginf(tail.slope), tail.threshold, -(log_n + tail.intercept) / tail.slope
    )


def log_exceedance(tail: Tail, psi: Float[ArrayLike, "*batch"]) -> Float[Array, "*batch"]:
    """log P(Psi > psi) = a psi + b, at most 0: the line, which holds above the threshold alone."""
    psi = jnp.asarray(psi, float)
    flat = jnp.where(psi > tail.threshold, -jnp.inf, jnp.log(tail.num_tail / tail.num_queries))
    line = jnp.where(jnp.isneginf(tail.slope), flat, tail.slope * psi + tail.intercept)
    return jnp.minimum(line, 0.0)


def worst_exceeds(
    tail: Tail, psi: Float[ArrayLike, "*batch"], num_queries: Float[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """P(worst of n > psi) = 1 - (1 - P(Psi > psi))^n, without loss at small probabilities."""
    exceeds = jnp.exp(log_exceedance(tail, psi))
    return at_least_one(exceeds, num_queries)


def at_least_one(
    chance: Float[ArrayLike, "*batch"], number: Float[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """1 - (1 - chance)^number, without loss at small chances and large numbers."""
    return -jnp.expm1(jnp.asarray(number, float) * jnp.log1p(-jnp.asarray(chance, float)))


def tail_mean(tail: Tail) -> Float[Array, "*batch"]:
    """E[p | Psi > q] for the q that num_tail / num_queries of the queries exceed by the line.

        int_0^inf exp(-y) p(q + s y) dy,    p(psi) = exp(-exp(-psi)),    s = -1 / slope,

    by Gauss-Legendre quadrature; in closed form Gamma(1 + 1/s) t^(-1/s) P(1/s, t), t = -log p(q),
    with P the regularised incomplete gamma function, which underflows where s is small.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    y = (nodes + 1) * _FARTHEST / 2
    weights = weights * _FARTHEST / 2 * np.exp(-y)
    start = tail_quantile(tail, tail.num_queries / tail.num_tail)
    scale = jnp.where(jnp.isneginf(tail.slope), 0.0, -1 / tail.slope)
    p = jnp.exp(log_p_of(start[..., None] + scale[..., None] * jnp.asarray(y, start.dtype)))
    return jnp.sum(p * jnp.asarray(weights, start.dtype), axis=-1)


def check_top(top: int, num_queries: int) -> None:
    """Refuses a tail that is no part of the queries."""
    if not 2 <= top <= num_queries:
        raise InputError(
            f"the tail is to hold {top} of {num_queries} queries; give 2 to {num_queries}, or run "
            "more queries"
        )
