"""Queries to tokens: one tokeniser step, one beginning of sequence, an id for every draw."""

import dataclasses

import numpy as np
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import load_model, save_model
from tailrisk_jax.policies import encode, from_tokens
from tests.oracles import random_model, tiny_config
from tests.policies.word_tokenizer import WORDS, ids, word_tokenizer

BARE = random_model(tiny_config(vocab_size=len(WORDS)))
CHAT = dataclasses.replace(BARE, tokenizer=word_tokenizer())
BASE = dataclasses.replace(BARE, tokenizer=word_tokenizer(chat=False))


def rows(prompts) -> list[list[int]]:
    tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


def test_a_string_is_one_user_message():
    encoded = encode(CHAT, ["hello", "how to bake a cake"])
    assert rows(encoded) == [
        ids("<s> <user> hello </s> <assistant>"),
        ids("<s> <user> how to bake a cake </s> <assistant>"),
    ]
    assert np.asarray(encoded.mask).tolist() == [[False] * 4 + [True] * 5, [True] * 9]


def test_messages_are_taken_as_they_are():
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "how"},
    ]
    wanted = "<s> <system> be kind </s> <user> hello </s> <assistant> fine </s> <user> how </s>"
    assert rows(encode(CHAT, [messages])) == [ids(wanted + " <assistant>")]


def test_message_and_string_mean_the_same():
    one, other = encode(CHAT, ["hello"]), encode(CHAT, [[{"role": "user", "content": "hello"}]])
    assert rows(one) == rows(other)


def test_a_base_model_gets_plain_text_and_one_beginning():
    assert rows(encode(BASE, ["how to bake"])) == [ids("<s> how to bake")]


@pytest.mark.parametrize("model", [CHAT, BASE], ids=["chat", "base"])
def test_beginning_of_sequence_comes_once(model):
    (row,) = rows(encode(model, ["hello hello"]))
    assert row.count(WORDS.index("<s>")) == 1
    assert row[0] == WORDS.index("<s>")


def test_doubled_beginning_of_sequence_is_refused():
    with pytest.raises(InputError, match="<s>"):
        encode(BASE, ["<s> hello"])
    doubling = word_tokenizer()
    doubling.chat_template = "<s>" + doubling.chat_template
    with pytest.raises(InputError, match="<s>"):
        encode(dataclasses.replace(CHAT, tokenizer=doubling), ["hello"])


def test_ids_tell_queries_and_repetitions_apart():
    queries = ["hello", "how", "hello", [{"role": "user", "content": "hello"}], "hello"]
    encoded = np.asarray(encode(CHAT, queries).ids)
    assert len(set(encoded.tolist())) == len(queries)
    # A query's id depends on the query and on how often it came before, not on its place.
    moved = np.asarray(encode(CHAT, ["how", "fine", "hello", "hello"]).ids)
    assert moved[[0, 2, 3]].tolist() == encoded[[1, 0, 2]].tolist()


def test_token_prompts_are_padded_left_and_have_ids():
    prompts = from_tokens([[1, 2], [3], [1, 2]])
    assert np.asarray(prompts.tokens).tolist() == [[1, 2], [0, 3], [1, 2]]
    assert np.asarray(prompts.mask).tolist() == [[True, True], [False, True], [True, True]]
    assert len(set(np.asarray(prompts.ids).tolist())) == 3
    assert np.asarray(from_tokens([[1], [2]], ids=[7, 2**32 - 1]).ids).tolist() == [7, 2**32 - 1]


def test_a_saved_tokenizer_encodes_the_same(tmp_path):
    save_model(CHAT, tmp_path)
    loaded = load_model(tmp_path)
    assert rows(encode(loaded, ["bake a cake"])) == rows(encode(CHAT, ["bake a cake"]))


@pytest.mark.parametrize(
    ("encoded", "named"),
    [
        (lambda: encode(BARE, ["hello"]), "no tokenizer"),
        (lambda: encode(CHAT, []), "no queries"),
        (lambda: encode(CHAT, "hello"), "'hello'"),
        (lambda: encode(BASE, [[{"role": "user", "content": "hello"}]]), "no chat template"),
        (lambda: from_tokens([[1], []]), "prompt 1 is empty"),
        (lambda: from_tokens([]), "at least one"),
    ],
)
def test_unusable_queries_are_refused_by_name(encoded, named):
    with pytest.raises(InputError, match=named):
        encoded()


def test_a_tokenizer_of_another_model_is_refused():
    small = dataclasses.replace(CHAT, config=tiny_config(vocab_size=7))
    with pytest.raises(InputError, match="vocabulary of 7"):
        encode(small, ["bake"])


def test_an_empty_plain_prompt_is_refused():
    tokenizer = word_tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(InputError, match="empty prompt"):
        encode(dataclasses.replace(BARE, tokenizer=tokenizer), [""])
