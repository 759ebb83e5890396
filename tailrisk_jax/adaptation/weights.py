"""Weights of a mixture of proposals, fitted to pilot draws.

The second moment of one draw's w h under q_alpha = sum_k alpha_k q_k,

    J(alpha) = E_p[h^2 p / q_alpha],   estimated by   mean_i h_i^2 p_i^2 / (m_i q_alpha(y_i)),

is convex on the simplex, and 1 / J is concave, so log J and sums of log J over queries are convex
too. The cross-entropy -E_p[h log q_alpha] / E_p[h] is convex. Both are minimised by multiplicative
steps alpha_k <- alpha_k g_k^power, g the negative gradient: power 1 is EM for the cross-entropy,
power 1/2 minimises an upper bound that touches J at the present alpha (1/x is convex), so that
neither objective ever rises. Steps end when the duality gap, max_k g_k - sum_k alpha_k g_k times
the free share, proves that no other alpha is better by more than a tolerance in nats.
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from tailrisk_jax.adaptation.pilot import Hits, Pilot, harmful
from tailrisk_jax.errors import InputError

Objective = Literal["second-moment", "cross-entropy"]
TOLERANCE = 0.01  # nats: 1% of the second moment, or of a draw's share of the cross-entropy
MAX_STEPS = 2000


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureFit:
    """Weights of the components, and how they were found.

    Attributes:
      weights: alpha, one row per query, equal rows where they are shared, [Q, K].
      log_second_moment: log of the pilot's estimate of J at these weights, on the very draws that
        they were fitted to, so too low; NaN for queries without a harmful draw, [Q].
      gap: how far the objective is at most above its minimum, in nats, the largest over queries.
      steps: the most steps taken.
      hits: harmful draws per query, [Q].
    """

    weights: Float[np.ndarray, "Q K"]
    log_second_moment: Float[np.ndarray, " Q"]
    gap: float
    steps: int
    hits: Int[np.ndarray, " Q"]

    @property
    def without_hits(self) -> Int[np.ndarray, " M"]:
        """Indices of the queries of which no pilot draw was harmful."""
        return np.flatnonzero(self.hits == 0)


def fit_weights(
    pilot: Pilot,
    *,
    objective: Objective = "second-moment",
    shared: bool = False,
    target_share: float = 0.05,
    uniform_share: float = 1 / 3,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> MixtureFit:
    """The weights that minimise the pilot's estimate of an objective.

    A part of the weights is fixed: `target_share` for the target, which bounds p / q by its
    inverse, and `uniform_share` spread evenly over all components, which bounds the loss against
    the uniform dictionary by its inverse whatever the pilot did not see. `adapt_weights` sets the
    uniform share from the draws.

    Args:
      pilot: draws, the target as component 0.
      objective: "second-moment" (J) or "cross-entropy".
      shared: one set of weights for all queries, by the sum over queries of log J or of the
        cross-entropies; otherwise each query has its own.
      tolerance: of the duality gap, in nats.

    Edges: a query without a harmful draw gets the fixed part and the rest uniform, or the shared
    weights; see `MixtureFit.without_hits`.
    Raises:
      InputError: shares that are negative or sum to more than 1, and as `harmful`.
    Source: Silvey, Titterington & Torsney 1978 and Yu 2010 (the multiplicative steps).
    """
    hits = harmful(pilot)
    fixed = fixed_part(hits.ratios.shape[-1], target_share, uniform_share)
    solved = solve(
        hits.ratios,
        coefficients(hits, objective),
        fixed,
        squares=is_second_moment(objective),
        shared=shared,
        tolerance=tolerance,
        max_steps=max_steps,
    )
    weights = np.broadcast_to(normalised(solved.weights), (len(hits.counts), len(fixed)))
    return MixtureFit(
        weights=weights,
        log_second_moment=log_second_moment(hits, weights),
        gap=float(np.max(solved.gap)),
        steps=int(np.max(solved.steps)),
        hits=hits.counts,
    )


def fixed_part(
    num_components: int, target_share: float, uniform_share: float
) -> Float[np.ndarray, " K"]:
    """The part of the weights that no fit may change.

    Raises InputError for shares that are negative or sum to more than 1.
    """
    if min(target_share, uniform_share) < 0 or target_share + uniform_share > 1:
        raise InputError(
            f"target_share={target_share} and uniform_share={uniform_share} must be 0 or more "
            "and sum to at most 1"
        )
    fixed = np.full(num_components, uniform_share / num_components)
    fixed[0] += target_share
    return fixed


def normalised(weights: Float[ArrayLike, "*batch K"]) -> Float[np.ndarray, "*batch K"]:
    """The weights in float64, summing to 1."""
    exact = np.asarray(weights, np.float64)
    return exact / exact.sum(axis=-1, keepdims=True)


def coefficients(hits: Hits, objective: Objective) -> Float[np.ndarray, "Q H"]:
    """log c_i of the objective, in units of the ratios: sum_i c_i / q_i, or -sum_i c_i log q_i."""
    if is_second_moment(objective):
        return hits.log_w_h + hits.log_p_h - hits.log_max
    return hits.log_w_h


def is_second_moment(objective: Objective) -> bool:
    """False for the cross-entropy. Raises InputError for anything else."""
    if objective not in get_args(Objective):
        raise InputError(f"objective {objective!r} is none of {', '.join(get_args(Objective))}")
    return objective == "second-moment"


def log_second_moment(hits: Hits, weights: Float[np.ndarray, "Q K"]) -> Float[np.ndarray, " Q"]:
    """log of the pilot's estimate of J at given weights; NaN without a harmful draw."""
    log_c = coefficients(hits, "second-moment")
    with np.errstate(divide="ignore", invalid="ignore"):  # padded rows: -inf - -inf
        log_terms = log_c - np.log(np.einsum("qhk,qk->qh", hits.ratios, weights))
    log_terms = np.where(log_c == -np.inf, -np.inf, log_terms)
    total = np.logaddexp.reduce(log_terms, axis=1) - np.log(np.maximum(hits.scored, 1))
    return np.where(hits.counts > 0, total, np.nan)


@struct.dataclass
class Solution:
    """`weights` [R, K] or [1, K], with the `gap` and the `steps` of each row."""

    weights: Float[Array, "R K"]
    gap: Float[Array, " R"]
    steps: Int[Array, " R"]


@functools.partial(jax.jit, static_argnames=("squares", "shared"))
def solve(
    ratios: Float[Array, "R H K"],
    log_c: Float[Array, "R H"],
    fixed: Float[Array, " K"],
    *,
    squares: bool,
    shared: bool,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> Solution:
    """Minimises sum_r log(sum_i c_ri / q_ri) or -sum_r (sum_i c_ri log q_ri) / (sum_i c_ri).

    q_ri = sum_k beta_k ratios_rik with beta = fixed + (1 - sum(fixed)) alpha, alpha on the simplex.
    `squares` is the first of the two; `shared` has one alpha for all rows, otherwise each row
    has its own. Rows whose c are all 0 say nothing: their alpha is uniform.
    """
    # Only ratios of the c of one row matter.
    largest = jnp.max(log_c, axis=1, keepdims=True)
    c = jnp.exp(log_c - jnp.where(largest == -jnp.inf, 0.0, largest))
    if shared:
        one = _solve(ratios, c, fixed, squares, tolerance, max_steps)
        return jax.tree.map(lambda leaf: leaf[None], one)
    return jax.vmap(
        lambda ratios, c: _solve(ratios[None], c[None], fixed, squares, tolerance, max_steps)
    )(ratios, c)


def _solve(ratios, c, fixed, squares, tolerance, max_steps) -> Solution:
    free = 1 - jnp.sum(fixed)
    num_components = ratios.shape[-1]
    active = jnp.sum(c, axis=1) > 0

    def slopes(alpha):
        """-d objective / d beta over the number of active rows; its mean under beta is 1."""
        q = ratios @ (fixed + free * alpha)
        q = jnp.maximum(q, jnp.finfo(q.dtype).tiny)
        terms = c / q if squares else c
        totals = jnp.where(active, jnp.sum(terms, axis=1), 1.0)
        per_draw = terms / q / totals[:, None]
        return jnp.einsum("rh,rhk->k", per_draw, ratios) / jnp.maximum(jnp.sum(active), 1)

    def duality_gap(alpha, g):
        return free * (jnp.max(g) - jnp.sum(alpha * g))

    def step(state):
        alpha, g, _, steps = state
        alpha = alpha * (jnp.sqrt(g) if squares else g)
        alpha = alpha / jnp.sum(alpha)
        g = slopes(alpha)
        return alpha, g, duality_gap(alpha, g), steps + 1

    def unfinished(state):
        _, _, gap, steps = state
        return jnp.any(active) & (gap > tolerance) & (steps < max_steps)

    alpha = jnp.full(num_components, 1 / num_components, ratios.dtype)
    g = slopes(alpha)
    alpha, _, gap, steps = jax.lax.while_loop(
        unfinished, step, (alpha, g, duality_gap(alpha, g), jnp.zeros((), jnp.int32))
    )
    return Solution(fixed + free * alpha, jnp.where(jnp.any(active), gap, 0.0), steps)
