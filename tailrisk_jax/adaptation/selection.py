"""Choosing among the constructions at hand, by what a pilot says each is worth per unit of compute.

With C(alpha) = sum_k alpha_k c_k the cost of one draw from the mixture, c_k that of drawing from
component k and scoring under all components kept, the equal-error ratio per unit of compute is

    (P - P^2) / (J(alpha) - P^2)  *  c_target / C(alpha),

in draws of plain Monte Carlo, which cost c_target each and need no scoring. J is homogeneous of
degree -1 and C of degree 1, so minimising J C over alpha is minimising J over shares of the budget,
a_k proportional to alpha_k c_k: the convex problem of `weights.solve` with q_k / c_k for q_k.
Which components to keep is decided by leaving out one after another, each set judged on held-out
draws.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from tailrisk_jax.adaptation.pilot import Hits, Pilot, harmful
from tailrisk_jax.adaptation.weights import coefficients, log_second_moment, normalised, solve
from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import component_mean_weights, covered_hits

FOLDS = 4
COVERS = 0.5  # least mean weight of a component that covers the target, as in `covered_hits`


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one response costs, in tokens through the network, per component; the target first.

    Attributes:
      draw: to draw it: its tokens times the policies run in lock-step, and the share of the prompt.
      score: to score a response under the component; 0 for one whose policies others score already.
    """

    draw: tuple[float, ...]
    score: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The mixture chosen, and why.

    Attributes:
      weights: alpha, 0 for components left out, [K].
      ratio: Monte Carlo draws that one draw is worth, the median over queries with harmful draws,
        by held-out draws; NaN without any. To compare proposals by, not to report: the pilot can't
        tell what it did not reach, and on the organism the figure was 3 to 25 times too high.
      ratio_per_compute: the same for one unit of compute.
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
    cover_share: float = 0.1,
) -> Choice:
    """The mixture of constructions with the best estimated ratio per unit of compute.

    Guards against lost coverage: `target_share` of the budget stays with the target and
    `cover_share` is spread over the components whose own draws have a mean weight of at least 0.5,
    of which the last is never left out; and where no harmful draw came from such a component, the
    reason says that the ratios can't be trusted.

    Args:
      pilot: draws from a mixture of the components, the target as component 0.
      labels: the component that made each draw.
      costs: per component.
      names: of the components.

    Edges: without a harmful draw nothing is left out and the budget is shared equally beyond the
    floors. Plain Monte Carlo is chosen where no mixture's ratio per unit of compute exceeds 1.
    Raises:
      InputError: no score; no component beside the target; costs, names or components that differ
        in number; costs below 0, or nothing for a draw; shares that are negative or sum to more
        than 1.
    """
    hits = harmful(pilot)
    num_components = hits.ratios.shape[-1]
    draw, score = np.array(costs.draw, float), np.array(costs.score, float)
    if not len(names) == len(draw) == len(score) == num_components:
        raise InputError(
            f"there are {num_components} components, {len(names)} names and costs of {len(draw)} "
            f"draws and {len(score)} scores; give one of each for every component"
        )
    if num_components < 2:
        raise InputError("there is nothing to choose: give the target and a component beside it")
    if not (np.all(draw > 0) and np.all(score >= 0)):
        raise InputError(f"costs {costs} must be above 0 to draw and 0 or more to score")
    if min(target_share, cover_share) < 0 or target_share + cover_share > 1:
        raise InputError(
            f"target_share={target_share} and cover_share={cover_share} must be 0 or more and sum "
            "to at most 1"
        )
    log_q = np.asarray(pilot.component_log_probs)
    exists = ~np.isnan(np.asarray(pilot.scores))
    means = component_mean_weights(log_q[0], log_q, labels, mask=exists)
    mean_weights = np.array([_median(row) for row in np.asarray(means.mean_weight, np.float64)])
    mean_weights[0] = 1.0
    covers = mean_weights >= COVERS
    covered = np.asarray(covered_hits(pilot.scores, labels, means, COVERS, mask=exists))

    trial = _Trial(hits, draw, score, covers, target_share, cover_share)
    everything = np.ones(num_components, bool)
    if not hits.counts.any():
        weights, nan = trial.fit(everything), float("nan")
        reason = "No pilot draw was harmful, so nothing tells the components apart: all are kept."
        alone = np.full(num_components, nan)
        return Choice(weights, nan, nan, alone, mean_weights, covers, hits.counts, reason)

    kept, best = everything, trial.held_out(everything)
    while kept.sum() > 2:
        smaller = [_without(kept, k) for k in np.flatnonzero(kept)[1:]]
        smaller = [s for s in smaller if (s & covers)[1:].any() or not (kept & covers)[1:].any()]
        tried = [trial.held_out(s) for s in smaller]
        if not tried or min(t.objective for t in tried) > best.objective:
            break
        first = int(np.argmin([t.objective for t in tried]))
        kept, best = smaller[first], tried[first]
    pairs = [np.isin(np.arange(num_components), [0, k]) for k in range(1, num_components)]
    alone = np.array([1.0, *(trial.held_out(pair).ratio_per_compute for pair in pairs)])
    weights = trial.fit(kept)
    ratios = best.ratio, best.ratio_per_compute
    if best.ratio_per_compute <= 1:
        weights, ratios = np.eye(num_components)[0], (1.0, 1.0)
    reason = _reason(names, weights, ratios, alone, mean_weights, covers, hits.counts, covered)
    return Choice(weights, *ratios, alone, mean_weights, covers, hits.counts, reason)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """On held-out draws: the mean over queries of log J + log C, and the median ratios."""

    objective: float
    ratio: float
    ratio_per_compute: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Trial:
    """Fits and judges the mixture of a set of components."""

    hits: Hits
    draw: Float[np.ndarray, " K"]
    score: Float[np.ndarray, " K"]
    covers: Bool[np.ndarray, " K"]
    target_share: float
    cover_share: float

    def costs(self, kept: Bool[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
        """Of one draw from each component, scored under all that are kept."""
        return self.draw + self.score[kept].sum()

    def fit(
        self, kept: Bool[np.ndarray, " K"], out: Bool[np.ndarray, " H"] | None = None
    ) -> Float[np.ndarray, " K"]:
        """alpha fitted without the hits in the columns `out`."""
        log_c = coefficients(self.hits, "second-moment")
        if out is not None:
            log_c = np.where(out, -np.inf, log_c)
        costs = self.costs(kept)
        fixed = np.zeros(len(kept))
        spread = (kept & self.covers)[1:]
        fixed[1:] = self.cover_share * spread / max(spread.sum(), 1)
        fixed[0] = self.target_share
        cheapness = np.where(kept, costs.min() / costs, 0.0)
        solved = solve(
            self.hits.ratios * cheapness.astype(np.float32), log_c, fixed, squares=True, shared=True
        )
        budget = np.asarray(solved.weights[0], np.float64) * kept
        return normalised(budget / costs)

    def held_out(self, kept: Bool[np.ndarray, " K"]) -> _Outcome:
        """Cross-fitted: every hit is judged by a fit without it."""
        hits, columns = self.hits, np.arange(self.hits.log_p_h.shape[1]) % FOLDS
        parts, costs = [], []
        for fold in range(FOLDS):
            alpha = self.fit(kept, columns == fold)
            ours = dataclasses.replace(
                hits, log_w_h=np.where(columns == fold, hits.log_w_h, -np.inf)
            )
            parts.append(log_second_moment(ours, np.tile(alpha, (len(hits.counts), 1))))
            costs.append(alpha @ self.costs(kept))
        seen = hits.counts > 0
        log_j, cost = np.logaddexp.reduce(parts, axis=0)[seen], float(np.mean(costs))
        log_p = np.logaddexp.reduce(hits.log_w_h[seen], axis=1) - np.log(hits.scored[seen])
        p, j = np.exp(log_p), np.exp(log_j)
        ratio = float(np.median((p - p**2) / np.maximum(j - p**2, 1e-3 * j)))
        return _Outcome(
            objective=float(np.mean(log_j)) + np.log(cost),
            ratio=ratio,
            ratio_per_compute=ratio * float(self.draw[0]) / cost,
        )


def _without(kept: Bool[np.ndarray, " K"], index: int) -> Bool[np.ndarray, " K"]:
    return kept & (np.arange(len(kept)) != index)


def _median(values: Float[np.ndarray, " Q"]) -> float:
    """NaN where no query has a value."""
    finite = values[~np.isnan(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _reason(names, weights, ratios, alone, mean_weights, covers, hits, covered) -> str:
    order = np.argsort(-weights, kind="stable")
    chosen = ", ".join(f"{weights[k]:.0%} {names[k]}" for k in order if weights[k] > 0)
    best = int(np.argmax(alone[1:])) + 1
    if weights[0] == 1:
        return (
            "Plain Monte Carlo: no mixture is worth more at equal compute. The best single one "
            f"with the target, {names[best]}, gives {alone[best]:.2g}."
        )
    parts = [
        f"Chosen: {chosen}: one draw is worth {ratios[0]:.3g} of Monte Carlo, and "
        f"{ratios[1]:.3g} at equal compute (median of {np.sum(hits > 0)} queries, by held-out "
        "pilot draws, which overstate it where the pilot missed harm)."
    ]
    parts.append(f"The best single one with the target, {names[best]}, gives {alone[best]:.3g}.")
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
