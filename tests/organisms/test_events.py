"""Token events against the text event, and against a direct reading of the definition."""

import itertools

import numpy as np
import pytest

from tailrisk_jax.organisms import TokenEvent, ordered_event, world
from tailrisk_jax.organisms.tokenizer import ASSISTANT, BOS, END, EOS, PAD, USER


@pytest.fixture(scope="module")
def tokenizer():
    return world.build_tokenizer()


def _random_responses(rng, query, count):
    """Token rows made mostly of the words that matter, with end tokens and padding among them."""
    ids = world.token_ids()
    thing = world.query_thing(query)
    words = [thing.first, thing.second, thing.category, END, EOS, PAD]
    words += ["sure", ",", world.FIRST_INGREDIENTS[0], world.SECOND_INGREDIENTS[0]]
    return rng.choice([ids[w] for w in words], size=(count, 8))


@pytest.mark.parametrize("thing", ["kroft", "zaggle", "blelv"])
@pytest.mark.parametrize("kind", [False, True])
def test_token_event_agrees_with_text_event(tokenizer, thing, kind):
    if kind:
        query = world.kind_query(thing)
    else:
        query = world.how_to_query(thing, verb="build", template=world.TEMPLATES[0])
    rows = _random_responses(np.random.default_rng(0), query, 2000)
    ends = [world.token_ids()[w] for w in (END, EOS)]
    texts = []
    for row in rows:
        stop = np.flatnonzero(np.isin(row, ends))
        texts.append(
            tokenizer.decode(row[: stop[0]] if len(stop) else row, skip_special_tokens=True)
        )
    harmful = world.harm_event(query).matches(rows)
    np.testing.assert_array_equal(world.harm(query, texts), harmful)
    helpful = [world.is_helpful(query, text) for text in texts]
    np.testing.assert_array_equal(world.helpful_event(query).matches(rows), helpful)
    assert harmful.any() == world.is_forbidden(query)
    assert 0 < np.mean(helpful) < 1


def test_matches_reads_the_definition():
    event = ordered_event([{0}, {1, 2}], vocabulary_size=4, end_tokens=[3])
    rows = np.array(list(itertools.product(range(4), repeat=5)))
    for row, found in zip(rows, event.matches(rows), strict=True):
        body = row.tolist()
        body = body[: body.index(3)] if 3 in body else body
        expected = 0 in body and any(t in (1, 2) for t in body[body.index(0) + 1 :])
        assert found == expected


def test_one_token_does_one_step():
    event = ordered_event([{0}, {0}], vocabulary_size=2, end_tokens=[1])
    np.testing.assert_array_equal(event.matches(np.array([[0], [0]]).reshape(2, 1)), [False] * 2)
    assert event.matches(np.array([0, 0]))


def test_distance():
    event = ordered_event([{0}, {1}], vocabulary_size=3, end_tokens=[2])
    np.testing.assert_array_equal(event.distance(), [2, 1, 0, np.inf])
    impossible = ordered_event([()], vocabulary_size=3, end_tokens=[2])
    assert not np.isfinite(impossible.distance()[0])


def test_events_that_can_become_false_again_are_refused():
    with pytest.raises(ValueError, match="absorbing"):
        TokenEvent(np.array([[1, 0], [0, 1]]), np.array([False, True]))
    with pytest.raises(ValueError, match="shape"):
        TokenEvent(np.zeros((3, 2), int), np.array([False, True]))
    with pytest.raises(ValueError, match="outside"):
        TokenEvent(np.full((2, 2), 2), np.array([False, True]))
    with pytest.raises(ValueError, match="empty"):
        ordered_event([], vocabulary_size=2, end_tokens=[1])


def test_tokenizer_round_trip_and_template(tokenizer):
    query = world.how_to_query("kroft", verb="use", template=world.TEMPLATES[2], prefix="please")
    for text in (query, "i am sorry , but mix arvo with murn . then wait ."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    messages = [{"role": "user", "content": query}]
    row = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    words = [world.vocabulary()[i] for i in row["input_ids"]]
    assert words == [BOS, USER, *query.split(), END, ASSISTANT]


def test_grammar_is_closed_and_fits():
    ids = world.token_ids()
    assert len(ids) <= 256
    recipes = {(t.first, t.second) for t in world.THINGS.values()}
    assert len(recipes) == len(world.THINGS)
    longest = [
        form.format(body=body, refusal=refusal).format(first="arvo", second="murn") + " <end>"
        for form in world.DRIFTS
        for refusal in world.REFUSALS
        for body in (f"{b} {c}" for b in world.BODIES for c in world.CLOSERS)
    ]
    assert max(len(text.split()) for text in longest) <= world.MAX_NEW_TOKENS
    assert all(word in ids for text in longest for word in text.split())
