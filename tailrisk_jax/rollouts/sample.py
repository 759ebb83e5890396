"""Sampling: one of the only two loops over tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import (
    Prefix,
    empty_suffix,
    forward,
    next_logits,
    prefill,
    write_suffix,
)
from tailrisk_jax.models.sharding import constrain
from tailrisk_jax.policies import Mixture, Policy, Prompts
from tailrisk_jax.policies import draw as draw_token
from tailrisk_jax.rollouts.blocks import decode_row_bytes, rows_that_fit, run_blocks
from tailrisk_jax.rollouts.rollouts import Draws, Rollouts
from tailrisk_jax.rollouts.score import mixture_token_log_probs, token_log_probs

_LABEL = 0x6C61626C  # what is folded into a draw's key to pick its mixture component


def sample(
    key: Array,
    policy: Policy | Mixture,
    prompts: Prompts,
    num_samples: int,
    max_new_tokens: int,
    *,
    batch_size: int | None = None,
) -> Rollouts:
    """Draws N responses to each query, with their log-probability.

    A response ends with an end token, which counts, or is cut at T tokens, which is a complete
    outcome of the truncated distribution. The key of a draw depends on (key, query id, sample
    index) alone: neither batch size, nor the other queries, nor the devices change it.

    Args:
      key: `jax.random.key(seed)`, of the threefry kind.
      policy: what to sample from. A mixture draws a component for each response, then scores
        all of them under all components.
      prompts: Q tokenised queries.
      num_samples: N, at least 1.
      max_new_tokens: T, at least 1.
      batch_size: rows (responses) on the device at once; by default what fits in 1 GiB.

    Raises:
      InputError: N, T or batch_size below 1, or a key of another kind.
    """
    draws = draw(key, policy, prompts, num_samples, max_new_tokens, batch_size=batch_size)
    log_probs = draws.drawn_log_probs
    if isinstance(policy, Mixture):
        scored = token_log_probs(policy.components, draws, batch_size=batch_size)
        log_probs = mixture_token_log_probs(scored, jnp.log(policy.weights))
    fields = {name: getattr(draws, name) for name in Draws.__dataclass_fields__}
    return Rollouts(**fields, token_log_probs=log_probs)


def draw(
    key: Array,
    policy: Policy | Mixture,
    prompts: Prompts,
    num_samples: int,
    max_new_tokens: int,
    *,
    batch_size: int | None = None,
) -> Draws:
    """`sample` without the scoring pass that a mixture needs; see there."""
    sizes = {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    keys = _query_keys(key, prompts.ids)
    if isinstance(policy, Mixture):
        components, log_alphas = policy.components, jnp.log(policy.weights)
        labels = np.asarray(_draw_labels(keys, log_alphas, num_samples))
    else:
        components, labels = (policy,), np.zeros((len(prompts), num_samples), np.int32)
    shape = (len(prompts), num_samples, max_new_tokens)
    tokens, log_probs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    lengths, ended = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool)
    for k, component in enumerate(components):
        indices, owned = _indices(labels == k)
        if not owned.any():
            continue
        drawn = _draw_component(component, prompts, keys, indices, max_new_tokens, batch_size)
        where = np.broadcast_to(np.arange(shape[0])[:, None], owned.shape)[owned], indices[owned]
        for whole, part in zip((tokens, log_probs, lengths, ended), drawn, strict=True):
            whole[where] = part[owned]
    mask = np.arange(max_new_tokens) < lengths[..., None]
    config = components[0].model.config
    return Draws(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        ended=jnp.asarray(ended),
        labels=jnp.asarray(labels),
        drawn_log_probs=jnp.asarray(log_probs),
        prompts=prompts,
        tokenizer=components[0].model.tokenizer,
        end_ids=config.end_ids,
    )


def _query_keys(key: Array, ids: Array) -> Array:
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise InputError(
            f"key is of kind {jax.random.key_impl(key)}, whose draws depend on the batch; "
            "give jax.random.key(seed, impl='threefry2x32')"
        )
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)


@functools.partial(jax.jit, static_argnums=2)
def _draw_labels(keys, log_alphas, num_samples):
    def label(key, index):
        key = jax.random.fold_in(jax.random.fold_in(key, index), _LABEL)
        return jax.random.categorical(key, log_alphas)

    per_query = jax.vmap(label, in_axes=(None, 0))
    return jax.vmap(per_query, in_axes=(0, None))(keys, jnp.arange(num_samples))


def _indices(owned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sample indices that are True in each row, as a rectangle, and which entries count."""
    counts = owned.sum(axis=1)
    order = np.argsort(~owned, axis=1, kind="stable")[:, : max(counts.max(), 1)]
    return order, np.arange(order.shape[1]) < counts[:, None]


def _draw_component(
    policy: Policy,
    prompts: Prompts,
    keys: Array,
    indices: np.ndarray,
    length: int,
    batch_size: int | None,
) -> tuple[np.ndarray, ...]:
    """Tokens, log-probs [Q, n, T], lengths and ended [Q, n] of the samples `indices` [Q, n]."""
    config, params = policy.model.config, policy.model.params
    itemsize = params["embedding"].dtype.itemsize
    rows = batch_size or rows_that_fit(decode_row_bytes(config, length, itemsize))
    steering, temperature = policy.steering_or_zero, jnp.float32(policy.temperature)

    def start(queries):
        inputs = prompts[queries]
        prefix = _prefill(config, params, steering, inputs.tokens, inputs.mask)
        own = keys[queries]

        def run(block):
            index = indices[np.ix_(block.queries, block.samples)]
            return _decode(config, length, params, steering, temperature, prefix, own, index)

        return run

    out = list(run_blocks(indices.shape[0], indices.shape[1], rows, start))
    whole = [np.empty((*indices.shape, *x.shape[2:]), x.dtype) for x in out[0][1]]
    for block, drawn in out:
        q, n = block.kept
        for array, part in zip(whole, drawn, strict=True):
            array[np.ix_(block.queries[:q], block.samples[:n])] = np.asarray(part)[:q, :n]
    return tuple(whole)


_prefill = functools.partial(jax.jit, static_argnums=0)(prefill)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
    config,
    length: int,
    params: Any,
    steering,
    temperature: Float[Array, ""],
    prefix: Prefix,
    query_keys: Array,
    indices: Int[Array, "Q N"],
):
    """Decodes all rows in step until every one has ended."""
    queries, samples = indices.shape
    fold = jax.vmap(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))
    row_keys = fold(query_keys, indices)
    end_ids = jnp.asarray(config.end_ids, jnp.int32)

    def record(state, step, logits):
        uniform = lambda key: jax.random.uniform(jax.random.fold_in(key, step), (2,))  # noqa: E731
        uniforms = jax.vmap(jax.vmap(uniform))(row_keys)
        token, log_prob = draw_token(uniforms, logits, temperature)
        alive = ~state["ended"]
        token, log_prob = jnp.where(alive, token, 0), jnp.where(alive, log_prob, 0.0)
        return state | {
            "step": step + 1,
            "tokens": state["tokens"].at[:, :, step].set(token),
            "log_probs": state["log_probs"].at[:, :, step].set(log_prob),
            "lengths": state["lengths"] + alive,
            "ended": state["ended"] | jnp.isin(token, end_ids) & alive,
        }

    def advance(state):
        step = state["step"]
        previous = jax.lax.dynamic_slice_in_dim(state["tokens"], step - 1, 1, axis=2)
        hidden, kv = forward(
            config,
            params,
            previous,
            (prefix.lengths + step - 1)[:, None, None],
            steering,
            response=jnp.ones((1, 1, 1), bool),
            prefix=prefix,
            suffix=(state["suffix"], step - 1),
        )
        state = state | {"suffix": write_suffix(state["suffix"], kv, step - 1)}
        return record(state, step, next_logits(config, params, hidden[:, :, 0]))

    def rows(fill, dtype, *trailing):
        array = jnp.full((queries, samples, *trailing), fill, dtype)
        return constrain(array, "queries", "samples", *(None for _ in trailing))

    dtype = params["embedding"].dtype
    state = {
        "step": jnp.int32(0),
        "tokens": rows(0, jnp.int32, length),
        "log_probs": rows(0.0, jnp.float32, length),
        "lengths": rows(0, jnp.int32),
        "ended": rows(False, bool),
        "suffix": empty_suffix(config, queries, samples, max(length - 1, 1), dtype),
    }
    state = record(state, jnp.int32(0), next_logits(config, params, prefix.last_hidden)[:, None])
    unfinished = lambda state: (state["step"] < length) & ~jnp.all(state["ended"])  # noqa: E731
    state = jax.lax.while_loop(unfinished, advance, state)
    return tuple(state[name] for name in ("tokens", "log_probs", "lengths", "ended"))
