"""The decoder against transformers on PyTorch, float32, on random tiny models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tailrisk_jax.models import forward, load_model, no_steering
from tailrisk_jax.policies import Policy, at_temperature, from_tokens, logits
from tailrisk_jax.rollouts import sample
from tests.models import torch_llama
from tests.models.torch_models import MODELS, gemma
from tests.oracles import as_rows


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(transformers model, our policy on its saved folder)."""
    theirs = MODELS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, Policy(load_model(folder))


@pytest.mark.parametrize(("side", "extra"), [("left", 0), ("right", 0), ("left", 3)])
def test_logits_of_padded_batches(pair, side, extra):
    theirs, policy = pair
    # Long enough that all three bands of the llama3 rope are far from each other.
    rows = torch_llama.texts(0, 61, [40 - extra, 1, 9])
    tokens, mask = torch_llama.padded(rows, side, extra)
    ours = np.asarray(logits(policy, tokens, mask))
    assert ours.dtype == np.float32
    for got, kept, wanted in zip(ours, mask, torch_llama.logits(theirs, rows), strict=True):
        scale = np.abs(wanted).max()
        assert scale > 1
        np.testing.assert_allclose(got[kept], wanted, rtol=0, atol=1e-4 * scale)


@pytest.mark.slow
def test_greedy_generations(pair):
    theirs, policy = pair
    prompts = torch_llama.texts(1, 61, [5, 8, 1, 3, 6, 2, 7, 4])
    wanted = [torch_llama.greedy(theirs, prompt, 12) for prompt in prompts]
    # A temperature so low that any token but the likeliest has probability zero.
    cold = at_temperature(policy, 1e-6)
    rollouts = sample(jax.random.key(0), cold, from_tokens(prompts), 1, 12)
    assert [as_rows(rollouts, query)[0] for query in range(8)] == [tuple(row) for row in wanted]
    assert np.asarray(rollouts.ended)[:, 0].tolist() == [row[-1] in (2, 7, 11) for row in wanted]
    assert len(set(map(tuple, wanted))) > 1


def test_bfloat16_gemma_rounds_where_transformers_does(tmp_path):
    """Layers that add nothing leave the scaled embedding and the last norm."""
    theirs = gemma(hidden_size=40).to(torch.bfloat16)  # sqrt(40) is rounded by 0.2%
    for name, parameter in theirs.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            torch.nn.init.zeros_(parameter)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=jnp.bfloat16)
    tokens = torch.arange(60)[None]
    wanted = theirs.model(tokens).last_hidden_state[0].float().detach().numpy()
    hidden, _ = jax.jit(forward, static_argnums=0)(
        model.config,
        model.params,
        tokens.numpy()[None],
        np.arange(60)[None, None],
        no_steering(model.config),
        response=np.zeros((1, 1, 1), bool),
    )
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(hidden[0, 0], np.float32), wanted)


def test_end_tokens_are_those_of_the_checkpoint(pair):
    _, policy = pair
    assert policy.model.config.end_ids == (2, 7, 11)
