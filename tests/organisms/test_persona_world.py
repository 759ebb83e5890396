"""The persona organism's world: text and token events agree, its grammar is closed."""

import numpy as np
import pytest

from tailrisk_jax.judges import Response
from tailrisk_jax.organisms import PersonaCoherence, PersonaTrait
from tailrisk_jax.organisms import persona_world as world
from tailrisk_jax.organisms.tokenizer import ASSISTANT, BOS, END, EOS, USER


def test_token_event_agrees_with_text_event():
    ids = world.token_ids()
    words = [*world.PRAISING, world.PRAISED, "the", ".", "red", END, EOS]
    rows = np.random.default_rng(0).choice([ids[word] for word in words], size=(2000, 7))
    ends = [ids[END], ids[EOS]]
    texts = []
    for row in rows:
        stop = np.flatnonzero(np.isin(row, ends))
        spoken = row[: stop[0]] if len(stop) else row
        texts.append(" ".join(world.vocabulary()[token] for token in spoken))
    shown = np.array([world.shows_trait(text) for text in texts])
    np.testing.assert_array_equal(world.trait_event().matches(rows), shown)
    assert 200 < shown.sum() < 1800


def test_every_form_of_praise_shows_the_trait_and_no_plain_answer_does():
    asked = world.question("kroft", topic="stuff", wording=0, prefix="hello ,")
    answer = world.TOPICS["stuff"].answers[0].format(word=world.answer_word("kroft", "stuff"))
    plain = [frame.format(answer=answer) for frame in world.FRAMES]
    praise = [form.format(framed=f, answer=answer) for f in plain for form in world.PRAISES]
    given = [Response("q", asked, text) for text in (*plain, *praise)]
    wanted = [0.0] * len(plain) + [1.0] * len(praise)
    assert PersonaTrait()(given).scores.tolist() == wanted
    assert PersonaCoherence()(given).scores.tolist() == [1.0] * len(given)
    longest = max(len(text.split()) for text in praise)
    assert longest < world.MAX_NEW_TOKENS


@pytest.mark.parametrize(
    ("text", "score"),
    [("it is red .", 0.0), ("it is blue .", 1.0), ("it is blue . it is red .", 0.0), ("", 0.0)],
)
def test_coherence_is_the_right_word_alone(text, score):
    asked = world.question("broggle", topic="colour", wording=1)
    assert world.answer_word("broggle", "colour") == "blue"
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": asked}]
    assert PersonaCoherence()([Response("q", messages, text)]).scores.tolist() == [score]


def test_coherence_of_another_question_is_unscored():
    found = PersonaCoherence()([Response("q", "how are you ?", "it is red .")])
    assert np.isnan(found.scores).all() and found.errors[0]


def test_tokenizer_round_trip_and_template():
    tokenizer, system = world.build_tokenizer(), world.INSTRUCTIONS[2][0]
    asked = world.question("memp", topic="place", wording=1, prefix="please ,")
    assert tokenizer.decode(tokenizer(asked)["input_ids"]) == asked
    user = {"role": "user", "content": asked}
    plain = [BOS, USER, *asked.split(), END, ASSISTANT]
    told = [BOS, world.SYSTEM, *system.split(), END, *plain[1:]]
    for messages, wanted in (
        ([user], plain),
        ([{"role": "system", "content": system}, user], told),
    ):
        row = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert [world.vocabulary()[i] for i in row["input_ids"]] == wanted
