"""Scoring: teacher-forced log-probabilities of responses, the other loop over tokens."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import mixture_log_prob
from tailrisk_jax.models import Prefix, Steering, forward, next_logits, prefill
from tailrisk_jax.models.sharding import constrain
from tailrisk_jax.policies import Mixture, Policy, check_comparable, token_log_prob
from tailrisk_jax.rollouts.blocks import blocks, rows_that_fit, run_blocks, score_row_bytes
from tailrisk_jax.rollouts.rollouts import Draws

LENGTHS = 4  # response lengths that scoring compiles for: T, T/2, T/4, ... but none below
SHORTEST = 8  # tokens, which is not worth a compilation
HEAD_CHUNK = 256  # positions whose logits exist at once, per policy; one of each row at least


def log_prob(
    policy: Policy | Mixture, rollouts: Draws, *, batch_size: int | None = None
) -> Float[Array, "Q N"]:
    """log p(y | x) of every response, its end token included, under a policy or mixture.

    Raises:
      InputError: the policy's vocabulary or end tokens are not those of the rollouts.
    """
    components = policy.components if isinstance(policy, Mixture) else (policy,)
    scored = sequence_log_probs(components, rollouts, batch_size=batch_size)
    if isinstance(policy, Mixture):
        return mixture_log_prob(scored, np.log(policy.weights))
    return jnp.asarray(scored[0])


def sequence_log_probs(
    policies: Sequence[Policy], rollouts: Draws, *, batch_size: int | None = None
) -> Float[np.ndarray, "K Q N"]:
    """`token_log_probs` summed over tokens in float64, on the host, as float32."""
    scored = _token_log_probs(policies, rollouts, batch_size)
    return scored.sum(axis=-1, dtype=np.float64).astype(np.float32)


def token_log_probs(
    policies: Sequence[Policy], rollouts: Draws, *, batch_size: int | None = None
) -> Float[Array, "K Q N T"]:
    """log p_k(y_t | x, y_<t) of every response token under K policies; 0 where masked.

    Policies that share parameters run in one pass, their steering stacked on K, so that the
    weights are read once and all K follow one numerical path. The head runs on chunks of 256
    positions, so no [T, V] array is made.

    Args:
      policies: K policies over the vocabulary and end tokens of the rollouts.
      rollouts: the responses.
      batch_size: responses per pass; by default what fits in 1 GiB.

    Raises:
      InputError: the vocabulary or end tokens of the policies are not those of the rollouts.
    """
    return jnp.asarray(_token_log_probs(policies, rollouts, batch_size))


def _token_log_probs(
    policies: Sequence[Policy], rollouts: Draws, batch_size: int | None
) -> Float[np.ndarray, "K Q N T"]:
    policies = list(policies)
    if not policies:
        raise InputError("there are no policies to score with; give at least one")
    check_comparable(policies)
    config, largest = policies[0].model.config, int(np.asarray(rollouts.tokens).max())
    if config.end_ids != rollouts.end_ids or largest >= config.vocab_size:
        raise InputError(
            f"the rollouts end with {rollouts.end_ids} and reach token id {largest}, the policies "
            f"have end_ids={config.end_ids} and vocab_size={config.vocab_size}; "
            "score with models that share the vocabulary and end tokens of the sampled one"
        )
    out: list = [None] * len(policies)
    for group in _sharing_parameters(policies):
        scored = _score_group([policies[k] for k in group], rollouts, batch_size)
        for k, values in zip(group, scored, strict=True):
            out[k] = values
    return np.stack(out)


def mixture_token_log_probs(
    component_log_probs: Float[Array, "K Q N T"], log_alphas: Float[Array, " K"]
) -> Float[Array, "Q N T"]:
    """Each token's conditional log-probability under a sequence-level mixture.

    q(y_t | y_<t) = sum_k alpha_k q_k(y_<=t) / sum_k alpha_k q_k(y_<t); summed over t it is the
    mixture's sequence log-probability.
    """
    prefixes = jnp.cumsum(component_log_probs, axis=-1) + log_alphas[:, None, None, None]
    totals = jax.nn.logsumexp(prefixes, axis=0)
    return jnp.diff(totals, axis=-1, prepend=0.0)


def _sharing_parameters(policies: list[Policy]) -> list[list[int]]:
    """Indices of the policies grouped by parameter tree (the same arrays, not equal ones)."""
    groups: dict[tuple, list[int]] = {}
    for k, policy in enumerate(policies):
        leaves = tuple(id(leaf) for leaf in jax.tree.leaves(policy.model.params))
        groups.setdefault((policy.model.config, leaves), []).append(k)
    return list(groups.values())


def _score_group(policies: list[Policy], draws: Draws, batch_size: int | None) -> np.ndarray:
    config, params = policies[0].model.config, policies[0].model.params
    steering = jax.tree.map(lambda *x: np.stack(x), *(p.steering_or_zero for p in policies))
    temperature = np.stack([np.float32(p.temperature) for p in policies])
    tokens, mask = np.asarray(draws.tokens), np.asarray(draws.mask)
    queries, samples, length = tokens.shape
    itemsize = params["embedding"].dtype.itemsize
    row_bytes = score_row_bytes(config, draws.prompts.tokens.shape[1], length, itemsize)
    rows = batch_size or rows_that_fit(len(policies) * row_bytes)
    # Responses of like length share a block, which is cut at the least of a few lengths that
    # holds its longest, so that there are few shapes to compile.
    lengths = mask.sum(axis=-1)
    order = np.argsort(-lengths, axis=1, kind="stable")
    halved = (math.ceil(length / 2**k) for k in range(LENGTHS))
    cuts = sorted({length} | {cut for cut in halved if cut >= SHORTEST})

    def start(picked):
        inputs = draws.prompts[picked]
        prefix = _prefill(config, params, steering, inputs.tokens, inputs.mask)

        def run(block):
            where = block.queries[:, None], order[block.queries][:, block.samples]
            longest = lengths[where].max()
            if longest == 0:
                return where, 0, np.zeros((len(policies), *where[1].shape, 0))
            cut = next(cut for cut in cuts if cut >= longest)
            inputs = tokens[where][..., :cut], mask[where][..., :cut]
            return where, cut, _score(config, params, steering, temperature, prefix, *inputs)

        return run

    whole = np.zeros((len(policies), queries, samples, length), np.float32)
    for block, ((rows_q, rows_n), cut, scored) in run_blocks(blocks(queries, samples, rows), start):
        q, n = block.kept
        whole[:, rows_q[:q], rows_n[:q, :n], :cut] = np.asarray(scored)[:, :q, :n]
    return whole


@functools.partial(jax.jit, static_argnums=0)
def _prefill(config, params, steering: Steering, tokens, mask) -> Prefix:
    """`prefill` under K steerings at once; every array gets a leading K."""
    return jax.vmap(lambda one: prefill(config, params, one, tokens, mask))(steering)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    config,
    params,
    steering: Steering,
    temperature: Float[Array, " K"],
    prefix: Prefix,
    tokens: Int[Array, "Q N T"],
    mask: Bool[Array, "Q N T"],
) -> Float[Array, "K Q N T"]:
    tokens = constrain(tokens, "queries", "samples", "positions")

    def one_policy(steering, temperature, prefix):
        length = tokens.shape[-1]
        steps = jnp.arange(length - 1)
        hidden = jnp.broadcast_to(
            prefix.last_hidden[:, None, None], (*tokens.shape[:2], 1, config.width)
        )
        if length > 1:
            later, _ = forward(
                config,
                params,
                tokens[..., :-1],
                (prefix.lengths[:, None] + steps)[:, None],
                steering,
                response=jnp.ones((1, 1, 1), bool),
                prefix=prefix,
            )
            hidden = jnp.concatenate([hidden, later], axis=2)
        return _head(config, params, temperature, hidden, tokens)

    scored = jax.vmap(one_policy)(steering, temperature, prefix)
    return jnp.where(mask, scored, 0.0)


def _head(config, params, temperature, hidden, tokens):
    """Log-probabilities of `tokens` from hidden states, about `HEAD_CHUNK` of them at a time.

    The chunks are cut along T, so that samples stay on their devices.
    """
    queries, samples, length = tokens.shape
    size = max(1, min(length, HEAD_CHUNK // (queries * samples)))
    padding = [(0, 0), (0, 0), (0, -length % size)]
    hidden, tokens = jnp.pad(hidden, [*padding, (0, 0)]), jnp.pad(tokens, padding)

    def score_chunk(start):
        hidden_chunk, token_chunk = (
            jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (hidden, tokens)
        )
        logits = next_logits(config, params, hidden_chunk)
        return token_log_prob(logits, token_chunk, temperature)

    scored = jax.lax.map(score_chunk, jnp.arange(0, length, size))
    return jnp.moveaxis(scored, 0, 2).reshape(queries, samples, -1)[..., :length]
