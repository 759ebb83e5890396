"""Confidence intervals.

An interval whose width the draws don't show is the whole range it could take, never a point: an
unknown standard error gives (0, inf) on the log scale and (-inf, inf) on the linear one. An
estimate that is NaN has the interval (NaN, NaN).
"""

from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.binomial import tail_log_odds
from tailrisk_jax.estimators.logspace import contributions, moments, unscale

_RESAMPLES_AT_ONCE = 16


@struct.dataclass
class Interval:
    """The limits of a two-sided interval, each over the leading axes.

    `kind` names the method. `certified` says that the interval holds at its level for every number
    of draws; the others are asymptotic, and blind to harm that no draw reached.
    """

    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]
    kind: str = struct.field(pytree_node=False, default="")
    certified: bool = struct.field(pytree_node=False, default=False)


@partial(jax.jit, static_argnames="level")
def wald_interval(
    value: Float[ArrayLike, "*batch"], stderr: Float[ArrayLike, "*batch"], level: float = 0.95
) -> Interval:
    """Normal interval on the linear scale, value -+ z stderr with z = Phi^-1((1 + level) / 2).

    Asymptotic. Its lower limit can fall below 0, and its coverage is poor where the relative
    standard error is not small; prefer `log_t_interval` for a probability.

    Edges: NaN stderr gives (-inf, inf); NaN value gives (NaN, NaN).
    Raises: ValueError where level is not in (0, 1).
    """
    z = _normal_quantile(level)
    value, stderr = checks.real(value), checks.real(stderr)
    half = jnp.where(jnp.isnan(stderr), jnp.inf, z * stderr)
    return Interval(lower=value - half, upper=value + half, kind="wald")


@partial(jax.jit, static_argnames="level")
def log_interval(
    value: Float[ArrayLike, "*batch"], stderr: Float[ArrayLike, "*batch"], level: float = 0.95
) -> Interval:
    """Normal interval on log(value) by the delta method, value * exp(-+ z stderr / value).

    Asymptotic; never below 0, and symmetric on the log scale, on which tail probabilities are
    shown. The upper limit is not cut at 1.

    Edges: (0, inf) where value is 0 or inf, or stderr is NaN or inf; (NaN, NaN) where value is NaN
    or negative.
    Raises: ValueError where level is not in (0, 1).
    """
    z = _normal_quantile(level)
    value, stderr = checks.real(value), checks.real(stderr)
    relative = stderr / value
    known = jnp.isfinite(relative) & jnp.isfinite(value)
    factor = jnp.exp(z * jnp.where(known, relative, 0.0))
    limits = jnp.where(known, value / factor, 0.0), jnp.where(known, value * factor, jnp.inf)
    return _unless_nan(value, *limits, kind="log-delta")


@partial(jax.jit, static_argnames="level")
def log_t_interval(
    value: Float[ArrayLike, "*batch"],
    stderr: Float[ArrayLike, "*batch"],
    ess_harm: Float[ArrayLike, "*batch"],
    skewness: Float[ArrayLike, "*batch"],
    level: float = 0.95,
) -> Interval:
    """`log_interval` widened for few and for skewed draws: the default of `importance`.

        value * exp(-t r),  value * exp(t r (1 + |skewness|)),   r = stderr / value

    with t Student's quantile at ess_harm - 1 degrees of freedom, since no more draws than that
    carry the spread, and skewness that of the mean, E[(x - value)^3] / (sd^3 sqrt(n)). Draws with a
    long right tail miss it more often than they overstate it; the first-order correction of the
    upper limit is of the size of the skewness (Hall 1992). The rule and its coverage were measured,
    in experiments/calibration.

    t is by its Cornish-Fisher expansion: within 1% from 4 degrees of freedom on, too small below.

    Edges and errors: as `log_interval`; (0, inf) too where ess_harm is 1 or less.
    Source: Abramowitz & Stegun 26.7.5; Hall 1992, On the removal of skewness by transformation.
    """
    z = _normal_quantile(level)
    freedom = jnp.maximum(checks.real(ess_harm) - 1, 0.0)
    t = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    value, relative = checks.real(value), checks.real(stderr) / checks.real(value)
    known = jnp.isfinite(relative) & jnp.isfinite(value) & jnp.isfinite(t)
    below = jnp.where(known, t * relative, 0.0)
    above = below * (1 + jnp.where(known, jnp.abs(checks.real(skewness)), 0.0))
    lower, upper = value * jnp.exp(-below), value * jnp.exp(above)
    limits = jnp.where(known, lower, 0.0), jnp.where(known, upper, jnp.inf)
    return _unless_nan(value, *limits, kind="log-t")


def clopper_pearson(
    hits: Int[ArrayLike, "*batch"], num_samples: Int[ArrayLike, "*batch"], level: float = 0.95
) -> Interval:
    """Exact interval for the probability behind `hits` events in `num_samples` draws.

    The lower limit is the p with P(X >= hits) = (1 - level) / 2, the upper limit the p with
    P(X <= hits) = (1 - level) / 2, X ~ Binomial(num_samples, p). Covers with probability at least
    `level` for every p and every number of draws. Within 1e-5 relative of
    scipy.stats.beta.ppf in float32, up to a million draws.

    Edges: no hits gives lower 0 and upper 1 - ((1 - level) / 2)^(1/n); all hits gives upper 1;
    no draws gives (NaN, NaN).
    Raises: ValueError where hits is not in [0, num_samples], or level is not in (0, 1).
    Source: Clopper & Pearson 1934, Biometrika 26.
    """
    checks.counts(hits, num_samples)
    mass = (1 - checks.level(level)) / 2
    return _clopper_pearson(checks.real(hits), checks.real(num_samples), mass)


@jax.jit
def _clopper_pearson(
    hits: Float[Array, "*batch"], num_samples: Float[Array, "*batch"], mass: ArrayLike
) -> Interval:
    num = jnp.maximum(num_samples, 1.0)
    # The upper limit of hits is 1 - the lower limit of misses; one solve for both.
    counted = jnp.maximum(jnp.stack([hits, num - hits]), 1.0)
    log_odds = tail_log_odds(counted, jnp.stack([num, num]), mass)
    lower = jnp.where(hits == 0, 0.0, jax.nn.sigmoid(log_odds[0]))
    upper = jnp.where(hits == num_samples, 1.0, jax.nn.sigmoid(-log_odds[1]))
    return _unless_nan(hits / num_samples, lower, upper, kind="clopper-pearson", certified=True)


def bootstrap_interval(
    key: Key[Array, "*batch"],
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    *,
    level: float = 0.95,
    num_resamples: int = 1000,
) -> Interval:
    """Percentile bootstrap of mean(w h): quantiles of the mean over resamples of the scored draws.

    Asymptotic, and blind to what no draw hit: few hits give an interval that is too narrow.
    Monte Carlo draws have log_weights of zeros.

    `key` is one key, by which every row resamples the same draw indices, or one key per row; either
    way a row's interval doesn't depend on the rows beside it. Rows go one after the other and
    resamples a few at a time, so no array of shape [N, num_resamples] is ever held.

    Edges: (0, inf) where the draws show no spread (no hits, a single draw, all contributions
    equal) or one weight is +inf; (NaN, NaN) where no draw has a score.
    Raises: ValueError for shapes that differ, scores outside [0, 1], NaN log-weights on scored
    draws, level outside (0, 1), num_resamples < 1.
    Source: Efron 1979, Annals of Statistics 7.
    """
    shape = checks.same_shape(scores=scores, log_weights=log_weights)
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; give at least 1, such as 1000")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), shape[:-1]):
        raise ValueError(f"key has shape {key.shape}; give one key, or keys of shape {shape[:-1]}")
    log_weights = checks.log_weights(log_weights, scores)
    keys = jnp.broadcast_to(key, shape[:-1])
    mass = (1 - checks.level(level)) / 2
    return _bootstrap(keys, checks.scores(scores), log_weights, mass, num_resamples)


@partial(jax.jit, static_argnames="num_resamples")
def _bootstrap(
    keys: Key[Array, "*batch"],
    scores: Float[Array, "*batch N"],
    log_weights: Float[Array, "*batch N"],
    mass: ArrayLike,
    num_resamples: int,
) -> Interval:
    *batch, size = scores.shape
    log_x, scored = contributions(scores, log_weights)
    x = moments(log_x, scored)
    scored_first = jnp.argsort(~scored, axis=-1, stable=True)
    scaled = jnp.take_along_axis(x.scaled, scored_first, axis=-1)
    positions = jnp.arange(size)

    def limits(row):
        row_key, draws, count = row
        num = count.astype(draws.dtype)

        def resampled_mean(resample_key):
            chosen = jax.random.randint(resample_key, (size,), 0, jnp.maximum(count, 1))
            return jnp.sum(jnp.where(positions < count, draws[chosen], 0.0)) / num

        means = lax.map(
            resampled_mean,
            jax.random.split(row_key, num_resamples),
            batch_size=min(_RESAMPLES_AT_ONCE, num_resamples),
        )
        return jnp.quantile(means, mass), jnp.quantile(means, 1 - mass)

    rows = (keys.reshape(-1), scaled.reshape(-1, size), x.count.reshape(-1))
    lower, upper = (limit.reshape(batch) for limit in lax.map(limits, rows))
    known = ~jnp.isnan(x.stderr) & jnp.isfinite(x.shift)
    return _unless_nan(
        x.mean,
        jnp.where(known, unscale(lower, x.shift), 0.0),
        jnp.where(known, unscale(upper, x.shift), jnp.inf),
        kind="bootstrap",
    )


def _normal_quantile(level: float) -> float:
    return NormalDist().inv_cdf((1 + checks.level(level)) / 2)


def _unless_nan(
    value: Float[Array, "*batch"],
    lower: Float[Array, "*batch"],
    upper: Float[Array, "*batch"],
    *,
    kind: str,
    certified: bool = False,
) -> Interval:
    nothing = ~(value >= 0)
    return Interval(
        lower=jnp.where(nothing, jnp.nan, lower),
        upper=jnp.where(nothing, jnp.nan, upper),
        kind=kind,
        certified=certified,
    )
