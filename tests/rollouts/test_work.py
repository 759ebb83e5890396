"""Shared work is done once: one compilation, one prefill, and never a [T, V] array."""

import contextlib
import functools
import itertools
from collections import Counter
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tailrisk_jax.models import no_steering, prefill
from tailrisk_jax.models.transformer import parameter_shapes
from tailrisk_jax.policies import (
    Policy,
    ablate,
    at_temperature,
    from_tokens,
    mixture,
    steer,
    window,
)
from tailrisk_jax.rollouts import draw, log_prob, sample, token_log_probs, weigh
from tailrisk_jax.rollouts.blocks import TURNS
from tailrisk_jax.rollouts.decode import decode
from tailrisk_jax.rollouts.network import Network, prefill_stacked
from tests.oracles import random_model, tiny_config, unit_vector

# Modules, where the package's index has functions of these names.
SAMPLE, SCORE, NETWORK = (
    import_module(f"tailrisk_jax.rollouts.{name}") for name in ("sample", "score", "network")
)

# The shapes of test_enumeration.py, which shares what is compiled.
CONFIG = tiny_config()
TARGET = Policy(random_model(CONFIG))
ROWS, LENGTH = 4096, 3
D = unit_vector(CONFIG)


@contextlib.contextmanager
def traces():
    """Counts what jax traces, by function name."""
    counts = Counter()

    def listen(event, duration, *, fun_name="", **_):
        if event == "/jax/core/compile/jaxpr_trace_duration":
            counts[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_second_call_of_the_same_shapes_traces_nothing():
    """Neither another key, nor other prompts, steering or temperature compile anything."""

    def call(seed, row, proposal):
        prompts = from_tokens([row])
        rollouts = sample(jax.random.key(seed), proposal, prompts, ROWS, LENGTH, batch_size=ROWS)
        return log_prob(proposal, rollouts, batch_size=ROWS)

    other = Policy(random_model(CONFIG, seed=1))
    with traces() as counts:
        jax.jit(lambda x: x + 1)(0)
        call(0, [1, 2, 0], at_temperature(steer(ablate(TARGET, D, 0.5), D, 1, 2.0), 1.5))
    assert counts
    with traces() as counts:
        call(1, [3, 3, 3], ablate(TARGET, -D, 1.0, positions="prompt"))
        call(2, [0, 0, 1], at_temperature(steer(TARGET, D, 0, 1.0, positions="response"), 0.5))
        call(3, [0, 1, 1], other)
    assert not counts


def count_calls(monkeypatch, module, name, counts, size=lambda args: 1):
    """Adds size(args) to counts[name] on every call of a module's function."""
    original = getattr(module, name)

    def counting(*args):
        counts[name] += size(args)
        return original(*args)

    monkeypatch.setattr(module, name, counting)


def test_defect_10_a_prompt_is_prefilled_once_per_policy_and_query(monkeypatch):
    """However many samples and blocks of them there are."""
    prefilled, blocks = Counter(), Counter()
    count = functools.partial(count_calls, monkeypatch)
    count(SAMPLE, "prefill_one", prefilled, lambda args: args[1].shape[0])
    count(SAMPLE, "decode", blocks)
    prompts, slots = from_tokens([[1, 2, 0]]), ROWS // 8 // TURNS
    rollouts = sample(jax.random.key(0), TARGET, prompts, 4 * ROWS, LENGTH, batch_size=slots)
    assert (prefilled["prefill_one"], blocks["decode"]) == (1, 4 * 8)

    prefilled.clear()
    policies = [TARGET, ablate(TARGET, D, 1.0)]
    count(NETWORK, "prefill_stacked", prefilled, lambda args: len(args[0].temperature))
    count(SCORE, "score_rows", blocks)
    token_log_probs(policies, rollouts, batch_size=ROWS)
    assert (prefilled["prefill_stacked"], blocks["score_rows"]) == (len(policies), 4)


def test_defect_10_the_prefix_has_no_samples_axis():
    config = tiny_config(num_layers=3, num_kv_heads=2)
    shape = jax.eval_shape(
        lambda model, prompts: prefill(
            config, model.params, no_steering(config), prompts.tokens, prompts.mask
        ),
        random_model(config),
        from_tokens([[1, 2, 3, 0, 1]] * 4),
    )
    layers, queries, samples, *rest = shape.kv.keys.shape
    assert (layers, queries, samples) == (3, 4, 1)
    assert sorted(rest) == sorted([2, 5, 6])


def test_a_dictionary_of_windows_costs_one_pass_over_its_experts(monkeypatch):
    """One loop for each set of experts draws, one pass scores; the rest is sums."""
    calls = Counter()
    unsafe = [ablate(TARGET, D, 0.5), steer(TARGET, D, 1, 3.0)]
    bounds = [(a, b) for a in range(LENGTH) for b in range(a + 1, LENGTH + 1)]
    windows = [window(one, TARGET, a, b) for one in unsafe for a, b in bounds]
    whole = mixture([TARGET, *windows], [1 / 13] * 13)
    for name in ("decode", "decode_experts"):
        count_calls(monkeypatch, SAMPLE, name, calls)
    draws = draw(jax.random.key(0), whole, from_tokens([[1, 2, 0]]), 100, LENGTH)
    assert calls == {"decode": 1, "decode_experts": 2}

    count_calls(monkeypatch, NETWORK, "prefill_stacked", calls)
    for name in ("score_rows", "_score_path"):
        count_calls(monkeypatch, SCORE, name, calls)
    calls.clear()
    weighed = weigh(TARGET, whole, draws, batch_size=128)
    assert calls == {"prefill_stacked": 1, "score_rows": 1}

    experts = token_log_probs([TARGET, *unsafe], draws, batch_size=128)
    steps = jnp.arange(LENGTH)
    for k, (u, (a, b)) in enumerate(itertools.product((1, 2), bounds), 1):
        wanted = jnp.where((a <= steps) & (steps < b), experts[u], experts[0]).sum(axis=-1)
        got = weighed.component_log_probs[k]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


# Shapes only: nothing of this is allocated or run.


def shapes(config, *, queries=1, samples, prompt, length, policies=None):
    """Arguments of `decode` (without `policies`) or of `score_rows` as shapes."""
    struct = jax.ShapeDtypeStruct
    params = nn.meta.unbox(parameter_shapes(config))
    steering = jax.eval_shape(lambda: no_steering(config))
    tokens, mask = struct((queries, prompt), jnp.int32), struct((queries, prompt), bool)
    if policies is None:
        prefix = jax.eval_shape(lambda *x: prefill(config, *x), params, steering, tokens, mask)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), queries))
        queue = struct((queries, samples, TURNS), jnp.int32)
        sizes, temperature = struct((queries, samples), jnp.int32), struct((), jnp.float32)
        network = Network(config, params, steering, None, temperature)
        return length, network, prefix, keys, queue, sizes
    steering = jax.tree.map(lambda x: struct((policies, *x.shape), x.dtype), steering)
    network = Network(config, params, steering, None, struct((policies,), jnp.float32))
    prefix = jax.eval_shape(prefill_stacked, network, tokens, mask)
    rows = (queries, samples, length)
    return network, prefix, struct(rows, jnp.int32), struct(rows, bool)


def temporary_bytes(function, arguments) -> int:
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_defect_10_decoding_memory_does_not_hold_the_prompt_per_sample():
    config = tiny_config(num_layers=4, num_kv_heads=2, head_dim=16)
    used = temporary_bytes(decode, shapes(config, samples=64, prompt=512, length=4))
    prompts = 64 * 4 * 2 * 4 * 512 * 2 * 16  # N x bytes x keys and values x L x P x H_kv x d
    assert used < prompts / 8


def test_scoring_memory_does_not_hold_length_times_vocabulary():
    config = tiny_config(vocab_size=4096)
    arguments = shapes(config, samples=4, prompt=8, length=256, policies=2)
    logits = 4 * 2 * 4 * 256 * 4096  # bytes x K x N x T x V
    assert temporary_bytes(SCORE.score_rows, arguments) < logits / 3
    network, prefix, *rows = arguments
    path = (network,), jax.ShapeDtypeStruct((3, 256, 2), jnp.float32), (prefix,), *rows
    assert temporary_bytes(SCORE._score_path, path) < logits / 2
