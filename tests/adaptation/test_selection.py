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
        """Median over queries of the exact figure."""
        kept = alpha > 0
        cost = alpha @ np.array(costs.draw) + np.array(costs.score)[kept].sum()
        p = self.q[0, :, 1:]
        total = p.sum(axis=1)
        moment = (p**2 / np.tensordot(alpha, self.q[:, :, 1:], 1)).sum(axis=1)
        return np.median((total - total**2) / (moment - total**2)) * costs.draw[0] / cost


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


def test_what_is_dear_is_left_out():
    equal = choose(*world().pilot(), Costs((1, 1, 1, 1), (0, 0, 0, 0)), NAMES)
    dear = choose(*world().pilot(), Costs((1, 1000, 1, 1), (0, 0, 0, 0)), NAMES)
    assert equal.weights[1] > 0.2 and dear.weights[1] == 0
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
    assert choice.covers.tolist() == [True, False, False, True] and choice.weights[3] > 0.05
    assert "No harmful draw came from a component that covers" in choice.reason


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
        ("costs of 2", Costs((1, 1), (0, 0)), NAMES),
        ("above 0", Costs((1, 0, 1, 1), (0,) * 4), NAMES),
        ("above 0", Costs((1,) * 4, (-1,) * 4), NAMES),
    ):
        with pytest.raises(InputError, match=words):
            choose(pilot, labels, *arguments)
    with pytest.raises(InputError, match="cover_share"):
        choose(pilot, labels, good, NAMES, target_share=0.5, cover_share=0.6)
    alone = Pilot(np.asarray(pilot.component_log_probs)[:1], pilot.log_m, pilot.scores)
    with pytest.raises(InputError, match="nothing to choose"):
        choose(alone, labels * 0, Costs((1,), (0,)), NAMES[:1])
