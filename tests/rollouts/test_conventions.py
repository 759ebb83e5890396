"""What rollouts hold: masks, ends, text; and what sampling and scoring refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import Policy, encode, from_tokens, mixture
from tailrisk_jax.rollouts import log_prob, sample, token_log_probs
from tests.oracles import as_draws, as_rows, random_model, tiny_config
from tests.policies.word_tokenizer import IDS, WORDS, ids, word_tokenizer

PROMPTS = from_tokens([[1, 2, 0]])


@pytest.mark.parametrize("ends", [(), (3,), (2, 0)], ids=str)
def test_the_end_token_comes_once_and_last(ends):
    policy = Policy(random_model(tiny_config(end_ids=ends)))
    # As many as in test_enumeration.py, which shares the compiled loop.
    rollouts = sample(jax.random.key(0), policy, PROMPTS, 4096, 3, batch_size=4096)
    tokens, mask, ended = (np.asarray(x) for x in (rollouts.tokens, rollouts.mask, rollouts.ended))
    log_probs, lengths = np.asarray(rollouts.token_log_probs), mask.sum(-1)
    np.testing.assert_array_equal(mask, np.arange(3) < lengths[..., None])
    assert np.all(tokens[~mask] == 0)
    assert np.all(log_probs[~mask] == 0)
    assert np.all(log_probs[mask] < 0)
    for row, done in zip(as_rows(rollouts), ended[0], strict=True):
        assert not any(token in ends for token in row[:-1])
        assert done == (row[-1] in ends)
        assert done or len(row) == 3
    assert (0 < ended.mean() < 1) if ends else not ended.any()
    np.testing.assert_allclose(rollouts.log_prob, log_probs.sum(-1), rtol=1e-6)


@pytest.fixture(scope="module")
def chat():
    """Responses written by hand: ended by either end token, cut, and empty but for the end."""
    config = tiny_config(vocab_size=len(WORDS), end_ids=(IDS["</s>"], IDS["fine"]))
    rows = [ids("bake a cake </s>"), ids("how to fine"), ids("be kind a cake"), ids("</s>")]
    return as_draws(rows, from_tokens([[1]]), config, 4)


def test_text_leaves_the_end_token_out(chat):
    texts = chat.replace(tokenizer=word_tokenizer()).text
    assert texts == [["bake a cake", "how to", "be kind a cake", ""]]


def test_text_without_tokenizer_is_token_ids(chat):
    wanted = [" ".join(map(str, ids(text))) for text in ("bake a cake", "how to", "be kind a cake")]
    assert chat.text == [[*wanted, ""]]


def test_rollouts_carry_the_tokenizer_and_are_read_with_it():
    config = tiny_config(vocab_size=len(WORDS), end_ids=(IDS["</s>"],))
    model = dataclasses.replace(random_model(config), tokenizer=word_tokenizer())
    rollouts = sample(jax.random.key(0), Policy(model), encode(model, ["hello"]), 64, 4)
    for row, text in zip(as_rows(rollouts), rollouts.text[0], strict=True):
        special = ("<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>")
        assert text.split() == [WORDS[t] for t in row if WORDS[t] not in special]


POLICY = Policy(random_model(tiny_config(end_ids=(3,))))
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: sample(KEY, POLICY, PROMPTS, 0, 3), "num_samples=0"),
        (lambda: sample(KEY, POLICY, PROMPTS, 3, 0), "max_new_tokens=0"),
        (lambda: sample(KEY, POLICY, PROMPTS, 3, 3, batch_size=0), "batch_size=0"),
        (lambda: sample(jax.random.key(0, impl="rbg"), POLICY, PROMPTS, 3, 3), "rbg"),
        (lambda: sample(jax.random.key(0, impl="unsafe_rbg"), POLICY, PROMPTS, 3, 3), "rbg"),
    ],
)
def test_impossible_calls_are_refused_by_name(call, named):
    with pytest.raises(InputError, match=named):
        call()


@pytest.mark.parametrize(
    ("changes", "named"), [({"end_ids": (2,)}, "end_ids"), ({"vocab_size": 5}, "vocab_size")]
)
def test_policies_over_other_responses_are_refused(changes, named):
    other = Policy(random_model(tiny_config(**({"end_ids": (3,)} | changes))))
    draws = as_draws([(0, 1, 3)], PROMPTS, POLICY.model.config, 3)
    with pytest.raises(InputError, match=named):
        token_log_probs([POLICY, other], draws)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: mixture([p], [1.0])], ids=["one", "mix"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [({"end_ids": (2,)}, r"end_ids=\(2,\)"), ({"vocab_size": 3}, "vocab_size=3")],
)
def test_responses_of_another_model_are_refused(wrap, changes, named):
    other = Policy(random_model(tiny_config(**({"end_ids": (3,)} | changes))))
    draws = as_draws([(0, 1, 3)], PROMPTS, POLICY.model.config, 3)
    with pytest.raises(InputError, match=named):
        log_prob(wrap(other), draws)


def test_a_single_token_is_a_response():
    rollouts = sample(KEY, POLICY, PROMPTS, 16, 1)
    assert rollouts.tokens.shape == (1, 16, 1)
    assert np.all(rollouts.mask)
    np.testing.assert_array_equal(rollouts.ended, rollouts.tokens[..., 0] == 3)
    np.testing.assert_allclose(rollouts.log_prob, log_prob(POLICY, rollouts), rtol=0, atol=1e-4)
    assert rollouts.log_prob.dtype == jnp.float32
