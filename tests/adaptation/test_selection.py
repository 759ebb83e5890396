"""The choice among constructions in a finite world, where every ratio is a sum."""

import dataclasses

import numpy as np
import pytest
import scipy.optimize

from tailrisk_jax import InputError
from tailrisk_jax.adaptation import Costs, Pilot, choose

NAMES = ("target", "narrow", "broad", "useless")


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Cells 0 (harmless), 1 and 2 (harm): probabilities of each component, [K, Q, 3]."""

    q: np.ndarray

    def pilot(self, draws=500, seed=0, harm=(0, 1, 1)):
        rng = np.random.default_rng(seed)
        num, queries, _ = self.q.shape
        labels = rng.integers(num, size=(queries, draws))
        drawn = np.array(
            [[rng.choice(3, p=self.q[k, i]) for k in row] for i, row in enumerate(labels)]
        )
        density = np.take_along_axis(self.q, np.broadcast_to(drawn, (num, *drawn.shape)), axis=2)
        with np.errstate(divide="ignore"):
            log_q = np.log(density)
        return Pilot(log_q, np.log(density.mean(axis=0)), np.array(harm, float)[drawn]), labels

    def ratio_per_compute(self, alpha, costs):
        """Geometric mean over queries of the exact figure."""
        kept = alpha > 0
        cost = alpha @ np.array(costs.draw) + np.array(costs.score)[kept].sum()
        p = self.q[0, :, 1:]
        total = p.sum(axis=1)
        moment = (p**2 / np.tensordot(alpha, self.q[:, :, 1:], 1)).sum(axis=1)
        ratios = (total - total**2) / (moment - total**2)
        return np.exp(np.log(ratios).mean()) * costs.draw[0] / cost


def world(queries=8, rare=1e-3, covering=True):
    """Narrow reaches cell 1 alone, broad both, useless is the target again.

    They cover the target; none but useless does where `covering` is False.
    """
    scale = rare * np.linspace(0.5, 2, queries)
    cells = np.empty((4, queries, 3))
    cells[0, :, 1:] = scale[:, None] * [1, 0.5]
    cells[1, :, 1:] = [0.6, 0] if covering else [1 - 1e-6, 0]
    cells[2, :, 1:] = [0.1, 0.1] if covering else [1 - 2e-6, 1e-6]
    cells[3, :, 1:] = cells[0, :, 1:]
    cells[:, :, 0] = 1 - cells[:, :, 1:].sum(axis=2)
    return World(cells)


@pytest.mark.parametrize(
    ("draw", "score"),
    [
        ((1, 1, 1, 1), (0.2, 0.2, 0.2, 0.2)),
        ((1, 1, 30, 1), (0.1, 0.1, 2, 0.1)),
        ((1, 8, 1, 1), (0.2, 9, 0.2, 0.2)),
    ],
)
def test_the_choice_is_near_the_best_there_is(draw, score):
    """Within 0.8 of the best mixture at the true second moments, found by scipy for each set."""
    space, costs = world(), Costs(draw, score)
    choice = choose(*space.pilot(), costs, NAMES)
    np.testing.assert_allclose(choice.weights.sum(), 1)
    best = 0.0
    for kept in ([0, 1], [0, 2], [0, 1, 2], [0, 2, 3], [0, 1, 2, 3]):

        def loss(x, kept=kept):
            alpha = np.zeros(4)
            alpha[kept] = np.exp(x) / np.exp(x).sum()
            return -np.log(space.ratio_per_compute(alpha, costs))

        start = np.zeros(len(kept))
        best = max(best, np.exp(-scipy.optimize.minimize(loss, start, method="Nelder-Mead").fun))
    ours = space.ratio_per_compute(choice.weights, costs)
    assert ours > 0.8 * best and best > 3
    assert 0.7 * ours < choice.ratio_per_compute < 1.4 * ours
    assert choice.weights[3] == 0 and "useless" in choice.reason
    assert choice.alone[0] == 1 and choice.alone[1:].max() <= 1.2 * choice.ratio_per_compute
    assert choice.reason.startswith("Chosen: ") and "held-out" in choice.reason


def test_what_is_dear_is_hardly_drawn():
    equal = choose(*world().pilot(), Costs((1, 1, 1, 1), (0, 0, 0, 0)), NAMES)
    dear = choose(*world().pilot(), Costs((1, 1000, 1, 1), (0, 0, 0, 0)), NAMES)
    assert equal.weights[1] > 0.2 and dear.weights[1] < 1e-5
    assert dear.weights[2] > 0.5


def test_lost_coverage_is_said():
    blind = World(world(covering=False).q[:3])
    choice = choose(*blind.pilot(), Costs((1,) * 3, (0,) * 3), NAMES[:3])
    assert choice.covers.tolist() == [True, False, False]
    assert "No construction covers the target" in choice.reason and "too high" in choice.reason
    # The one component that covers is kept, though it gains nothing and costs its scoring; and
    # where it reached none of the harm, that is said.
    pilot, labels = world(covering=False).pilot()
    quiet = np.where((labels == 0) | (labels == 3), 0.0, np.asarray(pilot.scores))
    pilot = dataclasses.replace(pilot, scores=quiet)
    choice = choose(pilot, labels, Costs((1,) * 4, (0.1,) * 4), NAMES)
    assert choice.covers.tolist() == [True, False, False, True] and choice.weights[3] > 0.27
    assert "No harmful draw came from a component that covers" in choice.reason


def test_the_figure_allows_for_harm_that_was_not_seen():
    """With one kind of harm all hits are alike, so that both figures are closed forms."""
    p, q, draws, found = 0.1, 0.5, 40, 12  # of 40 from equal shares, 20 q + 20 p are harmful
    harm = np.arange(draws) < found
    labels = np.r_[np.ones(10), np.zeros(2), np.ones(10), np.zeros(18)].astype(int)
    density = np.where(harm, [[p], [q]], [[1 - p], [1 - q]])[:, None].repeat(5, axis=1)
    pilot = Pilot(np.log(density), np.log(density.mean(axis=0)), np.tile(1.0 * harm, (5, 1)))
    costs = Costs((1, 2), (0.1, 0.3))
    choice = choose(pilot, np.tile(labels, (5, 1)), costs, NAMES[:2])
    np.testing.assert_allclose(choice.mean_weights, 1, rtol=1e-6)

    cost = choice.weights @ [1, 2] + 0.4
    j = p**2 / (choice.weights @ [p, q])
    np.testing.assert_allclose(choice.seen_per_compute, (p - p**2) / (j - p**2) / cost, rtol=1e-3)
    more = j * (1 + 1 / (found + 1))
    np.testing.assert_allclose(choice.ratio, (p - p**2) / (more - p**2), rtol=1e-3)
    np.testing.assert_allclose(choice.ratio_per_compute, choice.ratio / cost)


def opener(queries=6):
    """As `world`, but narrow does not cover the target, and broad does, which reaches cell 2."""
    cells = world(queries).q[:3]
    cells[1, :, 1:], cells[2, :, 1:] = [1 - 1e-6, 1e-9], [0.02, 0.01]
    cells[1:, :, 0] = 1 - cells[1:, :, 1:].sum(axis=2)
    return World(cells)


def test_shares_have_harm_that_was_not_seen_in_view():
    """The least of the mean of log(J + lambda P R), by scipy on the draws themselves."""
    pilot, labels = opener().pilot(draws=150, seed=1)
    free = Costs((1,) * 3, (0,) * 3)
    choice = choose(pilot, labels, free, NAMES[:3], cover_share=0.1)
    assert choice.covers.tolist() == [True, False, True] and np.all(choice.weights > 0.05)

    scores, density = np.asarray(pilot.scores), np.exp(np.asarray(pilot.component_log_probs))
    weight = scores * density[0] / np.exp(pilot.log_m)
    p, hits = weight.mean(axis=1), scores.sum(axis=1)
    assert len(set(hits)) > 1 and np.all(hits > 0)

    def loss(x, unseen=True):
        target = choice.weights[0]
        alpha = np.array([target, x * (1 - target), (1 - x) * (1 - target)])
        j = np.mean(weight * density[0] / np.tensordot(alpha, density, 1), axis=1)
        return np.mean(np.log(j + unseen / (hits + 1) * p * np.mean(j / p)))

    def best(unseen):
        return scipy.optimize.minimize_scalar(
            loss, args=(unseen,), bounds=(0.01, 0.9), method="bounded"
        )

    ours = choice.weights[1] / choice.weights[1:].sum()
    assert loss(ours) < best(True).fun + 0.01 < loss(best(False).x)
    assert ours < best(False).x - 0.03


def test_a_third_stays_with_what_covers():
    """Though all harm that was seen is of the kind that narrow reaches."""
    pilot, labels = opener().pilot()
    density = np.asarray(pilot.component_log_probs)
    seen = dataclasses.replace(pilot, scores=np.where(density[1] < -10, 0.0, pilot.scores))
    free = Costs((1,) * 3, (0,) * 3)
    np.testing.assert_allclose(
        choose(seen, labels, free, NAMES[:3]).weights, [0.1, 0.6, 0.3], atol=0.02
    )
    none = choose(seen, labels, free, NAMES[:3], cover_share=0).weights
    assert none[1] > 0.8
    unreached = density.copy()
    unreached[2, np.asarray(seen.scores) > 0] = -np.inf
    blind = dataclasses.replace(seen, component_log_probs=unreached)
    even = choose(blind, labels, free, NAMES[:3]).weights
    np.testing.assert_allclose(even, [0.1, 0.6, 0.3], atol=0.02)


def test_a_policy_is_scored_once():
    costs = Costs((1, 2, 2), (1, 10), ((True, False), (True, True), (False, True)))
    for kept, cost in (((1, 0, 0), 1), ((1, 1, 0), 11), ((0, 0, 1), 10), ((1, 1, 1), 11)):
        assert costs.scoring(np.array(kept, bool)) == cost
    # Broad is worth its scoring only where the policy is scored for narrow already.
    space = world()
    own = choose(*space.pilot(), Costs((1,) * 4, (0, 1, 3000, 1)), NAMES)
    with_narrow = ((1, 0, 0), (0, 1, 0), (0, 1, 0), (0, 0, 1))
    shared = Costs((1,) * 4, (0, 1, 1), tuple(tuple(map(bool, row)) for row in with_narrow))
    together = choose(*space.pilot(), shared, NAMES)
    assert own.weights[2] == 0 < 0.05 < together.weights[2]
    cost = together.weights @ np.ones(4) + 1 + (together.weights[3] > 0)
    np.testing.assert_allclose(together.ratio / together.ratio_per_compute, cost, rtol=0.02)


def test_a_harmful_draw_that_the_target_hardly_makes():
    """Its density under what is left without narrow is beyond float32, and so is its worth."""
    pilot, labels = world().pilot()
    costs = Costs((1,) * 4, (0.1,) * 4)
    plain = choose(pilot, labels, costs, NAMES)
    log_q, log_m = np.array(pilot.component_log_probs), np.array(pilot.log_m)
    scores = np.array(pilot.scores)
    log_q[:, 0, 0], log_m[0, 0], scores[0, 0] = [-200, 0, -200, -200], np.log(0.25), 1
    found = choose(Pilot(log_q, log_m, scores), labels, costs, NAMES)
    np.testing.assert_allclose(found.weights, plain.weights, atol=0.03)
    assert np.all(np.isfinite(found.alone)) and 0.8 < found.ratio / plain.ratio < 1.25


def test_plain_monte_carlo_and_no_hits():
    common = world(rare=0.3)
    choice = choose(*common.pilot(), Costs((1,) * 4, (1,) * 4), NAMES)
    assert choice.weights.tolist() == [1, 0, 0, 0] and choice.ratio_per_compute == 1
    assert choice.reason.startswith("Plain Monte Carlo")
    pilot, labels = world().pilot()
    none = dataclasses.replace(pilot, scores=np.zeros_like(pilot.scores))
    choice = choose(none, labels, Costs((1,) * 4, (1,) * 4), NAMES)
    assert np.all(choice.weights > 0.1) and np.isnan(choice.ratio)
    assert "No pilot draw was harmful" in choice.reason


def test_bad_input():
    pilot, labels = world().pilot(draws=20)
    good = Costs((1,) * 4, (0,) * 4)
    for words, *arguments in (
        ("4 components, 3 names", good, NAMES[:3]),
        ("costs of 2 draws", Costs((1, 1), (0, 0)), NAMES),
        ("costs of 2 scores", Costs((1,) * 4, (0, 0)), NAMES),
        ("costs of 2 scores", Costs((1,) * 4, (0, 0), ((True, True),) * 3), NAMES),
        ("above 0", Costs((1, 0, 1, 1), (0,) * 4), NAMES),
        ("above 0", Costs((1,) * 4, (-1,) * 4), NAMES),
    ):
        with pytest.raises(InputError, match=words):
            choose(pilot, labels, *arguments)
    for share in (-0.1, 1.1):
        with pytest.raises(InputError, match=f"cover_share={share}"):
            choose(pilot, labels, good, NAMES, cover_share=share)
        with pytest.raises(InputError, match=f"target_share={share}"):
            choose(pilot, labels, good, NAMES, target_share=share)
    alone = Pilot(np.asarray(pilot.component_log_probs)[:1], pilot.log_m, pilot.scores)
    with pytest.raises(InputError, match="nothing to choose"):
        choose(alone, labels * 0, Costs((1,), (0,)), NAMES[:1])
