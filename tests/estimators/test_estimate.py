"""Point estimates against exact enumeration, and every edge case under jit and vmap."""

import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tailrisk_jax.estimators import estimate as estimate_module
from tailrisk_jax.estimators import importance, log_t_interval, mixture_log_prob, monte_carlo

# A space of five responses, small enough to sum over every possible sample.
P = np.array([0.5, 0.3, 0.15, 0.04, 0.01])
Q = np.array([0.1, 0.2, 0.2, 0.2, 0.3])
U = np.array([0.3, 0.0, 0.0, 0.1, 0.6])  # never draws the third response, which scores 0.25
H = np.array([0.0, 0.0, 0.25, 1.0, 0.6])
TRUTH = float(P @ H)

ALL_ONE = np.arange(5)[:, None]
ALL_PAIRS = np.array(list(itertools.product(range(5), repeat=2)))


def log(x):
    with np.errstate(divide="ignore"):
        return np.log(x)


@pytest.mark.parametrize("draws", [ALL_ONE, ALL_PAIRS], ids=["N=1", "N=2"])
@pytest.mark.parametrize("q", [Q, P], ids=["proposal", "target"])
def test_expectation_over_all_samples_is_the_truth(draws, q):
    prob = q[draws].prod(1)
    found = importance(H[draws], log(P / q)[draws])
    np.testing.assert_allclose(prob @ np.asarray(found.value), TRUTH, rtol=1e-6)
    np.testing.assert_allclose(prob @ np.asarray(found.mean_weight), 1, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["random labels", "fixed counts"])
def test_mixture_expectation_over_all_pairs_is_the_truth(scheme):
    # U misses a part of the harm: alone it would be biased.
    alphas = np.array([0.5, 0.5])
    components = np.stack([Q, U])
    mixed = np.asarray(mixture_log_prob(log(components)[:, ALL_PAIRS], log(alphas)))
    first, second = ALL_PAIRS.T
    if scheme == "random labels":
        prob = (alphas @ components)[ALL_PAIRS].prod(1)
    else:
        prob = Q[first] * U[second]
    found = importance(H[ALL_PAIRS], log(P)[ALL_PAIRS] - mixed)
    np.testing.assert_allclose(prob @ np.asarray(found.value), TRUTH, rtol=1e-6)


def test_squared_stderr_is_unbiased_over_all_pairs():
    prob = Q[ALL_PAIRS].prod(1)
    found = importance(H[ALL_PAIRS], log(P / Q)[ALL_PAIRS])
    variance = Q @ (P / Q * H - TRUTH) ** 2
    expected = prob @ np.nan_to_num(np.asarray(found.stderr)) ** 2
    np.testing.assert_allclose(expected, variance / 2, rtol=1e-6)


def test_fields_against_their_definitions():
    rng = np.random.default_rng(0)
    draws = rng.choice(5, size=250, p=Q)
    unscored = np.arange(250) % 5 == 0
    found = importance(np.where(unscored, np.nan, H[draws]), log(P / Q)[draws], level=0.9)
    w, h = (P / Q)[draws][~unscored], H[draws][~unscored]
    wh = w * h
    share = wh[wh > 0] / wh.sum()
    skewness = ((wh - wh.mean()) ** 3).mean() / wh.std(ddof=1) ** 3 / np.sqrt(200)
    interval = log_t_interval(found.value, found.stderr, found.ess_harm, skewness, 0.9)
    expected = {
        "value": wh.mean(),
        "stderr": wh.std(ddof=1) / np.sqrt(200),
        "lower": interval.lower,
        "upper": interval.upper,
        "num_samples": 200,
        "unscored": 0.2,
        "hits": (h > 0).sum(),
        "ess": w.sum() ** 2 / (w**2).sum(),
        "ess_harm": wh.sum() ** 2 / (wh**2).sum(),
        "largest_share": wh.max() / wh.sum(),
        "mean_weight": w.mean(),
        "mean_weight_z": (w.mean() - 1) / (w.std(ddof=1) / np.sqrt(200)),
        "kl": (share * np.log(200 * share)).sum(),
    }
    for name, figure in expected.items():
        np.testing.assert_allclose(getattr(found, name), figure, rtol=2e-5, err_msg=name)


def test_kl_of_an_event_is_the_mean_log_weight_over_hits_less_log_value():
    draws = np.random.default_rng(1).choice(5, size=5000, p=Q)
    h = (H >= 0.6).astype(float)
    w, hit = (P / Q)[draws], h[draws] > 0
    found = importance(h[draws], log(w))
    share = w[hit] / w[hit].sum()
    np.testing.assert_allclose(
        found.kl, share @ np.log(w[hit]) - np.log(float(found.value)), rtol=1e-4
    )
    exact = P * h / (P @ h)
    np.testing.assert_allclose(found.kl, exact[3:] @ np.log(exact[3:] / Q[3:]), rtol=0.05)


def test_weights_of_one_are_monte_carlo():
    scores = np.random.default_rng(2).random((2, 40))
    weighted = importance(scores, np.zeros((2, 40)))
    chex.assert_trees_all_equal(monte_carlo(scores), weighted.replace(estimator="monte_carlo"))


def test_a_shift_of_all_log_weights_scales_the_value_and_leaves_relative_figures():
    rng = np.random.default_rng(3)
    scores, log_w = (rng.random((2, 40)) < 0.3).astype(float), rng.normal(size=(2, 40))
    near, far = importance(scores, log_w), importance(scores, log_w - 60)
    np.testing.assert_allclose(far.value / near.value, np.exp(-60), rtol=1e-4)
    for name in ("ess", "ess_harm", "largest_share", "kl"):
        np.testing.assert_allclose(getattr(far, name), getattr(near, name), rtol=1e-4)
    np.testing.assert_allclose(far.upper / far.value, near.upper / near.value, rtol=1e-4)


def test_rows_are_independent_of_their_neighbours():
    rng = np.random.default_rng(4)
    scores = np.where(rng.random((2, 2, 40)) < 0.1, np.nan, rng.random((2, 2, 40)))
    log_w = rng.normal(size=(2, 2, 40)) * 20
    batch = importance(scores, log_w)
    for row in range(2):
        rows = jax.tree.map(lambda x, row=row: x[row], batch)
        chex.assert_trees_all_close(rows, importance(scores[row], log_w[row]), rtol=1e-6)
    vmapped = jax.vmap(importance, in_axes=1)(jnp.asarray(scores), jnp.asarray(log_w))
    swapped = jax.tree.map(jnp.transpose, batch)
    chex.assert_trees_all_close(vmapped, swapped, rtol=1e-6)


# Edge cases. Each row: scores, log-weights, and the fields it pins down.
NAN, INF = np.nan, np.inf
EDGES = {
    "no hits": (
        [0, 0, 0, 0],
        [0.5, -1, 0, 0],
        dict(
            value=0, stderr=NAN, lower=0, upper=INF, hits=0, ess_harm=0, largest_share=NAN, kl=NAN
        ),
    ),
    "one hit": (
        [0, 1, 0, 0],
        [0, np.log(2), 0, 0],
        dict(value=0.5, stderr=0.5, hits=1, ess_harm=1, largest_share=1, kl=np.log(4)),
    ),
    "one draw, a hit": (
        [1],
        [-3],
        dict(value=np.exp(-3), stderr=NAN, lower=0, upper=INF, mean_weight_z=NAN, kl=0),
    ),
    "one draw, a miss": ([0], [-3], dict(value=0, stderr=NAN, lower=0, upper=INF, ess=1)),
    "one scored draw": ([NAN, 1, NAN, NAN], [2, -3, 0, 0], dict(value=np.exp(-3), stderr=NAN)),
    "all contributions equal": (
        [1, 1, 1, 1],
        [-3, -3, -3, -3],
        dict(value=np.exp(-3), stderr=NAN, lower=0, upper=INF, ess_harm=4, mean_weight_z=-INF),
    ),
    "all weights zero": (
        [1, 0, 1, 1],
        [-INF, -INF, -INF, -INF],
        dict(value=0, stderr=NAN, lower=0, upper=INF, hits=0, ess=0, mean_weight=0),
    ),
    "hit of weight zero": (
        [1, 1, 0, 0],
        [-INF, 0, 0, 0],
        dict(value=0.25, stderr=0.25, hits=1, ess=3),
    ),
    "some unscored": ([NAN, 1, NAN, 0], [5, 0, 9, 0], dict(value=0.5, num_samples=2, unscored=0.5)),
    "unscored with NaN weight": (
        [NAN, 1, 0, 0],
        [NAN, 0, 0, 0],
        dict(value=1 / 3, mean_weight=1, mean_weight_z=0, ess=3),
    ),
    "none scored": (
        [NAN, NAN, NAN, NAN],
        [0, 0, 0, 0],
        dict(value=NAN, stderr=NAN, lower=NAN, upper=NAN, num_samples=0, unscored=1, hits=0, ess=0),
    ),
    "huge weight on a miss": (
        [1, 0, 0, 0],
        [0, 90, 0, 0],
        dict(value=0.25, stderr=0.25, ess_harm=1, mean_weight=np.exp(90 - np.log(4)), ess=1),
    ),
    "huge weight on a hit": (
        [1, 0, 0, 0],
        [90, 0, 0, 0],
        dict(value=np.exp(90 - np.log(4)), stderr=np.exp(90 - np.log(4)), largest_share=1),
    ),
    "overflow": ([1, 0, 0, 0], [120, 0, 0, 0], dict(value=INF, stderr=INF, lower=0, upper=INF)),
    "infinite weight on a miss": (
        [1, 0, 0, 0],
        [0, INF, 0, 0],
        dict(value=0.25, hits=1, mean_weight=INF, mean_weight_z=INF, ess=1),
    ),
    "infinite weight on a hit": (
        [1, 1, 0, 0],
        [INF, 0, 0, 0],
        dict(value=INF, stderr=INF, lower=0, upper=INF, hits=1, largest_share=1, ess_harm=1),
    ),
    "tiny score": ([1e-30, 0, 0, 0], [-10, 0, 0, 0], dict(value=np.exp(-10) * 1e-30 / 4, hits=1)),
}


@pytest.mark.parametrize("num", [1, 4])
def test_edges(num, transform):
    cases = {name: case for name, case in EDGES.items() if len(case[0]) == num}
    scores, log_w, expected = zip(*cases.values(), strict=True)
    found = transform(importance)(jnp.array(scores, jnp.float32), jnp.array(log_w, jnp.float32))
    for row, name in enumerate(cases):
        for field, figure in expected[row].items():
            np.testing.assert_allclose(
                getattr(found, field)[row], figure, rtol=2e-5, err_msg=f"{name}: {field}"
            )


def test_monte_carlo_edges_and_intervals(transform):
    exact = stats.beta.ppf([0.025, 0.975], [1, 2], [10, 9])
    deviation = np.std([1, 0.5] + [0] * 8, ddof=1)
    graded = np.array([1, 0.5] + [0] * 8)
    skewness = ((graded - 0.15) ** 3).mean() / deviation**3 / 10**0.5
    default = log_t_interval(0.15, deviation / 10**0.5, 1.5**2 / 1.25, skewness)
    normal = default.lower, default.upper
    cases = [
        ([0] * 10, 0, NAN, 0, 1 - 0.025**0.1),
        ([1] * 10, 1, NAN, 0.025**0.1, 1),
        ([1] + [NAN] * 9, 1, NAN, 0.025, 1),
        ([0.5] * 10, 0.5, NAN, 0, INF),
        ([NAN] * 10, NAN, NAN, NAN, NAN),
        ([1] + [0] * 9, 0.1, 0.1, *exact),
        ([1, 0.5] + [0] * 8, 0.15, deviation / 10**0.5, *normal),
    ]
    scores, *expected = zip(*cases, strict=True)
    found = transform(monte_carlo)(jnp.array(scores, jnp.float32))
    fields = [found.value, found.stderr, found.lower, found.upper]
    np.testing.assert_allclose(np.stack(fields), expected, rtol=1e-5)
    np.testing.assert_array_equal(found.mean_weight_z, [0, 0, 0, 0, NAN, 0, 0])


def test_traced_nan_weight_is_never_silent():
    scores, log_w = jnp.array([1.0, 0.0]), jnp.array([jnp.nan, 0.0])
    found = jax.jit(importance)(scores, log_w)
    assert np.isnan(found.value) and np.isnan(found.mean_weight)
    at_a_miss = jax.jit(importance)(scores, log_w[::-1])
    assert at_a_miss.value == 0.5 and np.isnan(at_a_miss.mean_weight)


@pytest.mark.parametrize(
    ("scores", "log_w", "level", "message"),
    [
        ([0, 1.5], [0, 0], 0.95, r"scores holds 1.5 at \(1,\), outside \[0, 1\]; rescale"),
        ([0, -0.1], [0, 0], 0.95, r"scores holds -0.1 at \(1,\)"),
        ([0, 1], [0, NAN], 0.95, r"log_weights holds NaN at \(1,\)"),
        ([0, 1], [0, 0, 0], 0.95, r"scores \(2,\), log_weights \(3,\)"),
        (0.5, 0.0, 0.95, r"scores has shape \(\); its last axis"),
        ([], [], 0.95, r"scores has shape \(0,\); its last axis"),
        ([0, 1], [0, 0], 95, r"level is 95; give one number"),
    ],
)
def test_errors_name_the_thing_the_value_and_the_way_out(scores, log_w, level, message):
    with pytest.raises(ValueError, match=message):
        importance(np.array(scores, float), np.array(log_w, float), level=level)


def test_new_values_do_not_retrace(monkeypatch):
    for name in ("_importance", "_monte_carlo"):
        counted = chex.assert_max_traces(inspect.unwrap(getattr(estimate_module, name)), n=1)
        monkeypatch.setattr(estimate_module, name, jax.jit(counted, static_argnames="level"))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        importance(rng.random((2, 7)), rng.normal(size=(2, 7)))
        monte_carlo(rng.random((2, 7)))
    with pytest.raises(AssertionError):
        importance(np.zeros((2, 8)), np.zeros((2, 8)))
