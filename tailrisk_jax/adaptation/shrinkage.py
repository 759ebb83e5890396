"""How far to trust weights that were fitted to pilot draws: shares by cross-fitting.

Weights that minimise the pilot's second moment put everything where the pilot saw harm. Harm that
it did not see is then reached by the target's share alone, and the fitted mixture can be worse
than the uniform dictionary by a factor of 10 or more, while its own draws look best. Here the
answer is a mixture of mixtures,

    sigma_0 target + sigma_1 uniform + sigma_2 shared fit + sigma_3 the query's own fit,

whose four shares minimise the second moment on draws that the fits were not made from: each
harmful draw is held out of one of a few folds. Draws whose like was never seen in the other folds
stand for the harm that no draw shows, and pull towards the shared and the uniform part. Queries
with a like number of harmful draws have the same four shares (by the sum of their log J), so that
hundreds of harmful draws decide them, with a floor under the first two.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from tailrisk_jax.adaptation.pilot import Hits, Pilot, harmful
from tailrisk_jax.adaptation.weights import coefficients, fixed_part, normalised, solve
from tailrisk_jax.errors import InputError

FOLDS = 4
INNER_UNIFORM = 0.05  # spread over all components in each fit, before the fits are mixed
ALONE_UNIFORM = 1 / 3  # where there is one query, and so nothing to set the shares by
GROUPS, GROUP_SIZE = 3, 10  # of queries by harmful draws: at most so many, at least so large
MIXED = ("target", "uniform", "shared", "own")


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """Weights of the components for every query, shrunk.

    Attributes:
      weights: alpha, rows sum to 1, [Q, K]; equal rows from `adapt_shared`.
      shares: of the target, the uniform dictionary, the shared fit and the query's own fit, [Q, 4].
      log_second_moment: log of the estimate of J at these shares on held-out draws, for fits from
        the other folds (so for slightly fewer draws); NaN for queries without a harmful draw, [Q].
      hits: harmful pilot draws, [Q].
      gap: the largest duality gap of any fit, in nats; above its tolerance only where a fit ran
        out of steps.
    """

    weights: Float[np.ndarray, "Q K"]
    shares: Float[np.ndarray, "Q 4"]
    log_second_moment: Float[np.ndarray, " Q"]
    hits: Int[np.ndarray, " Q"]
    gap: float

    @property
    def without_hits(self) -> Int[np.ndarray, " M"]:
        """Indices of the queries of which no pilot draw was harmful."""
        return np.flatnonzero(self.hits == 0)


def adapt_weights(
    pilot: Pilot,
    *,
    target_share: float = 0.05,
    uniform_share: float = 0.1,
    folds: int = FOLDS,
) -> Adapted:
    """Weights for the queries of the pilot, each with a fit of its own.

    The loss against the uniform dictionary is at most 1 / `uniform_share`, whatever the pilot did
    not see. With harmful draws of one query only, nothing can set the shares, and the uniform
    share is 1/3: on the organism, single queries did best between 1/4 and 1/2.

    Args:
      pilot: draws, the target as component 0.
      target_share: the least share of the target; no weight p / q exceeds its inverse.
      uniform_share: the least share of the uniform dictionary.
      folds: number of parts; 2 or more.

    Edges: a query without a harmful draw has no fit of its own, and the shared fit takes its place;
    without any at all, all weights but the target's are uniform.
    Raises:
      InputError: fewer than 2 folds, and as `fit_weights`.
    """
    hits = harmful(pilot)
    rank = np.arange(hits.log_p_h.shape[1]) + np.zeros((len(hits.counts), 1), int)
    return _adapt(hits, rank, True, target_share, uniform_share, folds)


def adapt_shared(
    pilot: Pilot,
    *,
    target_share: float = 0.05,
    uniform_share: float = 0.1,
    folds: int = FOLDS,
) -> Adapted:
    """One set of weights, for other queries than those of the pilot.

    As `adapt_weights` without fits of single queries, and whole queries are held out, so that the
    shares are those that do best on queries that the fit has not seen. Queries much alike, such as
    paraphrases, should be one query to the pilot, or the shares trust the fit too much.
    """
    hits = harmful(pilot)
    rank = np.cumsum(hits.counts > 0)[:, None] + np.zeros(hits.log_p_h.shape, int)
    return _adapt(hits, rank, False, target_share, uniform_share, folds)


def _adapt(
    hits: Hits,
    rank: Int[np.ndarray, "Q H"],
    own: bool,
    target_share: float,
    uniform_share: float,
    folds: int,
) -> Adapted:
    if folds < 2:
        raise InputError(f"folds={folds}; cross-fitting needs 2 or more")
    queries, _, num_components = hits.ratios.shape
    fixed_part(num_components, target_share, uniform_share)  # refuses bad shares
    alone = np.sum(hits.counts > 0) < 2
    if alone:
        uniform_share = max(uniform_share, min(ALONE_UNIFORM, 1 - target_share))
    floors = np.zeros(len(MIXED))
    floors[:2] = target_share, uniform_share
    log_c = coefficients(hits, "second-moment")
    inner = fixed_part(num_components, target_share, min(INNER_UNIFORM, 1 - target_share))

    parts, gap = _parts(hits, log_c, inner, own)
    held_out = np.ones((*log_c.shape, len(MIXED)), np.float32)
    for fold in range(folds):
        out = rank % folds == fold
        others, other_gap = _parts(hits, np.where(out, -np.inf, log_c), inner, own)
        gap = max(gap, other_gap)
        densities = np.einsum("qhk,qbk->qhb", hits.ratios, others)
        held_out = np.where(out[..., None], densities, held_out)

    if alone:
        shares = np.tile(
            floors + (1 - floors.sum()) * np.eye(len(MIXED))[3 if own else 2], (queries, 1)
        )
    else:
        mixed = np.arange(4 if own else 3)
        shares = np.zeros((queries, len(MIXED)))
        groups = _groups(hits.counts) if own else np.zeros(queries, int)
        for group in np.unique(groups):
            ours = groups == group
            log_c_ours = np.where(ours[:, None], log_c, -np.inf)
            solved = solve(
                held_out[..., mixed], log_c_ours, floors[mixed], squares=True, shared=True
            )
            shares[np.ix_(ours, mixed)] = normalised(solved.weights[0])
            gap = max(gap, float(solved.gap[0]))
    with np.errstate(divide="ignore"):
        log_terms = log_c - np.log(np.einsum("qhb,qb->qh", held_out, shares))
    total = np.logaddexp.reduce(log_terms, axis=1) - np.log(np.maximum(hits.scored, 1))
    return Adapted(
        weights=normalised(np.einsum("qb,qbk->qk", shares, parts)),
        shares=shares,
        log_second_moment=np.where(hits.counts > 0, total, np.nan),
        hits=hits.counts,
        gap=gap,
    )


def _groups(counts: Int[np.ndarray, " Q"]) -> Int[np.ndarray, " Q"]:
    """Queries parted by their number of harmful draws into groups of like size, 0 the fewest."""
    seen = np.sort(counts[counts > 0])
    groups = max(1, min(GROUPS, len(seen) // GROUP_SIZE))
    edges = np.quantile(seen, np.arange(1, groups) / groups)
    return np.searchsorted(edges, counts, side="right")


def _parts(
    hits: Hits, log_c: Float[np.ndarray, "Q H"], inner: Float[np.ndarray, " K"], own: bool
) -> tuple[Float[np.ndarray, "Q B K"], float]:
    """What is mixed, for each query: target, uniform, shared fit, own fit; and the largest gap."""
    queries, _, num_components = hits.ratios.shape
    target, uniform = np.eye(num_components)[0], np.full(num_components, 1 / num_components)
    shared = solve(hits.ratios, log_c, inner, squares=True, shared=True)
    fit, gap = normalised(shared.weights[0]), float(shared.gap[0])
    fits = np.tile(fit, (queries, 1))
    same = [np.tile(row, (queries, 1)) for row in (target, uniform)]
    if not own:
        return np.stack([*same, fits, fits], axis=1), gap
    solved = solve(hits.ratios, log_c, inner, squares=True, shared=False)
    seen = np.any(log_c > -np.inf, axis=1, keepdims=True)
    singles = np.where(seen, normalised(solved.weights), fits)
    return np.stack([*same, fits, singles], axis=1), max(gap, float(np.max(solved.gap)))
