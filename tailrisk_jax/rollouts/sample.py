"""Sampling: one of the only two loops over tokens."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.models.sharding import fetch
from tailrisk_jax.policies import (
    Component,
    LogitPath,
    Mixture,
    Policy,
    Prompts,
    TokenMixture,
    check_comparable,
    own_prompts,
)
from tailrisk_jax.rollouts.blocks import (
    TURNS,
    blocks,
    decode_row_bytes,
    rows_that_fit,
    run_blocks,
)
from tailrisk_jax.rollouts.decode import decode, decode_experts
from tailrisk_jax.rollouts.network import network, passes, prefill_one
from tailrisk_jax.rollouts.rollouts import Draws, Rollouts
from tailrisk_jax.rollouts.schedules import schedule
from tailrisk_jax.rollouts.score import mixture_token_log_probs, token_log_probs

_LABEL = 0x6C61626C  # what is folded into a draw's key to pick its mixture component


def sample(
    key: Array,
    policy: Component | Mixture,
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
        all of them under all components. The experts of a token mixture or logit path run in
        lock-step; components that share their experts run together.
      prompts: Q tokenised queries.
      num_samples: N, at least 1.
      max_new_tokens: T, at least 1.
      batch_size: rows (responses) on the device at once; by default what fits in 1 GiB a device.

    Raises:
      InputError: N, T or batch_size below 1, a temperature that isn't above 0, a key of another
        kind, a mixture with weights for another number of queries, or a policy with a context
        that can't be put around these prompts.
    """
    draws = draw(key, policy, prompts, num_samples, max_new_tokens, batch_size=batch_size)
    log_probs = draws.drawn_log_probs
    if isinstance(policy, Mixture):
        scored = token_log_probs(policy.components, draws, batch_size=batch_size)
        log_probs = mixture_token_log_probs(scored, policy.log_alphas(len(prompts)))
    fields = {name: getattr(draws, name) for name in Draws.__dataclass_fields__}
    return Rollouts(**fields, token_log_probs=log_probs)


def draw(
    key: Array,
    policy: Component | Mixture,
    prompts: Prompts,
    num_samples: int | Int[np.ndarray, " Q"],
    max_new_tokens: int,
    *,
    first: int | Int[np.ndarray, " Q"] = 0,
    batch_size: int | None = None,
) -> Draws:
    """`sample` without the scoring pass that a mixture needs; see there.

    Args:
      num_samples: N, or one number per query, 0 for none; N is then the largest, and what lies
        beyond a query's own is left empty: no token, not ended.
      first: index of the first sample, or one per query: these are the last N of the first + N
        that a call with more samples draws.
    """
    counts = np.broadcast_to(num_samples, len(prompts))
    first = np.broadcast_to(first, len(prompts)).astype(np.int32)
    num_samples = int(counts.max())
    sizes = {
        "num_samples": num_samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size,
    }  # fmt: skip
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value} must be at least 1")
    keys = _query_keys(key, jnp.asarray(prompts.ids))
    if isinstance(policy, Mixture):
        components, log_alphas = policy.components, policy.log_alphas(len(prompts))
        labels = fetch(_draw_labels(keys, log_alphas, first, num_samples))
    else:
        components, labels = (policy,), np.zeros((len(prompts), num_samples), np.int32)
    check_comparable(components)
    shape = (len(prompts), num_samples, max_new_tokens)
    tokens, log_probs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    lengths, ended = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool)
    own = np.arange(num_samples) < counts[:, None]
    for members in _drawn_together(components):
        indices, owned = _indices(np.isin(labels, members) & own)
        if not owned.any():
            continue
        drawn = _draw_group(
            [components[k] for k in members], prompts, keys, first[:, None] + indices,
            np.searchsorted(members, np.take_along_axis(labels, indices, axis=1)),
            owned.sum(axis=1), max_new_tokens, batch_size,
        )  # fmt: skip
        where = np.broadcast_to(np.arange(shape[0])[:, None], owned.shape)[owned], indices[owned]
        for whole, part in zip((tokens, log_probs, lengths, ended), drawn, strict=True):
            whole[where] = part[owned]
    mask = np.arange(max_new_tokens) < lengths[..., None]
    model = components[0].experts[0].model
    return Draws(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        ended=jnp.asarray(ended),
        labels=jnp.asarray(labels),
        drawn_log_probs=jnp.asarray(log_probs),
        prompts=prompts,
        tokenizer=model.tokenizer,
        end_ids=model.config.end_ids,
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


@functools.partial(jax.jit, static_argnums=3)
def _draw_labels(keys, log_alphas, first, num_samples):
    def label(key, log_alphas, index):
        key = jax.random.fold_in(jax.random.fold_in(key, index), _LABEL)
        return jax.random.categorical(key, log_alphas)

    per_query = jax.vmap(label, in_axes=(None, None, 0))
    return jax.vmap(per_query)(keys, log_alphas, first[:, None] + jnp.arange(num_samples))


def _indices(owned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sample indices that are True in each row, as a rectangle, and which entries count."""
    counts = owned.sum(axis=1)
    order = np.argsort(~owned, axis=1, kind="stable")[:, : max(counts.max(), 1)]
    return order, np.arange(order.shape[1]) < counts[:, None]


def _drawn_together(components: Sequence[Component]) -> list[list[int]]:
    """Indices of the components that one loop draws: of one kind, with the same experts."""
    groups: dict[tuple, list[int]] = {}
    for k, component in enumerate(components):
        experts = tuple(id(expert) for expert in component.experts)
        groups.setdefault((type(component), experts), []).append(k)
    return list(groups.values())


def _draw_group(
    components: Sequence[Component],
    prompts: Prompts,
    keys: Array,
    indices: Int[np.ndarray, "Q n"],
    labels: Int[np.ndarray, "Q n"],
    counts: Int[np.ndarray, " Q"],
    length: int,
    batch_size: int | None,
) -> tuple[np.ndarray, ...]:
    """Tokens, log-probs [Q, n, T], lengths and ended [Q, n] of the samples `indices`.

    Only the first `counts` of each query are drawn; `labels` are their components.
    """
    prepare: Callable = _prepare_one if isinstance(components[0], Policy) else _prepare_experts
    row_bytes, start_decoding = prepare(components, prompts, length)
    rows = batch_size or rows_that_fit(row_bytes)

    def start(picked):
        decode_rows = start_decoding(picked)

        def run(block):
            q, n = block.kept
            wanted = block.samples < counts[block.queries, None]
            wanted[q:], wanted[:, n:] = False, False
            by_turn = (len(block.queries), -1, block.slots)
            where = np.ix_(block.queries, block.samples)
            queue, own = (np.swapaxes(x[where].reshape(by_turn), 1, 2) for x in (indices, labels))
            sizes = wanted.reshape(by_turn).sum(axis=1)
            return decode_rows(keys[block.queries], queue, own, sizes)

        return run

    shape = queries, samples = indices.shape
    out = (
        np.empty((*shape, length), np.int32),
        np.empty((*shape, length), np.float32),
        np.empty(shape, np.int32),
        np.empty(shape, bool),
    )
    for block, drawn in run_blocks(blocks(queries, samples, rows, turns=TURNS), start):
        q, n = block.kept
        where = np.ix_(block.queries[:q], block.samples[:n])
        for array, part in zip(out, drawn, strict=True):
            in_order = np.swapaxes(fetch(part), 1, 2)
            array[where] = in_order.reshape(len(block.queries), -1, *part.shape[3:])[:q, :n]
    return out


def _prepare_one(components: Sequence[Policy], prompts: Prompts, length: int):
    """Memory of a row, and for the picked queries a function that decodes rows of theirs."""
    policy = components[0]
    net, own = network(policy), own_prompts(policy, prompts, length)

    def start(picked) -> Callable:
        inputs = own[picked]
        prefix = prefill_one(net, inputs.tokens, inputs.mask)
        return lambda keys, queue, labels, sizes: decode(length, net, prefix, keys, queue, sizes)

    return decode_row_bytes(net.config, length, net.itemsize), start


def _prepare_experts(components: Sequence[TokenMixture | LogitPath], prompts: Prompts, length: int):
    """`_prepare_one` for token mixtures or logit paths of the same experts."""
    experts = components[0].experts
    each = passes(experts, prompts, length)
    # Rounded up, so that calls with other numbers of components share compiled code.
    count = max(8, 1 << (len(components) - 1).bit_length())
    schedules = np.zeros((count, length, len(experts)), np.float32)
    for row, component in zip(schedules, components, strict=False):
        row[:] = schedule(component, length)[:, each.order]
    rule = "mixture" if isinstance(components[0], TokenMixture) else "path"

    def start(picked) -> Callable:
        prefixes = each.prefill(picked)
        return lambda keys, *queue: decode_experts(
            rule, length, each.networks, schedules, prefixes, keys, *queue
        )

    return each.row_bytes(
        lambda net, own: decode_row_bytes(net.config, length, net.itemsize)
    ), start
