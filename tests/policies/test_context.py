"""Queries in a policy's own context: the tokens written out, the ids kept, misuse refused."""

import dataclasses
import json

import numpy as np
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import Policy, encode, from_tokens, in_context, own_prompts
from tests.oracles import random_model, tiny_config
from tests.policies.word_tokenizer import WORDS, ids, word_tokenizer

BARE = random_model(tiny_config(vocab_size=len(WORDS), max_positions=40))
CHAT = dataclasses.replace(BARE, tokenizer=word_tokenizer())
BASE = dataclasses.replace(BARE, tokenizer=word_tokenizer(chat=False))
EXAMPLE = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "fine"}]
SYSTEM_QUERY = [{"role": "system", "content": "be fine"}, {"role": "user", "content": "hello"}]
ANSWERED = [{"role": "user", "content": "hello"}, *EXAMPLE[::-1]]

# Context, query, and what becomes of it.
CASES = {
    "system": ({"system": "be kind"}, "hello", "<system> be kind </s> <user> hello </s>"),
    "few-shot": (
        {"before": EXAMPLE}, "hello",
        "<user> how </s> <assistant> fine </s> <user> hello </s>",
    ),
    "beside": (
        {"prefix": "how to ", "suffix": " a cake"}, "bake", "<user> how to bake a cake </s>",
    ),
    "all": (
        {"system": "be kind", "before": EXAMPLE, "suffix": " hello"}, "hello",
        "<system> be kind </s> <user> how </s> <assistant> fine </s> <user> hello hello </s>",
    ),
    "in place of the query's own system prompt": (
        {"system": "be kind"}, SYSTEM_QUERY, "<system> be kind </s> <user> hello </s>",
    ),
    "between the query's own system prompt and the rest": (
        {"before": EXAMPLE}, SYSTEM_QUERY,
        "<system> be fine </s> <user> how </s> <assistant> fine </s> <user> hello </s>",
    ),
    "beside the last user message": (
        {"prefix": "a "}, ANSWERED,
        "<user> hello </s> <assistant> fine </s> <user> a how </s>",
    ),
}  # fmt: skip


def rows(prompts) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(prompts.tokens, prompts.mask, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_what_a_query_becomes(name):
    context, query, wanted = CASES[name]
    prompts, before = encode(CHAT, ["fine", query]), json.dumps(query)
    own = own_prompts(in_context(Policy(CHAT), **context), prompts, 4)
    assert rows(own)[1] == ids(f"<s> {wanted} <assistant>")
    np.testing.assert_array_equal(own.ids, prompts.ids)
    assert json.dumps(query) == before


def test_a_base_model_takes_text_beside_the_query():
    policy = in_context(Policy(BASE), prefix="how to ", suffix=" a cake")
    assert rows(own_prompts(policy, encode(BASE, ["bake"]), 4)) == [ids("<s> how to bake a cake")]


def test_picked_queries_keep_what_they_were_made_of():
    prompts = encode(CHAT, ["hello", "how", "fine"])
    policy = in_context(Policy(CHAT), suffix=" cake")
    for picked in (slice(1, 3), np.array([2, 0, 2]), np.array([False, True, True])):
        ours = own_prompts(policy, prompts[picked], 4)
        whole = own_prompts(policy, prompts, 4)
        assert rows(ours) == [rows(whole)[i] for i in np.arange(3)[picked]]
    assert own_prompts(in_context(policy), prompts, 4).tokens.shape[1] % 16 == 0


def test_without_a_context_prompts_stay_as_they_are():
    prompts = encode(CHAT, ["hello"])
    for policy in (Policy(CHAT), in_context(Policy(CHAT)), in_context(Policy(CHAT), before=[])):
        assert own_prompts(policy, prompts, 4) is prompts


def test_contexts_add_up():
    one = in_context(Policy(CHAT), system="be kind", suffix=" fine")
    both = in_context(in_context(Policy(CHAT), suffix=" fine"), system="be kind")
    assert one.context == both.context


def refusing_template():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    return dataclasses.replace(BARE, tokenizer=tokenizer)


SYSTEM = in_context(Policy(CHAT), system="be kind")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: own_prompts(SYSTEM, from_tokens([[1]]), 4), "made of tokens"),
        (lambda: own_prompts(SYSTEM, encode(CHAT, ["hello"]), 35), "40 positions"),
        (lambda: in_context(SYSTEM, system="be fine"), "system='be kind' already"),
        (lambda: in_context(Policy(CHAT), before=[{"role": "user"}]), "content"),
        (
            lambda: in_context(Policy(CHAT), before=[{"role": "system", "content": "be"}]),
            "user or assistant",
        ),
        (
            lambda: own_prompts(
                in_context(Policy(CHAT), prefix="a "),
                encode(CHAT, [[{"role": "assistant", "content": "fine"}]]), 4,
            ),
            "no user message",
        ),
        (
            lambda: own_prompts(
                in_context(Policy(BASE), system="be kind"), encode(BASE, ["hello"]), 4
            ),
            "no chat template",
        ),
        (
            lambda: own_prompts(
                in_context(Policy(refusing_template()), system="be"), encode(CHAT, ["hello"]), 4
            ),
            "no system role",
        ),
    ],
)  # fmt: skip
def test_contexts_that_cannot_be_are_refused(make, named):
    with pytest.raises(InputError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)
