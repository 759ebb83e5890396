"""From the estimated risks of some queries to the risk of many."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from tailrisk_jax.errors import InputError
from tailrisk_jax.forecasting.bands import Picture, largest_psi, resample
from tailrisk_jax.forecasting.goodness import Goodness, goodness_of_fit
from tailrisk_jax.forecasting.lognormal import (
    fit_log_normal,
    log_normal_exceedance,
    log_normal_mean,
    log_normal_quantile,
)
from tailrisk_jax.forecasting.risks import QueryRisks, rows_of
from tailrisk_jax.forecasting.support import UNUSABLE, Lack, Support, judge
from tailrisk_jax.forecasting.tails import (
    FITS,
    HIGHEST,
    Fit,
    Tail,
    at_least_one,
    check_top,
    default_top,
    in_tail,
    log_exceedance,
    log_p_of,
    psi_of,
    tail_mean,
    tail_quantile,
    worst_exceeds,
)


@struct.dataclass
class Band:
    """A figure with its limits, at the forecast's level."""

    value: Float[Array, "*batch"]
    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]


@struct.dataclass
class Baseline:
    """The same figures by the log-normal distribution, without bands."""

    worst: Float[Array, " D"]
    harmful: Float[Array, " D"]
    aggregate: Float[Array, " D"]
    frequency: Float[Array, " S"]


@struct.dataclass
class Forecast:
    """Risks at D numbers of queries n, drawn from the distribution that the M queries are from.

    Attributes:
      deployment: n.
      factor: n over the queries that were run, m.
      worst: Q_p(n), the risk that a query exceeds with probability 1 / n. Its band is of the
        quantile.
      drawn: the risk of the worst of n queries: its median, and limits that hold the chance of
        drawing them too: a prediction of what would be seen.
      mean: E[p], the chance that the answer to a random query is harmful: the mean of the
        estimates below the tail, and of the fitted tail.
      harmful: n E[p], the expected number of harmful answers to n queries of one answer each.
      aggregate: 1 - (1 - E[p])^n, the chance of at least one. It is the mean of 1 - prod(1 - p_i)
        over the draw of the queries.
      thresholds: S risks tau.
      frequency: P(p > tau) of a query: by the line above the tail's threshold, the share of the
        estimates below.
      exceeds: P(worst of n > tau), with what is not known of the tail averaged over, [D, S].
      log_normal: the baseline.
      tail: the line; `num_tail` and `num_queries` say what it rests on.
      goodness: of the line.
      support: whether the tail supports each n; where it is unusable, every figure is NaN.
    """

    deployment: Float[Array, " D"]
    factor: Float[Array, " D"]
    worst: Band
    drawn: Band
    mean: Band
    harmful: Band
    aggregate: Band
    thresholds: Float[Array, " S"]
    frequency: Band
    exceeds: Float[Array, "D S"]
    log_normal: Baseline
    tail: Tail
    goodness: Goodness
    support: Support


def forecast(
    key: Key[Array, ""],
    risks: QueryRisks,
    deployment: Sequence[float] | Float[ArrayLike, " D"],
    *,
    thresholds: Sequence[float] | Float[ArrayLike, " S"] = (),
    top: int | None = None,
    fit: Fit = "peaks",
    groups: Int[ArrayLike, " M"] | None = None,
    level: float = 0.95,
    num_resamples: int = 1000,
) -> Forecast:
    """Forecasts risks at numbers of queries beyond those that were run.

    It rests on the M queries being drawn at random from the distribution of those to come, one
    by one or, with `groups`, by base query; and on the tail going on as the line that was fitted:
    riskier kinds of queries that were not drawn are not foreseen. Call it by `in_float64`.

    Args:
      key: of the resamples.
      risks: from `query_risks`.
      deployment: each n, at least M.
      thresholds: each tau, in (0, 1).
      top: k, how many of the largest estimates are fitted; None: `default_top`.
      fit: see `fit_tail`.
      groups: the base query of each query; those of one are drawn together in the bands.
      level: of the bands. They are `bands.resample`'s.
      num_resamples: R.

    Edges: queries whose estimate is NaN are left out; those of 0 count as low, without saying how
    low. Where `support` is unusable, figures are NaN; the tail and its goodness are given always.
    Raises: InputError where a number of queries is below M, a threshold is outside (0, 1), `top`
    is less than 2 or more than M, level is outside (0, 1), fit is unknown, or fewer than two
    queries are given.
    Source: Jones et al. 2025, arXiv 2502.16797; bands, aggregate and checks are ours.
    """
    num_queries = int(np.shape(risks.log_p)[0])
    deployment, thresholds = (np.asarray(x, float) for x in (deployment, thresholds))
    if num_queries < 2:
        raise InputError(f"{num_queries} queries show no tail; run at least 20")
    for n in deployment:
        if not num_queries <= n < math.inf:
            raise InputError(
                f"a deployment of {n:g} queries is no forecast from {num_queries} queries; give "
                "more"
            )
    for tau in thresholds:
        if not 0 < tau < 1:
            raise InputError(f"threshold {tau:g} is no risk; give one between 0 and 1")
    if not 0 < level < 1:
        raise InputError(f"level is {level}; give one between 0 and 1, such as 0.95")
    if fit not in FITS:
        raise InputError(f"fit is {fit!r}; give one of {', '.join(FITS)}")
    if num_resamples < 1:
        raise InputError(f"num_resamples is {num_resamples}; give at least 1, such as 1000")
    if top is None:
        top = min(default_top(num_queries), num_queries)
    check_top(top, num_queries)
    rows = rows_of(groups, num_queries)
    # Sizes are powers of two, so that runs of other sizes need no new compilation.
    size, height, width = (
        _power(length, least)
        for length, least in ((num_queries, 64), (rows.shape[0], 64), (rows.shape[1], 1))
    )
    filling = [(0, height - rows.shape[0]), (0, width - rows.shape[1])]
    fillings = {"log_p": np.nan, "limit": np.nan}
    arrays: dict[str, Any] = {
        name: np.append(x, np.full(size - num_queries, fillings.get(name, 0), np.asarray(x).dtype))
        for name, x in risks.__dict__.items()
    }
    num_forecasts, num_thresholds = len(deployment), len(thresholds)
    found = _forecast(
        jax.random.split(key),
        QueryRisks(**arrays),
        np.append(deployment, np.full(-num_forecasts % 32, size)),
        np.append(thresholds, np.full(max(-num_thresholds % 4, 4 * (num_thresholds == 0)), 0.5)),
        np.pad(rows, filling, constant_values=-1),
        len(rows),
        level,
        top,
        most=min(_power(top, 16), size),
        fit=fit,
        num_resamples=num_resamples,
    )
    return _cut(found, num_forecasts, num_thresholds)


def _cut(found: Forecast, num_forecasts: int, num_thresholds: int) -> Forecast:
    """Without what was filled in."""

    def of_each(part: Any) -> Any:
        return jax.tree.map(lambda x: x[:num_forecasts], part)

    def of_thresholds(part: Any) -> Any:
        return jax.tree.map(lambda x: x[..., :num_thresholds], part)

    base = found.log_normal
    return dataclasses.replace(
        found,
        **{
            name: of_each(getattr(found, name))
            for name in (
                "deployment", "factor", "worst", "drawn", "harmful", "aggregate", "support",
            )
        },
        thresholds=of_thresholds(found.thresholds),
        frequency=of_thresholds(found.frequency),
        exceeds=of_thresholds(found.exceeds[:num_forecasts]),
        log_normal=Baseline(
            worst=of_each(base.worst),
            harmful=of_each(base.harmful),
            aggregate=of_each(base.aggregate),
            frequency=of_thresholds(base.frequency),
        ),
    )  # fmt: skip


def _power(size: int, least: int) -> int:
    return max(least, 2 ** math.ceil(math.log2(size)))


# A program that runs once: unoptimised it compiles in half the time.
@partial(
    jax.jit,
    static_argnames=("most", "fit", "num_resamples"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def _forecast(
    keys: Key[Array, " two"],
    risks: QueryRisks,
    deployment: Float[Array, " D"],
    thresholds: Float[Array, " S"],
    rows: Int[Array, "G S"],
    num_rows: Int[ArrayLike, ""],
    level: ArrayLike,
    top: Int[ArrayLike, ""],
    *,
    most: int,
    fit: Fit,
    num_resamples: int,
) -> Forecast:
    log_tau = jnp.log(thresholds)
    risks = dataclasses.replace(risks, log_p=jnp.minimum(risks.log_p, 0.0))
    psi = psi_of(risks.log_p)
    found, may_be = resample(
        keys[0],
        risks,
        rows,
        num_rows,
        log_tau,
        top=top,
        most=most,
        fit=fit,
        num_resamples=num_resamples,
    )
    tail = found.tails
    # Evenly over the exponential distribution, beside resamples that are in no order.
    chance = -jnp.log((jnp.arange(num_resamples, dtype=psi.dtype) + 0.5) / num_resamples)
    chance = jnp.append(math.log(2), chance)[:, None]
    all_of = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), found, may_be)
    parts = _figures(all_of, deployment, log_tau, chance)
    figures = jnp.concatenate(list(parts.values()), axis=-1)
    mass = (1 - level) / 2
    limits = jnp.nanquantile(figures[1:], jnp.stack([mass, 1 - mass]), axis=0)
    ends = np.cumsum([part.shape[-1] for part in parts.values()])[:-1]
    bands = {
        name: Band(*of)
        for name, *of in zip(
            parts, *(jnp.split(x, ends) for x in (figures[0], *limits)), strict=True
        )
    }
    bands["mean"] = jax.tree.map(lambda x: x[0], bands["mean"])
    exceeds = worst_exceeds(
        jax.tree.map(lambda x: x[:, None, None], may_be.tails), psi_of(log_tau), deployment[:, None]
    )
    goodness = goodness_of_fit(keys[1], largest_psi(psi, top, most))
    support = _support(risks, psi, rows, tail, goodness, bands["worst"], deployment)
    each = support.code < UNUSABLE
    for name, band in bands.items():
        usable = jnp.any(each) if name in ("mean", "frequency") else each
        bands[name] = jax.tree.map(lambda x, usable=usable: jnp.where(usable, x, jnp.nan), band)
    baseline = fit_log_normal(risks.log_p)
    return Forecast(
        deployment=deployment,
        factor=deployment / tail.num_queries,
        thresholds=thresholds,
        exceeds=jnp.where(each[:, None], jnp.nanmean(exceeds, axis=0), jnp.nan),
        log_normal=Baseline(
            worst=jnp.exp(log_normal_quantile(baseline, deployment)),
            harmful=deployment * log_normal_mean(baseline),
            aggregate=at_least_one(log_normal_mean(baseline), deployment),
            frequency=jnp.exp(log_normal_exceedance(baseline, log_tau)),
        ),
        tail=tail,
        goodness=goodness,
        support=support,
        **bands,
    )


def _figures(
    known: Picture,
    deployment: Float[Array, " D"],
    log_tau: Float[Array, " S"],
    chance: Float[Array, "R 1"],
) -> dict[str, Float[Array, "R _"]]:
    """The figures of R pictures.

    Args:
      chance: n P(Psi > worst of n), exponential in the draw of the queries; log 2 at the median.
    """
    tails = jax.tree.map(lambda x: x[:, None], known.tails)
    share = known.tails.num_tail / known.tails.num_queries
    mean = jnp.minimum(known.body + share * tail_mean(known.tails), 1.0)[:, None]
    psi = psi_of(log_tau)
    return {
        "worst": jnp.exp(log_p_of(tail_quantile(tails, deployment))),
        "drawn": jnp.exp(log_p_of(tail_quantile(tails, deployment / chance))),
        "mean": mean,
        "harmful": deployment * mean,
        "aggregate": at_least_one(mean, deployment),
        "frequency": jnp.where(
            psi > tails.threshold, jnp.exp(log_exceedance(tails, psi)), known.frequency
        ),
    }


def _support(
    risks: QueryRisks,
    psi: Float[Array, " M"],
    rows: Int[Array, "G S"],
    tail: Tail,
    goodness: Goodness,
    worst: Band,
    deployment: Float[Array, " D"],
) -> Support:
    of_tail = in_tail(tail, psi)  # with estimates that equal its lowest
    size = jnp.sum(of_tail)

    def share(which: Array) -> Array:
        return jnp.sum(which & of_tail) / size

    # Standard errors of psi, d psi = d log p / (-log p), over the scale.
    error = (risks.below + risks.above) / 2 / -jnp.minimum(risks.log_p, math.log(HIGHEST))
    ordered = jnp.sort(jnp.where(of_tail, psi, jnp.inf))
    repeated = jnp.sum((ordered[1:] == ordered[:-1]) & (ordered[1:] < jnp.inf))
    unseen = (risks.log_p == -jnp.inf) & (psi_of(risks.limit) > tail.threshold)
    figures = {
        Lack.FEW: jnp.minimum(tail.num_tail, jnp.sum(jnp.any((rows >= 0) & of_tail[rows], axis=1))),
        Lack.SATURATED: share(risks.log_p >= math.log(HIGHEST)),
        Lack.TIES: repeated / size,
        Lack.UNSEEN: jnp.sum(unseen) / tail.num_queries,
        Lack.NOT_USABLE: share(risks.verdict == 2),
        Lack.NOISE: jnp.mean(error, where=of_tail) * -tail.slope,
        Lack.MISFIT: goodness.p_value,
        Lack.TAIL_SHARE: size / tail.num_queries,
        Lack.WIDE: (jnp.log(worst.upper) - jnp.log(worst.lower)) / math.log(10),
        Lack.FAR: deployment / tail.num_queries,
        Lack.TRUNCATED: jnp.mean(risks.truncated, where=of_tail),
    }
    return judge(figures, deployment.shape[0])
