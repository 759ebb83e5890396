"""Windows: the grid, and their densities against explicit sums and the engine."""

import numpy as np
import pytest

from tailrisk_jax import InputError
from tailrisk_jax.adaptation import components, window_log_probs, windows
from tailrisk_jax.rollouts.score import sequence_log_probs
from tests.adaptation.enumerated import tiny


@pytest.mark.parametrize(
    ("length", "count", "starts", "longest"),
    [
        (24, 1 + 6 * 55, range(11), 24),
        (3, 1 + 6 * 6, range(3), 3),
        (150, 331, range(0, 77, 7), 150),
    ],
)
def test_the_default_grid(length, count, starts, longest):
    grid = windows(6, length)
    rows = set(zip(grid.experts.tolist(), grid.starts.tolist(), grid.stops.tolist(), strict=True))
    assert len(grid) == count == len(rows)
    assert (grid.experts[0], grid.stops[0]) == (0, 0) and np.all(grid.experts[1:] > 0)
    assert {start for _, start, _ in rows} == set(starts)
    assert all(a < b <= length for u, a, b in rows if u)
    assert (3, 0, longest) in rows  # the policy as it is
    own = windows(1, 10, starts=[2, 12, 8], lengths=[1, 50, 60])
    assert list(zip(own.starts, own.stops, strict=True))[1:] == [(2, 3), (2, 10), (8, 9), (8, 10)]


def test_densities_are_those_of_the_engine_and_sum_to_one():
    world = tiny()
    ours = np.asarray(window_log_probs(world.scored, world.dictionary))
    np.testing.assert_allclose(ours, world.log_q, rtol=0, atol=1e-5)
    engine = sequence_log_probs(world.components(), world.draws)
    np.testing.assert_allclose(ours, engine, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.exp(ours).sum(axis=-1), 1, atol=1e-5)


def test_an_impossible_token_counts_only_where_its_policy_is_in_charge():
    values = np.full((2, 1, 3), -1.0)
    values[0, 0, 1], values[1, 0, 0] = -np.inf, -np.inf
    grid = windows(1, 3, starts=[0, 1, 2], lengths=[1, 2, 3])
    got = dict(
        zip(zip(grid.starts.tolist(), grid.stops.tolist(), strict=True),
            np.asarray(window_log_probs(values, grid))[:, 0].tolist(), strict=True)
    )  # fmt: skip
    assert {pair for pair, value in got.items() if value > -np.inf} == {(1, 2), (1, 3)}
    assert got[1, 2] == got[1, 3] == -3


def test_bad_input():
    for bad in (
        dict(num_unsafe=0), dict(max_new_tokens=0), dict(starts=[-1]), dict(lengths=[0]),
    ):  # fmt: skip
        with pytest.raises(InputError):
            windows(**(dict(num_unsafe=1, max_new_tokens=4) | bad))
    with pytest.raises(ValueError, match="needs"):
        window_log_probs(np.zeros((2, 5, 3)), windows(2, 3))
    with pytest.raises(ValueError, match="windows of 2 policies, 1"):
        components(windows(2, 3), tiny().target, tiny().unsafe[:1])
