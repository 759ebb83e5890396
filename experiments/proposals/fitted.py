"""Proposals that are fitted: dictionaries, cross-entropy search, upper limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from collect import harmful_draws, uniform_weights
from exact import Harm, dictionary_log_probs, mixed, score_once, switched, with_target
from rows import Rows, padded, stack
from setting import LEARNED, TARGET_SHARE, UNSAFE, Setting

from tailrisk_jax.adaptation import (
    Grid,
    Pilot,
    SearchResult,
    adapt_shared,
    adapt_weights,
    default_grid,
    fit_weights,
    search,
    window_log_probs,
    windows,
)
from tailrisk_jax.adaptation import Setting as Choice
from tailrisk_jax.adaptation.search import PRIOR_HITS
from tailrisk_jax.adaptation.weights import Objective

TRIED: dict[Objective, tuple[float, ...]] = {
    "cross-entropy": (PRIOR_HITS,), "second-moment": (PRIOR_HITS, 0.0),
}  # fmt: skip
LEAVES_KEPT = 256  # per query, for fits on the enumerated responses


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A proposal, its density and what it cost.

    Attributes:
      family, name: what the tables call it.
      log_q: of the whole mixture, target share included, on all rows of `Harm`, [M].
      cost: of a draw, in draws of Monte Carlo.
      pilot: pilot draws per query; 0 for what needs none.
      weights: of the dictionary or the singles, where there are some.
    """

    family: str
    name: str
    log_q: np.ndarray
    cost: float
    pilot: int = 0
    weights: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class HarmfulPilot:
    """Harmful pilot draws, scored under every policy.

    Attributes:
      rows: M responses.
      token_log_probs: by policy, [M, T].
      windows: log q_k, [K, M].
      log_m: of the mixture that drew them, [M].
    """

    rows: Rows
    token_log_probs: dict[str, np.ndarray]
    windows: np.ndarray
    log_m: np.ndarray

    def first(self, queries: int, counts: np.ndarray) -> HarmfulPilot:
        """The first `counts[q]` harmful draws of each query."""
        found = np.bincount(self.rows.query, minlength=queries)
        order = np.concatenate([np.arange(n) for n in found])
        kept = order < counts[self.rows.query]
        return HarmfulPilot(
            Rows(self.rows.query[kept], self.rows.tokens[kept], self.rows.lengths[kept]),
            {name: values[kept] for name, values in self.token_log_probs.items()},
            self.windows[:, kept],
            self.log_m[kept],
        )

    def pilot(self, queries: int) -> Pilot:
        """For the fits of the dictionary."""
        query = self.rows.query
        return Pilot(
            padded(query, queries, self.windows, 0.0),
            padded(query, queries, self.log_m, 0.0),
            padded(query, queries, np.ones(len(query)), np.nan),
        )


def dictionary_cost(setting: Setting, weights: np.ndarray) -> float:
    """Target draws run one policy, windows two in lock-step; all policies score."""
    return float(weights[0] + 2 * (1 - weights[0]) + 1 + len(setting.parts))


def score_pilot(setting: Setting, rows: Rows, weights: np.ndarray, path: Path) -> HarmfulPilot:
    """Harmful draws of the dictionary with these weights; scores are kept at `path`."""
    scored = score_once(setting, rows, path)
    by_name = dict(zip(setting.policies, scored, strict=True))
    windows = dictionary_log_probs(setting, by_name)
    return HarmfulPilot(rows, by_name, windows, mixed(windows, weights))


def dictionaries(harm: Harm, pilots: dict[int, HarmfulPilot]) -> Iterator[Fitted]:
    """Uniform weights, and weights fitted from pilots of several sizes."""
    setting, query = harm.setting, harm.rows.query
    queries = len(harm.found)

    def entry(family, name, weights, pilot=0):
        rows = np.atleast_2d(weights)
        cost = dictionary_cost(setting, rows.mean(axis=0))
        log_q = mixed(harm.windows, np.broadcast_to(rows, (queries, rows.shape[1])), query)
        return Fitted(family, name, log_q, cost, pilot, rows)

    uniform = uniform_weights(setting, TARGET_SHARE)
    yield entry("dictionary, uniform", "dictionary: uniform weights", uniform)
    floor: Any = {"target_share": TARGET_SHARE}
    for count, found in pilots.items():
        pilot = found.pilot(queries)
        fits = {
            "per query": fit_weights(pilot, uniform_share=0.0, **floor).weights,
            "per query, 1/3 uniform": fit_weights(pilot, **floor).weights,
            "shared": fit_weights(pilot, uniform_share=0.0, shared=True, **floor).weights[0],
            "shared, shrunk": adapt_shared(pilot, **floor).weights[0],
            "shrunk": adapt_weights(pilot, **floor).weights,
        }
        for name, weights in fits.items():
            label = f"dictionary: {name}, {count} pilot draws"
            yield entry("dictionary, fitted", label, weights, count)
    yield from wide_dictionaries(harm, pilots)
    leaves = on_leaves(harm)
    for shared in (False, True):
        fit = fit_weights(leaves, uniform_share=0.0, shared=shared, max_steps=500, **floor)
        name = "shared" if shared else "per query"
        yield entry("dictionary, upper limit", f"dictionary: on the leaves, {name}", fit.weights)


def wide_dictionaries(harm: Harm, pilots: dict[int, HarmfulPilot]) -> Iterator[Fitted]:
    """Windows of all policies at hand, fitted to the same pilot draws of the small dictionary.

    All of them score every draw, so it costs more.
    """
    no = ("target", "logit path", "context", "tempered steering", LEARNED)
    names = [n for n, f in harm.setting.families.items() if f not in no]
    grid = windows(len(names), harm.setting.organism.max_new_tokens)

    def log_probs(token_log_probs):
        experts = np.stack([token_log_probs[name] for name in ("target", *names)])
        return np.asarray(window_log_probs(experts, grid), np.float32)

    on_rows, queries = log_probs(harm.token_log_probs), len(harm.found)
    for count, found in pilots.items():
        pilot = dataclasses.replace(found, windows=log_probs(found.token_log_probs)).pilot(queries)
        weights = adapt_weights(pilot, target_share=TARGET_SHARE).weights
        one = fit_weights(pilot, uniform_share=0.0, shared=True, target_share=TARGET_SHARE).weights
        for name, rows in (("shrunk", weights), ("shared", one)):
            yield Fitted(
                "dictionary of all policies, fitted",
                f"dictionary of all policies: {name}, {count} pilot draws",
                mixed(on_rows, rows, harm.rows.query),
                float(2 - rows[:, 0].mean()) + 1 + len(names),
                count,
            )


def two_rounds(
    harm: Harm, first: HarmfulPilot, count: int, seed: int, folder: Path
) -> Iterator[Fitted]:
    """As many draws again from weights that are fitted to the first `count`, shared and shrunk.

    All draws then count as draws of one mixture, half of each round's weights.
    """
    setting, queries = harm.setting, len(harm.found)
    uniform = uniform_weights(setting, TARGET_SHARE)
    weights = adapt_shared(first.pilot(queries), target_share=TARGET_SHARE).weights[0]
    again, _ = harmful_draws(
        setting, setting.dictionary_mixture(weights.tolist()), count, seed, folder / "round.npz"
    )
    second = score_pilot(setting, again, weights, folder / "round_scores.npz")
    log_q = np.concatenate([first.windows, second.windows], axis=1)
    both = HarmfulPilot(
        stack([first.rows, second.rows]), {}, log_q, mixed(log_q, (uniform + weights) / 2)
    )
    fit = adapt_weights(both.pilot(queries), target_share=TARGET_SHARE).weights
    yield Fitted(
        "dictionary, fitted",
        f"dictionary: shrunk, two rounds of {count} pilot draws",
        mixed(harm.windows, fit, harm.rows.query),
        dictionary_cost(setting, fit.mean(axis=0)),
        2 * count,
        fit,
    )


def on_leaves(harm: Harm) -> Pilot:
    """The most probable enumerated responses as a pilot: sums over them are expectations."""
    kept = np.concatenate(
        [np.flatnonzero(harm.enumerated & (harm.rows.query == q))[:LEAVES_KEPT]
         for q in range(len(harm.found))]
    )  # fmt: skip
    query = harm.rows.query[kept]
    queries = len(harm.found)
    return Pilot(
        padded(query, queries, harm.windows[:, kept], 0.0),
        padded(query, queries, np.zeros(len(kept)), 0.0),
        padded(query, queries, np.ones(len(kept)), np.nan),
    )


def searches(harm: Harm, pilots: dict[int, HarmfulPilot]) -> Iterator[Fitted]:
    """Cross-entropy search over strength x switch x bias, and the best setting by the leaves."""
    setting = harm.setting
    grid = default_grid(setting.organism.max_new_tokens)
    steering = [n for n, f in setting.families.items() if f in ("ablation", "addition")]
    tempered = steering + [n for n, f in setting.families.items()
                           if f.startswith("tempered") and not n.startswith(UNSAFE)]  # fmt: skip
    no = ("target", "logit path", LEARNED)
    wide = [n for n, f in setting.families.items() if f not in no]
    queries, query = len(harm.found), harm.rows.query
    enumerated = np.flatnonzero(harm.enumerated)
    top = np.concatenate([enumerated[query[enumerated] == q][:64] for q in range(queries)])
    leaves = HarmfulPilot(
        Rows(query[top], harm.rows.tokens[top], harm.rows.lengths[top]),
        {name: values[top] for name, values in harm.token_log_probs.items()},
        harm.windows[:, top],
        np.zeros(len(top)),
    )
    kinds = {"steering": steering, "tempered steering": tempered, "any policy": wide}
    for kind, names in kinds.items():
        for count, found in [*pilots.items(), (0, leaves)]:
            for objective, priors in TRIED.items():
                for prior in priors if count else (0.0,):
                    result = searched(found, names, queries, grid, objective, prior)
                    source = f"{count} pilot draws" if count else "on the leaves"
                    label = f"tuned {kind}, {objective}, {source}"
                    family = f"tuned {kind}" if count else f"tuned {kind}, upper limit"
                    one = result.shared
                    own = [setting or one for setting in result.per_query]
                    told = f"shared: {names[one.policy]}, switch {one.switch}, bias {one.bias}"
                    each = "per query" if prior or not count else "per query, not shrunk"
                    settings = {told: [one] * queries, each: own}
                    for how in settings if prior or not count else (each,):
                        log_q, cost = as_proposal(harm, names, settings[how], grid)
                        yield Fitted(family, f"{label}, {how}", log_q, cost, count)


def searched(
    found: HarmfulPilot, names: Sequence[str], queries: int, grid: Grid, objective: Objective,
    prior: float,
) -> SearchResult:  # fmt: skip
    """`search` on harmful draws."""
    query = found.rows.query
    target, *unsafe = (
        padded(query, queries, found.token_log_probs[name], 0.0, axis=-2)
        for name in ("target", *names)
    )
    log_m = padded(query, queries, found.log_m, 0.0)
    scores = padded(query, queries, np.ones(len(query)), np.nan)
    return search(
        target, np.stack(unsafe), log_m, scores, grid, objective=objective, prior_hits=prior
    )


def as_proposal(
    harm: Harm, names: Sequence[str], settings: Sequence[Choice], grid: Grid
) -> tuple[np.ndarray, float]:
    """Density with 10% target, and cost, of one setting for each query."""
    places = [(s.policy, s.switch, s.bias) for s in settings]
    log_q = np.empty(len(harm.rows))
    for place in set(places):
        where = np.array([other == place for other in places])[harm.rows.query]
        policy, step, bias = place
        log_q[where] = switched(harm, names[policy], step, bias)[where]
    beside = [bias < 1 or step < grid.switches[-1] for _, step, bias in places]
    return with_target(harm, log_q), 3 + (1 - TARGET_SHARE) * float(np.mean(beside))
