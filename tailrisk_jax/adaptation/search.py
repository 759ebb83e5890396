"""Cross-entropy search over strength x layer x switch step x mixture weight.

A setting is an unsafe policy (a strength, at a layer), a switch step w and a bias b:

    q(y_t | y_<t) = b u_t + (1 - b) p_t   for t < w,      p_t   from w on.

Chosen is the setting that minimises the pilot's estimate of -E_p[h log q] / E_p[h], which is
KL(p h / E_p[h] || q) up to a constant, or of the second moment E_p[h^2 p / q]. Only the chosen
tokens' log-probabilities under the policies are needed, and only of harmful draws, so that
thousands of settings are array arithmetic. Pilot draws are not to be reused in an estimate.

Source: De Boer, Kroese, Mannor & Rubinstein 2005 (the cross-entropy method); Angell et al. 2026,
arXiv 2604.22167 (this family and its grids).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from tailrisk_jax.adaptation.pilot import first_columns
from tailrisk_jax.adaptation.segments import prefixes
from tailrisk_jax.adaptation.weights import Objective, is_second_moment
from tailrisk_jax.errors import InputError

STRENGTHS = tuple(round(0.1 * i, 1) for i in range(1, 11))
"""Ablation intensities that are searched by default, as the reference has them."""
NUM_SWITCHES, NUM_BIASES = 30, 25  # of the reference
PRIOR_HITS = 20.0  # experiments/proposals compares


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is tried with each unsafe policy.

    Attributes:
      switches: steps from which the target takes over; 0 is the target itself.
      biases: weights of the unsafe policy before that, in [0, 1].
    """

    switches: tuple[int, ...]
    biases: tuple[float, ...]

    def __post_init__(self) -> None:
        switches, biases = self.switches, self.biases
        if not switches or not biases or min(switches) < 0 or not 0 <= min(biases) <= max(biases):
            raise InputError(f"grid needs switches {switches} >= 0 and biases {biases} in [0, 1]")
        if max(biases) > 1:
            raise InputError(f"grid has bias {max(biases)}; biases are at most 1")


def default_grid(max_new_tokens: int) -> Grid:
    """The reference's: 30 switches (0, 5, ... at 150 tokens) and T itself, for "never"; 25 biases.

    Switches are ceil(T / 30) apart; biases run evenly from 1/25 to 1.
    """
    switches = range(0, max_new_tokens, math.ceil(max_new_tokens / NUM_SWITCHES))
    biases = tuple((i + 1) / NUM_BIASES for i in range(NUM_BIASES))
    return Grid((*switches, max_new_tokens), biases)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of the search.

    Attributes:
      policy: index among the unsafe policies.
      switch, bias: of the grid.
      objective: there, in nats.
    """

    policy: int
    switch: int
    bias: float
    objective: float


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """What `search` found.

    Attributes:
      shared: the setting with the least mean objective over the queries that have one.
      per_query: each query's own, shrunk towards the mean; None where no pilot draw was harmful.
      surface: the objective, inf where a harmful draw is impossible, NaN for queries without a
        harmful draw, [Q, S, B, W].
      hits: harmful pilot draws per query, [Q].
    """

    shared: Setting
    per_query: tuple[Setting | None, ...]
    surface: Float[np.ndarray, "Q S B W"]
    hits: Int[np.ndarray, " Q"]

    @property
    def without_hits(self) -> Int[np.ndarray, " M"]:
        """Indices of the queries of which no pilot draw was harmful."""
        return np.flatnonzero(self.hits == 0)


def search(
    target: Float[ArrayLike, "Q N T"],
    unsafe: Float[ArrayLike, "S Q N T"],
    log_m: Float[ArrayLike, "Q N"],
    scores: Float[ArrayLike, "Q N"],
    grid: Grid,
    *,
    objective: Objective = "cross-entropy",
    prior_hits: float = PRIOR_HITS,
) -> SearchResult:
    """The best setting for all queries together, and for each.

    Queries count alike: each objective is normalised by the query's own sum of w h, or is the log
    of its second moment. A query's own setting minimises

        n / (n + prior_hits) * its objective + prior_hits / (n + prior_hits) * the mean objective

    with n its harmful pilot draws: few draws show one way to harm and hide the others, which the
    other queries' draws may show.

    Args:
      target: log p(y_t), 0 where masked; of harmful draws only, if the others aren't at hand (they
        may hold anything finite).
      unsafe: log u(y_t) under S unsafe policies.
      log_m: log-density of the mixture that the pilot draws come from (`grid_log_mixture` for one
        over a grid): of the whole mixture, not of each draw's own component.
      scores: h in [0, 1], NaN where there is none.
      prior_hits: harmful draws that the mean over queries counts for; 0 trusts each query alone.

    Edges: unscored draws and those with h = 0 or p = 0 say nothing. Of equal settings the first
    counts: at switch 0 all are the target.
    Raises:
      InputError: no score, no harmful draw of any query, or none reachable by any one setting.
      ValueError: shapes that differ, switches beyond T, log_m not finite on a harmful draw,
        prior_hits below 0.
    """
    if not prior_hits >= 0:
        raise ValueError(f"prior_hits={prior_hits} must be 0 or more")
    scores = np.asarray(scores, np.float64)
    shape = (*scores.shape, jnp.shape(target)[-1])
    if jnp.shape(target) != shape or jnp.shape(unsafe)[1:] != shape:
        raise ValueError(
            f"target {jnp.shape(target)}, unsafe {jnp.shape(unsafe)} and scores {scores.shape} "
            "must be [Q, N, T], [S, Q, N, T] and [Q, N]"
        )
    if np.isnan(scores).all():
        raise InputError(
            f"none of the {scores.size} pilot draws has a score; check the judge on a few of them"
        )
    log_p = np.asarray(jnp.sum(jnp.asarray(target), axis=-1), np.float64)
    hit = np.logical_and(scores > 0, log_p > -np.inf)
    if not hit.any():
        raise InputError(
            f"none of the {scores.size} pilot draws is harmful, so there is nothing to search by; "
            "draw more, or from stronger unsafe policies"
        )
    log_m = np.asarray(log_m, np.float64)
    if not np.isfinite(log_m[hit]).all():
        raise ValueError(
            "log_m isn't finite on a harmful draw; a draw has positive density under m"
        )
    squares = is_second_moment(objective)
    log_h = np.log(np.where(hit, scores, 1.0))
    log_c = np.where(hit, (1 + squares) * (log_p + log_h) - log_m, -np.inf)
    shift = np.max(log_c, axis=1, keepdims=True, initial=-1e30)
    c = np.exp(log_c - shift)
    if not squares:
        c = c / np.maximum(c.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    columns, _ = first_columns(hit)
    rows = np.arange(len(scores))[:, None]
    values = _surface(
        *_per_setting(
            np.asarray(target)[rows, columns], np.asarray(unsafe)[:, rows, columns], grid
        ),
        jnp.asarray(np.take_along_axis(c, columns, axis=1), float),
        squares=squares,
    )
    surface = np.moveaxis(np.asarray(values, np.float64), -1, 0)
    surface = surface.reshape(len(scores), jnp.shape(unsafe)[0], len(grid.biases), -1)
    if squares:
        scored = np.sum(~np.isnan(scores), axis=1)
        offset = shift[:, 0] - np.log(np.maximum(scored, 1))
        surface = surface + offset[:, None, None, None]
    found = np.any(hit, axis=1)
    surface[~found] = np.nan
    mean = surface[found].mean(axis=0)
    if np.isinf(mean).all():
        raise InputError(
            "every setting gives some harmful pilot draw probability 0; add biases below 1"
        )
    hits = hit.sum(axis=1)
    blended = (
        surface
        + (mean if prior_hits else 0.0) * (prior_hits / np.maximum(hits, 1))[:, None, None, None]
    )
    return SearchResult(
        shared=_least(mean, mean, grid),
        per_query=tuple(
            _least(blended[q], surface[q], grid) if found[q] else None for q in range(len(scores))
        ),
        surface=surface,
        hits=hits,
    )


def grid_log_mixture(
    target: Float[ArrayLike, "Q N T"], unsafe: Float[ArrayLike, "S Q N T"], grid: Grid
) -> Float[Array, "Q N"]:
    """log m(y) of the uniform mixture over all settings of a grid, which need not be `search`'s.

    Its density is that of whole responses, so the draws' weights p / m are balance-heuristic ones.
    """
    count = jnp.shape(unsafe)[0] * len(grid.biases) * len(grid.switches)
    return _log_sum(*_per_setting(target, unsafe, grid)) - math.log(count)


def pilot_queries(key: Array, num_queries: int, share: float = 0.1) -> Int[np.ndarray, " M"]:
    """Indices of the queries to search on, at random, in order; one at least.

    Raises InputError for a share outside (0, 1] and no queries.
    """
    if not 0 < share <= 1 or num_queries < 1:
        raise InputError(
            f"pilot of share={share} of {num_queries} queries; give a share above 0 and at most 1"
        )
    chosen = jax.random.permutation(key, num_queries)[: max(1, round(share * num_queries))]
    return np.sort(np.asarray(chosen))


def pilot_tokens(
    prompt_lengths: Int[ArrayLike, " Q"],
    lengths: Int[ArrayLike, "Q N"],
    *,
    drawing: int,
    scoring: int,
    experts: int = 1,
) -> int:
    """Tokens through the network for a pilot: of prompts and responses, drawn and then scored.

    A prompt is read once by each policy that draws or scores it; a response is drawn by `experts`
    policies in lock-step, and scored by `scoring`.

    Args:
      lengths: of the responses, end token included.
      drawing: distinct policies among the components drawn from.
      scoring: distinct policies scored under.
      experts: policies that run side by side for one draw: 2 with a bias below 1.
    """
    prompts, responses = int(np.sum(prompt_lengths)), int(np.sum(lengths))
    return prompts * (drawing + scoring) + responses * (experts + scoring)


def _least(
    surface: Float[np.ndarray, "S B W"], objective: Float[np.ndarray, "S B W"], grid: Grid
) -> Setting:
    """Where the surface is least, with the objective there."""
    policy, bias, switch = map(int, np.unravel_index(np.argmin(surface), surface.shape))
    return Setting(
        policy, grid.switches[switch], grid.biases[bias], float(objective[policy, bias, switch])
    )


def _per_setting(target, unsafe, grid: Grid) -> tuple:
    """Arrays for the loops over (policy, bias), one row after another, all switches at once."""
    target, unsafe = jnp.asarray(target, float), jnp.asarray(unsafe, float)
    if max(grid.switches) > target.shape[-1]:
        raise ValueError(f"grid switches at {max(grid.switches)}, beyond T = {target.shape[-1]}")
    policies = np.repeat(np.arange(unsafe.shape[0]), len(grid.biases))
    biases = np.tile(np.asarray(grid.biases), unsafe.shape[0])
    return target, unsafe, policies, jnp.asarray(biases, float), np.array(grid.switches)


def _log_probs(target, unsafe, bias, switches) -> Float[Array, "W Q N"]:
    mixed = jnp.logaddexp(jnp.log(bias) + unsafe, jnp.log1p(-bias) + target)
    before, own = prefixes(mixed), prefixes(target)
    return (before[switches] + own[-1] - own[switches]).log_prob


@functools.partial(jax.jit, static_argnames="squares")
def _surface(target, unsafe, policies, biases, switches, c, *, squares: bool):
    """The objective of every (policy, bias), switch and query, [S * B, W, Q]."""

    def one(pair):
        policy, bias = pair
        log_q = _log_probs(target, unsafe[policy], bias, switches)
        if squares:
            return jax.nn.logsumexp(jnp.where(c > 0, -log_q, -jnp.inf), axis=-1, b=c)
        return -jnp.sum(jnp.where(c > 0, c * log_q, 0.0), axis=-1)

    return jax.lax.map(one, (policies, biases))


@jax.jit
def _log_sum(target, unsafe, policies, biases, switches) -> Float[Array, "Q N"]:
    def add(total, pair):
        policy, bias = pair
        log_q = _log_probs(target, unsafe[policy], bias, switches)
        return jnp.logaddexp(total, jax.nn.logsumexp(log_q, axis=0)), None

    start = jnp.full(target.shape[:-1], -jnp.inf)
    return jax.lax.scan(add, start, (policies, biases))[0]
