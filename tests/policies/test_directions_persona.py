"""Persona vectors: their averages against PyTorch, their rows against a model made by hand."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import Model, load_model
from tailrisk_jax.policies import (
    Answers,
    Policy,
    ablate,
    from_tokens,
    intensity_for,
    layer_of_row,
    logits,
    mean_activations,
    persona_vectors,
    steer,
    vector_of_layer,
)
from tests.models import torch_llama
from tests.oracles import random_model, tiny_config, unit_vector

PROMPTS = torch_llama.texts(20, 61, [4, 6, 3])
RESPONSES = torch_llama.texts(21, 61, [5, 1, 3])


def answers_of(prompts, responses) -> Answers:
    tokens, mask = torch_llama.padded(responses, "right", extra=6 - max(map(len, responses)))
    return Answers(from_tokens(prompts, multiple=8), tokens, mask)


@torch.no_grad()
def block_outputs(model, row) -> np.ndarray:
    """Embeddings and the output of every block, [L + 1, S, D]; none of it normed."""
    outputs = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out))
        for layer in model.model.layers
    ]
    model(torch.tensor([row]))
    for handle in handles:
        handle.remove()
    rows = [model.model.embed_tokens(torch.tensor([row])), *outputs]
    return np.stack([x[0].double().numpy() for x in rows])


def test_activations_are_averaged_where_they_should_be(tmp_path):
    theirs = torch_llama.llama(**torch_llama.CONFIGS["grouped"])
    theirs.save_pretrained(tmp_path)
    policy = Policy(load_model(tmp_path))
    wanted = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        rows = block_outputs(theirs, [*prompt, *response])
        of_prompt, of_response = np.split(rows, [len(prompt)], axis=1)
        wanted.append([of_prompt.mean(axis=1), of_prompt[:, -1], of_response.mean(axis=1)])
    wanted = np.asarray(wanted)
    answers, fewer = answers_of(PROMPTS, RESPONSES), answers_of(PROMPTS[:2], RESPONSES[:2])
    ours = mean_activations(policy, answers, batch_size=2)
    ours = np.stack([ours.prompt_avg, ours.prompt_last, ours.response_avg])
    np.testing.assert_allclose(ours, wanted.mean(axis=0), rtol=0, atol=2e-5)
    difference = persona_vectors(policy, answers, fewer, batch_size=2).response_avg
    wanted = wanted[:, 2].mean(axis=0) - wanted[:2, 2].mean(axis=0)
    np.testing.assert_allclose(difference, wanted, rtol=0, atol=4e-5)


def silent(model: Model) -> Model:
    """The model, but its layers write nothing to the residual stream."""

    def quiet(path, leaf):
        names = {key.key for key in path}
        return leaf * 0 if "layers" in names and names & {"out", "down"} else leaf

    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(quiet, model.params))


@pytest.mark.parametrize("block", [0, 1, 2])
def test_row_l_is_the_output_of_block_l_minus_1(block):
    """All embeddings are alike, so that one block's MLP writes one vector everywhere."""
    config = tiny_config(num_layers=3)
    loud = random_model(config)
    embedding = np.broadcast_to(np.asarray(loud.params["embedding"])[:1], (4, config.width))
    loud = dataclasses.replace(loud, params=dict(loud.params, embedding=embedding))
    plain = silent(loud)
    params = jax.tree.map(np.array, plain.params)
    down = params["layers"]["mlp"]["down"]["kernel"]
    down[block] = loud.params["layers"]["mlp"]["down"]["kernel"][block]
    writing = Policy(dataclasses.replace(plain, params=params))
    answers = answers_of([[1, 2], [3]], [[2], [1, 1]])
    means = [mean_activations(policy, answers) for policy in (writing, Policy(plain))]
    for kind in ("prompt_avg", "prompt_last", "response_avg"):
        vectors = getattr(means[0], kind) - getattr(means[1], kind)
        written = vectors[block + 1]
        assert np.linalg.norm(written) > 0.1
        np.testing.assert_allclose(vectors[: block + 1], 0, atol=1e-7)
        np.testing.assert_allclose(vectors[block + 1 :] - written, 0, atol=1e-6)
    layer = layer_of_row(block + 1, config.num_layers)
    assert layer == block
    np.testing.assert_array_equal(vector_of_layer(vectors, layer, config.num_layers), written)
    steered = steer(Policy(plain), written, layer, 1.0)
    tokens = np.array([[1, 2, 3]])
    ours, wanted = (logits(policy, tokens, tokens > 0) for policy in (steered, writing))
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda: layer_of_row(0, 3), "row 0 of a persona vector is no block's output"),
        (lambda: layer_of_row(4, 3), "row 4"),
        (lambda: vector_of_layer(np.ones((4, 8)), 3, 3), "layer=3 is out of range"),
        (lambda: vector_of_layer(np.ones((4, 8)), 1, 5), "have 4 rows"),
        (lambda: of_answers([[1]], [[]]), "no token to average"),
        (lambda: of_answers([[1]], [[1]], keep=0), "no answers"),
    ],
)
def test_what_has_no_row_is_refused(made, named):
    with pytest.raises(InputError, match=named):
        made()


def of_answers(prompts, responses, keep=1):
    answers = answers_of(prompts, responses)
    answers = Answers(answers.prompts[:keep], answers.tokens[:keep], answers.mask[:keep])
    return mean_activations(Policy(random_model(tiny_config())), answers)


@pytest.mark.parametrize("total", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("layers", [1, 4])
def test_the_intensity_for_a_total_leaves_the_rest_of_what_no_layer_writes(total, layers):
    """In a model whose layers write nothing, the embedding alone is cut, once a layer."""
    config = tiny_config(num_layers=layers)
    policy, direction = Policy(silent(random_model(config))), unit_vector(config)
    answers = answers_of([[1]], [[2]])
    ablated = ablate(policy, direction, intensity_for(total, layers))
    before, after = (
        mean_activations(one, answers).response_avg[-1] @ direction for one in (policy, ablated)
    )
    np.testing.assert_allclose(after, (1 - total) * before, atol=1e-6)


def test_a_total_that_is_no_share_is_refused():
    with pytest.raises(InputError, match=r"total=1\.2"):
        intensity_for(1.2, 4)
