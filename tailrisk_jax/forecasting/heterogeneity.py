"""How far true values spread that are each known with an error: random-effects estimates.

Of a group of M variants, y_i = theta_i + e_i are the estimates and s_i their known standard errors,

    theta_i ~ N(mu, tau^2),   e_i ~ N(0, s_i^2).

tau is the spread that is left when estimation error is removed. With w_i = 1 / (s_i^2 + tau^2) and
mu(tau) = sum w y / sum w, everything here rests on one function, decreasing in tau^2,

    Q(tau^2) = sum_i w_i (y_i - mu(tau))^2,   which at the true tau^2 is chi^2 with M - 1 degrees.

Here y is log10 of a risk, so tau is in orders of magnitude. Any other scale does as well.
"""

from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
from flax import struct
from jax.scipy.special import gammainc
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

_HALVINGS = 45
_LEAST_VARIANCE = 1e-30  # weights stay finite where an estimate is exact


@struct.dataclass
class Heterogeneity:
    """How estimates spread, error removed, over the leading axes.

    Attributes:
      count: estimates in the group.
      mean: mu(tau), the mean of the true values.
      mean_stderr: 1 / sqrt(sum w), of the mean; as if tau were known.
      sd: tau, by Paule & Mandel.
      lower, upper: of tau, by Q-profile. Above 0, lower says that error alone does not explain
        the spread. Both are 0 where the estimates lie nearer to each other than their errors
        allow: the errors are then too large.
      observed_sd: sample standard deviation of y, error included.
      error_sd: root mean square of the standard errors.
    """

    count: Int[Array, "*batch"]
    mean: Float[Array, "*batch"]
    mean_stderr: Float[Array, "*batch"]
    sd: Float[Array, "*batch"]
    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]
    observed_sd: Float[Array, "*batch"]
    error_sd: Float[Array, "*batch"]


def log10_stderr(
    lower: Float[ArrayLike, "*batch"], upper: Float[ArrayLike, "*batch"], *, level: float = 0.95
) -> Float[Array, "*batch"]:
    """Standard error of log10 of an estimate, in orders of magnitude, from its interval.

        (log10 upper - log10 lower) / (2 z),   z = Phi^-1((1 + level) / 2)

    The default interval is wider where few draws carry the estimate and where they are skewed, and
    so is this error; on the embedded organism's estimates of verdict ok, (log10 of estimate over
    truth) / error had the root mean square 1.07, and 1.32 by the delta method, stderr / value.

    Edges: NaN where a limit is 0, inf or NaN: the error is unknown.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    found = (jnp.log10(jnp.asarray(upper, float)) - jnp.log10(jnp.asarray(lower, float))) / (2 * z)
    return jnp.where(jnp.isfinite(found), found, jnp.nan)


@partial(jax.jit, static_argnames="level")
def heterogeneity(
    estimates: Float[ArrayLike, "*batch M"],
    stderr: Float[ArrayLike, "*batch M"],
    *,
    mask: Bool[ArrayLike, "*batch M"] | None = None,
    level: float = 0.95,
) -> Heterogeneity:
    """The spread of each group: tau^2 solves Q(tau^2) = M - 1, and is 0 where Q(0) is less.

    The interval is Q-profile: the tau^2 at which Q is the chi^2 quantile of (1 + level) / 2 and of
    (1 - level) / 2. It covers at its level for every M where y is normal and s_i known; those of
    an estimated risk are neither quite.

    Args:
      estimates: y.
      stderr: s, 0 for exact values.
      mask: True where there is an estimate with a standard error; None for all.

    Edges: fewer than 2 estimates give NaN for all but count, mean and error_sd; none, for these.
    Source: Paule & Mandel 1982; Viechtbauer 2007, Statistics in Medicine 26; of 16 estimators
    Veroniki et al. 2016 recommend these.
    """
    y, variances, kept = _checked(estimates, stderr, mask)
    return _heterogeneity(y, variances, kept, kept.sum(axis=-1), level, lambda q: q)


@partial(jax.jit, static_argnames="level")
def pooled_heterogeneity(
    estimates: Float[ArrayLike, "*batch Q M"],
    stderr: Float[ArrayLike, "*batch Q M"],
    *,
    mask: Bool[ArrayLike, "*batch Q M"] | None = None,
    level: float = 0.95,
) -> Heterogeneity:
    """One spread within all groups, each about a mean of its own: sum_q Q_q = sum_q (M_q - 1).

    The typical spread; groups of one estimate say nothing of it. `count` counts all estimates,
    `mean` is the mean of the groups' means, and `mean_stderr` its standard error with the groups
    fixed.

    Edges and source: as `heterogeneity`; NaN where no group has 2 estimates.
    """
    y, variances, kept = _checked(estimates, stderr, mask)
    return _heterogeneity(y, variances, kept, kept.sum(axis=-1), level, lambda q: q.sum(axis=-1))


def profile(
    y: Float[Array, "*batch M"],
    variances: Float[Array, "*batch M"],
    kept: Bool[Array, "*batch M"],
    tau2: Float[Array, "*batch"],
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Q(tau^2), mu(tau) and the sum of the weights."""
    total = jnp.maximum(variances + tau2[..., None], _LEAST_VARIANCE)
    weights = jnp.where(kept, 1 / total, 0.0)
    sum_weights = weights.sum(axis=-1)
    mean = (weights * y).sum(axis=-1) / sum_weights
    return (weights * (y - mean[..., None]) ** 2).sum(axis=-1), mean, sum_weights


def root(excess: Callable[[Array], Array], top: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Where a decreasing function is 0 in [0, top], by halving; 0 where it is not above 0 at 0."""

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        above = excess(middle) > 0
        return jnp.where(above, middle, ends[0]), jnp.where(above, ends[1], middle)

    return jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(top), top))[0]


def squares(y: Float[Array, "*batch M"], kept: Bool[Array, "*batch M"]) -> Float[Array, "*batch"]:
    """Sum of squares about the mean of what is kept."""
    mean = jnp.where(kept, y, 0.0).sum(axis=-1) / kept.sum(axis=-1)
    return jnp.where(kept, (y - mean[..., None]) ** 2, 0.0).sum(axis=-1)


def _heterogeneity(
    y: Array, variances: Array, kept: Array, counts: Array, level: float, pool: Callable
) -> Heterogeneity:
    """With `pool` that sums over the groups that share one tau, or leaves them apart."""

    def q(tau2: Array) -> Array:
        each, _, _ = profile(y, variances, kept, _apart(tau2, counts))
        return pool(jnp.where(counts > 1, each, 0.0))

    freedom = pool(jnp.maximum(counts - 1, 0))
    count = pool(counts)
    about = pool(jnp.where(counts > 1, squares(y, kept), 0.0))
    known = freedom > 0
    unless = partial(jnp.where, known)
    degrees = jnp.maximum(freedom, 1).astype(y.dtype)
    tail = (1 - level) / 2

    def end(mass: Array) -> Array:
        return root(lambda tau2: gammainc(degrees / 2, q(tau2) / 2) - mass, about / tail**2)

    ends = jax.vmap(end)(jnp.array([1 - tail, tail], y.dtype))
    tau2 = root(lambda t: q(t) - degrees, about)
    _, means, sums = profile(y, variances, kept, _apart(tau2, counts))
    some = counts > 0
    groups = pool(some.astype(y.dtype))
    return Heterogeneity(
        count=count,
        mean=pool(jnp.where(some, means, 0.0)) / groups,
        mean_stderr=unless(jnp.sqrt(pool(jnp.where(some, 1 / sums, 0.0))) / groups, jnp.nan),
        sd=unless(jnp.sqrt(tau2), jnp.nan),
        lower=unless(jnp.sqrt(ends[0]), jnp.nan),
        upper=unless(jnp.sqrt(ends[1]), jnp.nan),
        observed_sd=unless(jnp.sqrt(about / degrees), jnp.nan),
        error_sd=jnp.sqrt(pool(jnp.where(kept, variances, 0.0).sum(axis=-1)) / count),
    )


def _apart(tau2: Array, counts: Array) -> Array:
    """One tau^2 for each group, where groups share it."""
    return tau2 if tau2.ndim == counts.ndim else jnp.broadcast_to(tau2[..., None], counts.shape)


def _checked(
    estimates: ArrayLike, stderr: ArrayLike, mask: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """y and s^2 without what is masked, and the mask."""
    y, s = jnp.asarray(estimates, float), jnp.asarray(stderr, float)
    kept = jnp.ones(y.shape, bool) if mask is None else jnp.asarray(mask, bool)
    if not y.shape == s.shape == kept.shape:
        raise ValueError(
            f"shapes differ: estimates {y.shape}, stderr {s.shape}, mask {kept.shape}; give every "
            "estimate one entry in each"
        )
    return jnp.where(kept, y, 0.0), jnp.where(kept, s, 0.0) ** 2, kept
