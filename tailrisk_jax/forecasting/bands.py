"""What else the data allow: tails as they may truly be, from resampled queries and estimates.

Each resample draws base queries anew, moves those of the tail along the fitted line, gives every
estimate a new error and fits again. How far that fit lies from the first, measured in its own
scale, is how far the first may lie from the truth; so each resample is reflected into one tail
that the truth may have:

    s' = s^2 / s*,    l' = l - s (l* - l) / s*,

with s the scale, l = Q_psi(m / k) and * of the resample. The quantiles of a quantity over these
tails are its bootstrap-t limits. Exact queries with an exponential tail are covered exactly but
for the number of resamples, whatever the fit: (l* - l) / s* and s* / s have the distribution of
their counterparts. An error of estimates widens the tail twice in the resamples and once in the
first fit; reflected, the tails have that widening taken out.

Source: Efron & Tibshirani 1993, ch. 12 (bootstrap-t); Caers & Maes 1998, Risk Analysis 18 (tails
resampled from the fit).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.scipy.special import ndtri
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from tailrisk_jax.forecasting.risks import QueryRisks, with_error
from tailrisk_jax.forecasting.tails import (
    Fit,
    Tail,
    in_tail,
    line_through,
    log_p_of,
    psi_of,
    tail_quantile,
)

_AT_ONCE = 50  # resamples held in memory
_MOVED = 2  # times the tail are drawn from its line
_LEAST = 2.0**-25  # of a uniform draw: its normal quantile is finite


@struct.dataclass
class Picture:
    """A tail and the queries below it, over the leading axes: as estimated, or resampled.

    Attributes:
      tails: the lines.
      body: mean over all queries of the risks that are not of the tail.
      frequency: share of the queries with a risk above each threshold.
    """

    tails: Tail
    body: Float[Array, "*batch"]
    frequency: Float[Array, "*batch S"]


def largest_psi(
    psi: Float[Array, "*batch M"], top: Int[ArrayLike, ""], most: int
) -> Float[Array, "*batch k"]:
    """The `top` largest psi, the largest first, filled up to `most` with -inf; NaN is left out."""
    found = lax.top_k(jnp.where(jnp.isnan(psi), -jnp.inf, psi), most)[0]
    return jnp.where(jnp.arange(most) < top, found, -jnp.inf)


def body_mean(
    log_p: Float[Array, "*batch M"], of_tail: Bool[Array, "*batch M"]
) -> Float[Array, "*batch"]:
    """Mean over the queries with an estimate, which is NaN elsewhere, of risks not of the tail."""
    there = ~jnp.isnan(log_p)
    rest = jnp.sum(jnp.exp(log_p), axis=-1, where=there & ~of_tail)
    return rest / jnp.sum(there, axis=-1)


def frequency(
    log_p: Float[Array, "*batch M"], thresholds: Float[Array, " S"]
) -> Float[Array, "*batch S"]:
    """Share of the queries with an estimate that it puts above each threshold, a log p."""
    above = log_p[..., None, :] > thresholds[:, None]
    return jnp.sum(above, axis=-1) / jnp.sum(~jnp.isnan(log_p), axis=-1)[..., None]


@partial(jax.jit, static_argnames=("most", "fit", "num_resamples"))
def resample(
    key: Key[Array, ""],
    risks: QueryRisks,
    rows: Int[Array, "G S"],
    num_rows: Int[ArrayLike, ""],
    thresholds: Float[Array, " S"],
    *,
    top: Int[ArrayLike, ""],
    most: int,
    fit: Fit,
    num_resamples: int,
) -> tuple[Picture, Picture]:
    """What the estimates say, and `num_resamples` that the truth may be.

    Queries of one base query are drawn together. Those of the 2 k riskiest (the tail, and as many
    more, as its threshold moves) get a new place on the line, psi = l - s log(2 u), u uniform;
    where they are of one base query the riskiest does, and the others move with it, as far apart as
    they are. So single queries are drawn from the line anew, and the likeness of variants is kept.

    Args:
      rows: the queries of each base query, from `rows_of`; after the first `num_rows` filling.
      top: how many queries are fitted; `most` is at least as many, and the array's size.
      thresholds: of `Picture.frequency`, as log p.

    Edges: resamples with fewer than two estimates above 0 are NaN.
    """

    def line(psi: Float[Array, " M"]) -> Tail:
        num_queries = jnp.sum(~jnp.isnan(psi)).astype(psi.dtype)
        return line_through(largest_psi(psi, top, most), num_queries, fit)

    psi = psi_of(risks.log_p)
    tail = line(psi)
    of_tail = in_tail(tail, psi)

    def picture(log_p: Float[Array, " M"], of_tail: Bool[Array, " M"], tail: Tail) -> Picture:
        return Picture(tail, body_mean(log_p, of_tail), frequency(log_p, thresholds))

    found = picture(risks.log_p, of_tail, tail)
    scale = -1 / tail.slope
    level = tail.num_queries / tail.num_tail  # the tail's share is kept, whatever a resample's m
    start = tail_quantile(tail, level)
    num_moved = jnp.minimum(_MOVED * tail.num_tail, jnp.sum(psi > -jnp.inf))
    is_row = jnp.arange(rows.shape[0]) < num_rows
    known = jnp.where(jnp.isnan(psi), -jnp.inf, psi)
    best = jnp.max(jnp.where(rows >= 0, known[rows], -jnp.inf), axis=1)
    place = jnp.maximum(num_moved, 1).astype(int) - 1
    least_moved = -jnp.sort(-known)[place]

    def one(uniform: Float[Array, "G _"]) -> Picture:
        uniform = uniform.astype(psi.dtype)
        row = (uniform[:, 0] * num_rows).astype(int)
        chosen = jnp.where(is_row[:, None], rows[row], -1)
        there = chosen >= 0
        excess = -scale * jnp.log(uniform[:, 1] * num_moved / tail.num_tail)
        shift = jnp.where(best[row] >= least_moved, start + excess - best[row], 0.0)[:, None]
        noise = risks.below[chosen], risks.above[chosen], ndtri(uniform[:, 2:])
        own = jnp.where(there, with_error(risks.log_p[chosen], *noise), jnp.nan)
        log_p = jnp.where(shift == 0, risks.log_p[chosen], log_p_of(psi[chosen] + shift))
        log_p = jnp.where(there, with_error(log_p, *noise), jnp.nan)
        return picture(own.ravel(), of_tail[chosen].ravel(), line(psi_of(log_p.ravel())))

    def some(key: Key[Array, ""]) -> Picture:
        shape = (_AT_ONCE, rows.shape[0], 2 + rows.shape[1])
        return jax.vmap(one)(jax.random.uniform(key, shape, jnp.float32, minval=_LEAST))

    parts = lax.map(some, jax.random.split(key, -(-num_resamples // _AT_ONCE)))
    drawn = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_resamples], parts)
    new_scale = scale**2 * -drawn.tails.slope
    new_start = start + scale * (tail_quantile(drawn.tails, level) - start) * drawn.tails.slope
    tails = Tail(
        slope=-1 / new_scale,
        intercept=new_start / new_scale - jnp.log(level),
        threshold=new_start,
        num_tail=jnp.broadcast_to(tail.num_tail, new_scale.shape),
        num_queries=jnp.broadcast_to(tail.num_queries, new_scale.shape),
    )
    may_be = Picture(
        tails, _reflected(found.body, drawn.body), _reflected(found.frequency, drawn.frequency)
    )
    return found, may_be


def _reflected(value: Array, drawn: Array) -> Array:
    """On the log scale; 0 where the value is, and the value where a resample shows none."""
    return jnp.where(drawn > 0, value**2 / drawn, value)
