"""The loop of decoding, for one policy and for experts in lock-step."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tailrisk_jax.models import Prefix, Suffix, empty_suffix, write_suffix
from tailrisk_jax.models.sharding import constrain
from tailrisk_jax.policies import draw, draw_from_mixture, log_masses, path_log_masses
from tailrisk_jax.rollouts.network import Network, over_policies

_EXPERT = 0x65787074  # what is folded into a token's key to pick the expert that draws it

Rule = Literal["mixture", "path"]


@functools.partial(jax.jit, static_argnums=0)
def decode(
    length: int,
    network: Network,
    prefix: Prefix,
    query_keys: Array,
    queue: Int[Array, "Q N R"],
    sizes: Int[Array, "Q N"],
):
    """Draws from one policy; see `_loop`."""

    def pick(keys, steps, logits):
        return draw(_uniforms(keys, steps), logits, network.temperature)

    def step(suffix, token, age, back, place):
        hidden, kv = _next_hidden(network, prefix, suffix, token, age, back)
        return network.logits(hidden), write_suffix(suffix, kv, place)

    suffix = _empty(network, queue, length)
    logits = network.logits(prefix.last_hidden)[:, None]
    keys = _sample_keys(query_keys, queue)
    return _loop(length, network.config.end_ids, pick, step, suffix, logits, keys, sizes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def decode_experts(
    rule: Rule,
    length: int,
    networks: tuple[Network, ...],
    schedules: Float[Array, "C T K"],
    prefixes: tuple[Prefix, ...],
    query_keys: Array,
    queue: Int[Array, "Q N R"],
    components: Int[Array, "Q N R"],
    sizes: Int[Array, "Q N"],
):
    """Draws from token mixtures or logit paths of the same K experts; see `_loop`.

    All experts run on every row. Those that share parameters and prompts run in one pass.

    Args:
      rule: what the schedules mean.
      networks, prefixes: with leading axes that add up to K.
      schedules: weights or coefficients of each component by token.
      components: which one draws each sample.
    """

    def of_experts(function):
        return jnp.concatenate([function(*one) for one in zip(networks, prefixes, strict=True)])

    def pick(samples, steps, masses):
        keys, component = samples
        schedule = schedules[component, steps]
        if rule == "path":
            combined = path_log_masses(masses, schedule)
            return draw(_uniforms(keys, steps), combined, jnp.float32(1))
        uniforms = jnp.concatenate([_uniforms(keys, steps), _expert_uniforms(keys, steps)], -1)
        return draw_from_mixture(uniforms, masses, schedule)

    def masses_of(network, hidden):
        return log_masses(network.logits(hidden), network.temperature)

    def step(suffixes, token, age, back, place):
        def one(network, prefix, suffix):
            hidden, kv = _next_hidden(network, prefix, suffix, token, age, back)
            return masses_of(network, hidden), write_suffix(suffix, kv, place)

        parts = [
            over_policies(one, *each) for each in zip(networks, prefixes, suffixes, strict=True)
        ]
        masses, suffixes = zip(*parts, strict=True)
        return jnp.concatenate(masses), suffixes

    suffixes = tuple(
        over_policies(lambda network: _empty(network, queue, length), network)
        for network in networks
    )
    masses = of_experts(
        lambda network, prefix: over_policies(masses_of, network, prefix.last_hidden)[:, :, None]
    )
    samples = _sample_keys(query_keys, queue), components
    end_ids = networks[0].config.end_ids
    return _loop(length, end_ids, pick, step, suffixes, masses, samples, sizes)


def _loop(
    length: int,
    end_ids: tuple[int, ...],
    pick: Callable,
    step: Callable,
    suffix: Any,
    first_logits: Array,
    samples: Any,
    sizes: Int[Array, "Q N"],
):
    """Decodes with N rows (slots) per query, each with a queue of up to R samples.

    A slot whose response is complete takes its next sample at once. All slots write their keys and
    values to the same position of a ring of T - 1, so that a write is one slice; a slot sees as
    many positions back as its response is long. First tokens need no step: their distribution is
    known from the prompt.

    Args:
      pick: (what is known of the current samples, index of the token, logits) -> token, log-prob.
      step: (suffix, last token, tokens so far, how many steps ago each place of the ring was
        written, where to write) -> logits, suffix.
      suffix: the empty ring.
      first_logits: of each query's first token.
      samples: what is known of each sample, arrays [Q, N, R], in the order in which a slot draws
        them.
      sizes: how many of them are to be drawn.

    Returns: tokens, log-probs [Q, N, R, T], lengths and ended [Q, N, R].
    """
    queries, slots, turns = jax.tree.leaves(samples)[0].shape
    ring = max(length - 1, 1)
    ends = jnp.asarray(end_ids, jnp.int32)

    def of_turn(tree, turn):
        one = _per_slot(lambda row, k: row[k])
        return jax.tree.map(lambda x: one(x, jnp.minimum(turn, turns - 1)), tree)

    def complete(state):
        return jnp.isin(state["token"], ends) | (state["age"] >= length)

    def advance(state):
        """One token for every slot, then the next sample for those that are complete."""
        turn, age, time = state["turn"], state["age"], state["time"]
        alive = (turn < sizes) & ~complete(state)
        back = (time - 1 - jnp.arange(ring)) % ring
        logits, suffix = step(state["suffix"], state["token"], age, back, time % ring)
        token, log_prob = pick(of_turn(samples, turn), age, logits)
        written = jnp.where(alive, turn, turns)  # beyond the last: dropped
        put = _per_slot(lambda out, k, t, x: out.at[k, t].set(x, mode="drop"))
        state = {
            "time": time + 1,
            "turn": turn,
            "age": age + alive,
            "token": jnp.where(alive, token, state["token"]),
            "suffix": suffix,
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

    by_turn = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), samples)
    first, first_log_probs = jax.lax.map(
        lambda samples: pick(samples, rows(0, jnp.int32), first_logits), by_turn
    )
    first, first_log_probs = (jnp.moveaxis(x, 0, 2) for x in (first, first_log_probs))
    state = {
        "time": jnp.int32(0),
        "turn": rows(0, jnp.int32),
        "age": rows(1, jnp.int32),
        "token": first[..., 0],
        "suffix": suffix,
        "tokens": rows(0, jnp.int32, turns, length).at[..., 0].set(first),
        "log_probs": rows(0.0, jnp.float32, turns, length).at[..., 0].set(first_log_probs),
    }
    if length > 1:
        state = jax.lax.while_loop(lambda state: jnp.any(state["turn"] < sizes), advance, state)
    tokens = state["tokens"]
    ended_at = jnp.isin(tokens, ends)  # what follows the first is nothing, and is written as 0
    ended = jnp.any(ended_at, axis=-1)
    lengths = jnp.where(ended, jnp.argmax(ended_at, axis=-1) + 1, length)
    return tokens, state["log_probs"], lengths, ended


def _next_hidden(network, prefix, suffix, token, age, back):
    """Final hidden states [Q, N, D] of one more token per row, and its keys and values.

    A row sees as many places of the ring back as its response has tokens before this one, the
    latest of which stands right before it.
    """
    position = prefix.lengths[:, None] + age - 1
    hidden, kv = network.forward(
        token[..., None],
        position[..., None],
        response=jnp.ones((1, 1, 1), bool),
        prefix=prefix,
        suffix=Suffix(
            kv=suffix,
            mask=back < age[..., None] - 1,
            positions=position[..., None] - 1 - back,
        ),
    )
    return hidden[:, :, 0], kv


def _empty(network, queue, length):
    queries, slots, _ = queue.shape
    dtype = network.params["embedding"].dtype
    return empty_suffix(network.config, queries, slots, max(length - 1, 1), dtype)


def _per_slot(function):
    return jax.vmap(jax.vmap(function))


def _sample_keys(query_keys: Array, queue: Int[Array, "Q N R"]) -> Array:
    over_turns = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))
    return jax.vmap(over_turns)(query_keys, queue)


@_per_slot
def _uniforms(key, step):
    return jax.random.uniform(jax.random.fold_in(key, step), (2,))


@_per_slot
def _expert_uniforms(key, step):
    key = jax.random.fold_in(jax.random.fold_in(key, step), _EXPERT)
    return jax.random.uniform(key, (1,))
