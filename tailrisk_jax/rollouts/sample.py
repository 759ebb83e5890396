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
from tailrisk_jax.policies import Mixture, Policy, Prompts, check_comparable
from tailrisk_jax.policies import draw as draw_token
from tailrisk_jax.rollouts.blocks import (
    TURNS,
    blocks,
    decode_row_bytes,
    rows_that_fit,
    run_blocks,
)
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
      InputError: N, T or batch_size below 1, a temperature that isn't above 0, or a key of another
        kind.
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
        components, log_alphas = policy.components, jnp.log(policy.weights)
        labels = np.asarray(_draw_labels(keys, log_alphas, first, num_samples))
    else:
        components, labels = (policy,), np.zeros((len(prompts), num_samples), np.int32)
    check_comparable(components)
    shape = (len(prompts), num_samples, max_new_tokens)
    tokens, log_probs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    lengths, ended = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool)
    for k, component in enumerate(components):
        indices, owned = _indices((labels == k) & (np.arange(num_samples) < counts[:, None]))
        if not owned.any():
            continue
        drawn = _draw_component(
            component, prompts, keys, first[:, None] + indices, owned.sum(axis=1),
            max_new_tokens, batch_size,
        )  # fmt: skip
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


@functools.partial(jax.jit, static_argnums=3)
def _draw_labels(keys, log_alphas, first, num_samples):
    def label(key, index):
        key = jax.random.fold_in(jax.random.fold_in(key, index), _LABEL)
        return jax.random.categorical(key, log_alphas)

    per_query = jax.vmap(label, in_axes=(None, 0))
    return jax.vmap(per_query)(keys, first[:, None] + jnp.arange(num_samples))


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
    counts: np.ndarray,
    length: int,
    batch_size: int | None,
) -> tuple[np.ndarray, ...]:
    """Tokens, log-probs [Q, n, T], lengths and ended [Q, n] of the samples `indices` [Q, n].

    Only the first `counts` [Q] of each query are drawn.
    """
    config, params = policy.model.config, policy.model.params
    itemsize = params["embedding"].dtype.itemsize
    rows = batch_size or rows_that_fit(decode_row_bytes(config, length, itemsize))
    steering, temperature = policy.steering_or_zero, jnp.float32(policy.temperature)

    def start(queries):
        inputs = prompts[queries]
        prefix = _prefill(config, params, steering, inputs.tokens, inputs.mask)
        fixed = config, length, params, steering, temperature, prefix, keys[queries]

        def run(block):
            q, n = block.kept
            wanted = block.samples < counts[block.queries, None]
            wanted[q:], wanted[:, n:] = False, False
            by_turn = (len(block.queries), -1, block.slots)
            queue = indices[np.ix_(block.queries, block.samples)].reshape(by_turn)
            sizes = wanted.reshape(by_turn).sum(axis=1)
            return _decode(*fixed, np.swapaxes(queue, 1, 2), sizes)

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
            in_order = np.swapaxes(np.asarray(part), 1, 2)
            array[where] = in_order.reshape(len(block.queries), -1, *part.shape[3:])[:q, :n]
    return out


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
    queue: Int[Array, "Q N K"],
    sizes: Int[Array, "Q N"],
):
    """Decodes with N rows (slots) per query, each with a queue of up to K samples.

    A slot whose response is complete takes its next sample at once. All slots write their keys and
    values to the same position of a ring of T - 1, so that a write is one slice; a slot sees as
    many positions back as its response is long. First tokens need no step: their distribution is
    known from the prompt.

    Args:
      queue: sample indices, in the order in which a slot draws them.
      sizes: how many of them are to be drawn.

    Returns: tokens, log-probs [Q, N, K, T], lengths and ended [Q, N, K].
    """
    queries, slots, turns = queue.shape
    ring = max(length - 1, 1)
    over_turns = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))
    keys = jax.vmap(over_turns)(query_keys, queue)
    end_ids = jnp.asarray(config.end_ids, jnp.int32)
    per_slot = lambda function: jax.vmap(jax.vmap(function))  # noqa: E731

    @per_slot
    def uniforms(key, step):
        return jax.random.uniform(jax.random.fold_in(key, step), (2,))

    def pick(keys, steps, logits):
        return draw_token(uniforms(keys, steps), logits, temperature)

    def of_turn(x, turn):
        return per_slot(lambda row, k: row[k])(x, jnp.minimum(turn, turns - 1))

    def complete(state):
        return jnp.isin(state["token"], end_ids) | (state["age"] >= length)

    def advance(state):
        """One token for every slot, then the next sample for those that are complete."""
        turn, age, time = state["turn"], state["age"], state["time"]
        alive = (turn < sizes) & ~complete(state)
        steps_back = (time - 1 - jnp.arange(ring)) % ring
        hidden, kv = forward(
            config,
            params,
            state["token"][..., None],
            (prefix.lengths[:, None] + age - 1)[..., None],
            steering,
            response=jnp.ones((1, 1, 1), bool),
            prefix=prefix,
            suffix=(state["suffix"], steps_back < age[..., None] - 1),
        )
        logits = next_logits(config, params, hidden[:, :, 0])
        token, log_prob = pick(of_turn(keys, turn), age, logits)
        written = jnp.where(alive, turn, turns)  # beyond the last: dropped
        put = per_slot(lambda out, k, t, x: out.at[k, t].set(x, mode="drop"))
        state = {
            "time": time + 1,
            "turn": turn,
            "age": age + alive,
            "token": jnp.where(alive, token, state["token"]),
            "suffix": write_suffix(state["suffix"], kv, time % ring),
            "tokens": put(state["tokens"], written, age, token),
            "log_probs": put(state["log_probs"], written, age, log_prob),
        }
        done = complete(state)
        turn = turn + done
        return state | {
            "turn": turn,
            "age": jnp.where(done, 1, state["age"]),
            "token": jnp.where(done, of_turn(first, turn), state["token"]),
        }

    def rows(fill, dtype, *trailing):
        array = jnp.full((queries, slots, *trailing), fill, dtype)
        return constrain(array, "queries", "samples", *(None for _ in trailing))

    first_logits = next_logits(config, params, prefix.last_hidden)[:, None]
    first, first_log_probs = jax.lax.map(
        lambda keys: pick(keys, rows(0, jnp.int32), first_logits), jnp.moveaxis(keys, 2, 0)
    )
    first, first_log_probs = (jnp.moveaxis(x, 0, 2) for x in (first, first_log_probs))
    state = {
        "time": jnp.int32(0),
        "turn": rows(0, jnp.int32),
        "age": rows(1, jnp.int32),
        "token": first[..., 0],
        "suffix": empty_suffix(config, queries, slots, ring, params["embedding"].dtype),
        "tokens": rows(0, jnp.int32, turns, length).at[..., 0].set(first),
        "log_probs": rows(0.0, jnp.float32, turns, length).at[..., 0].set(first_log_probs),
    }
    if length > 1:
        state = jax.lax.while_loop(lambda state: jnp.any(state["turn"] < sizes), advance, state)
    tokens = state["tokens"]
    ends = jnp.isin(tokens, end_ids)  # what follows the first is nothing, and is written as 0
    ended = jnp.any(ends, axis=-1)
    lengths = jnp.where(ended, jnp.argmax(ends, axis=-1) + 1, length)
    return tokens, state["log_probs"], lengths, ended
