"""Every construction passes one list of checks, on all responses of a 4-token, 3-step model.

The exact law of a construction comes from the logits of its experts on prompt and prefix as one
text, combined in float64 by its equation: no cache, no blocks, no lock-step, no scoring code.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tailrisk_jax.models.adapters import LowRank
from tailrisk_jax.policies import (
    Component,
    Mixture,
    Policy,
    TokenMixture,
    ablate,
    at_temperature,
    encode,
    in_context,
    in_int8,
    interpolate,
    logit_path,
    logits,
    mixture,
    steer,
    switch,
    token_mixture,
    window,
    with_adapter,
)
from tailrisk_jax.rollouts import Draws, draw, log_prob, weigh
from tests.oracles import (
    as_draws,
    as_rows,
    frequency_p_value,
    random_model,
    responses,
    tiny_config,
    unit_vector,
)

LENGTH, SAMPLES, ROWS_AT_ONCE, KEY = 3, 2048, 128, jax.random.key(0)
CONFIG = tiny_config(end_ids=(2, 0))
QUERIES = ["b c a", "d d"]
IDS = {"a": 0, "b": 1, "c": 2, "d": 3}


def four_words() -> PreTrainedTokenizerFast:
    """Tokens a to d; a chat is its messages' contents one after the other."""
    tokenizer = Tokenizer(WordLevel(IDS, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    out = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    out.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    return out


def random_adapter(rank: int, *names: str, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    sizes = {"query": (8, 12), "out": (12, 8)}
    kernels = {
        name: {
            "kernel": LowRank(
                *(jnp.asarray(rng.normal(size=shape) / 2, jnp.float32) for shape in shapes),
                scale=jnp.asarray([1.0, 0.5]),
            )
        }
        for name, shapes in (
            (name, ((2, rank, sizes[name][0]), (2, sizes[name][1], rank))) for name in names
        )
    }
    return {"layers": {"attention": kernels}}


MODEL = dataclasses.replace(random_model(CONFIG, seed=3), tokenizer=four_words())
OTHER = random_model(CONFIG, seed=4)
TARGET = Policy(MODEL)
D, V = unit_vector(CONFIG, 0), unit_vector(CONFIG, 1)
ADAPTER = random_adapter(2, "query", "out")
UNSAFE = ablate(with_adapter(TARGET, random_adapter(1, "query", seed=1), 3.0), D, 1.0)
SYSTEM = in_context(TARGET, system="d b")
INT8 = in_int8(TARGET)
FEW_SHOT = {
    "before": [{"role": "user", "content": "a d"}, {"role": "assistant", "content": "c"}],
    "prefix": "d ",
    "suffix": " d d",
}
# What each context makes of a query's tokens; written out by hand.
CONTEXTS: dict[Any, Callable[[list[int]], list[int]]] = {
    None: lambda query: query,
    SYSTEM.context: lambda query: [3, 1, *query],
    in_context(TARGET, **FEW_SHOT).context: lambda query: [0, 3, 2, 3, *query, 3, 3],
}
ROWS = [[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.0, 0.1, 0.9]]

# Each by its strength; strength 0 is the target.
SINGLE: dict[str, Callable[[float], Component]] = {
    "ablation": lambda s: ablate(TARGET, D, s),
    "addition": lambda s: steer(TARGET, V, 1, 2 * s, positions="response"),
    "both": lambda s: steer(ablate(TARGET, D, 0.5 * s), V, 0, s),
    "adapter": lambda s: with_adapter(TARGET, ADAPTER, s),
    "steered adapter": lambda s: steer(with_adapter(TARGET, ADAPTER, -s), V, 1, s),
    "system prompt": lambda s: in_context(TARGET, system="d b" if s else None),
    "few-shot": lambda s: in_context(TARGET, **(FEW_SHOT if s else {})),
    "interpolation": lambda s: interpolate(TARGET, OTHER, 0.6 * s),
    "int8": lambda s: ablate(with_adapter(INT8, ADAPTER), D, s) if s else TARGET,
    "temperature": lambda s: at_temperature(TARGET, 1 + s),
    "bias": lambda s: token_mixture([UNSAFE, TARGET], [0.7 * s, 1 - 0.7 * s]),
    "switch": lambda s: switch(UNSAFE, TARGET, 2, 0.7 * s),
    "early switch": lambda s: switch(UNSAFE, TARGET, int(s)),
    "window": lambda s: window(UNSAFE, TARGET, 1, 1 + int(s)),
    "token mixture": lambda s: token_mixture(
        [Policy(OTHER, None, 1.5), SYSTEM, TARGET], ROWS if s else [0.0, 0.0, 1.0]
    ),
    "logit path": lambda s: logit_path([UNSAFE, TARGET], [1.4 * s, 1 - 1.4 * s]),
    "path of others": lambda s: logit_path(
        [SYSTEM, at_temperature(TARGET, 1 + s)], [[-0.5 * s, 1 + 0.5 * s], [0.9 * s, 1 - 0.5 * s]]
    ),
}
MIXTURES: dict[str, Callable[[float], Mixture]] = {
    "sequence mixture": lambda s: mixture(
        [make(s) for make in SINGLE.values()], [1 / len(SINGLE)] * len(SINGLE)
    ),
    "defensive mixture": lambda s: mixture(
        [TARGET, *(window(UNSAFE, TARGET, i, i + int(s)) for i in range(3))], [0.1, 0.3, 0.2, 0.4]
    ),
    "mixture per query": lambda s: mixture(
        [TARGET, *(window(UNSAFE, TARGET, i, i + int(s)) for i in range(3))],
        [[0.1, 0.3, 0.2, 0.4], [0.3, 0.0, 0.7, 0.0]],
    ),
}
CONSTRUCTIONS: dict[str, Callable[[float], Any]] = SINGLE | MIXTURES


@functools.cache
def prefixes() -> list[tuple[int, ...]]:
    """All beginnings of responses."""
    unended = [t for t in range(4) if t not in CONFIG.end_ids]
    return [p for n in range(LENGTH) for p in itertools.product(unended, repeat=n)]


def next_log_probs(policy: Policy, query: list[int]) -> dict[tuple[int, ...], np.ndarray]:
    """log q(. | prefix) in float64 after each beginning of a response."""
    prompt = CONTEXTS[policy.context](query)
    tokens, mask = np.zeros((8, 16), np.int32), np.zeros((8, 16), bool)
    mask[:, 0] = True
    for row, prefix in enumerate(prefixes()):
        text = [*prompt, *prefix]
        tokens[row, : len(text)], mask[row, : len(text)] = text, True
    response = np.broadcast_to(np.arange(16) >= len(prompt), tokens.shape)
    scores = np.asarray(logits(policy, tokens, mask, response=response), np.float64)
    log_probs = scipy.special.log_softmax(scores / float(policy.temperature), axis=-1)
    return {
        prefix: log_probs[row, len(prompt) + len(prefix) - 1]
        for row, prefix in enumerate(prefixes())
    }


def exact_log_probs(component: Any, query: list[int], rows: Sequence[tuple]) -> np.ndarray:
    """log q(y) of each response in float64, by the component's equation."""
    if isinstance(component, Mixture):
        parts = [exact_log_probs(one, query, rows) for one in component.components]
        weights = np.asarray(component.weights, np.float64)[:, None]
        return scipy.special.logsumexp(parts, axis=0, b=weights)
    experts = [next_log_probs(expert, query) for expert in component.experts]
    following = {}
    for prefix in prefixes():
        parts = np.stack([expert[prefix] for expert in experts])
        if isinstance(component, Policy):
            following[prefix] = parts[0]
            continue
        mixes = isinstance(component, TokenMixture)
        values = component.weights if mixes else component.coefficients
        row = values[min(len(prefix), len(values) - 1)][:, None]
        following[prefix] = (
            scipy.special.logsumexp(parts, axis=0, b=row)
            if mixes
            else scipy.special.log_softmax((row * parts).sum(axis=0))
        )
    return np.array([sum(following[row[:t]][row[t]] for t in range(len(row))) for row in rows])


EVERY = responses(4, LENGTH, CONFIG.end_ids)
PROMPTS = encode(MODEL, QUERIES)
EVENT = np.array([float(row.count(1) == 1 or len(row) == 1) for row in EVERY])


@functools.cache
def scored(strength: float) -> dict[str, np.ndarray]:
    """log q(y) of all responses [Q, M], float32, under each construction and the target."""
    draws = as_draws(EVERY, PROMPTS, CONFIG, LENGTH)
    weighed = weigh(TARGET, MIXTURES["sequence mixture"](strength), draws)
    out = dict(zip(SINGLE, np.asarray(weighed.component_log_probs), strict=True))
    others = ("defensive mixture", "mixture per query")
    return out | {
        "target": np.asarray(weighed.log_p),
        "sequence mixture": np.asarray(weighed.log_q),
        **{name: np.asarray(log_prob(MIXTURES[name](strength), draws)) for name in others},
    }


@functools.cache
def exact(name: str) -> np.ndarray:
    """The same at strength 1 in float64, [Q, M]."""
    component = TARGET if name == "target" else CONSTRUCTIONS[name](1.0)
    own = [component.for_queries(q) if name in MIXTURES else component for q in range(len(QUERIES))]
    queries = [[IDS[word] for word in query.split()] for query in QUERIES]
    return np.stack([exact_log_probs(*pair, EVERY) for pair in zip(own, queries, strict=True)])


@functools.cache
def drawn(name: str, strength: float = 1.0) -> Draws:
    component = CONSTRUCTIONS[name](strength)
    return draw(KEY, component, PROMPTS, SAMPLES, LENGTH, batch_size=ROWS_AT_ONCE)


# Combinations of others, and other settings of them.
COMBINED = {"both", "steered adapter", "few-shot", "early switch", "bias", "path of others"}


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in COMBINED else name
        for name in CONSTRUCTIONS
    ]
)
def name(request):
    return request.param


def test_it_is_a_distribution_and_the_one_of_its_equation(name):
    ours, wanted = scored(1.0)[name].astype(np.float64), exact(name)
    np.testing.assert_allclose(np.exp(ours).sum(axis=-1), 1, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=3e-5)
    assert np.all(np.abs(wanted - exact("target")).max(axis=-1) > 0.1)


def test_weights_average_to_one_and_to_the_exact_probability(name):
    """E_q[w] and E_q[w h], over the exact law of q."""
    weights = np.exp(scored(1.0)["target"].astype(np.float64) - scored(1.0)[name])
    law, probability = np.exp(exact(name)), np.exp(exact("target")) @ EVENT
    assert np.all((probability > 0.02) & (probability < 0.98))
    np.testing.assert_allclose((law * weights).sum(axis=-1), 1, rtol=0, atol=2e-5)
    np.testing.assert_allclose((law * weights) @ EVENT, probability, rtol=0, atol=2e-5)


def test_it_draws_what_it_scores(name):
    """Recorded log-probs are the exact ones, and responses come up as often as these say."""
    draws, number = drawn(name), {row: m for m, row in enumerate(EVERY)}
    for query in range(len(QUERIES)):
        which = np.array([number[row] for row in as_rows(draws, query)])
        counts = np.bincount(which, minlength=len(EVERY))
        assert frequency_p_value(counts, np.exp(scored(1.0)[name][query])) > 1e-3
        if name in SINGLE:
            recorded = np.asarray(draws.drawn_log_probs)[query].sum(axis=-1)
            np.testing.assert_allclose(recorded, exact(name)[query][which], rtol=0, atol=1e-4)


def test_strength_zero_is_the_target(name):
    """Bit for bit in one pass over the parameters, token mixtures included.

    To rounding elsewhere: logit paths and other trees, if equal ones, run in a pass of their own,
    and a sequence mixture adds up K equal terms.
    """
    ours, wanted = scored(0.0)[name], scored(0.0)["target"]
    if name in ("interpolation", "logit path", "path of others", *MIXTURES):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-6)
    else:
        np.testing.assert_array_equal(ours, wanted)
    if name in SINGLE:
        plain = drawn("temperature", 0.0)
        np.testing.assert_array_equal(drawn(name, 0.0).tokens, plain.tokens)


def test_the_batch_changes_nothing(name):
    """Another order of the queries, and later samples alone: the same tokens for each query."""
    later, prompts, component = 700, encode(MODEL, QUERIES[::-1]), CONSTRUCTIONS[name](1.0)
    again = draw(
        KEY, component.for_queries([1, 0]) if name in MIXTURES else component, prompts,
        SAMPLES - later, LENGTH, first=later, batch_size=ROWS_AT_ONCE,
    )  # fmt: skip
    for field in ("tokens", "mask", "labels", "drawn_log_probs"):
        ours = np.asarray(getattr(again, field))[::-1]
        wanted = np.asarray(getattr(drawn(name), field))[:, later:]
        atol = 1e-4 if field == "drawn_log_probs" else 0
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=atol, err_msg=field)


def test_components_are_drawn_with_each_querys_own_weights():
    name = "mixture per query"
    weights, labels = np.asarray(MIXTURES[name](1.0).weights), np.asarray(drawn(name).labels)
    for row, own in zip(weights, labels, strict=True):
        assert frequency_p_value(np.bincount(own, minlength=len(row)), row) > 1e-3  # 0: none


def test_a_component_of_a_mixture_draws_and_scores_as_it_does_alone():
    whole, labels = drawn("sequence mixture"), np.asarray(drawn("sequence mixture").labels)
    assert set(labels.ravel()) == set(range(len(SINGLE)))
    for k, name in enumerate(SINGLE):
        own = labels == k
        np.testing.assert_array_equal(whole.tokens[own], drawn(name).tokens[own])
    draws = as_draws(EVERY, PROMPTS, CONFIG, LENGTH)
    for name in ("adapter", "path of others"):
        alone = log_prob(SINGLE[name](1.0), draws)
        np.testing.assert_allclose(alone, scored(1.0)[name], rtol=0, atol=1e-5)
