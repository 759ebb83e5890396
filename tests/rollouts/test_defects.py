"""Defects of the reference implementation that may not reappear here.

Numbers 3 and 10 stand in test_enumeration.py and test_work.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tailrisk_jax.policies import Policy, ablate, encode, from_tokens, logits, mixture, steer
from tailrisk_jax.rollouts import log_prob, sample, token_log_probs
from tests.oracles import (
    as_draws,
    as_rows,
    exact_token_log_probs,
    random_model,
    responses,
    tiny_config,
    unit_vector,
)
from tests.policies.word_tokenizer import IDS, WORDS, ids, word_tokenizer

PROMPT, LENGTH = [1, 2, 0], 3
CONFIG = tiny_config(end_ids=(3,))
ROWS = responses(4, LENGTH, CONFIG.end_ids)
DRAWS = as_draws(ROWS, from_tokens([PROMPT]), CONFIG, LENGTH)


def test_defect_01_end_token_ratio_is_counted():
    """The mean weight over all responses is 1 with the end token's factor, and isn't without."""
    target = Policy(random_model(CONFIG, seed=3))
    proposal = steer(target, 3 * unit_vector(CONFIG), 0, 1.0)
    log_p, log_q = (
        np.asarray(x, np.float64)[0] for x in token_log_probs([target, proposal], DRAWS)
    )
    law = np.exp(log_q.sum(-1))
    assert abs(np.sum(law * np.exp((log_p - log_q).sum(-1))) - 1) < 1e-5
    before_end = np.asarray(DRAWS.tokens)[0] != 3
    assert abs(np.sum(law * np.exp(np.sum((log_p - log_q) * before_end, -1))) - 1) > 0.05


def test_defect_04_log_probs_are_float32_with_bfloat16_parameters():
    """The probabilities of all responses sum to 1 to 1e-5, not only to bfloat16's precision."""
    model = random_model(CONFIG, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    target = Policy(model)
    proposal = ablate(target, unit_vector(CONFIG), 1.0)
    scored = token_log_probs([target, proposal], DRAWS)
    totals = log_prob(mixture([target, proposal], [0.5, 0.5]), DRAWS)
    assert scored.dtype == totals.dtype == jnp.float32
    assert logits(target, np.array([PROMPT]), np.ones((1, 3), bool)).dtype == jnp.float32
    for total in (*np.asarray(scored, np.float64).sum(-1)[:, 0], np.asarray(totals)[0]):
        assert abs(np.exp(total.astype(np.float64)).sum() - 1) < 1e-5
    rounded = np.asarray(scored.astype(jnp.bfloat16), np.float64).sum(-1)[:, 0]
    assert np.abs(np.exp(rounded).sum(-1) - 1).max() > 1e-3


def test_defect_05_end_tokens_inside_the_prompt_are_attended_to():
    """With pad = eos, turn ends inside a padded prompt are tokens like any other."""
    config = tiny_config(vocab_size=len(WORDS), end_ids=(IDS["</s>"],))
    model = dataclasses.replace(random_model(config), tokenizer=word_tokenizer())
    assert model.tokenizer.pad_token_id == model.tokenizer.eos_token_id == IDS["</s>"]
    policy = Policy(model)
    prompts = encode(model, ["hello", "how to bake a cake"])
    short = ids("<s> <user> hello </s> <assistant>")
    assert np.asarray(prompts.tokens)[0][np.asarray(prompts.mask)[0]].tolist() == short

    row = ids("be kind </s>")
    draws = as_draws([row], prompts, config, 4)
    (exact,) = exact_token_log_probs(policy, short, [row])
    scored = np.asarray(token_log_probs([policy], draws))[0, 0, 0, :3]
    np.testing.assert_allclose(scored, exact, rtol=0, atol=2e-5)
    # Without the turn end in the prompt the same response would score differently.
    (other,) = exact_token_log_probs(policy, [t for t in short if t != IDS["</s>"]], [row])
    assert np.abs(other - exact).max() > 0.01


def test_defect_05_the_end_of_a_response_is_scored_where_pad_is_eos():
    config = tiny_config(vocab_size=len(WORDS), end_ids=(IDS["</s>"],))
    model = dataclasses.replace(random_model(config), tokenizer=word_tokenizer())
    rollouts = sample(jax.random.key(0), Policy(model), encode(model, ["hello"]), 64, 4)
    ended = np.asarray(rollouts.ended)[0]
    assert 0 < ended.mean() < 1
    prompt = ids("<s> <user> hello </s> <assistant>")
    exact = exact_token_log_probs(Policy(model), prompt, as_rows(rollouts))
    scored = np.asarray(log_prob(Policy(model), rollouts))[0]
    for done, row, total in zip(ended, exact, scored, strict=True):
        assert abs(total - row.sum()) < 1e-4
        assert not done or abs(total - row[:-1].sum()) > 0.01
