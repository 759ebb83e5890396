"""Limits that hold at their level for every number of draws, and that may be watched.

For draws y_i that are independent given the past, x_i = w_i h_i >= 0 has mean E_p[h]. A gambler who
stakes a fixed share f of what he owns on x_i multiplies it by 1 - f + f x_i / m; if the mean is m
or less, his fortune is a supermartingale, and exceeds 1 / delta at some time with probability at
most delta (Ville). The limit is the m at which the fortune, averaged over a fixed grid of f, is
1 / delta. So it holds at every sample size, and for a sampling that stops when it pleases.

An upper limit needs a bound x_i <= B: B = 1 / alpha for a defensive mixture with the share alpha of
target draws. It can't fall below about B log(1 / delta) / n, whatever the draws show: harm that no
proposal reaches is seen by target draws alone.

Labels of a mixture must be drawn at random: fixed counts break the argument.

Source: Waudby-Smith & Ramdas 2024, Estimating means of bounded random variables by betting, JRSS B.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.intervals import Interval
from tailrisk_jax.estimators.logspace import contributions, moments, unscale

MOST_BLOCKS = 1024  # bets of a lower limit; with more draws each is on the mean of several
_STAKES = np.geomspace(0.9, 1e-5, 18)  # shares of the fortune; small ones for a wide spread of x
_UPPER_STAKES = np.array([0.4, 0.8, 0.98])
_MOST_STEPS = 40


def betting_lower(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
    block: int | None = None,
) -> Float[Array, "*batch"]:
    """A certified lower limit: P(E_p[h] >= limit) >= level, for every N, one-sided.

        sup{m : mean_f prod_j (1 - f + f x_j / m) >= 1 / (1 - level)}

    with x_j the mean of w h over `block` successive draws. A proposal that misses harm can only
    lower it. Blocks save time and cost little while most blocks hold few hits; block=1 bets on
    every draw. Watched while sampling, block must stay the same.

    Args:
      block: draws per bet; by default the least that gives at most `MOST_BLOCKS` bets.

    Edges: 0 without hits; NaN scores are left out, as if they were missing at random; NaN where
    no draw has a score.
    Raises: ValueError as `importance`, and for block < 1.
    """
    log_x, scored = contributions(*checks.draws(scores, log_weights, mask))
    if block is not None and block < 1:
        raise ValueError(f"block is {block}; give at least 1 draw per bet")
    size = block or math.ceil(log_x.shape[-1] / MOST_BLOCKS)
    return _betting_lower(log_x, scored, math.log(1 / (1 - checks.level(level))), size)


def betting_upper(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    log_bound: Float[ArrayLike, ""] | Float[ArrayLike, "*batch"],
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Float[Array, "*batch"]:
    """A certified upper limit: P(E_p[h] <= limit) >= level, for every N, one-sided.

    The lower limit of B - w h by betting. It is loose: never under B log(1 / (1 - level)) / n.

    Args:
      log_bound: log B with w h <= B always, one number or one for each row of the batch; -log
        alpha where the proposal is a mixture that holds the target with weight alpha, 0 for draws
        from the target itself.

    Edges: 1 at most; NaN where no draw has a score.
    Raises: ValueError as `importance`, and where a draw on a hit has log w above log_bound.
    """
    log_x, scored = contributions(*checks.draws(scores, log_weights, mask))
    log_bound = checks.bound(log_bound, log_x)
    return _betting_upper(log_x, scored, log_bound, math.log(1 / (1 - checks.level(level))))


def betting_interval(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    log_bound: Float[ArrayLike, ""] | Float[ArrayLike, "*batch"] | None = None,
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Interval:
    """`betting_lower` and `betting_upper`, each at (1 + level) / 2: a confidence sequence.

    Without a bound the upper limit is inf.
    """
    side = (1 + checks.level(level)) / 2
    lower = betting_lower(scores, log_weights, level=side, mask=mask)
    if log_bound is None:
        upper = jnp.where(jnp.isnan(lower), jnp.nan, jnp.inf)
    else:
        upper = betting_upper(scores, log_weights, log_bound, level=side, mask=mask)
    return Interval(lower=lower, upper=upper, kind="betting", certified=True)


def empirical_bernstein(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    log_bound: Float[ArrayLike, ""] | Float[ArrayLike, "*batch"],
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Interval:
    """value -+ (s sqrt(2 c / n) + 7 B c / (3 (n - 1))), c = log(4 / (1 - level)), cut to [0, 1].

    s^2 is the sample variance of w h, B its bound. Holds for every N, at an N fixed beforehand.
    Wider than `betting_interval`; given for comparison.

    Edges: [0, 1] for one draw; NaN where no draw has a score.
    Raises: ValueError as `betting_upper`.
    Source: Maurer & Pontil 2009, Empirical Bernstein bounds and sample variance penalization.
    """
    log_x, scored = contributions(*checks.draws(scores, log_weights, mask))
    log_bound = checks.bound(log_bound, log_x)
    return _empirical_bernstein(log_x, scored, log_bound, checks.level(level))


@partial(jax.jit, static_argnames=("level", "tuned_for"))
def asymptotic_sequence(
    value: Float[ArrayLike, "*batch"],
    stderr: Float[ArrayLike, "*batch"],
    num_samples: Int[ArrayLike, "*batch"],
    level: float = 0.95,
    tuned_for: int = 1000,
) -> Interval:
    """An interval that may be watched: asymptotically it holds at all sample sizes at once.

        value -+ stderr sqrt(2 (n r + 1) / (n r) log(sqrt(n r + 1) / (1 - level)))

    narrowest near n = `tuned_for`: r = (c + log(1 + c)) / tuned_for with c = -2 log(1 - level).
    About 1.5 times as wide as Wald's there.

    Edges: NaN stderr gives (-inf, inf); NaN value gives (NaN, NaN).
    Source: Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2024, Time-uniform central limit theory
    and asymptotic confidence sequences, Annals of Statistics.
    """
    log_delta = math.log(1 - checks.level(level))
    value, stderr = checks.real(value), checks.real(stderr)
    rate = (-2 * log_delta + math.log(1 - 2 * log_delta)) / tuned_for
    grown = checks.real(num_samples) * rate + 1
    width = jnp.sqrt(2 * grown / (grown - 1) * (jnp.log(grown) / 2 - log_delta))
    half = jnp.where(jnp.isnan(stderr), jnp.inf, stderr * width)
    return Interval(lower=value - half, upper=value + half, kind="asymptotic-sequence")


@partial(jax.jit, static_argnames="size")
def _betting_lower(
    log_x: Float[Array, "*batch N"], scored: Bool[Array, "*batch N"], log_odds: float, size: int
) -> Float[Array, "*batch"]:
    padding = [(0, 0)] * (log_x.ndim - 1) + [(0, -log_x.shape[-1] % size)]
    shape = (*log_x.shape[:-1], -1, size)
    log_x = jnp.pad(log_x, padding, constant_values=-jnp.inf).reshape(shape)
    count = jnp.sum(jnp.pad(scored, padding).reshape(shape), axis=-1)
    log_means = jax.nn.logsumexp(log_x, axis=-1) - jnp.log(jnp.maximum(checks.real(count), 1.0))
    bets = count > 0
    num_bets = checks.real(jnp.sum(bets, axis=-1))
    start = jax.nn.logsumexp(log_means, axis=-1) - jnp.log(num_bets)
    hit = start > -jnp.inf
    root = _growth_root(log_means, bets, jnp.where(hit, -start, 0.0), _STAKES, log_odds)
    return jnp.where(num_bets == 0, jnp.nan, jnp.where(hit, jnp.exp(-root), 0.0))


@jax.jit
def _betting_upper(
    log_x: Float[Array, "*batch N"],
    scored: Bool[Array, "*batch N"],
    log_bound: Float[Array, "*batch"],
    log_odds: float,
) -> Float[Array, "*batch"]:
    share = jnp.exp(log_x - log_bound[..., None])  # of the bound
    share = jnp.where(scored, jnp.minimum(share, 1.0), 0.0)
    num = checks.real(jnp.sum(scored, axis=-1))
    start = -jnp.log1p(-jnp.sum(share, axis=-1) / num)
    known = jnp.isfinite(start)
    start = jnp.where(known, start, 0.0)
    root = _growth_root(jnp.log1p(-share), scored, start, _UPPER_STAKES, log_odds)
    limit = jnp.where(known, jnp.minimum(-jnp.expm1(-root) * jnp.exp(log_bound), 1.0), 1.0)
    return jnp.where(num == 0, jnp.nan, limit)


def _growth_root(
    log_x: Float[Array, "*batch N"],
    bets: Bool[Array, "*batch N"],
    start: Float[Array, "*batch"],
    stakes: np.ndarray,
    log_odds: float,
) -> Float[Array, "*batch"]:
    """The t at which mean_f prod_i (1 - f + f x_i e^t) over the bets is exp(log_odds).

    Its logarithm is convex and rises with t. So the first Newton step from `start`, where it is
    below, lands at or beyond the root, and all further ones come down to it from there: what is
    returned never undercuts the root but for rounding.
    """

    def log_fortune(t, stake):
        stake = jnp.reshape(stake, [1] * log_x.ndim)
        exponent = log_x + t[..., None]
        near = jnp.log1p(stake * jnp.expm1(jnp.minimum(exponent, 1.0)))
        far = jnp.logaddexp(jnp.log1p(-stake), jnp.log(stake) + exponent)
        gain = jnp.where(exponent < 1, near, far)
        slope = jax.nn.sigmoid(exponent + jnp.log(stake) - jnp.log1p(-stake))
        return tuple(jnp.sum(jnp.where(bets, x, 0.0), axis=-1) for x in (gain, slope))

    grid = checks.real(stakes)
    tolerance = 1e-9 if start.dtype == jnp.float64 else 1e-5

    def newton(state):
        step, t, _ = state
        logs, slopes = jax.lax.map(lambda stake: log_fortune(t, stake), grid)
        total = jax.nn.logsumexp(logs, axis=0)
        slope = jnp.sum(jax.nn.softmax(logs, axis=0) * slopes, axis=0)
        excess = total - math.log(len(stakes)) - log_odds
        change = jnp.where(slope > 0, excess / slope, 0.0)
        return step + 1, t - change, jnp.any(jnp.abs(change) > tolerance * jnp.abs(t))

    going = lambda state: state[2] & (state[0] < _MOST_STEPS)  # noqa: E731
    return jax.lax.while_loop(going, newton, (0, start, jnp.array(True)))[1]


@partial(jax.jit, static_argnames="level")
def _empirical_bernstein(
    log_x: Float[Array, "*batch N"],
    scored: Bool[Array, "*batch N"],
    log_bound: Float[Array, "*batch"],
    level: float,
) -> Interval:
    x = moments(log_x, scored)
    value, stderr = unscale(x.mean, x.shift), unscale(x.stderr, x.shift)
    log_term = math.log(4 / (1 - level))
    others = checks.real(x.count - 1)
    spread = jnp.where(jnp.isnan(stderr), 0.0, stderr) * math.sqrt(2 * log_term)
    half = spread + 7 * jnp.exp(log_bound) * log_term / (3 * others)
    return Interval(
        lower=jnp.maximum(value - half, 0.0),
        upper=jnp.minimum(value + half, 1.0),
        kind="empirical-bernstein",
        certified=True,
    )
