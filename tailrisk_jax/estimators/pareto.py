"""Pareto-smoothed importance sampling: how heavy is the tail of the weights, and a smoothed mean.

The largest M = min(n / 5, 3 sqrt(n)) weights are fitted by a generalised Pareto distribution, whose
shape k tells how many moments the weights have: below 1/2 a variance, below 1 a mean. Above 0.7 no
feasible number of draws gives a reliable mean.

Source: Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto smoothed importance sampling, JMLR 25;
the fit is by Zhang & Stephens 2009, Technometrics 51, with the weak prior of the former.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.estimate import Estimate, importance
from tailrisk_jax.estimators.logspace import contributions

_LEAST_TAIL = 5  # with fewer values there is no fit, and k is inf
_PRIOR_SPREAD, _PRIOR_DRAWS, _PRIOR_K = 3, 10, 0.5


@struct.dataclass
class Tail:
    """The largest values of a row, scaled by its largest, and the Pareto fitted to them.

    `log_values` [..., M] from the largest down; `places` their indices; `length` how many of them
    lie above `cutoff` and count; `k` and `sigma` the fit, k inf where there is none.
    """

    log_values: Float[Array, "*batch M"]
    places: Int[Array, "*batch M"]
    length: Int[Array, "*batch"]
    cutoff: Float[Array, "*batch"]
    k: Float[Array, "*batch"]
    sigma: Float[Array, "*batch"]


def pareto_k(
    log_weights: Float[ArrayLike, "*batch N"], *, mask: Bool[ArrayLike, "*batch N"] | None = None
) -> Float[Array, "*batch"]:
    """k-hat of weights exp(log_weights) >= 0, or of contributions w h, over the last axis.

    -inf is a weight of 0, and counts as a draw.

    Edges: inf where fewer than five values lie above the cutoff (few draws, few hits, or ties);
    NaN where a weight is NaN or +inf.
    Raises: ValueError for no draws, or a mask of another shape.
    """
    checks.same_shape(log_weights=log_weights)
    return _pareto_k(checks.real(log_weights), checks.mask(mask, log_weights))


@jax.jit
def _pareto_k(log_x: Float[Array, "*batch N"], mask: Bool[Array, "*batch N"]):
    return _fit(log_x, mask).k


def psis(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Estimate:
    """value = mean of w h with its largest values replaced by quantiles of their Pareto fit.

    Biased, usually downwards, in exchange for less spread where a few draws carry the estimate.
    The quantiles are cut at the largest w h seen. All figures are those of `importance` on the
    smoothed contributions, but for ess, mean_weight and its z, which are of the weights as they
    were.

    Edges: as `importance`, which it equals where k-hat is inf.
    Raises: ValueError as `importance`.
    """
    scores, log_weights, mask = checks.draws(scores, log_weights, mask)
    plain = importance(scores, log_weights, level=level, mask=mask)
    log_x, scored = contributions(scores, log_weights, mask)
    hit = jnp.where(jnp.isnan(scores), jnp.nan, jnp.where(log_x > -jnp.inf, 1.0, 0.0))
    smoothed = importance(hit, _smooth(log_x, scored), level=level, mask=mask)
    return dataclasses.replace(
        smoothed,
        hits=plain.hits,
        ess=plain.ess,
        mean_weight=plain.mean_weight,
        mean_weight_z=plain.mean_weight_z,
        estimator="psis",
        biased=True,
    )


@jax.jit
def _smooth(
    log_x: Float[Array, "*batch N"], mask: Bool[Array, "*batch N"]
) -> Float[Array, "*batch N"]:
    tail = _fit(log_x, mask)
    size = tail.log_values.shape[-1]
    order = jnp.arange(size, dtype=jnp.int32).reshape([1] * (log_x.ndim - 1) + [size])
    length = tail.length[..., None]
    rank = checks.real(length - order) - 0.5  # the largest comes first
    log_above = jnp.log1p(-rank / checks.real(jnp.maximum(length, 1)))
    k = tail.k[..., None]
    safe_k = jnp.where(jnp.abs(k) < 1e-12, 1.0, k)
    excess = jnp.where(safe_k == k, jnp.expm1(-safe_k * log_above) / safe_k, -log_above)
    quantiles = jnp.log(tail.sigma[..., None] * excess + jnp.exp(tail.cutoff[..., None]))
    counts = (order < length) & jnp.isfinite(k)
    shift = _shift(log_x, mask)
    values = jnp.where(counts, jnp.minimum(quantiles, 0.0), tail.log_values) + shift
    places = jnp.where(counts, tail.places, log_x.shape[-1])  # beyond the end: dropped

    def put(row, where, new):
        return row.at[where].set(new, mode="drop")

    for _ in range(log_x.ndim - 1):
        put = jax.vmap(put)
    return put(log_x, places, values)


def _shift(log_x, mask):
    top = jnp.max(jnp.where(mask, log_x, -jnp.inf), axis=-1, keepdims=True)
    return jnp.where(top == -jnp.inf, 0.0, top)


def _fit(log_x: Float[Array, "*batch N"], mask: Bool[Array, "*batch N"]) -> Tail:
    size = log_x.shape[-1]
    most = math.floor(min(size / 5, 3 * math.sqrt(size)))
    num = checks.real(jnp.sum(mask, axis=-1))
    wanted = jnp.floor(jnp.minimum(num / 5, 3 * jnp.sqrt(num))).astype(jnp.int32)
    shift = _shift(log_x, mask)
    log_x = jnp.where(mask, log_x, -jnp.inf) - shift
    values, places = jax.lax.top_k(log_x, most + 1)
    cutoff = jnp.take_along_axis(values, jnp.minimum(wanted, most)[..., None], axis=-1)
    cutoff = jnp.maximum(cutoff, math.log(jnp.finfo(log_x.dtype).tiny))
    length = jnp.sum(values > cutoff, axis=-1, dtype=jnp.int32)
    k, sigma = _generalised_pareto(jnp.exp(values) - jnp.exp(cutoff), length)
    k = jnp.where(length < _LEAST_TAIL, jnp.inf, k)
    k = jnp.where(jnp.isfinite(shift[..., 0]), k, jnp.nan)
    return Tail(values, places, length, cutoff[..., 0], k, sigma)


def _generalised_pareto(
    x: Float[Array, "*batch M"], length: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Shape and scale of the generalised Pareto behind the first `length` values, largest first.

    The posterior mean of b over a grid, k = mean log(1 - b x), shrunk a little towards 1/2.
    """
    size = x.shape[-1]
    num = checks.real(jnp.maximum(length, 1))
    kept = (
        jnp.arange(size, dtype=jnp.int32).reshape([1] * (x.ndim - 1) + [size]) < length[..., None]
    )
    quarter = length - (num / 4 + 0.5).astype(jnp.int32)
    quartile = jnp.take_along_axis(x, jnp.clip(quarter, 0, size - 1)[..., None], axis=-1)[..., 0]
    grid = 30 + jnp.floor(jnp.sqrt(num))

    def mean_log(b):
        return jnp.sum(jnp.where(kept, jnp.log1p(-b[..., None] * x), 0.0), axis=-1) / num

    def candidate(j):
        b = (1 - jnp.sqrt(grid / (j + 0.5))) / (_PRIOR_SPREAD * quartile) + 1 / x[..., 0]
        k = mean_log(b)
        log_posterior = num * (jnp.log(-b / k) - k - 1)
        return b, jnp.where(j < grid, log_posterior, -jnp.inf)

    b, log_posterior = jax.lax.map(candidate, checks.real(jnp.arange(30 + math.isqrt(size))))
    weights = jax.nn.softmax(log_posterior, axis=0)
    weights = jnp.where(weights >= 10 * jnp.finfo(x.dtype).eps, weights, 0.0)
    b = jnp.sum(b * weights, axis=0) / jnp.sum(weights, axis=0)
    k = mean_log(b)
    shrunk = (num * k + _PRIOR_DRAWS * _PRIOR_K) / (num + _PRIOR_DRAWS)
    return shrunk, -k / b
