"""Refusal directions against forward hooks on PyTorch; choices from scores made by hand."""

import dataclasses

import numpy as np
import pytest
import scipy.special
import torch

from tailrisk_jax import load_organism
from tailrisk_jax.errors import InputError
from tailrisk_jax.models import load_model
from tailrisk_jax.policies import (
    DirectionScores,
    Policy,
    ablate,
    choose_direction,
    from_tokens,
    mean_differences,
    post_instruction_tokens,
    refusal_log_odds,
    refusal_tokens,
    score_directions,
)
from tests.models import torch_llama
from tests.oracles import random_model, tiny_config, unit_vector
from tests.policies.word_tokenizer import WORDS, ids, word_tokenizer

HARMFUL = torch_llama.texts(10, 61, [5, 3, 7, 4])
HARMLESS = torch_llama.texts(11, 61, [4, 8, 3, 6])
PROMPTS = [from_tokens(rows, multiple=8) for rows in (HARMFUL, HARMLESS)]
REFUSALS = (3, 17, 40)
LAYERS = 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    settings = torch_llama.CONFIGS["grouped"] | {"num_hidden_layers": LAYERS}
    theirs = torch_llama.llama(**settings)
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, Policy(load_model(folder))


@torch.no_grad()
def hidden_states(model, row) -> np.ndarray:
    """The input of every layer at every token, [L, P, D]."""
    states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
    return np.stack([layer[0].double().numpy() for layer in states[:LAYERS]])


def test_mean_differences_are_of_what_pytorch_feeds_each_layer(pair):
    theirs, policy = pair
    means = [
        np.mean([hidden_states(theirs, row)[:, -3:] for row in rows], axis=0)
        for rows in (HARMFUL, HARMLESS)
    ]
    wanted = np.swapaxes(means[0] - means[1], 0, 1)
    ours = mean_differences(policy, *PROMPTS, positions=3, batch_size=3)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    with pytest.raises(InputError, match="positions=4 must lie between 1 and 3"):
        mean_differences(policy, *PROMPTS, positions=4)


def hooked(model, rows, **steering) -> np.ndarray:
    """First-token log-probabilities of each prompt by itself, [Q, V] float64."""
    last = [torch_llama.steered_logits(model, row, [], **steering)[-1] for row in rows]
    return scipy.special.log_softmax(np.asarray(last, np.float64), axis=-1)


def log_odds(log_probs) -> float:
    refusing = np.exp(log_probs)[:, list(REFUSALS)].sum(axis=-1)
    return np.mean(np.log(refusing / (1 - refusing)))


def test_scores_equal_those_of_hooks(pair):
    """In batches of 3 of 4 prompts, and of 2 candidates with all prompts each."""
    theirs, policy = pair
    directions = np.random.default_rng(0).normal(size=(2, LAYERS, 24)) * 2
    directions[1, 2] = 0.0  # a candidate without a direction
    plain = hooked(theirs, HARMLESS)
    wanted = np.full((3, 2, LAYERS), np.nan)
    for position, layer in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 3)]:
        vector = directions[position, layer].astype(np.float32)
        ablation, additions = (vector, 1.0, "all"), [(vector, layer - 1, 1.0, "all")]
        changed = hooked(theirs, HARMLESS, ablation=ablation)
        wanted[:, position, layer] = (
            log_odds(hooked(theirs, HARMFUL, ablation=ablation)),
            log_odds(hooked(theirs, HARMLESS, additions=additions)),
            np.mean(np.sum(np.exp(plain) * (plain - changed), axis=-1)),
        )
    assert np.nanmin(wanted[2]) > 0.01
    plain_odds = [log_odds(hooked(theirs, HARMFUL)), log_odds(plain)]
    for batch_size in (3, 8):
        told = []
        scores = score_directions(
            policy, directions, *PROMPTS, REFUSALS,
            batch_size=batch_size, on_progress=lambda *done, told=told: told.append(done),
        )  # fmt: skip
        ours = np.stack([scores.refusal, scores.induced, scores.kl])
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-4)
        np.testing.assert_allclose(
            [scores.plain_refusal, scores.plain_induced], plain_odds, atol=1e-4
        )
        assert told[-1] == (5 * 3 * 4, 5 * 3 * 4)


def scores_of(refusal, induced, kl) -> DirectionScores:
    return DirectionScores(*(np.asarray(x, float) for x in (refusal, induced, kl)), 5.0, -5.0)


nan = np.nan
SCORES = scores_of(
    [[nan, -3.0, -2.0, nan], [nan, -4.0, -9.0, nan]],
    [[nan, 1.0, 2.0, nan], [nan, 0.0, 3.0, nan]],
    [[nan, 0.01, 0.1, nan], [nan, 0.2, 0.4, nan]],
)


@pytest.mark.parametrize(
    ("thresholds", "chosen"),
    [
        ({}, (-2, 1)),
        ({"min_induced": 1.5}, (-2, 2)),
        ({"max_kl": 0.2}, (-1, 1)),
        ({"max_kl": np.inf}, (-1, 2)),
    ],
)
def test_the_lowest_refusal_within_the_thresholds_is_chosen(thresholds, chosen):
    assert choose_direction(SCORES, **thresholds) == chosen


def test_when_none_is_within_the_best_are_shown_with_what_they_fail():
    with pytest.raises(InputError) as refused:
        choose_direction(SCORES, max_kl=0.1, min_induced=2.5)
    said = str(refused.value)
    assert "position -1 layer 2: refusal -9.00, induced 3.00, KL 0.400 (too high); " in said
    assert "position -2 layer 1: refusal -3.00, induced 1.00 (too low), KL 0.010; " in said
    assert "layer 2: refusal -2.00" not in said
    nothing = scores_of([[nan]], [[nan]], [[nan]])
    with pytest.raises(InputError, match="none could be scored"):
        choose_direction(nothing)


def test_tokens_after_the_instruction_are_those_of_the_template():
    chat = dataclasses.replace(
        random_model(tiny_config(vocab_size=len(WORDS))), tokenizer=word_tokenizer()
    )
    base = dataclasses.replace(chat, tokenizer=word_tokenizer(chat=False))
    alike = ["bake a cake", "hello a cake", "cake"]
    system = [{"role": "system", "content": "be kind"}, {"role": "user", "content": " bake "}]
    assert post_instruction_tokens(chat, alike) == 2  # </s> <assistant>
    assert post_instruction_tokens(chat, [system]) == 2
    assert post_instruction_tokens(chat, ["</s>", "hello"]) == 2
    assert post_instruction_tokens(base, alike) == 1
    organism = load_organism()
    assert post_instruction_tokens(organism.target.model, organism.queries) == 2


def test_refusal_tokens_are_first_tokens_that_the_tokenizer_knows():
    tokenizer = word_tokenizer()
    assert refusal_tokens(tokenizer, ["hello a", "Sorry", "be", "hello"]) == tuple(ids("hello be"))
    with pytest.raises(InputError, match="'I', 'As', 'Sorry'"):
        refusal_tokens(tokenizer)
    with pytest.raises(InputError, match="'I'"):  # its tokenizer raises at unknown words
        refusal_tokens(load_organism().target.model.tokenizer)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(tokens=[]), "no refusal tokens"),
        (dict(tokens=[61]), "token 61 is not in the vocabulary of 61"),
        (dict(drop_last=1.0), "drop_last=1.0"),
        (dict(harmful=PROMPTS[0][:0]), "harmful set is empty"),
        (dict(directions=np.ones((1, LAYERS, 7))), r"\[7\]; this model needs \[24\]"),
        (dict(policy="ablated"), "already ablates"),
    ],
)
def test_what_cannot_be_scored_is_refused(pair, changes, named):
    policy = pair[1]
    if changes.get("policy") == "ablated":
        changes = {"policy": ablate(policy, unit_vector(policy.model.config), 1.0)}
    given = {
        "policy": policy, "directions": np.ones((1, LAYERS, 24)), "tokens": REFUSALS,
        "harmful": PROMPTS[0], "harmless": PROMPTS[1],
    }  # fmt: skip
    with pytest.raises(InputError, match=named):
        score_directions(**(given | changes))


def test_log_odds_do_not_saturate(pair):
    """Where 1 - P(refusal) is lost in float32, its logarithm isn't."""
    theirs, policy = pair
    model = policy.model
    params = dict(model.params, lm_head=model.params["lm_head"] * 80)
    sharp = Policy(dataclasses.replace(model, params=params))
    log_probs = [torch_llama.steered_logits(theirs, row, [])[-1] * 80.0 for row in HARMFUL]
    log_probs = scipy.special.log_softmax(np.asarray(log_probs, np.float64), axis=-1)
    token = int(np.argmax(log_probs.max(axis=0)))
    others = scipy.special.logsumexp(np.delete(log_probs, token, axis=1), axis=-1)
    odds = refusal_log_odds(sharp, PROMPTS[0], [token], batch_size=3)
    np.testing.assert_allclose(odds, log_probs[:, token] - others, rtol=1e-3)
    assert odds.max() > 17 and odds.min() < -17
