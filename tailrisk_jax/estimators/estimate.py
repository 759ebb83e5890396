"""Point estimates of E_p[h(y)] per query, with everything needed to judge them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.scipy.special import xlogy
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.intervals import clopper_pearson, log_interval
from tailrisk_jax.estimators.logspace import contributions, effective_size, moments, unscale


@struct.dataclass
class Estimate:
    """An estimate of E_p[h(y)], its interval and its diagnostics, each over the leading axes.

    Everything but `unscored` is computed over the n draws that have a score; w = p(y) / q(y) is a
    draw's weight, h in [0, 1] its score.

      value          mean(w h)
      stderr         sample standard error of value; NaN where the draws show no spread
                     (no hits, a single draw, all w h equal): unknown, never 0
      lower, upper   the default interval for display, see `monte_carlo` and `importance`
      num_samples    n
      unscored       fraction of all draws whose score is NaN
      hits           draws with h > 0 and a finite log-weight
      ess            (sum w)^2 / sum w^2; 0 where every weight is 0
      ess_harm       (sum w h)^2 / sum (w h)^2; 0 without hits. The relative standard error is
                     1 / sqrt(ess_harm), less a term 1 / n
      largest_share  largest w h over the sum of all; NaN without hits
      mean_weight    mean(w), expected to be 1 if the proposal reaches all of the target
      mean_weight_z  (mean_weight - 1) over its standard error; 0 where mean_weight is exactly 1,
                     +-inf where all weights are equal and not 1 or one is +inf, NaN for one draw
      kl             estimated KL(p h / E_p[h] || q), in nats: sum_i r_i log(n r_i) with
                     r_i = w_i h_i / sum_j w_j h_j, which for events is
                     sum_i r_i log w_i - log(value). It can't exceed log n: a value near log n is a
                     lower bound, and says that n draws are too few. About exp(kl) draws are needed
                     (Chatterjee & Diaconis 2018, arXiv 1511.01437). NaN without hits
    """

    value: Float[Array, "*batch"]
    stderr: Float[Array, "*batch"]
    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]
    num_samples: Int[Array, "*batch"]
    unscored: Float[Array, "*batch"]
    hits: Int[Array, "*batch"]
    ess: Float[Array, "*batch"]
    ess_harm: Float[Array, "*batch"]
    largest_share: Float[Array, "*batch"]
    mean_weight: Float[Array, "*batch"]
    mean_weight_z: Float[Array, "*batch"]
    kl: Float[Array, "*batch"]


def importance(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    *,
    level: float = 0.95,
) -> Estimate:
    """Importance sampling: value = mean_i w_i h_i, log w_i = log p(y_i) - log q(y_i), y_i ~ q.

    Estimates E_p[h], without bias where q > 0 wherever p h > 0. For a mixture of proposals log q
    is `mixture_log_prob` (the balance heuristic), with labels drawn at random or in fixed counts.
    The default interval is `log_interval`, which is asymptotic: it says nothing of harm that no
    draw reached (see `verdict`).

    Edges. NaN scores are left out of every mean and counted in `unscored`; with no score left,
    value, stderr, lower and upper are NaN. That assumes scores go missing at random. A draw with
    score 0 contributes 0 whatever its weight, so a weight that overflows float32 there leaves
    value as it is. No hits, or all weights 0: value 0, stderr NaN, lower 0, upper inf (no upper
    limit is known). One draw, or all w h equal: stderr NaN, lower 0, upper inf. A weight of +inf on
    a hit: value inf, stderr inf or NaN, lower 0, upper inf. Values below 1e-38 underflow to 0.

    Raises: ValueError for shapes that differ, no draws, level outside (0, 1), and, where values are
    known (not under jit or vmap), scores outside [0, 1] or a NaN log-weight on a scored draw.
    Traced, such a NaN makes mean_weight NaN, and value too unless the score there is 0.
    """
    checks.same_shape(scores=scores, log_weights=log_weights)
    log_weights = checks.log_weights(log_weights, scores)
    return _importance(checks.scores(scores), log_weights, checks.level(level))


def monte_carlo(scores: Float[ArrayLike, "*batch N"], *, level: float = 0.95) -> Estimate:
    """Monte Carlo: value = mean_i h_i, y_i ~ p. Estimates E_p[h] without bias.

    The same as `importance` with every weight 1, but for the interval: exact (`clopper_pearson`)
    in rows where all scores are 0 or 1, `log_interval` elsewhere.

    Edges: as in `importance`; in addition no hits has a finite upper limit, and all hits (or no
    hits, or one draw) a NaN stderr with an exact interval.
    Raises: ValueError as `importance`.
    """
    checks.same_shape(scores=scores)
    return _monte_carlo(checks.scores(scores), checks.level(level))


@partial(jax.jit, static_argnames="level")
def _importance(
    scores: Float[Array, "*batch N"], log_weights: Float[Array, "*batch N"], level: float
) -> Estimate:
    log_x, scored = contributions(scores, log_weights)
    x, w = moments(log_x, scored), moments(log_weights, scored)
    value, stderr = unscale(x.mean, x.shift), unscale(x.stderr, x.shift)
    interval = log_interval(value, stderr, level)
    total = jnp.sum(x.scaled, axis=-1)
    mean_log_scaled = jnp.sum(xlogy(x.scaled, x.scaled), axis=-1) / total

    excess = w.mean - jnp.exp(-w.shift)
    no_spread = jnp.isnan(w.stderr) & (w.count > 1)
    z = excess / jnp.where(no_spread, 0.0, w.stderr)
    z = jnp.where(excess == 0, 0.0, jnp.where(w.shift == jnp.inf, jnp.inf, z))
    return Estimate(
        value=value,
        stderr=stderr,
        lower=interval.lower,
        upper=interval.upper,
        num_samples=x.count,
        unscored=jnp.mean(~scored, axis=-1, dtype=jnp.float32),
        hits=jnp.sum((scores > 0) & jnp.isfinite(log_weights), axis=-1, dtype=jnp.int32),
        ess=effective_size(w.scaled),
        ess_harm=effective_size(x.scaled),
        largest_share=jnp.max(x.scaled, axis=-1) / total,
        mean_weight=unscale(w.mean, w.shift),
        mean_weight_z=z,
        kl=jnp.maximum(mean_log_scaled - jnp.log(x.mean), 0.0),
    )


@partial(jax.jit, static_argnames="level")
def _monte_carlo(scores: Float[Array, "*batch N"], level: float) -> Estimate:
    estimate = _importance(scores, jnp.zeros_like(scores), level)
    exact = clopper_pearson(estimate.hits, estimate.num_samples, level)
    events = jnp.all(jnp.isnan(scores) | (scores == 0) | (scores == 1), axis=-1)
    return dataclasses.replace(
        estimate,
        lower=jnp.where(events, exact.lower, estimate.lower),
        upper=jnp.where(events, exact.upper, estimate.upper),
    )
