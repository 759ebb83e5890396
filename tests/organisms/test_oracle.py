"""The oracle against full enumeration of a tiny random model."""

import itertools
import math

import numpy as np
import pytest

from tailrisk_jax.organisms import (
    TokenEvent,
    complete_leaves,
    enumerate_event,
    ordered_event,
    second_moment,
)

VOCABULARY, LENGTH, END = 5, 4, 4
EVENT = ordered_event([{0}, {1}], vocabulary_size=VOCABULARY, end_tokens=[END])


class TableModel:
    """Random next-token distributions, one per prefix; prefix padding must not matter."""

    def __init__(self, seed, vocabulary=VOCABULARY, sharpness=3.0):
        self.seed, self.vocabulary, self.sharpness = seed, vocabulary, sharpness
        self.calls = 0

    def row(self, prefix):
        rng = np.random.default_rng([self.seed, len(prefix), *prefix])
        logits = self.sharpness * rng.normal(size=self.vocabulary)
        return logits - np.log(np.exp(logits).sum())

    def __call__(self, prefixes, lengths):
        self.calls += len(lengths)
        return np.stack([self.row(p[:n].tolist()) for p, n in zip(prefixes, lengths, strict=True)])

    def log_prob(self, tokens):
        return sum(self.row(list(tokens[:t]))[tokens[t]] for t in range(len(tokens)))


def all_responses():
    """Every complete response: ended by END or cut at LENGTH."""
    for length in range(1, LENGTH + 1):
        for body in itertools.product(range(VOCABULARY - 1), repeat=length - 1):
            yield (*body, END)
    yield from itertools.product(range(VOCABULARY - 1), repeat=LENGTH)


def brute_force(model):
    harmful = {r: model.log_prob(r) for r in all_responses() if EVENT.matches(np.array(r, int))}
    return math.fsum(map(math.exp, harmful.values())), harmful


def search(model, **options):
    options = {"rel_tol": 0.0, "mass_floor": 0.0, "batch_size": 7} | options
    return enumerate_event(model, EVENT, end_tokens=[END], max_new_tokens=LENGTH, **options)


@pytest.mark.parametrize("seed", range(5))
def test_full_search_is_exact(seed):
    model = TableModel(seed)
    truth, _ = brute_force(model)
    found = search(model)
    assert found.converged
    assert found.lower == pytest.approx(truth, rel=1e-12)
    assert found.upper == pytest.approx(truth, rel=1e-12)
    assert found.nodes == model.calls
    assert math.fsum(np.exp(found.leaves.log_probs)) == pytest.approx(found.lower, rel=1e-14)


def test_brute_force_itself_sums_to_one():
    model = TableModel(0)
    assert math.fsum(math.exp(model.log_prob(r)) for r in all_responses()) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_bounds_hold_at_every_budget_and_tighten(seed):
    model = TableModel(seed)
    truth, _ = brute_force(model)
    widths = []
    for budget in range(0, 90, 3):
        found = search(model, max_nodes=budget)
        assert found.lower <= truth * (1 + 1e-12)
        assert found.upper >= truth * (1 - 1e-12)
        assert found.nodes <= budget
        assert found.converged == (found.upper == found.lower)
        widths.append(found.upper - found.lower)
    assert widths[0] == 1.0
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(widths))


def test_batches_do_not_change_the_result_of_a_full_search():
    model = TableModel(1)
    one, many = search(model, batch_size=1), search(model, batch_size=100)
    assert one.lower == pytest.approx(many.lower, rel=1e-13)
    assert {tuple(t) for t in one.leaves.tokens} == {tuple(t) for t in many.leaves.tokens}


def test_leaves_are_the_shortest_accepting_prefixes():
    model = TableModel(2)
    leaves = search(model).leaves
    assert (np.diff(leaves.log_probs) <= 0).all()
    for tokens, length, log_prob in zip(
        leaves.tokens, leaves.lengths, leaves.log_probs, strict=True
    ):
        prefix = tokens[:length]
        assert EVENT.matches(prefix)
        assert not EVENT.matches(prefix[:-1])
        assert (tokens[length:] == 0).all()
        assert log_prob == pytest.approx(model.log_prob(prefix.tolist()))


def test_forgotten_mass_stays_in_the_upper_bound():
    model = TableModel(3)
    truth, _ = brute_force(model)
    found = search(model, mass_floor=0.02)
    assert found.lower < truth < found.upper
    assert not found.converged


def test_tolerance_ends_the_search():
    model = TableModel(4, sharpness=4.0)
    truth, _ = brute_force(model)
    found = search(model, rel_tol=0.3, batch_size=1)
    assert found.converged
    assert found.upper - found.lower <= 0.3 * found.lower
    assert found.nodes < search(model, batch_size=1).nodes
    assert found.lower <= truth <= found.upper


def test_an_unreachable_event_needs_no_search():
    model = TableModel(0)
    impossible = ordered_event([()], vocabulary_size=VOCABULARY, end_tokens=[END])
    found = enumerate_event(model, impossible, end_tokens=[END], max_new_tokens=LENGTH)
    assert (found.lower, found.upper, found.nodes) == (0.0, 0.0, 0)
    certain = TokenEvent(np.zeros((1, VOCABULARY), int), np.array([True]))
    found = enumerate_event(model, certain, end_tokens=[END], max_new_tokens=LENGTH)
    assert (found.lower, found.upper, found.leaves.lengths.tolist()) == (1.0, 1.0, [0])
    too_short = enumerate_event(model, EVENT, end_tokens=[END], max_new_tokens=1)
    assert (too_short.lower, too_short.upper, len(too_short.leaves)) == (0.0, 0.0, 0)


def test_tokens_of_probability_zero_are_not_followed():
    def never_first(prefixes, lengths):
        log_probs = np.log(np.full((len(lengths), VOCABULARY), 1 / (VOCABULARY - 1)))
        log_probs[:, 0] = -np.inf
        return log_probs

    found = search(never_first)
    assert (found.lower, found.upper, len(found.leaves)) == (0.0, 0.0, 0)


def test_completed_leaves_are_the_harmful_responses():
    model = TableModel(5)
    truth, harmful = brute_force(model)
    full = complete_leaves(
        model, search(model).leaves, end_tokens=[END], rel_tol=0.0, mass_floor=0.0
    )
    got = {
        tuple(t[:n].tolist()) for t, n in zip(full.leaves.tokens, full.leaves.lengths, strict=True)
    }
    assert got == set(harmful)
    assert full.lower == pytest.approx(truth, rel=1e-12)
    partial = complete_leaves(model, search(model).leaves, end_tokens=[END], max_nodes=3)
    assert partial.lower <= truth * (1 + 1e-12)
    assert partial.upper == pytest.approx(truth, rel=1e-12)


def test_second_moment_of_prefixes_is_a_lower_bound():
    p, q = TableModel(6), TableModel(7)
    truth, harmful = brute_force(p)
    leaves = search(p).leaves
    log_q = [q.log_prob(t[:n].tolist()) for t, n in zip(leaves.tokens, leaves.lengths, strict=True)]
    cut = second_moment(leaves.log_probs, np.array(log_q))
    full = sum(math.exp(2 * lp - q.log_prob(r)) for r, lp in harmful.items())
    responses = complete_leaves(p, leaves, end_tokens=[END], rel_tol=0.0, mass_floor=0.0).leaves
    log_q = [
        q.log_prob(t[:n].tolist()) for t, n in zip(responses.tokens, responses.lengths, strict=True)
    ]
    assert second_moment(responses.log_probs, np.array(log_q)) == pytest.approx(full)
    assert truth**2 <= cut < full
    # Under the target itself the weight is 1, cut or not.
    assert second_moment(leaves.log_probs, leaves.log_probs) == pytest.approx(truth)


def test_second_moment_edges():
    assert second_moment(np.zeros(0), np.zeros(0)) == 0.0
    assert second_moment(np.array([0.0]), np.array([-np.inf])) == math.inf
