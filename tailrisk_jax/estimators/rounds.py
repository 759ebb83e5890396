"""Several rounds of draws, each from a proposal of its own, made into one estimate."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.intervals import log_interval
from tailrisk_jax.estimators.weights import mixture_log_prob


@struct.dataclass
class Combined:
    """A weighted mean of rounds: `value`, its `stderr`, `log_interval`, and the rounds' shares."""

    value: Float[Array, "*batch"]
    stderr: Float[Array, "*batch"]
    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]
    shares: Float[Array, "R *batch"]


def combine_rounds(
    values: Float[ArrayLike, "R *batch"],
    stderrs: Float[ArrayLike, "R *batch"],
    pilot_variances: Float[ArrayLike, "R *batch"],
    *,
    level: float = 0.95,
) -> Combined:
    """value = sum_r s_r value_r, with shares s_r proportional to 1 / pilot_variances_r.

    Unbiased if every value is, given all earlier rounds, and if the pilot variances were fixed
    before their rounds' draws, by a pilot or by the draws of earlier rounds alone. Shares from
    `stderrs` themselves would be biased low: rounds that missed the rare harm have the smallest
    ones. stderr is sqrt(sum_r s_r^2 stderr_r^2).

    Edges: a pilot variance of inf gives a round no share; where one is 0, the rounds of variance 0
    share all of it; a NaN stderr of a round with a share makes stderr NaN, and the interval
    (0, inf).
    Raises: ValueError for shapes that differ, and negative or NaN pilot variances.
    """
    shape = checks.same_shape(values=values, stderrs=stderrs, pilot_variances=pilot_variances)
    if len(shape) < 1:
        raise ValueError(f"values has shape {shape}; give [R, ...], one entry per round")
    checks.not_negative("pilot_variances", pilot_variances)
    return _combine_rounds(
        *map(checks.real, (values, stderrs, pilot_variances)), checks.level(level)
    )


@partial(jax.jit, static_argnames="level")
def _combine_rounds(values, stderrs, variances, level: float) -> Combined:
    exact = jnp.any(variances == 0, axis=0, keepdims=True)
    precisions = jnp.where(exact, checks.real(variances == 0), 1 / variances)
    shares = precisions / jnp.sum(precisions, axis=0, keepdims=True)
    value = jnp.sum(jnp.where(shares > 0, shares * values, 0.0), axis=0)
    stderr = jnp.sqrt(jnp.sum(jnp.where(shares > 0, (shares * stderrs) ** 2, 0.0), axis=0))
    interval = log_interval(value, stderr, level)
    return Combined(
        value=value, stderr=stderr, lower=interval.lower, upper=interval.upper, shares=shares
    )


def balance_log_weights(
    log_p: Float[ArrayLike, "*batch N"],
    round_log_probs: Float[ArrayLike, "R *batch N"],
    counts: Int[ArrayLike, " R"],
) -> Float[Array, "*batch N"]:
    """log p - log sum_r (n_r / n) q_r: the balance heuristic over the draws of all rounds.

    Every draw is scored under the proposal of every round. Unbiased in `importance` if all
    proposals were fixed before the first draw; biased, though consistent, if later proposals were
    fitted to earlier draws, whose weights then depend on themselves.

    Raises: ValueError for counts that are negative or not [R].
    Source: Veach & Guibas 1995; for adaptive rounds Cornuet et al. 2012 (AMIS).
    """
    checks.not_negative("counts", counts)
    fractions = checks.real(counts) / jnp.sum(checks.real(counts))
    return checks.real(log_p) - mixture_log_prob(round_log_probs, jnp.log(fractions))
