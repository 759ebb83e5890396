"""Differences and ratios of two estimates, of independent draws or of the same ones.

Independent estimates are compared through the intervals that they have already, so that an exact
interval (Clopper-Pearson) or an unknown upper limit is carried over: the margins to the limits
stand in for the standard errors. Where both rest on the same draws, what counts is the spread of
the difference, draw by draw. For a mean over queries the spread of their draws adds up.

Squares and cubes of weights are taken here: call these through `in_float64`.

Source: Zou & Donner 2008, Construction of confidence limits about effect measures, Statistics in
Medicine 27 (the method of variance estimates recovery). The coverage of each is tested.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.intervals import Interval, log_t_interval
from tailrisk_jax.estimators.logspace import contributions


@struct.dataclass
class Spread:
    """A mean of weighted draws, or a difference of two, and how far it may be off.

    Attributes:
      value: the mean, or the difference of means.
      variance: of value, as the draws show it; 0 where they show none beyond rounding.
      third: its third central moment.
      absolute, squared: sums over the draws of |x| / n and (x / n)^2, for the effective size.
    """

    value: Float[Array, "*batch"]
    variance: Float[Array, "*batch"]
    third: Float[Array, "*batch"]
    absolute: Float[Array, "*batch"]
    squared: Float[Array, "*batch"]

    @property
    def ess(self) -> Float[Array, "*batch"]:
        """How many draws carry it; 0 where none does."""
        return jnp.where(self.squared > 0, self.absolute**2 / self.squared, 0.0)

    @property
    def stderr(self) -> Float[Array, "*batch"]:
        """The standard error; NaN where the draws show no spread."""
        return jnp.where(self.variance > 0, jnp.sqrt(self.variance), jnp.nan)

    @property
    def skewness(self) -> Float[Array, "*batch"]:
        """Of value; NaN with stderr."""
        return self.third / self.stderr**3

    def minus(self, other: "Spread") -> "Spread":
        """Of the difference to a mean of other draws."""
        return Spread(
            value=self.value - other.value,
            variance=self.variance + other.variance,
            third=self.third - other.third,
            absolute=self.absolute + other.absolute,
            squared=self.squared + other.squared,
        )

    def mean(self) -> "Spread":
        """Of the mean over the last axis, of independent draws."""
        size = self.value.shape[-1]
        return Spread(
            value=jnp.sum(self.value, axis=-1) / size,
            variance=jnp.sum(self.variance, axis=-1) / size**2,
            third=jnp.sum(self.third, axis=-1) / size**3,
            absolute=jnp.sum(self.absolute, axis=-1) / size,
            squared=jnp.sum(self.squared, axis=-1) / size**2,
        )


@jax.jit
def difference_interval(
    a: Float[ArrayLike, "*batch"],
    a_limits: Interval,
    b: Float[ArrayLike, "*batch"],
    b_limits: Interval,
) -> Interval:
    """Of a - b for independent a and b, from the interval of each; at the level of those.

        a - b - sqrt((a - lower_a)^2 + (upper_b - b)^2),
        a - b + sqrt((upper_a - a)^2 + (b - lower_b)^2)

    Too wide where a and b are positively correlated. As good as the intervals that it is given.

    Edges: an upper limit of inf is carried over; NaN where a or b is NaN.
    """
    a, b = checks.real(a), checks.real(b)
    below = jnp.hypot(a - checks.real(a_limits.lower), checks.real(b_limits.upper) - b)
    above = jnp.hypot(checks.real(a_limits.upper) - a, b - checks.real(b_limits.lower))
    return Interval(lower=a - b - below, upper=a - b + above, kind="recovered")


@jax.jit
def mean_interval(value: Float[ArrayLike, "*batch Q"], limits: Interval) -> Interval:
    """Of the mean of Q independent estimates, from the interval of each; at the level of those.

        mean - sqrt(sum_q (value_q - lower_q)^2) / Q,   mean + sqrt(sum_q (upper_q - value_q)^2) / Q

    As good as the intervals that it is given.

    Edges: an upper limit of inf is carried over; NaN where a value is NaN.
    """
    value = checks.real(value)
    size = value.shape[-1]
    mean = jnp.mean(value, axis=-1)
    below = jnp.linalg.norm(value - checks.real(limits.lower), axis=-1) / size
    above = jnp.linalg.norm(checks.real(limits.upper) - value, axis=-1) / size
    return Interval(lower=mean - below, upper=mean + above, kind="recovered")


@jax.jit
def log_ratio_interval(
    a: Float[ArrayLike, "*batch"],
    a_limits: Interval,
    b: Float[ArrayLike, "*batch"],
    b_limits: Interval,
) -> Interval:
    """Of log(a / b) for independent a and b: `difference_interval` of their logarithms.

    Edges: where a or b is 0 its logarithm has no margins; the limits are those of the quotients
    lower_a / upper_b and upper_a / lower_b, which hold at twice the error, and are infinite where
    those are unknown. NaN where a or b is NaN.
    """
    a, b = checks.real(a), checks.real(b)
    low_a, high_a = jnp.log(checks.real(a_limits.lower)), jnp.log(checks.real(a_limits.upper))
    low_b, high_b = jnp.log(checks.real(b_limits.lower)), jnp.log(checks.real(b_limits.upper))
    both = (a > 0) & (b > 0)
    log_a, log_b = jnp.log(jnp.where(both, a, 1.0)), jnp.log(jnp.where(both, b, 1.0))
    value = log_a - log_b
    lower = jnp.where(both, value - jnp.hypot(log_a - low_a, high_b - log_b), low_a - high_b)
    upper = jnp.where(both, value + jnp.hypot(high_a - log_a, log_b - low_b), high_a - low_b)
    unknown = jnp.isnan(a) | jnp.isnan(b)
    return Interval(
        lower=jnp.where(unknown, jnp.nan, lower),
        upper=jnp.where(unknown, jnp.nan, upper),
        kind="recovered-log",
    )


def spread_of(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    *,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Spread:
    """Of mean_i w_i h_i over the draws that have a score.

    Edges: without a score, value is NaN; without two, variance is 0.
    Raises: ValueError as `importance`.
    """
    x, scored = _terms(*checks.draws(scores, log_weights, mask))
    return _spread(x, scored, jnp.zeros_like(x), scored)


def paired_spread(
    a_scores: Float[ArrayLike, "*batch N"],
    a_log_weights: Float[ArrayLike, "*batch N"],
    b_scores: Float[ArrayLike, "*batch N"],
    b_log_weights: Float[ArrayLike, "*batch N"],
    *,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Spread:
    """Of a - b for a = mean_i w_i h_i and b = mean_i w'_i h'_i over the same draws.

    Each mean is over the draws that its side has a score for; a draw's term is what it adds to the
    one less what it adds to the other.

    Edges: as `spread_of`; draws on which both agree add nothing, and where they agree on all, no
    spread is shown.
    Raises: ValueError as `importance`.
    """
    x, x_scored = _terms(*checks.draws(a_scores, a_log_weights, mask))
    y, y_scored = _terms(*checks.draws(b_scores, b_log_weights, mask))
    return _spread(x, x_scored, y, y_scored)


def paired_log_ratio(
    a_scores: Float[ArrayLike, "*batch N"],
    a_log_weights: Float[ArrayLike, "*batch N"],
    b_scores: Float[ArrayLike, "*batch N"],
    b_log_weights: Float[ArrayLike, "*batch N"],
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Interval:
    """Of log(a / b) over the same draws, by the delta method:

        log(a / b) -+ t s (1 + g)

    with s the standard error of mean(w h / a - w' h' / b), t at one less than the smallest
    effective size, and g the largest |skewness|, of that mean and of `paired_spread`; a and b count
    for the size too. A ratio is no surer than its parts, nor than the draws that the sides differ
    on: counting all hits instead, a judge that drops a few of another's covers 0.86 for 0.95.

    Edges: (-inf, inf) where no spread is shown, or a or b is 0.
    Raises: ValueError as `importance`.
    """
    x, x_scored = _terms(*checks.draws(a_scores, a_log_weights, mask))
    y, y_scored = _terms(*checks.draws(b_scores, b_log_weights, mask))
    return _paired_log_ratio(x, x_scored, y, y_scored, checks.level(level))


@partial(jax.jit, static_argnames="level")
def spread_interval(spread: Spread, level: float = 0.95) -> Interval:
    """value - t s (1 + (-g)+), value + t s (1 + g+), s the standard error, g the skewness.

    t is Student's quantile at ess - 1, since no more draws than that carry the difference; the
    side of the long tail is widened as in `log_t_interval`. Asymptotic, and blind to what no draw
    showed: for paired events, a draw on which the two disagree the other way.

    Edges: (-inf, inf) where no spread is shown, or it is carried by a single draw.
    Raises: ValueError where level is not in (0, 1).
    """
    stderr, ess, skewness = spread.stderr, spread.ess, spread.skewness
    above = _margin(stderr, ess, jnp.maximum(skewness, 0.0), level)
    below = _margin(stderr, ess, jnp.maximum(-skewness, 0.0), level)
    return Interval(lower=spread.value - below, upper=spread.value + above, kind="spread-t")


def _terms(scores: Array, log_weights: Array, mask: Array) -> tuple[Array, Array]:
    """w h of each draw, and which have a score."""
    log_x, scored = contributions(scores, log_weights, mask)
    return jnp.exp(log_x), scored


@jax.jit
def _spread(
    x: Float[Array, "*batch N"],
    x_scored: Bool[Array, "*batch N"],
    y: Float[Array, "*batch N"],
    y_scored: Bool[Array, "*batch N"],
) -> Spread:
    """Of mean(x) - mean(y), each over its scored draws."""
    used = x_scored | y_scored
    count = checks.real(jnp.sum(used, axis=-1, keepdims=True))
    terms, deviations = jnp.zeros_like(x), jnp.zeros_like(x)
    for sign, values, scored in ((1.0, x, x_scored), (-1.0, y, y_scored)):
        own = checks.real(jnp.sum(scored, axis=-1, keepdims=True))
        mean = jnp.sum(values, axis=-1, where=scored, keepdims=True) / own
        share = sign / own  # of one draw in its mean
        terms += jnp.where(scored, values * share, 0.0)
        deviations += jnp.where(scored, (values - mean) * share, 0.0)
    correction = jnp.maximum(count / (count - 1), 1.0)[..., 0]
    nothing = ~jnp.any(x_scored, axis=-1) | ~jnp.any(y_scored, axis=-1)
    variance = jnp.sum(deviations**2, axis=-1) * correction
    squared = jnp.sum(terms**2, axis=-1)
    rounding = (8 * jnp.finfo(x.dtype).eps) ** 2 * squared
    return Spread(
        value=jnp.where(nothing, jnp.nan, jnp.sum(terms, axis=-1)),
        variance=jnp.where(variance > rounding, variance, 0.0),
        third=jnp.sum(deviations**3, axis=-1),
        absolute=jnp.sum(jnp.abs(terms), axis=-1),
        squared=squared,
    )


@partial(jax.jit, static_argnames="level")
def _paired_log_ratio(x, x_scored, y, y_scored, level: float) -> Interval:
    zeros = jnp.zeros_like(x)
    a, b = _spread(x, x_scored, zeros, x_scored), _spread(y, y_scored, zeros, y_scored)
    relative = _spread(x / a.value[..., None], x_scored, y / b.value[..., None], y_scored)
    apart = _spread(x, x_scored, y, y_scored)
    ess = jnp.min(jnp.stack([one.ess for one in (a, b, relative, apart)]), axis=0)
    skewness = jnp.maximum(jnp.abs(relative.skewness), jnp.abs(apart.skewness))
    margin = _margin(relative.stderr, ess, skewness, level)
    value = jnp.log(a.value / b.value)
    known = jnp.isfinite(value) & jnp.isfinite(margin)
    return Interval(
        lower=jnp.where(known, value - margin, -jnp.inf),
        upper=jnp.where(known, value + margin, jnp.inf),
        kind="paired-log-t",
    )


def _margin(stderr: Array, ess: Array, skewness: Array, level: float) -> Array:
    """t stderr (1 + skewness), inf where the standard error is unknown."""
    ones = jnp.ones_like(stderr)
    # The logarithm of this limit is t (1 + skewness): the rule is kept in one place.
    factor = jnp.log(log_t_interval(ones, ones, ess, skewness, level).upper)
    return jnp.where(jnp.isnan(stderr), jnp.inf, stderr * factor)
