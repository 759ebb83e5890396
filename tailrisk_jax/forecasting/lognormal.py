"""The baseline: log p is normal over queries, body and tail alike."""

import jax.numpy as jnp
from flax import struct
from jax.scipy.special import log_ndtr, ndtr, ndtri
from jax.typing import ArrayLike
from jaxtyping import Array, Float


@struct.dataclass
class LogNormal:
    """log p ~ Normal(mean, sd^2), and p = 1 where that exceeds 0."""

    mean: Float[Array, "*batch"]
    sd: Float[Array, "*batch"]


def fit_log_normal(log_p: Float[ArrayLike, "*batch M"]) -> LogNormal:
    """Least squares of the ordered log p on normal scores, Phi^-1((i - 1/2) / m).

    Estimates of 0 (-inf) take the lowest ranks and are not fitted, so they count as low without
    saying how low (regression on order statistics). NaN is left out.

    Edges: fewer than two estimates above 0 give NaN.
    Source: Helsel & Cohn 1988, Water Resources Research 24.
    """
    log_p = jnp.minimum(jnp.asarray(log_p, float), 0.0)
    there = ~jnp.isnan(log_p)
    ordered = jnp.sort(jnp.where(there, log_p, -jnp.inf), axis=-1)[..., ::-1]
    count = jnp.sum(there, axis=-1, keepdims=True)
    fitted = ordered > -jnp.inf
    num = jnp.sum(fitted, axis=-1, keepdims=True)
    rank = jnp.arange(ordered.shape[-1]) + 0.5
    scores = jnp.where(fitted, -ndtri(jnp.where(fitted, rank / count, 0.5)), 0.0)
    values = jnp.where(fitted, ordered, 0.0)
    mean_x, mean_y = (jnp.sum(x, axis=-1, keepdims=True) / num for x in (scores, values))
    x = jnp.where(fitted, scores - mean_x, 0.0)
    sd = jnp.sum(x * values, axis=-1) / jnp.sum(x * x, axis=-1)
    mean = mean_y[..., 0] - sd * mean_x[..., 0]
    enough = num[..., 0] >= 2
    return LogNormal(mean=jnp.where(enough, mean, jnp.nan), sd=jnp.where(enough, sd, jnp.nan))


def log_normal_quantile(
    fitted: LogNormal, num_queries: Float[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """log p that a query exceeds with probability 1 / n; at most 0."""
    n = jnp.asarray(num_queries, float)
    return jnp.minimum(fitted.mean - fitted.sd * ndtri(1 / n), 0.0)


def log_normal_exceedance(
    fitted: LogNormal, log_p: Float[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """log P(log p of a query > this), for log p below 0."""
    return log_ndtr((fitted.mean - jnp.asarray(log_p, float)) / fitted.sd)


def log_normal_mean(fitted: LogNormal) -> Float[Array, "*batch"]:
    """E[min(p, 1)] = exp(mu + s^2 / 2) Phi(-mu / s - s) + Phi(mu / s)."""
    mean, sd = fitted.mean, fitted.sd
    inside = jnp.exp(mean + sd**2 / 2 + log_ndtr(-mean / sd - sd))
    return inside + ndtr(mean / sd)
