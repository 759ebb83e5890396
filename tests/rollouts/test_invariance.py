"""What a draw may not depend on: its batch, its padding, the other queries of the call.

Tokens stay the same exactly, log-probabilities to float rounding. The number of devices is in
test_devices.py.
"""

import jax
import numpy as np
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import Policy, Prompts, ablate, from_tokens, mixture
from tailrisk_jax.rollouts import draw, log_prob, sample, token_log_probs, weigh
from tailrisk_jax.rollouts.blocks import blocks
from tests.oracles import random_model, tiny_config, unit_vector

CONFIG = tiny_config(vocab_size=18, num_heads=4, num_kv_heads=2, end_ids=(3, 4))
ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 1, 2]]
IDS = [11, 22, 33]
SAMPLES, LENGTH, KEY = 6, 6, jax.random.key(0)
TARGET = Policy(random_model(CONFIG))
PROPOSAL = ablate(TARGET, unit_vector(CONFIG), 1.0)
MIXTURE = mixture([TARGET, PROPOSAL], [0.3, 0.7])


def as_prompts(rows, ids, *, side="left", length=7) -> Prompts:
    """Padding with a token that means something, so that attending to it would show."""
    tokens, mask = np.full((len(rows), length), 9, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        tokens[i, where], mask[i, where] = row, True
    return Prompts(tokens, mask, np.array(ids, np.uint32))


@pytest.fixture(scope="module")
def base():
    """Rollouts and their log-probabilities under target and proposal, per query."""
    return drawn(PROPOSAL, as_prompts(ROWS, IDS))


@pytest.fixture(scope="module")
def mixed():
    return drawn(MIXTURE, as_prompts(ROWS, IDS))


def drawn(policy, prompts, **options):
    rollouts = sample(KEY, policy, prompts, SAMPLES, LENGTH, **options)
    return rollouts, token_log_probs([TARGET, PROPOSAL], rollouts, **options)


def assert_same(ours, wanted, numbers):
    """Query q of ours is query numbers[q] of wanted."""
    (rollouts, scored), (others, other_scores) = ours, wanted
    for q, number in enumerate(numbers):
        if number is None:
            continue
        for name in ("tokens", "mask", "ended", "labels"):
            one, other = getattr(rollouts, name)[q], getattr(others, name)[number]
            np.testing.assert_array_equal(one, other, err_msg=name)
        for name in ("drawn_log_probs", "token_log_probs"):
            one, other = getattr(rollouts, name)[q], getattr(others, name)[number]
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(scored[:, q], other_scores[:, number], rtol=0, atol=1e-4)


# How the call is changed: prompts, which of the base's queries they are, and options.
CALLS = {
    "one-row-at-a-time": (as_prompts(ROWS, IDS), [0, 1, 2], {"batch_size": 1}),
    "two-queries-at-a-time": (as_prompts(ROWS, IDS), [0, 1, 2], {"batch_size": 16}),
    "one-query-without-padding": (from_tokens(ROWS[1:2], ids=IDS[1:2]), [1], {}),
    "other-order": (as_prompts(ROWS[::-1], IDS[::-1]), [2, 1, 0], {}),
    "other-company": (as_prompts([ROWS[2], [1, 1], ROWS[0]], [33, 44, 11]), [2, None, 0], {}),
    "right-padding": (as_prompts(ROWS, IDS, side="right"), [0, 1, 2], {}),
    "more-padding": (as_prompts(ROWS, IDS, length=11), [0, 1, 2], {}),
}


QUICK = ("one-row-at-a-time", "other-order", "other-company", "right-padding", "more-padding")


@pytest.mark.parametrize(
    "call", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in CALLS]
)
def test_draws_and_log_probs_do_not_depend_on_the_call(base, call):
    prompts, numbers, options = CALLS[call]
    assert_same(drawn(PROPOSAL, prompts, **options), base, numbers)


@pytest.mark.parametrize("call", ["other-company", "right-padding"])
def test_nor_do_the_draws_of_a_mixture(mixed, call):
    prompts, numbers, options = CALLS[call]
    assert_same(drawn(MIXTURE, prompts, **options), mixed, numbers)
    assert len(np.unique(mixed[0].labels)) == 2


def test_more_samples_begin_with_the_same(base):
    more = sample(KEY, PROPOSAL, base[0].prompts, 8, LENGTH)
    np.testing.assert_array_equal(more.tokens[:, :SAMPLES], base[0].tokens)


@pytest.mark.parametrize("policy", [PROPOSAL, MIXTURE], ids=["policy", "mixture"])
def test_a_later_call_draws_the_samples_that_follow(policy):
    prompts = as_prompts(ROWS, IDS)
    whole = draw(KEY, policy, prompts, SAMPLES, LENGTH)
    rest = draw(KEY, policy, prompts, SAMPLES - 2, LENGTH, first=2)
    for name in ("tokens", "labels", "ended"):
        np.testing.assert_array_equal(getattr(rest, name), getattr(whole, name)[:, 2:])


@pytest.mark.parametrize("policy", [PROPOSAL, MIXTURE], ids=["policy", "mixture"])
def test_each_query_may_have_its_own_samples(policy):
    prompts = as_prompts(ROWS, IDS)
    first, counts = np.array([0, 3, 1]), np.array([2, 1, SAMPLES - 1])
    whole = draw(KEY, policy, prompts, SAMPLES, LENGTH)
    some = draw(KEY, policy, prompts, counts, LENGTH, first=first)
    for name in ("tokens", "labels", "ended", "mask"):
        for q in range(3):
            own = np.asarray(getattr(some, name))[q, : counts[q]]
            wanted = np.asarray(getattr(whole, name))[q, first[q] : first[q] + counts[q]]
            np.testing.assert_array_equal(own, wanted, err_msg=name)
            assert name == "labels" or not np.any(getattr(some, name)[q, counts[q] :])


def test_seeds_and_repetitions_of_a_query_draw_differently(base):
    other = sample(jax.random.key(1), PROPOSAL, base[0].prompts, SAMPLES, LENGTH)
    assert not np.array_equal(other.tokens, base[0].tokens)
    repeated = sample(KEY, PROPOSAL, from_tokens([ROWS[2]] * 3), SAMPLES, LENGTH)
    assert len({np.asarray(query).tobytes() for query in repeated.tokens}) == 3


def test_old_style_keys_draw_the_same(base):
    old = sample(jax.random.PRNGKey(0), PROPOSAL, base[0].prompts, SAMPLES, LENGTH)
    np.testing.assert_array_equal(old.tokens, base[0].tokens)


def test_decoded_log_probs_are_the_scored_ones(base, mixed):
    for (rollouts, scored), of in ((base, 1), (mixed, mixed[0].labels)):
        of = np.broadcast_to(np.asarray(of), (3, SAMPLES))[None, ..., None]
        own = np.take_along_axis(np.asarray(scored), of, 0)[0]
        np.testing.assert_allclose(rollouts.drawn_log_probs, own, rtol=0, atol=1e-4)
        assert np.abs(own).max() > 1


def test_neither_order_nor_what_stands_after_the_end_changes_a_score(base):
    rollouts, scored = base
    mask = np.asarray(rollouts.mask)
    assert not mask.all()
    order = np.argsort(mask.sum(-1), axis=1)[..., None]
    noise = np.where(mask, rollouts.tokens, 6)
    moved = rollouts.replace(
        tokens=np.take_along_axis(noise, order, 1), mask=np.take_along_axis(mask, order, 1)
    )
    wanted = np.take_along_axis(np.asarray(scored), order[None], 2)
    ours = token_log_probs([TARGET, PROPOSAL], moved)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


def test_slots_draw_one_sample_after_another():
    """Two slots, so that each draws many samples, through a ring that turns over."""
    prompts = as_prompts(ROWS[:1], IDS[:1])
    one_each = draw(KEY, PROPOSAL, prompts, 50, LENGTH, batch_size=64)
    in_turn = draw(KEY, PROPOSAL, prompts, 50, LENGTH, batch_size=2)
    np.testing.assert_array_equal(in_turn.tokens, one_each.tokens)
    np.testing.assert_array_equal(in_turn.mask, one_each.mask)
    np.testing.assert_allclose(in_turn.drawn_log_probs, one_each.drawn_log_probs, atol=1e-4)


@pytest.mark.parametrize("turns", [1, 8])
@pytest.mark.parametrize("queries", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 3, 8, 100])
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 1000])
def test_blocks_cover_everything_once_within_their_size(queries, samples, rows, turns):
    seen = np.zeros((queries, samples), int)
    shapes = set()
    for block in blocks(queries, samples, rows, turns=turns):
        q, n = block.kept
        seen[np.ix_(block.queries[:q], block.samples[:n])] += 1
        shapes.add((len(block.queries), len(block.samples), block.slots))
        assert n <= len(block.samples) <= block.slots * turns
    assert np.all(seen == 1)
    assert len(shapes) == 1
    ((per_query, _, slots),) = shapes
    assert per_query * slots <= rows


def test_each_query_is_drawn_and_scored_with_its_own_weights():
    """As it is by a mixture of its own, which leaves out what has no weight."""
    rows, prompts = [[0.3, 0.7], [1.0, 0.0], [0.6, 0.4]], as_prompts(ROWS, IDS)
    whole = mixture([TARGET, PROPOSAL], rows)
    together = sample(KEY, whole, prompts, SAMPLES, LENGTH)
    assert not np.any(np.asarray(together.labels)[1])
    for q, row in enumerate(rows):
        used = [k for k in range(2) if row[k] > 0]
        parts = [[TARGET, PROPOSAL][k] for k in used]
        alone = sample(KEY, mixture(parts, [row[k] for k in used]), prompts[[q]], SAMPLES, LENGTH)
        for name in ("tokens", "mask", "ended", "labels"):
            one, other = getattr(alone, name)[0], getattr(together, name)[q]
            np.testing.assert_array_equal(one, other, err_msg=name)
        np.testing.assert_allclose(
            alone.token_log_probs[0], together.token_log_probs[q], rtol=0, atol=1e-5
        )
    scored = np.asarray(log_prob(whole, together))
    np.testing.assert_allclose(together.log_prob, scored, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(weigh(TARGET, whole, together).log_q, scored)

    fewer = mixture([TARGET, PROPOSAL], rows[:2])
    for call in (
        lambda: draw(KEY, fewer, prompts, SAMPLES, LENGTH),
        lambda: sample(KEY, fewer, prompts, SAMPLES, LENGTH),
        lambda: log_prob(fewer, together),
        lambda: weigh(TARGET, fewer, together),
    ):
        with pytest.raises(InputError, match="weights for 2 queries and is used with 3"):
            call()
