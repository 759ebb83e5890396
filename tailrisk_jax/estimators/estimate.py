"""Point estimates of E_p[h(y)] per query, with everything needed to judge them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.scipy.special import xlogy
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.intervals import clopper_pearson, log_interval, log_t_interval
from tailrisk_jax.estimators.logspace import contributions, effective_size, moments, unscale


@struct.dataclass
class Estimate:
    """An estimate of E_p[h(y)], its interval and its diagnostics, each over the leading axes.

    Everything but `unscored` is computed over the n draws that exist and have a score; w =
    p(y) / q(y) is a draw's weight, h in [0, 1] its score. `estimator` names what made it, and
    `biased` says that its expectation is not E_p[h] at finite n.

    Attributes:
      value: mean(w h).
      stderr: sample standard error of value; NaN where the draws show no spread (no hits, a single
        draw, all w h equal): unknown, never 0.
      lower, upper: the default interval for display, see `monte_carlo` and `importance`.
      num_samples: n.
      unscored: fraction of the draws that exist whose score is NaN.
      hits: draws with h > 0 and a finite log-weight.
      certified: True where [lower, upper] holds at its level for every N (Clopper-Pearson); False
        where it is asymptotic.
      ess: (sum w)^2 / sum w^2; 0 where every weight is 0.
      ess_harm: (sum w h)^2 / sum (w h)^2; 0 without hits. The relative standard error is
        1 / sqrt(ess_harm), less a term 1 / n.
      largest_share: largest w h over the sum of all; NaN without hits.
      mean_weight: mean(w), expected to be 1 if the proposal reaches all of the target.
      mean_weight_z: (mean_weight - 1) over its standard error; 0 where mean_weight is exactly 1,
        +-inf where all weights are equal and not 1 or one is +inf, NaN for one draw.
      kl: estimated KL(p h / E_p[h] || q), in nats: sum_i r_i log(n r_i) with
        r_i = w_i h_i / sum_j w_j h_j, which for events is sum_i r_i log w_i - log(value). It can't
        exceed log n: a value near log n is a lower bound, and says that n draws are too few. About
        exp(kl) draws are needed (Chatterjee & Diaconis 2018, arXiv 1511.01437). NaN without hits.
    """

    value: Float[Array, "*batch"]
    stderr: Float[Array, "*batch"]
    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]
    certified: Bool[Array, "*batch"]
    num_samples: Int[Array, "*batch"]
    unscored: Float[Array, "*batch"]
    hits: Int[Array, "*batch"]
    ess: Float[Array, "*batch"]
    ess_harm: Float[Array, "*batch"]
    largest_share: Float[Array, "*batch"]
    mean_weight: Float[Array, "*batch"]
    mean_weight_z: Float[Array, "*batch"]
    kl: Float[Array, "*batch"]
    estimator: str = struct.field(pytree_node=False, default="importance")
    biased: bool = struct.field(pytree_node=False, default=False)


def importance(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Estimate:
    """Importance sampling: value = mean_i w_i h_i, log w_i = log p(y_i) - log q(y_i), y_i ~ q.

    Estimates E_p[h], without bias where q > 0 wherever p h > 0. For a mixture of proposals log q
    is `mixture_log_prob` (the balance heuristic), with labels drawn at random or in fixed counts.
    The default interval is `log_t_interval`, which is asymptotic: it says nothing of harm that no
    draw reached (see `verdict`).

    Args:
      scores: h, NaN where a draw has none.
      log_weights: log w.
      level: of the interval.
      mask: True where there is a draw, for rows of different length; None if all are full.

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
    return _importance(*checks.draws(scores, log_weights, mask), checks.level(level))


def monte_carlo(
    scores: Float[ArrayLike, "*batch N"],
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Estimate:
    """Monte Carlo: value = mean_i h_i, y_i ~ p. Estimates E_p[h] without bias.

    The same as `importance` with every weight 1, but for the interval: exact (`clopper_pearson`)
    in rows where all scores are 0 or 1, `log_t_interval` elsewhere.

    Edges: as in `importance`; in addition no hits has a finite upper limit, and all hits (or no
    hits, or one draw) a NaN stderr with an exact interval.
    Raises: ValueError as `importance`.
    """
    checks.same_shape(scores=scores)
    mask = checks.mask(mask, scores)
    return _monte_carlo(checks.scores(scores, mask), mask, checks.level(level))


def self_normalised(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Estimate:
    """Self-normalised importance sampling: value = sum_i w_i h_i / sum_i w_i.

    Needs log w up to a constant only. Biased by O(1/n) and consistent; value stays in [0, 1]. If
    the proposal misses a part of the target, it is off by the factor 1 / mean weight, which for a
    refusal is large. stderr by the delta method, sqrt(sum w^2 (h - value)^2) / sum w; `ess_harm`,
    `largest_share` and `kl` are those of `importance`, and mean_weight needs normalised log w.

    Edges and errors: as `importance`; value NaN where every weight is 0; stderr NaN where it would
    be 0 (all scores equal).
    Source: Hesterberg 1988; Owen, Monte Carlo theory, methods and examples, ch. 9.2.
    """
    return _self_normalised(*checks.draws(scores, log_weights, mask), checks.level(level))


@partial(jax.jit, static_argnames="level")
def _importance(
    scores: Float[Array, "*batch N"],
    log_weights: Float[Array, "*batch N"],
    mask: Bool[Array, "*batch N"],
    level: float,
) -> Estimate:
    log_x, scored = contributions(scores, log_weights, mask)
    x, w = moments(log_x, scored), moments(log_weights, scored)
    value, stderr = unscale(x.mean, x.shift), unscale(x.stderr, x.shift)
    ess_harm = effective_size(x.scaled)
    interval = log_t_interval(value, stderr, ess_harm, x.skewness, level)
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
        certified=jnp.zeros(value.shape, bool),
        num_samples=x.count,
        unscored=jnp.mean(checks.real(~scored), axis=-1, where=mask),
        hits=jnp.sum(scored & (scores > 0) & jnp.isfinite(log_weights), axis=-1, dtype=jnp.int32),
        ess=effective_size(w.scaled),
        ess_harm=ess_harm,
        largest_share=jnp.max(x.scaled, axis=-1) / total,
        mean_weight=unscale(w.mean, w.shift),
        mean_weight_z=z,
        kl=jnp.maximum(mean_log_scaled - jnp.log(x.mean), 0.0),
    )


@partial(jax.jit, static_argnames="level")
def _monte_carlo(
    scores: Float[Array, "*batch N"], mask: Bool[Array, "*batch N"], level: float
) -> Estimate:
    estimate = _importance(scores, jnp.zeros_like(scores), mask, level)
    exact = clopper_pearson(estimate.hits, estimate.num_samples, level)
    scored = mask & ~jnp.isnan(scores)
    events = jnp.all(~scored | (scores == 0) | (scores == 1), axis=-1)
    return dataclasses.replace(
        estimate,
        lower=jnp.where(events, exact.lower, estimate.lower),
        upper=jnp.where(events, exact.upper, estimate.upper),
        certified=events,
        estimator="monte_carlo",
    )


@partial(jax.jit, static_argnames="level")
def _self_normalised(
    scores: Float[Array, "*batch N"],
    log_weights: Float[Array, "*batch N"],
    mask: Bool[Array, "*batch N"],
    level: float,
) -> Estimate:
    plain = _importance(scores, log_weights, mask, level)
    scored = mask & ~jnp.isnan(scores)
    w = moments(log_weights, scored)
    h = jnp.where(scored, scores, 0.0)
    total = jnp.sum(w.scaled, axis=-1)
    value = jnp.sum(w.scaled * h, axis=-1) / total
    deviations = w.scaled * (h - value[..., None])
    spread = jnp.sqrt(jnp.sum(deviations**2, axis=-1)) / total
    stderr = jnp.where(spread > 0, spread, jnp.nan)
    interval = log_interval(value, stderr, level)
    return dataclasses.replace(
        plain,
        value=value,
        stderr=stderr,
        lower=interval.lower,
        upper=interval.upper,
        estimator="self_normalised",
        biased=True,
    )
