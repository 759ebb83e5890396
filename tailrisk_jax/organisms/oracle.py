"""Exact bounds on the probability of a token event, by mass-first prefix-tree enumeration.

    P(event) = sum of p(leaf) over harmful leaves

where a *leaf* is the shortest prefix at which the absorbing event accepts: every continuation of
it is harmful, no proper prefix of it is, so distinct leaves are disjoint events. Expanding every
prefix that is open (not ended, not yet harmful, event still reachable within the remaining tokens)
in order of mass, at any moment

    lower = sum of p(leaf) found   <=   P(event)   <=   lower + sum of p(open prefix) = upper.

Sums are float64; a callable that normalises in float64 makes the bounds good to about 1e-15.
No clock is consulted: the search ends on its tolerance, on its node budget, or when nothing is
open.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Int

from tailrisk_jax.organisms.events import TokenEvent

NextLogProbs = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(prefixes int [M, T], lengths int [M]) -> log p(next token | prefix), float64 [M, V].

Positions at and beyond a row's length are padding with id 0 and must not matter.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Leaves:
    """Disjoint token sequences with their log-probabilities, most probable first.

    Attributes:
      tokens: int32 [M, T], padded with 0 beyond `lengths`.
      lengths: int32 [M].
      log_probs: float64 [M], the log-probability of the sequence as a prefix.
    """

    tokens: Int[np.ndarray, "M T"]
    lengths: Int[np.ndarray, " M"]
    log_probs: Float[np.ndarray, " M"]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclasses.dataclass(frozen=True, eq=False)
class Enumeration:
    """The result of `enumerate_event` or `complete_leaves`.

    Attributes:
      lower: mass of the leaves found; never above the truth.
      upper: lower + unexplored mass; never below the truth.
      leaves: what was found.
      nodes: prefixes whose next-token distribution was computed.
      converged: whether upper - lower met the tolerance. If not, the node budget ended the search,
        and the bounds are valid but wider than asked for.
    """

    lower: float
    upper: float
    leaves: Leaves
    nodes: int
    converged: bool


def enumerate_event(
    next_log_probs: NextLogProbs,
    event: TokenEvent,
    *,
    end_tokens: Iterable[int],
    max_new_tokens: int,
    rel_tol: float = 0.01,
    abs_tol: float = 0.0,
    max_nodes: int = 100_000,
    mass_floor: float = 1e-15,
    batch_size: int = 128,
) -> Enumeration:
    """Bounds on P(event) and the harmful leaves, under any policy.

    Args:
      next_log_probs: the policy. It is called with at most `batch_size` rows, T = max_new_tokens.
      event: the absorbing event.
      end_tokens: ids that complete a response. Ending on the token that makes the event true
        counts as harmful.
      max_new_tokens: responses are cut here; a cut response is complete.
      rel_tol, abs_tol: stop when upper - lower <= max(abs_tol, rel_tol * lower).
      max_nodes: stop once this many prefixes were expanded (0 gives the trivial bounds).
      mass_floor: open prefixes below it are forgotten, to save memory. Their mass stays in `upper`.
      batch_size: prefixes expanded per call; the most massive open prefixes go first.

    Returns: an `Enumeration`. Its bounds hold at every budget; only their width depends on it.
    """
    distance = event.distance()
    ends = np.zeros(event.vocabulary_size, bool)
    ends[list(end_tokens)] = True

    def classify(state: np.ndarray, token: np.ndarray, remaining: np.ndarray):
        return event.accepting[state], ~ends[token] & (distance[state] <= remaining)

    root = Leaves(np.zeros((1, max_new_tokens), np.int32), np.zeros(1, np.int32), np.zeros(1))
    if event.accepting[event.initial]:
        return Enumeration(lower=1.0, upper=1.0, leaves=root, nodes=0, converged=True)
    if distance[event.initial] > max_new_tokens:
        root = _take(root, np.zeros(0, np.int64))
    return _search(
        next_log_probs,
        roots=root,
        root_states=np.full(len(root), event.initial),
        transitions=event.transitions,
        classify=classify,
        rel_tol=rel_tol,
        abs_tol=abs_tol,
        max_nodes=max_nodes,
        mass_floor=mass_floor,
        batch_size=batch_size,
    )


def complete_leaves(
    next_log_probs: NextLogProbs,
    leaves: Leaves,
    *,
    end_tokens: Iterable[int],
    rel_tol: float = 0.01,
    abs_tol: float = 0.0,
    max_nodes: int = 100_000,
    mass_floor: float = 1e-15,
    batch_size: int = 128,
) -> Enumeration:
    """Expands prefix leaves into complete responses, under the same policy.

    A response is complete at an end token or at T = `leaves.tokens.shape[1]` tokens. Leaves that
    already end that way are kept. `lower` is the mass of the complete responses found, and `upper`
    adds the mass of continuations not followed, so both lie within the mass of `leaves`.
    """
    end_list = list(end_tokens)
    last = leaves.tokens[np.arange(len(leaves)), leaves.lengths - 1]
    done = np.isin(last, end_list) | (leaves.lengths == leaves.tokens.shape[1])

    def classify(state: np.ndarray, token: np.ndarray, remaining: np.ndarray):
        ended = np.isin(token, end_list) | (remaining == 0)
        return ended, ~ended

    found = _search(
        next_log_probs,
        roots=_take(leaves, ~done),
        root_states=np.zeros(int((~done).sum()), np.int64),
        transitions=None,
        classify=classify,
        rel_tol=rel_tol,
        abs_tol=abs_tol,
        max_nodes=max_nodes,
        mass_floor=mass_floor,
        batch_size=batch_size,
    )
    kept = _take(leaves, done)
    kept_mass = math.fsum(np.exp(kept.log_probs))
    return dataclasses.replace(
        found,
        lower=found.lower + kept_mass,
        upper=found.upper + kept_mass,
        leaves=_sorted(_concatenate([kept, found.leaves])),
    )


def second_moment(log_p: Float[np.ndarray, " M"], log_q: Float[np.ndarray, " M"]) -> float:
    """sum_i p_i^2 / q_i, the second moment E_q[w^2 h] over the sequences given.

    With complete responses (`complete_leaves`) and q their probability under the proposal this is
    the second moment of the ordinary importance weight w = p/q, exact up to omitted responses. With
    prefix leaves and q(leaf) the probability of the *prefix* it is

    - exact for weights cut at the accepting token, w = p(leaf) / q(leaf), which are unbiased too,
      because the event is decided there;
    - a lower bound for weights of full responses: given a leaf, sum over its continuations s of
      p(s)^2 / q(s) >= 1 (Cauchy-Schwarz), with equality only where q continues exactly as p does,
      as a proposal does that has handed back to the target before the accepting token.

    Omitted harmful mass m adds at least m^2 / q(omitted), and without a floor on q there is no
    upper limit; where q >= a0 p (a defensive share a0 of the target) it adds at most m / a0.
    The result is inf where q is 0 and p isn't, and 0.0 for no sequences.
    """
    if len(log_p) == 0:
        return 0.0
    with np.errstate(over="ignore"):
        terms = np.exp(2 * np.asarray(log_p, np.float64) - np.asarray(log_q, np.float64))
    return math.fsum(terms)


def _search(
    next_log_probs: NextLogProbs,
    *,
    roots: Leaves,
    root_states: np.ndarray,
    transitions: np.ndarray | None,
    classify: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    rel_tol: float,
    abs_tol: float,
    max_nodes: int,
    mass_floor: float,
    batch_size: int,
) -> Enumeration:
    """Best-first expansion; `classify(state, token, remaining)` -> (is leaf, is still open)."""
    frontier, states = roots, root_states
    log_floor = math.log(mass_floor) if mass_floor > 0 else -math.inf
    found: list[Leaves] = [_take(roots, np.zeros(0, np.int64))]
    lower, forgotten, nodes = 0.0, 0.0, 0
    while True:
        unexplored = forgotten + math.fsum(np.exp(frontier.log_probs))
        converged = unexplored <= max(abs_tol, rel_tol * lower)
        budget = min(batch_size, max_nodes - nodes)
        if converged or budget <= 0 or len(frontier) == 0:
            break
        chosen = np.zeros(len(frontier), bool)
        chosen[np.argsort(-frontier.log_probs, kind="stable")[:budget]] = True
        batch, batch_states = _take(frontier, chosen), states[chosen]
        nodes += len(batch)

        log_next = np.asarray(next_log_probs(batch.tokens, batch.lengths), np.float64)
        row, token = np.nonzero(log_next > -np.inf)
        log_probs = batch.log_probs[row] + log_next[row, token]
        state = batch_states[row] if transitions is None else transitions[batch_states[row], token]
        remaining = batch.tokens.shape[1] - batch.lengths[row] - 1
        is_leaf, is_open = classify(state, token, remaining)
        tiny = is_open & ~is_leaf & (log_probs < log_floor)
        forgotten += math.fsum(np.exp(log_probs[tiny]))
        is_open &= ~is_leaf & ~tiny

        found.append(_extend(batch, row[is_leaf], token[is_leaf], log_probs[is_leaf]))
        lower += math.fsum(np.exp(found[-1].log_probs))
        grown = _extend(batch, row[is_open], token[is_open], log_probs[is_open])
        frontier = _concatenate([_take(frontier, ~chosen), grown])
        states = np.concatenate([states[~chosen], state[is_open]])
    return Enumeration(
        lower=lower,
        upper=lower + unexplored,
        leaves=_sorted(_concatenate(found)),
        nodes=nodes,
        converged=converged,
    )


def _extend(batch: Leaves, row: np.ndarray, token: np.ndarray, log_probs: np.ndarray) -> Leaves:
    """Children: row[i] of the batch followed by token[i]."""
    tokens, lengths = batch.tokens[row], batch.lengths[row]
    tokens[np.arange(len(row)), lengths] = token
    return Leaves(tokens, lengths + 1, log_probs)


def _take(leaves: Leaves, index: np.ndarray) -> Leaves:
    return Leaves(leaves.tokens[index], leaves.lengths[index], leaves.log_probs[index])


def _concatenate(parts: list[Leaves]) -> Leaves:
    return Leaves(
        np.concatenate([p.tokens for p in parts]),
        np.concatenate([p.lengths for p in parts]),
        np.concatenate([p.log_probs for p in parts]),
    )


def _sorted(leaves: Leaves) -> Leaves:
    return _take(leaves, np.argsort(-leaves.log_probs, kind="stable"))
