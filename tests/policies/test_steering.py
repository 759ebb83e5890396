"""Steering against forward hooks on PyTorch, and against edited weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import load_model
from tailrisk_jax.policies import Policy, ablate, difference_in_means, from_tokens, logits, steer
from tailrisk_jax.policies.directions import residual_stream
from tests.models import torch_llama
from tests.oracles import random_model, tiny_config, unit_vector

PROMPT, RESPONSE = torch_llama.texts(0, 61, [6, 7])
RNG = np.random.default_rng(0)
DIRECTION = RNG.normal(size=24).astype(np.float32)  # not of unit length
DIRECTIONS = RNG.normal(size=(3, 24)).astype(np.float32)
VECTOR = RNG.normal(size=24).astype(np.float32)
WHERE = ("all", "prompt", "response")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    theirs = torch_llama.llama(**torch_llama.CONFIGS["grouped"])
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, Policy(load_model(folder))


def our_logits(policy) -> np.ndarray:
    """Logits of prompt and response as one left-padded row."""
    tokens, mask = torch_llama.padded([[*PROMPT, *RESPONSE]], "left", extra=2)
    response = np.arange(tokens.shape[1])[None] >= 2 + len(PROMPT)
    return np.asarray(logits(policy, tokens, mask, response=response))[0, 2:]


def assert_hooks_agree(pair, ours, **steering):
    theirs, _ = pair
    plain = torch_llama.steered_logits(theirs, PROMPT, RESPONSE)
    wanted = torch_llama.steered_logits(theirs, PROMPT, RESPONSE, **steering)
    scale = np.abs(wanted).max()
    assert np.abs(wanted - plain).max() > 0.02 * scale
    np.testing.assert_allclose(our_logits(ours), wanted, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("intensity", [0.1, 0.5, 1.0, 1.5, -0.5])
def test_ablation_equals_hooks(pair, intensity, where):
    ours = ablate(pair[1], DIRECTION, intensity, positions=where)
    assert_hooks_agree(pair, ours, ablation=(DIRECTION, intensity, where))


def test_ablation_of_one_direction_per_layer_equals_hooks(pair):
    intensities = np.float32([0.0, 0.7, 1.0])
    ours = ablate(pair[1], DIRECTIONS, intensities)
    assert_hooks_agree(pair, ours, ablation=(DIRECTIONS, intensities, "all"))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("coefficient", [0.5, -3.0])
def test_addition_equals_hooks(pair, coefficient, layer, where):
    ours = steer(pair[1], VECTOR, layer, coefficient, positions=where)
    assert_hooks_agree(pair, ours, additions=[(VECTOR, layer, coefficient, where)])


def test_ablation_and_several_additions_together_equal_hooks(pair):
    ours = steer(pair[1], VECTOR, 0, 2.0, positions="prompt")
    ours = ablate(ours, DIRECTION, 0.8, positions="response")
    ours = steer(ours, DIRECTION, 0, -1.0)
    ours = steer(ours, VECTOR, 2, 1.0, positions="response")
    additions = [
        (VECTOR, 0, 2.0, "prompt"), (DIRECTION, 0, -1.0, "all"), (VECTOR, 2, 1.0, "response")
    ]  # fmt: skip
    assert_hooks_agree(pair, ours, ablation=(DIRECTION, 0.8, "response"), additions=additions)


@pytest.mark.parametrize("name", ["grouped", "multi-query-tied"])
def test_full_ablation_equals_orthogonalised_weights(tmp_path, name):
    settings = torch_llama.CONFIGS[name]
    original = torch_llama.llama(**settings)
    original.save_pretrained(tmp_path / "original")
    unit = torch.tensor(DIRECTION) / np.linalg.norm(DIRECTION)
    # Untied, since the embedding is edited where it writes to the residual stream, not as a head.
    edited = torch_llama.llama(**settings | {"tie_word_embeddings": False})
    edited.load_state_dict(original.state_dict())
    with torch.no_grad():
        embedding = edited.model.embed_tokens.weight
        embedding -= torch.outer(embedding @ unit, unit)
        for layer in edited.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight -= torch.outer(unit, unit @ weight)
    edited.save_pretrained(tmp_path / "edited")

    ablated = our_logits(ablate(Policy(load_model(tmp_path / "original")), DIRECTION, 1.0))
    wanted = our_logits(Policy(load_model(tmp_path / "edited")))
    scale = np.abs(wanted).max()
    plain = our_logits(Policy(load_model(tmp_path / "original")))
    assert np.abs(plain - wanted).max() > 0.02 * scale
    np.testing.assert_allclose(ablated, wanted, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_coefficients_are_the_target_bit_for_bit(dtype, where):
    config = tiny_config(vocab_size=61, width=24)
    target = Policy(random_model(config, dtype=dtype))
    wanted = our_logits(target)
    for steered in (
        ablate(target, DIRECTION, 0.0, positions=where),
        steer(target, VECTOR, 1, 0.0, positions=where),
        ablate(steer(target, VECTOR, 0, 0.0), DIRECTION, 0.0, positions=where),
        steer(steer(target, VECTOR, 1, 1.5, positions=where), VECTOR, 1, -1.5, positions=where),
    ):
        np.testing.assert_array_equal(our_logits(steered), wanted)


def test_zero_ablation_leaves_room_for_another():
    target = Policy(random_model(tiny_config()))
    d, e = unit_vector(target.model.config, 0), unit_vector(target.model.config, 1)
    tokens = np.array([[1, 2, 3]])
    twice = ablate(ablate(target, d, 0.0), e, 1.0)
    wanted = logits(ablate(target, e, 1.0), tokens, tokens > 0)
    np.testing.assert_array_equal(logits(twice, tokens, tokens > 0), wanted)


def test_response_steering_leaves_the_prompt_alone(pair):
    changed = our_logits(ablate(pair[1], DIRECTION, 1.0, positions="response"))
    plain = our_logits(pair[1])
    np.testing.assert_array_equal(changed[: len(PROMPT)], plain[: len(PROMPT)])
    assert np.all(np.abs(changed - plain)[len(PROMPT) :].max(axis=1) > 1e-3)


POLICY = Policy(random_model(tiny_config()))
UNIT = unit_vector(POLICY.model.config)


@pytest.mark.parametrize(
    ("steered", "named"),
    [
        (lambda: ablate(POLICY, np.ones(7), 1.0), r"\[7\]"),
        (lambda: ablate(POLICY, np.ones((3, 8)), 1.0), r"\[3, 8\]"),
        (lambda: ablate(POLICY, np.zeros(8), 1.0), "zero or non-finite"),
        (lambda: ablate(POLICY, np.stack([UNIT, 0 * UNIT]), 1.0), "zero or non-finite"),
        (lambda: ablate(POLICY, np.full(8, np.nan), 1.0), "non-finite"),
        (lambda: ablate(POLICY, UNIT, 1.0, positions="prompts"), "'prompts'"),
        (lambda: ablate(ablate(POLICY, UNIT, 0.5), UNIT, 0.5), "already ablates"),
        (lambda: steer(POLICY, np.ones(9), 0, 1.0), r"\[9\]"),
        (lambda: steer(POLICY, np.full(8, np.inf), 0, 1.0), "non-finite"),
        (lambda: steer(POLICY, UNIT, 2, 1.0), "layer=2"),
        (lambda: steer(POLICY, UNIT, -1, 1.0), "layer=-1"),
        (lambda: steer(POLICY, UNIT, 0, 1.0, positions="end"), "'end'"),
    ],
)
def test_unusable_steering_is_refused_by_name(steered, named):
    with pytest.raises(InputError, match=named):
        steered()


def test_residual_stream_is_what_pytorch_feeds_each_layer(pair):
    theirs, policy = pair
    rows = torch_llama.texts(3, 61, [5, 2, 7])
    ours = np.asarray(residual_stream(policy, from_tokens(rows)))
    with torch.no_grad():
        states = [theirs(torch.tensor([r]), output_hidden_states=True).hidden_states for r in rows]
    wanted = np.stack([[layer[0, -1].numpy() for layer in row[:3]] for row in states], axis=1)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_difference_in_means(pair):
    _, policy = pair
    harmful, harmless = (from_tokens(torch_llama.texts(seed, 61, [4, 6, 3])) for seed in (4, 5))
    ours = np.asarray(difference_in_means(policy, harmful, harmless))
    streams = [np.asarray(residual_stream(policy, x), np.float64) for x in (harmful, harmless)]
    np.testing.assert_allclose(ours, streams[0].mean(1) - streams[1].mean(1), atol=1e-5)


def test_difference_in_means_of_nothing_is_refused(pair):
    some = from_tokens(torch_llama.texts(4, 61, [4, 6]))
    with pytest.raises(InputError, match="harmless"):
        difference_in_means(pair[1], some, some[:0])
