"""Choosing among the constructions at hand, by what a pilot says each is worth per unit of compute.

With C(alpha) the cost of one draw from the mixture, the equal-error ratio per unit of compute is

    (P - P^2) / (J(alpha) - P^2)  *  c_target / C(alpha),

in draws of plain Monte Carlo, which cost c_target each and need no scoring. A draw from component
k costs c_k: to draw it, and to score it once under every policy that any component kept consists
of. J is homogeneous of degree -1 and C of degree 1, so minimising J C over alpha is minimising J
over shares of the budget, a_k proportional to alpha_k c_k: the convex problem of `weights.solve`
with q_k / c_k for q_k. The objective is the mean over queries of log(J C), and what is reported is
the geometric mean of the ratio over queries, in the same spirit.

Harm that the pilot did not see has no part in its estimate of J, however heavy its weights would
be: a hundredth of the harm, reached by 10% target alone, is enough to bring any ratio down to 10.
That misleads about two things, and there is an answer to each:

- Shares. Components that do not cover the target look best where only their own kind of harm was
  seen. So what the target leaves of the budget is shared by, and the ratio is reported for,

      J_q + lambda_q P_q R,    lambda_q = 1 / (n_q + 1),    R = mean over queries of J / P,

  with n_q harmful draws of the query: by the rule of succession, the chance that the next one is
  unlike them. It is taken to be like the harm of all queries together.
- Coverage. Half of what the target leaves stays with components that cover the target, so that J is
  at most twice what they would have alone at the same cost, whatever the pilot did not see.

Which components to keep is decided by leaving out one after another, each set judged on held-out
draws and by the plain J: sets are compared on the same draws, and what is missing is missing from
all of them, while R is the noise of a few heavy draws.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from tailrisk_jax.adaptation.pilot import Hits, Pilot, harmful
from tailrisk_jax.adaptation.weights import coefficients, normalised, solve
from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import component_mean_weights, covered_hits

FOLDS = 4
SLACK = 1e-3  # nats of log(J C): of two sets this near to each other the smaller is taken
COVERS = 0.5  # least mean weight on its own draws of a component that covers the target
POOLED = 256  # the heaviest draws of all queries, which stand for R in the fit


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one response costs, in tokens through the network; the target is the first component.

    Attributes:
      draw: to draw it from each component: its tokens times the policies run in lock-step, and the
        share of the prompt, [K].
      score: to score a response under each policy, [S].
      consists: whether a component consists of a policy, [K, S]; by default every component is one
        policy of its own, S = K.
    """

    draw: tuple[float, ...]
    score: tuple[float, ...]
    consists: tuple[tuple[bool, ...], ...] | None = None

    def scoring(self, kept: Bool[ArrayLike, " K"]) -> float:
        """To score a response under every policy of the components kept, each once."""
        own = np.eye(len(self.score), dtype=bool) if self.consists is None else self.consists
        return float(np.asarray(own, bool)[np.asarray(kept)].any(axis=0) @ np.array(self.score))


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The mixture chosen, and why.

    Attributes:
      weights: alpha, 0 for components left out, [K].
      ratio: Monte Carlo draws that one draw is worth, the geometric mean over queries with harmful
        draws, by held-out draws and with harm that was not seen allowed for; NaN without any.
      ratio_per_compute: the same for one unit of compute.
      seen_per_compute: the same had the pilot seen all harm there is; too high where it hasn't.
      alone: ratio_per_compute of each component with the target's floor beside it, [K]; 1 for the
        target.
      mean_weights: of each component on its own draws, the median over queries, [K].
      covers: whether that is at least 0.5; True for the target, [K].
      hits: harmful pilot draws per query, [Q].
      reason: a few sentences.
    """

    weights: Float[np.ndarray, " K"]
    ratio: float
    ratio_per_compute: float
    seen_per_compute: float
    alone: Float[np.ndarray, " K"]
    mean_weights: Float[np.ndarray, " K"]
    covers: Bool[np.ndarray, " K"]
    hits: Int[np.ndarray, " Q"]
    reason: str


def choose(
    pilot: Pilot,
    labels: Int[ArrayLike, "Q N"],
    costs: Costs,
    names: Sequence[str],
    *,
    target_share: float = 0.1,
    cover_share: float = 1 / 3,
) -> Choice:
    """The mixture of constructions with the best estimated ratio per unit of compute.

    Guards against lost coverage: `target_share` of the budget stays with the target; `cover_share`
    of the rest stays with the components whose own draws have a mean weight of at least 0.5, in the
    shares that serve best without the others, and the last of them is never left out; and where no
    harmful draw came from such a component, the reason says that the ratios can't be trusted.

    Args:
      pilot: draws from a mixture of the components, the target as component 0.
      labels: the component that made each draw.
      costs: per component.
      names: of the components.

    Edges: without a harmful draw nothing is left out and the budget is shared equally beyond the
    floors. Plain Monte Carlo is chosen where no mixture's ratio per unit of compute exceeds 1.
    Raises:
      InputError: no score; no component beside the target; costs, names or components that differ
        in number; costs below 0, or nothing for a draw; shares outside [0, 1].
    """
    hits = harmful(pilot)
    num_components = hits.ratios.shape[-1]
    _check(costs, names, num_components, target_share, cover_share)
    log_q = np.asarray(pilot.component_log_probs)
    exists = ~np.isnan(np.asarray(pilot.scores))
    means = component_mean_weights(log_q[0], log_q, labels, mask=exists)
    mean_weights = np.array([_median(row) for row in np.asarray(means.mean_weight, np.float64)])
    mean_weights[0] = 1.0
    covers = mean_weights >= COVERS
    covered = np.asarray(covered_hits(pilot.scores, labels, means, COVERS, mask=exists))

    trial = _Trial(hits, costs, covers, target_share, cover_share)
    everything = np.ones(num_components, bool)
    if not hits.counts.any():
        weights, nan = trial.fit(everything), float("nan")
        reason = "No pilot draw was harmful, so nothing tells the components apart: all are kept."
        alone = np.full(num_components, nan)
        return Choice(weights, nan, nan, nan, alone, mean_weights, covers, hits.counts, reason)

    kept, best = everything, trial.held_out(everything).objective
    while kept.sum() > 2:
        smaller = [_without(kept, k) for k in np.flatnonzero(kept)[1:]]
        smaller = [s for s in smaller if (s & covers)[1:].any() or not (kept & covers)[1:].any()]
        tried = [trial.held_out(s).objective for s in smaller]
        if not tried or min(tried) > best + SLACK:
            break
        first = int(np.argmin(tried))
        kept, best = smaller[first], tried[first]
    pairs = [np.isin(np.arange(num_components), [0, k]) for k in range(1, num_components)]
    alone = np.array([1.0, *(trial.held_out(s, unseen=True).per_compute for s in pairs)])
    weights, worth = trial.fit(kept, unseen=True), trial.held_out(kept, unseen=True)
    ratios = worth.ratio, worth.per_compute, worth.seen_per_compute
    if worth.per_compute <= 1:
        weights, ratios = np.eye(num_components)[0], (1.0, 1.0, 1.0)
    reason = _reason(names, weights, ratios, alone, mean_weights, covers, hits.counts, covered)
    return Choice(weights, *ratios, alone, mean_weights, covers, hits.counts, reason)


def _check(costs, names, num_components, target_share, cover_share) -> None:
    if not len(names) == len(costs.draw) == num_components:
        raise InputError(
            f"there are {num_components} components, {len(names)} names and costs of "
            f"{len(costs.draw)} draws; give one of each for every component"
        )
    policies = len(costs.score)
    rows = [policies] * policies if costs.consists is None else [*map(len, costs.consists)]
    if rows != [policies] * num_components:
        raise InputError(
            f"there are {num_components} components and costs of {policies} scores; give one for "
            "every component, or for every policy with what each component consists of"
        )
    if num_components < 2:
        raise InputError("there is nothing to choose: give the target and a component beside it")
    if not (min(costs.draw) > 0 and min(costs.score) >= 0):
        raise InputError(f"costs {costs} must be above 0 to draw and 0 or more to score")
    for name, share in (("target_share", target_share), ("cover_share", cover_share)):
        if not 0 <= share <= 1:
            raise InputError(f"{name}={share} must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """On held-out draws: the mean over queries of log J + log C of what was seen, and ratios."""

    objective: float
    ratio: float
    per_compute: float
    seen_per_compute: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Trial:
    """Fits and judges the mixture of a set of components."""

    hits: Hits
    costs: Costs
    covers: Bool[np.ndarray, " K"]
    target_share: float
    cover_share: float

    def per_draw(self, kept: Bool[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
        """The cost of a draw from each component, scored under all that are kept."""
        return np.array(self.costs.draw, float) + self.costs.scoring(kept)

    def fit(
        self,
        kept: Bool[np.ndarray, " K"],
        out: Bool[np.ndarray, " H"] | None = None,
        *,
        unseen: bool = False,
    ) -> Float[np.ndarray, " K"]:
        """alpha fitted without the hits in the columns `out`.

        `unseen` parts what the target leaves of the budget with more harm than was seen in view.
        """
        costs = self.per_draw(kept)
        rest = 1 - self.target_share
        fixed = np.zeros(len(kept))
        fixed[0] = self.target_share
        covering = kept & self.covers
        if covering[1:].any():
            alone = (_solved(*self.rows(covering, costs, out), fixed) * covering)[1:]
            parts = alone if alone.any() else covering[1:]  # none where they reach no hit
            fixed[1:] = self.cover_share * rest * normalised(parts)
        ratios, log_c = self.rows(kept, costs, out)
        budget = normalised(_solved(ratios, log_c, fixed) * kept)
        if unseen and rest > 0:
            share = budget[0]
            ratios, log_c = self.with_unseen(ratios, log_c, out)
            beside = (share * ratios[..., :1] + (1 - share) * ratios[..., 1:]) * kept[1:]
            parted = normalised(_solved(beside, log_c, fixed[1:] / rest) * kept[1:])
            budget = np.append(share, (1 - share) * parted)
        return normalised(budget / costs)

    def rows(self, kept, costs, out):
        """q_k / c_k of the components kept, the largest of a hit scaled to 1, and log of the c_i.

        A hit of which float32 can hold no such density has c = 0: its probability under the target
        is at most 1e-38 of that under a component left out.
        """
        ratios = self.hits.ratios * np.where(kept, costs.min() / costs, 0.0)
        largest = ratios.max(axis=-1)
        real = largest > 0
        scale = np.where(real, largest, 1.0)
        log_c = coefficients(self.hits, "second-moment") - np.log(scale)
        log_c = np.where(real if out is None else real & ~out, log_c, -np.inf)
        return np.where(real[..., None], ratios / scale[..., None], 1.0), log_c

    def with_unseen(self, ratios, log_c, out):
        """Rows with lambda_q P_q R added: the heaviest of all hits, on every query that has some.

        Which are heaviest is said at equal weights. P_q divides every row, which changes nothing.
        """
        log_p, log_lambda = self.seen(out)
        has = log_p > -np.inf
        if not has.any():
            return ratios, log_c
        own, rows = ratios[has], log_c[has] - (log_p + np.log(self.hits.scored))[has, None]
        heaviest = np.argsort(-(rows - np.log(own.mean(axis=-1))), axis=None)[:POOLED]
        pooled = own.reshape(-1, own.shape[-1])[heaviest]
        log_pooled = rows.ravel()[heaviest] - np.log(has.sum()) + log_lambda[has, None]
        return (
            np.concatenate([own, np.broadcast_to(pooled, (len(own), *pooled.shape))], axis=1),
            np.concatenate([rows, log_pooled], axis=1),
        )

    def seen(
        self, out: Bool[np.ndarray, " H"] | None = None
    ) -> tuple[Float[np.ndarray, " Q"], Float[np.ndarray, " Q"]]:
        """log of the estimate of P, -inf without hits, and log lambda."""
        log_w = self.hits.log_w_h if out is None else np.where(out, -np.inf, self.hits.log_w_h)
        log_p = np.logaddexp.reduce(log_w, axis=1) - np.log(np.maximum(self.hits.scored, 1))
        return log_p, -np.log1p(np.sum(log_w > -np.inf, axis=1))

    def held_out(self, kept: Bool[np.ndarray, " K"], *, unseen: bool = False) -> _Outcome:
        """Cross-fitted: every hit is judged by a fit without it."""
        hits, columns = self.hits, np.arange(self.hits.log_p_h.shape[1]) % FOLDS
        terms, costs = np.empty(hits.log_p_h.shape), []
        log_c = coefficients(hits, "second-moment")
        with np.errstate(divide="ignore"):
            for fold in range(FOLDS):
                out = columns == fold
                alpha = self.fit(kept, out, unseen=unseen)
                log_j = log_c - np.log(hits.ratios.astype(np.float64) @ alpha)
                most = hits.log_w_h - np.log(alpha[0])  # no weight exceeds 1 / alpha_0
                terms[:, out] = np.minimum(log_j, most)[:, out]
                costs.append(alpha @ self.per_draw(kept))
        log_p, log_lambda = self.seen()
        has = hits.counts > 0
        log_p, log_lambda, cost = log_p[has], log_lambda[has], float(np.mean(costs))
        log_j = (np.logaddexp.reduce(terms, axis=1) - np.log(np.maximum(hits.scored, 1)))[has]
        pooled = np.logaddexp.reduce(log_j - log_p) - np.log(has.sum())
        ratio = _geometric_mean(log_p, np.logaddexp(log_j, log_lambda + log_p + pooled))
        target = self.costs.draw[0]
        return _Outcome(
            objective=float(np.mean(log_j)) + np.log(cost),
            ratio=ratio,
            per_compute=ratio * target / cost,
            seen_per_compute=_geometric_mean(log_p, log_j) * target / cost,
        )


def _solved(ratios, log_c, fixed) -> Float[np.ndarray, " K"]:
    """Shares of the budget for all queries."""
    solved = solve(ratios.astype(np.float32), log_c, fixed, squares=True, shared=True)
    return np.asarray(solved.weights[0], np.float64)


def _geometric_mean(log_p: Float[np.ndarray, " Q"], log_j: Float[np.ndarray, " Q"]) -> float:
    """Of (P - P^2) / (J - P^2), with J - P^2 at least J / 1000."""
    p, excess = np.exp(log_p), np.maximum(-np.expm1(2 * log_p - log_j), 1e-3)
    return float(np.exp(np.mean(log_p + np.log1p(-np.minimum(p, 0.999)) - log_j - np.log(excess))))


def _without(kept: Bool[np.ndarray, " K"], index: int) -> Bool[np.ndarray, " K"]:
    return kept & (np.arange(len(kept)) != index)


def _median(values: Float[np.ndarray, " Q"]) -> float:
    """NaN where no query has a value."""
    finite = values[~np.isnan(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _figure(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _reason(names, weights, ratios, alone, mean_weights, covers, hits, covered) -> str:
    order = np.argsort(-weights, kind="stable")
    chosen = ", ".join(f"{weights[k]:.0%} {names[k]}" for k in order if weights[k] > 0)
    best = int(np.argmax(alone[1:])) + 1
    if weights[0] == 1:
        return (
            "Plain Monte Carlo: no mixture is worth more at equal compute. The best single one "
            f"with the target, {names[best]}, gives {_figure(alone[best])}."
        )
    parts = [
        f"Chosen: {chosen}: one draw is worth about {_figure(ratios[0])} of Monte Carlo, and "
        f"{_figure(ratios[1])} at equal compute (geometric mean of {np.sum(hits > 0)} queries, by "
        "held-out pilot draws, with allowance for harm that they missed; "
        f"{_figure(ratios[2])} if they missed none)."
    ]
    parts.append(
        f"The best single one with the target, {names[best]}, gives {_figure(alone[best])}."
    )
    left = [names[k] for k in np.flatnonzero(weights == 0)]
    if left:
        parts.append(f"Left out as not worth their compute: {', '.join(left)}.")
    if not covers[1:].any():
        top = int(np.nanargmax(np.where(np.isnan(mean_weights[1:]), -1, mean_weights[1:]))) + 1
        parts.append(
            f"No construction covers the target (the best mean weight on its own draws is "
            f"{mean_weights[top]:.2g}, of {names[top]}, where 1 is full coverage): harm unlike "
            "theirs is left to the target's share, and these ratios may be far too high."
        )
    elif not covered.any():
        parts.append(
            "No harmful draw came from a component that covers the target: these ratios may be "
            "far too high."
        )
    return " ".join(parts)
