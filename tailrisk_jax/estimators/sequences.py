"""Estimates watched while sampling goes on: when to stop, and how they ran."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.certificates import asymptotic_sequence, betting_lower
from tailrisk_jax.estimators.estimate import importance
from tailrisk_jax.estimators.intervals import Interval


def watched_interval(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
    tuned_for: int = 1000,
) -> Interval:
    """An interval of E_p[h] that sampling may be stopped on, at any time and for any reason.

    Its lower limit is `betting_lower` on single draws, a certificate; its upper limit is that of
    `asymptotic_sequence`, which holds asymptotically and is blind to harm that no draw reached.
    Each at (1 + level) / 2.

    Edges: (0, inf) without hits.
    Raises: ValueError as `importance`.
    """
    side = (1 + checks.level(level)) / 2
    estimate = importance(scores, log_weights, mask=mask)
    upper = asymptotic_sequence(
        estimate.value, estimate.stderr, estimate.num_samples, level, tuned_for
    ).upper
    lower = betting_lower(scores, log_weights, level=side, mask=mask, block=1)
    return Interval(lower=lower, upper=upper, kind="watched")


def relative_width(value: Float[ArrayLike, "*batch"], interval: Interval) -> Float[Array, "*batch"]:
    """(upper - lower) / (2 value): what `until` bounds; inf where there is no hit."""
    half = (checks.real(interval.upper) - checks.real(interval.lower)) / 2
    return jnp.where(checks.real(value) > 0, half / checks.real(value), jnp.inf)


@struct.dataclass
class Running:
    """Estimates from the first `num_samples` draws, [*batch, S]; limits by `log_t_interval`."""

    num_samples: Int[Array, " S"]
    value: Float[Array, "*batch S"]
    lower: Float[Array, "*batch S"]
    upper: Float[Array, "*batch S"]


def running(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    *,
    points: int = 20,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Running:
    """`importance` on the first n draws, for about `points` values of n, evenly on the log scale.

    For plots of convergence; limits that are looked at many times do not hold at their level.

    Raises: ValueError as `importance`.
    """
    scores, log_weights, mask = checks.draws(scores, log_weights, mask)
    size = scores.shape[-1]
    counts = np.unique(np.geomspace(1, size, min(points, size)).round().astype(np.int32))
    return _running(scores, log_weights, mask, jnp.asarray(counts), checks.level(level))


@partial(jax.jit, static_argnames="level")
def _running(scores, log_weights, mask, counts, level: float) -> Running:
    positions = jnp.broadcast_to(jnp.arange(scores.shape[-1], dtype=counts.dtype), scores.shape)

    def first(count):
        found = importance(scores, log_weights, level=level, mask=mask & (positions < count))
        return found.value, found.lower, found.upper

    rows = (jnp.moveaxis(x, 0, -1) for x in jax.lax.map(first, counts))
    return Running(counts, *rows)


@struct.dataclass
class Replicates:
    """What R repeats of a run say of its error bar.

    Attributes:
      values: each repeat's estimate, [*batch, R].
      spread: their standard deviation: the true error of one repeat, known to about
        1 / sqrt(2 (R - 1)) of itself.
      claimed: root mean square of the repeats' own standard errors, unknown ones left out.
    """

    values: Float[Array, "*batch R"]
    spread: Float[Array, "*batch"]
    claimed: Float[Array, "*batch"]


def replicates(
    scores: Float[ArrayLike, "*batch R N"],
    log_weights: Float[ArrayLike, "*batch R N"],
    *,
    mask: Bool[ArrayLike, "*batch R N"] | None = None,
) -> Replicates:
    """`importance` on each of R repeats, and their spread beside the error that they claim.

    A spread far above the claimed error says that the error bar misses a rare contribution, which
    only some repeats drew.

    Edges: spread NaN for one repeat; claimed NaN where no repeat shows a spread.
    Raises: ValueError as `importance`.
    """
    found = importance(scores, log_weights, mask=mask)
    repeats = found.value.shape[-1]
    spread = jnp.std(found.value, axis=-1, ddof=1) if repeats > 1 else found.value[..., 0] * jnp.nan
    known = ~jnp.isnan(found.stderr)
    squares = jnp.where(known, found.stderr, 0.0) ** 2
    claimed = jnp.sqrt(jnp.mean(squares, axis=-1, where=known))
    return Replicates(values=found.value, spread=spread, claimed=claimed)
