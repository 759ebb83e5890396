"""Scoring: teacher-forced log-probabilities of responses, the other loop over tokens."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import mixture_log_prob
from tailrisk_jax.models import Prefix
from tailrisk_jax.models.sharding import constrain, fetch
from tailrisk_jax.policies import (
    Component,
    LogitPath,
    Mixture,
    Policy,
    Prompts,
    check_comparable,
    log_masses,
    path_log_masses,
    token_log_prob,
)
from tailrisk_jax.rollouts.blocks import blocks, rows_that_fit, run_blocks, score_row_bytes
from tailrisk_jax.rollouts.network import Network, Passes, over_policies, passes, sharing
from tailrisk_jax.rollouts.rollouts import Draws
from tailrisk_jax.rollouts.schedules import schedule, sequence_totals, token_totals

LENGTHS = 4  # response lengths that scoring compiles for: T, T/2, T/4, ... but none below
SHORTEST = 8  # tokens, which is not worth a compilation
HEAD_CHUNK = 256  # positions whose logits exist at once, per policy; one of each row at least


def log_prob(
    policy: Component | Mixture, rollouts: Draws, *, batch_size: int | None = None
) -> Float[Array, "Q N"]:
    """log p(y | x) of every response, its end token included, under a component or mixture.

    Raises:
      InputError: the policy's vocabulary or end tokens are not those of the rollouts, it is a
        mixture with weights for another number of queries, or it has a context that can't be put
        around their prompts.
    """
    if isinstance(policy, Mixture):
        log_alphas = policy.log_alphas(len(rollouts.prompts))
        scored = sequence_log_probs(policy.components, rollouts, batch_size=batch_size)
        return mixture_log_prob(scored, log_alphas)
    return jnp.asarray(sequence_log_probs([policy], rollouts, batch_size=batch_size)[0])


def sequence_log_probs(
    components: Sequence[Component], rollouts: Draws, *, batch_size: int | None = None
) -> Float[np.ndarray, "K Q N"]:
    """`token_log_probs` summed over tokens in float64, on the host, as float32."""
    return sequence_totals(components, _score_experts(components, rollouts, batch_size))


def token_log_probs(
    components: Sequence[Component], rollouts: Draws, *, batch_size: int | None = None
) -> Float[Array, "K Q N T"]:
    """log p_k(y_t | x, y_<t) of every response token under K components; 0 where masked.

    Each distinct policy is scored once: those that share parameters and prompts in one pass,
    their steering and adapters stacked, so that the weights are read once and all follow one
    numerical path. Token mixtures are arithmetic on what their experts give. Logit paths need
    whole distributions: those of the same experts run in a pass of their own. The head runs on
    chunks of 256 positions, so no [T, V] array is made.

    Args:
      components: policies, token mixtures or logit paths over the vocabulary and end tokens of
        the rollouts.
      rollouts: the responses.
      batch_size: responses per pass; by default what fits in 1 GiB a device.

    Raises:
      InputError: as `log_prob`.
    """
    return jnp.asarray(token_totals(components, _score_experts(components, rollouts, batch_size)))


def mixture_token_log_probs(
    component_log_probs: Float[Array, "K Q N T"],
    log_alphas: Float[ArrayLike, " K"] | Float[ArrayLike, "Q K"],
) -> Float[Array, "Q N T"]:
    """Each token's conditional log-probability under a sequence-level mixture.

    q(y_t | y_<t) = sum_k alpha_k q_k(y_<=t) / sum_k alpha_k q_k(y_<t); summed over t it is the
    mixture's sequence log-probability.
    """
    num_components, queries = component_log_probs.shape[:2]
    per_query = jnp.broadcast_to(log_alphas, (queries, num_components))
    prefixes = jnp.cumsum(component_log_probs, axis=-1) + per_query.T[..., None, None]
    totals = jax.nn.logsumexp(prefixes, axis=0)
    return jnp.diff(totals, axis=-1, prepend=0.0)


def _score_experts(
    components: Sequence[Component], draws: Draws, batch_size: int | None
) -> dict[int, Float[np.ndarray, "Q N T"]]:
    """Token log-probs of all policies and logit paths that are needed, by their identity."""
    if not components:
        raise InputError("there are no policies to score with; give at least one")
    check_comparable(components)
    config = components[0].experts[0].model.config
    largest = int(np.asarray(draws.tokens).max())
    if config.end_ids != draws.end_ids or largest >= config.vocab_size:
        raise InputError(
            f"the rollouts end with {draws.end_ids} and reach token id {largest}, the policies "
            f"have end_ids={config.end_ids} and vocab_size={config.vocab_size}; "
            "score with models that share the vocabulary and end tokens of the sampled one"
        )
    policies: dict[int, Policy] = {}
    paths: dict[tuple[int, ...], list[LogitPath]] = {}
    for component in components:
        if isinstance(component, LogitPath):
            paths.setdefault(tuple(map(id, component.experts)), []).append(component)
        else:
            policies |= {id(expert): expert for expert in component.experts}
    distinct = list(policies.values())
    out: dict[int, np.ndarray] = {}
    for group in sharing(distinct):
        own = [distinct[k] for k in group]
        out |= zip(map(id, own), _score_policies(own, draws, batch_size), strict=True)
    for alike in paths.values():
        out |= zip(map(id, alike), _score_paths(alike, draws, batch_size), strict=True)
    return out


def _score_policies(policies: list[Policy], draws: Draws, batch_size: int | None) -> np.ndarray:
    """[K, Q, N, T] of policies that share parameters and prompts."""
    each = passes(policies, draws.prompts, draws.tokens.shape[-1])

    def start(picked):
        return functools.partial(score_rows, *each.networks, *each.prefill(picked))

    return _score_blocks(len(policies), draws, batch_size or _rows(each, draws), start)


def _score_paths(paths: list[LogitPath], draws: Draws, batch_size: int | None) -> np.ndarray:
    """[C, Q, N, T] of logit paths with the same experts."""
    length = draws.tokens.shape[-1]
    each = passes(paths[0].experts, draws.prompts, length)
    schedules = np.stack([schedule(path, length)[:, each.order] for path in paths])

    def start(picked):
        prefixes = each.prefill(picked)
        return functools.partial(_score_path, each.networks, schedules.astype(np.float32), prefixes)

    return _score_blocks(len(paths), draws, batch_size or _rows(each, draws), start)


def _rows(each: Passes, draws: Draws) -> int:
    """How many responses run at once by default."""

    def row_bytes(net: Network, prompts: Prompts) -> int:
        shape = prompts.tokens.shape[1], draws.tokens.shape[-1]
        return score_row_bytes(net.config, *shape, net.itemsize)

    return rows_that_fit(each.row_bytes(row_bytes))


def _score_blocks(
    count: int, draws: Draws, rows: int, start_scoring: Callable[[np.ndarray], Callable]
) -> np.ndarray:
    """[count, Q, N, T] from blocks of rows.

    Responses of like length share a block, which is cut at the least of a few lengths that holds
    its longest, so that there are few shapes to compile.

    Args:
      start_scoring: given query indices, prefills them and returns (tokens, mask) -> scores.
    """
    tokens, mask = np.asarray(draws.tokens), np.asarray(draws.mask)
    queries, samples, length = tokens.shape
    lengths = mask.sum(axis=-1)
    order = np.argsort(-lengths, axis=1, kind="stable")
    halved = (math.ceil(length / 2**k) for k in range(LENGTHS))
    cuts = sorted({length} | {cut for cut in halved if cut >= SHORTEST})

    def start(picked):
        score = start_scoring(picked)

        def run(block):
            where = block.queries[:, None], order[block.queries][:, block.samples]
            longest = lengths[where].max()
            if longest == 0:
                return where, 0, np.zeros((count, *where[1].shape, 0))
            cut = next(cut for cut in cuts if cut >= longest)
            return where, cut, score(tokens[where][..., :cut], mask[where][..., :cut])

        return run

    whole = np.zeros((count, queries, samples, length), np.float32)
    for block, ((rows_q, rows_n), cut, scored) in run_blocks(blocks(queries, samples, rows), start):
        q, n = block.kept
        whole[:, rows_q[:q], rows_n[:q, :n], :cut] = fetch(scored)[:, :q, :n]
    return whole


@jax.jit
def score_rows(
    net: Network, prefix: Prefix, tokens: Int[Array, "Q N T"], mask: Bool[Array, "Q N T"]
) -> Float[Array, "K Q N T"]:
    tokens = constrain(tokens, "queries", "samples", "positions")

    def one_policy(net, prefix):
        def score_chunk(start, hidden, tokens):
            return token_log_prob(net.logits(hidden), tokens, net.temperature)

        return _in_chunks(score_chunk, _hidden(net, prefix, tokens), tokens)

    return jnp.where(mask, over_policies(one_policy, net, prefix), 0.0)


@jax.jit
def _score_path(
    nets: tuple[Network, ...],
    schedules: Float[Array, "C T K"],
    prefixes: tuple[Prefix, ...],
    tokens: Int[Array, "Q N T"],
    mask: Bool[Array, "Q N T"],
) -> Float[Array, "C Q N T"]:
    """Of C logit paths, whose distributions are combined chunk by chunk."""
    tokens = constrain(tokens, "queries", "samples", "positions")
    hidden = tuple(
        over_policies(lambda net, prefix: _hidden(net, prefix, tokens), *each)
        for each in zip(nets, prefixes, strict=True)
    )

    def score_chunk(start, hidden, tokens):
        def masses_of(net, hidden):
            return log_masses(net.logits(hidden), net.temperature)

        masses = jnp.concatenate(
            [over_policies(masses_of, *each) for each in zip(nets, hidden, strict=True)]
        )
        steps = jnp.minimum(start + jnp.arange(tokens.shape[-1]), schedules.shape[1] - 1)

        def one_path(coefficients):
            combined = path_log_masses(masses, coefficients[steps])
            return token_log_prob(combined, tokens, jnp.float32(1))

        return jax.lax.map(one_path, schedules)

    return jnp.where(mask, _in_chunks(score_chunk, hidden, tokens), 0.0)


def _hidden(net: Network, prefix: Prefix, tokens: Int[Array, "Q N T"]) -> Float[Array, "Q N T D"]:
    """The states that each token is predicted from, of one policy."""
    length = tokens.shape[-1]
    steps = jnp.arange(length - 1)
    hidden = jnp.broadcast_to(
        prefix.last_hidden[:, None, None], (*tokens.shape[:2], 1, net.config.width)
    )
    if length > 1:
        later, _ = net.forward(
            tokens[..., :-1],
            (prefix.lengths[:, None] + steps)[:, None],
            response=jnp.ones((1, 1, 1), bool),
            prefix=prefix,
        )
        hidden = jnp.concatenate([hidden, later], axis=2)
    return hidden


def chunk_size(rows: int, length: int) -> int:
    """Positions of each row whose logits exist at once."""
    return max(1, min(length, HEAD_CHUNK // rows))


def _in_chunks(score_chunk: Callable, hidden: Any, tokens: Int[Array, "Q N T"]) -> Array:
    """score_chunk(first position, hidden, tokens), about `HEAD_CHUNK` positions at a time.

    The chunks are cut along T, so that samples stay on their devices.

    Args:
      hidden: arrays [..., T, D].
    """
    queries, samples, length = tokens.shape
    size = chunk_size(queries * samples, length)

    def padded(x, axis):
        return jnp.pad(x, [(0, -length % size if a == axis else 0) for a in range(x.ndim)])

    hidden = jax.tree.map(lambda x: padded(x, x.ndim - 2), hidden)
    tokens = padded(tokens, 2)

    def one_chunk(start):
        def cut(x, axis):
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

        hidden_chunk = jax.tree.map(lambda x: cut(x, x.ndim - 2), hidden)
        return score_chunk(start, hidden_chunk, cut(tokens, 2))

    scored = jax.lax.map(one_chunk, jnp.arange(0, length, size))
    scored = jnp.moveaxis(scored, 0, -2)
    return scored.reshape(*scored.shape[:-2], -1)[..., :length]
