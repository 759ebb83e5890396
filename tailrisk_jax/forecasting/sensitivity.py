"""How far variants of one query take its risk, estimation error removed."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.scipy.special import betainc, gammainc, ndtr, ndtri
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from tailrisk_jax.forecasting.heterogeneity import profile, root, squares

_STRATA = 100  # values of tau that the draws are shared among
_FAR = -5.0  # standard deviations below the mean from which on a limit is where the value lies


@struct.dataclass
class Reach:
    """What is known of the true risks of each group; medians and limits are over draws of them.

    Attributes:
      range, range_lower, range_upper: the riskiest variant over the least risky one, log10.
      over_original, over_lower, over_upper: the riskiest variant over the original, log10; NaN
        where the original has neither an estimate nor a limit.
      tenfold: probability that some variant has at least 10 times the original's risk.
      riskiest: which variant is the riskiest, most probably; its place in the row.
      riskiest_probability: of that.
    """

    range: Float[Array, "*batch"]
    range_lower: Float[Array, "*batch"]
    range_upper: Float[Array, "*batch"]
    over_original: Float[Array, "*batch"]
    over_lower: Float[Array, "*batch"]
    over_upper: Float[Array, "*batch"]
    tenfold: Float[Array, "*batch"]
    riskiest: Int[Array, "*batch"]
    riskiest_probability: Float[Array, "*batch"]


@struct.dataclass
class KindShift:
    """How a kind of variant moves the risk, over kinds.

    Attributes:
      queries: that have both the original and a variant of the kind.
      shift: mean over queries of (mean of the kind's estimates - the original's), log10.
      lower, upper: Student's interval over queries.
    """

    queries: Int[Array, " K"]
    shift: Float[Array, " K"]
    lower: Float[Array, " K"]
    upper: Float[Array, " K"]


@partial(jax.jit, static_argnames=("level", "draws"))
def reach(
    key: Key[Array, ""],
    estimates: Float[ArrayLike, "Q M"],
    stderr: Float[ArrayLike, "Q M"],
    *,
    mask: Bool[ArrayLike, "Q M"],
    original: Int[ArrayLike, " Q"],
    limits: Float[ArrayLike, "Q M"] | None = None,
    censored: Bool[ArrayLike, "Q M"] | None = None,
    level: float = 0.95,
    draws: int = 1000,
) -> Reach:
    """Range, riskiest variant and excess over the original of each group.

    The largest of M noisy estimates is too large, and the smallest too small. So true values are
    drawn, given the estimates, under theta_i ~ N(mu, tau^2):

        tau    from its confidence distribution, P(tau^2 <= t) = P(chi^2_{M-1} >= Q(t)) (Q-profile)
        mu     ~ N(mu(tau), 1 / sum w)
        theta  ~ N(mu + b (y - mu), b s^2),   b = tau^2 / (tau^2 + s^2)

    and the extremes are those of the draws. A variant whose estimate is zero has an upper limit
    alone: its true value is drawn from N(mu, tau^2) below that limit, while mu and tau rest on the
    others. As these are then rather too high, the range is rather too small.

    Args:
      estimates, stderr: y = log10 of the risks, and s; a row for each group.
      mask: True where there is an estimate.
      original: the place of the original in its row; -1 where there is none.
      limits: upper limits, log10; read where `censored` is True. None for no zeros.
      draws: rounded up to a multiple of 100.

    Edges: NaN, and -1 for `riskiest`, with fewer than 2 estimates in a group. All groups share
    their random numbers, so that what is said of one doesn't depend on the others.
    Source: Viechtbauer 2007 (tau); Louis 1984, JASA 79 (why not extremes of shrunken estimates).
    """
    y, s = jnp.asarray(estimates, float), jnp.asarray(stderr, float)
    kept = jnp.asarray(mask, bool)
    zeros = jnp.zeros_like(kept) if censored is None else jnp.asarray(censored, bool)
    tops = jnp.zeros_like(y) if limits is None else jnp.asarray(limits, float)
    normal = jax.lax.map(  # one after the other: XLA folds the counters of a large array for long
        lambda one: jax.random.normal(one, (_STRATA, y.shape[1] + 1), y.dtype),
        jax.random.split(key, -(-draws // _STRATA)),
    )
    each = partial(_reach, normal, level=level)
    rows = (
        jnp.where(kept, y, 0.0),
        jnp.where(kept, s, 0.0),
        kept,
        jnp.asarray(original),
        jnp.where(zeros, tops, 0.0),
        zeros & ~kept,
    )
    return jax.lax.map(lambda row: each(*row), rows)


@partial(jax.jit, static_argnames=("num_kinds", "level"))
def kind_shifts(
    estimates: Float[ArrayLike, "Q M"],
    *,
    mask: Bool[ArrayLike, "Q M"],
    original: Int[ArrayLike, " Q"],
    kinds: Int[ArrayLike, "Q M"],
    num_kinds: int,
    level: float = 0.95,
) -> KindShift:
    """The mean shift of each kind from the original, with an interval over queries.

    For query q and kind k, d_qk = mean of its estimates of that kind - the original's; the shift
    is the mean of d over queries, its error sd(d) / sqrt(queries), which estimation error is part
    of. Unbiased for the mean shift over queries like these.

    Edges: NaN without a query; limits -inf and inf with one. The original's own kind has the
    shift 0.
    """
    y, kept = jnp.asarray(estimates, float), jnp.asarray(mask, bool)
    place = jnp.asarray(original)
    base = jnp.take_along_axis(y, jnp.maximum(place, 0)[:, None], axis=1)
    has_base = (place >= 0) & jnp.take_along_axis(kept, jnp.maximum(place, 0)[:, None], axis=1)[
        :, 0
    ]
    of_kind = jax.nn.one_hot(jnp.asarray(kinds), num_kinds, dtype=y.dtype) * kept[..., None]
    size = of_kind.sum(axis=1)  # [Q, K]
    difference = jnp.where(kept, y - base, 0.0)
    d = jnp.einsum("qmk,qm->qk", of_kind, difference) / jnp.maximum(size, 1)
    both = (size > 0) & has_base[:, None]
    count = both.sum(axis=0)
    shift = jnp.where(both, d, 0.0).sum(axis=0) / count
    about = jnp.where(both, (d - shift) ** 2, 0.0).sum(axis=0)
    freedom = jnp.maximum(count - 1, 1).astype(y.dtype)
    half = _student(freedom, level) * jnp.sqrt(about / freedom / count)
    half = jnp.where(count > 1, half, jnp.inf)
    unless = partial(jnp.where, count > 0)
    return KindShift(
        queries=count,
        shift=shift,
        lower=unless(shift - half, jnp.nan),
        upper=unless(shift + half, jnp.nan),
    )


def _student(freedom: Float[Array, " K"], level: float) -> Float[Array, " K"]:
    """The two-sided quantile t of Student's distribution: P(|T| <= t) = level."""
    top = jnp.full_like(freedom, (1 - level) ** -2.0)  # beyond t^2 for one degree of freedom
    return jnp.sqrt(
        root(lambda x: betainc(freedom / 2, 0.5, freedom / (freedom + x)) - (1 - level), top)
    )


def _reach(
    normal: Float[Array, "R S M+1"],
    y: Float[Array, " M"],
    s: Float[Array, " M"],
    kept: Bool[Array, " M"],
    original: Int[Array, ""],
    limits: Float[Array, " M"],
    zeros: Bool[Array, " M"],
    *,
    level: float,
) -> Reach:
    count = kept.sum()
    degrees = jnp.maximum(count - 1, 1).astype(y.dtype)
    mass = (jnp.arange(_STRATA, dtype=y.dtype) + 0.5) / _STRATA
    rows = jnp.broadcast_to(y, (_STRATA, *y.shape)), jnp.broadcast_to(s**2, (_STRATA, *y.shape))
    excess = lambda t: gammainc(degrees / 2, profile(*rows, kept, t)[0] / 2) - mass  # noqa: E731
    tau2 = root(excess, squares(y, kept) / mass**2)
    _, center, weight = profile(*rows, kept, tau2)

    mu = (center + normal[..., -1] / jnp.sqrt(weight))[..., None]  # [R, S, 1]
    tau, normal = jnp.sqrt(tau2)[:, None], normal[..., :-1]  # [S, 1], [R, S, M]
    total = tau**2 + s**2
    b = jnp.where(total > 0, tau**2 / jnp.where(total > 0, total, 1.0), 1.0)
    theta = mu + b * (y - mu) + jnp.sqrt(b) * s * normal

    bound = (limits - mu) / jnp.where(tau > 0, tau, 1.0)
    below = ndtri(ndtr(normal) * ndtr(jnp.maximum(bound, _FAR)))  # normal, given < bound
    below = jnp.where(tau > 0, mu + tau * jnp.where(bound < _FAR, bound, below), mu)
    theta = jnp.where(zeros, jnp.minimum(below, limits), theta)

    present = kept | zeros
    high = jnp.where(present, theta, -jnp.inf)
    spread = high.max(axis=-1) - jnp.where(present, theta, jnp.inf).min(axis=-1)
    place = jnp.maximum(original, 0)
    known = (original >= 0) & present[place] & (present.sum() > 1)
    others = jnp.where(jnp.arange(len(y)) == original, -jnp.inf, high).max(axis=-1)
    over = jnp.where(known, others - theta[..., place], jnp.nan)
    first = jax.nn.one_hot(jnp.argmax(high, axis=-1), len(y), dtype=y.dtype).mean(axis=(0, 1))
    enough = count > 1
    unless = lambda x: jnp.where(enough, x, jnp.nan)  # noqa: E731
    tail = (1 - level) / 2
    ranges = unless(jnp.quantile(spread, jnp.array([0.5, tail, 1 - tail])))
    overs = unless(jnp.quantile(over, jnp.array([0.5, tail, 1 - tail])))
    return Reach(
        range=ranges[0],
        range_lower=ranges[1],
        range_upper=ranges[2],
        over_original=overs[0],
        over_lower=overs[1],
        over_upper=overs[2],
        tenfold=jnp.where(enough & known, jnp.mean(over >= 1), jnp.nan),
        riskiest=jnp.where(enough, jnp.argmax(first), -1),
        riskiest_probability=unless(first.max()),
    )
