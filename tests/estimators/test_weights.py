"""Mixture weights: identities of the balance heuristic, and what components say of coverage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from tailrisk_jax.estimators import (
    component_mean_weights,
    importance,
    mixture_log_prob,
    monte_carlo,
    target_share,
)

INF = np.inf


def test_one_component_is_plain_importance_sampling():
    log_q = np.random.default_rng(0).normal(size=(1, 3, 8)) * 30
    np.testing.assert_array_equal(mixture_log_prob(log_q, np.zeros(1)), log_q[0].astype(np.float32))


def test_target_alone_is_monte_carlo_exactly():
    rng = np.random.default_rng(1)
    log_p, scores = rng.normal(size=(2, 40)) * 50, rng.random((2, 40))
    log_q = mixture_log_prob(log_p[None], np.zeros(1))
    found = importance(scores, jnp.asarray(log_p, jnp.float32) - log_q)
    np.testing.assert_array_equal(found.value, monte_carlo(scores).value)
    np.testing.assert_array_equal(found.stderr, monte_carlo(scores).stderr)


def test_equal_components_are_the_component():
    log_q = np.random.default_rng(2).normal(size=(1, 8)) - 100
    mixed = mixture_log_prob(np.repeat(log_q, 3, axis=0), np.log([0.2, 0.3, 0.5]))
    np.testing.assert_allclose(mixed, log_q[0], rtol=1e-6)


def test_mixture_against_scipy_far_from_zero(transform):
    log_q = np.random.default_rng(3).normal(size=(4, 2, 6)) * 200 - 500
    alphas = np.array([0.1, 0.2, 0.3, 0.4])
    expected = np.asarray(logsumexp(log_q, axis=0, b=alphas[:, None, None]))
    mixed = transform(mixture_log_prob)(
        jnp.asarray(log_q, jnp.float32), jnp.asarray(np.log(alphas), jnp.float32)
    )
    np.testing.assert_allclose(mixed, expected, rtol=1e-6)


def test_impossible_draws_and_dropped_components(transform):
    log_q = jnp.array([[-INF, -INF, -2.0], [-INF, -1.0, -1.0]])
    mixed = transform(mixture_log_prob)(log_q, jnp.log(jnp.array([0.5, 0.5])))
    np.testing.assert_allclose(
        mixed, [-INF, -1 - np.log(2), np.log(0.5 * np.exp(-2) + 0.5 * np.exp(-1))], rtol=1e-6
    )
    dropped = transform(mixture_log_prob)(log_q, jnp.array([-INF, 0.0]))
    np.testing.assert_array_equal(dropped, log_q[1])


def test_each_row_of_the_batch_may_have_its_own_weights(transform):
    log_q = np.random.default_rng(5).normal(size=(3, 2, 4, 6)) * 20 - 50
    alphas = np.random.default_rng(6).dirichlet(np.ones(3), size=(2, 4))
    alphas[1, 2] = [0.0, 0.3, 0.7]
    expected = logsumexp(log_q, axis=0, b=np.moveaxis(alphas, -1, 0)[..., None])
    with np.errstate(divide="ignore"):
        log_alphas = jnp.asarray(np.log(alphas), jnp.float32)
    mixed = transform(mixture_log_prob)(jnp.asarray(log_q, jnp.float32), log_alphas)
    np.testing.assert_allclose(mixed, expected, rtol=1e-6)


def test_component_mean_weights_against_a_loop(transform):
    rng = np.random.default_rng(4)
    log_p, log_q = rng.normal(size=(2, 30)), rng.normal(size=(3, 2, 30))
    labels = rng.integers(0, 3, size=(2, 30))
    found = transform(component_mean_weights)(
        jnp.asarray(log_p, jnp.float32), jnp.asarray(log_q, jnp.float32), jnp.asarray(labels)
    )
    for k in range(3):
        for row in range(2):
            own = labels[row] == k
            w = np.exp(log_p[row] - log_q[k, row])[own]
            assert found.count[k, row] == own.sum()
            np.testing.assert_allclose(found.mean_weight[k, row], w.mean(), rtol=1e-5)
            np.testing.assert_allclose(
                found.stderr[k, row], w.std(ddof=1) / np.sqrt(own.sum()), rtol=1e-4
            )


def test_component_mean_weight_is_the_mass_in_reach_by_enumeration():
    # q_1 reaches two of three responses: E_{q_1}[p / q_1] = 0.3, though E[p / mixture] = 1.
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.0, 0.5, 0.5])
    draws = np.arange(3)[:, None]
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(p)[draws], np.log(np.stack([p, q]))[:, draws]
    found = component_mean_weights(log_p, log_q, np.ones((3, 1), int))
    reached = q > 0
    np.testing.assert_allclose(q[reached] @ np.asarray(found.mean_weight)[1, reached], 0.3)
    mixed = np.asarray(mixture_log_prob(log_q, np.log([0.5, 0.5])))
    np.testing.assert_allclose((p + q) / 2 @ np.exp(log_p - mixed)[:, 0], 1, rtol=1e-6)


def test_coverage_is_exact_where_draws_are_shared_out_exactly(transform):
    # Ten draws of each of three components, in the proportions of the component itself.
    p = np.array([0.9989, 0.001, 0.0001])
    q = np.array([[0.1, 0.4, 0.5], [0.0, 0.5, 0.5], [0.8, 0.1, 0.1]])
    draws = np.repeat(np.tile(np.arange(3), 3), np.rint(10 * q).astype(int).ravel())
    labels = np.repeat(np.arange(4), [10, 10, 10, 0])
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(p)[draws], np.log(np.vstack([q, 0.005 * np.eye(3)[0]]))[:, draws]
    found = transform(component_mean_weights)(
        jnp.asarray(log_p, jnp.float32), jnp.asarray(log_q, jnp.float32), jnp.asarray(labels)
    )
    # The last component made no draw: what it covers is known from the others'.
    exact = np.minimum(p, 100 * np.vstack([q, 0.005 * np.eye(3)[0]])).sum(axis=1)
    np.testing.assert_allclose(exact, [1, 0.0011, 1, 0.5])
    np.testing.assert_allclose(found.coverage, exact, rtol=1e-4)


def test_coverage_is_of_the_whole_target_even_where_no_component_reaches_it():
    # All draws show a thousandth of the target, and both components cover that.
    log_p, log_q = np.log(np.array([1e-3] * 8)), np.zeros((2, 8))
    found = component_mean_weights(log_p, log_q, np.arange(8) % 2)
    np.testing.assert_allclose(found.coverage, 1e-3, rtol=1e-5)
    nothing = component_mean_weights(log_p, log_q, np.arange(8) % 2, mask=np.zeros(8, bool))
    np.testing.assert_array_equal(nothing.coverage, 0)


def test_component_mean_weight_edges(transform):
    log_p = jnp.array([0.0, -INF, -INF, -3.0])
    log_q = jnp.array([[-1.0] * 4, [0.0] * 4, [-2.0] * 4, [-INF] * 4, [0.0] * 4])
    found = transform(component_mean_weights)(log_p, log_q, jnp.array([0, 1, 1, 3]))
    np.testing.assert_allclose(found.mean_weight, [np.e, 0, np.nan, INF, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(found.count, [1, 2, 0, 1, 0])
    assert np.isfinite(found.coverage).all() and (found.coverage <= 1).all()
    assert np.isnan(found.stderr).all()


def test_target_share(transform):
    scores = jnp.array([[1, 0, 0.5, jnp.nan], [0, 0, 0, 0]])
    log_w = jnp.log(jnp.array([[3.0, 9.0, 2.0, 5.0], [1.0, 1.0, 1.0, 1.0]])) + 85
    labels = jnp.array([[0, 0, 1, 0], [0, 0, 1, 1]])
    share = transform(target_share)(scores, log_w, labels)
    np.testing.assert_allclose(share, [3 / 4, np.nan], rtol=1e-5)
    other = transform(lambda s, w, la: target_share(s, w, la, 1))(scores, log_w, labels)
    np.testing.assert_allclose(other, [1 / 4, np.nan], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixture_log_prob(np.zeros((2, 3)), np.zeros(1)), r"log_alphas has shape \(1,\)"),
        (lambda: mixture_log_prob(np.zeros((2, 3)), np.zeros(2)), "weights sum to 2, not 1"),
        (
            lambda: mixture_log_prob(np.zeros((2, 3, 4)), np.log([[0.5, 0.5]] * 2)),
            r"log_alphas has shape \(2, 2\); 2 components need shape \(2,\), or \(3, 2\)",
        ),
        (
            lambda: mixture_log_prob(np.zeros((2, 2, 4)), np.log([[0.5, 0.5], [0.5, 0.2]])),
            "weights sum to 0.7, not 1",
        ),
        (lambda: mixture_log_prob(np.zeros(2), np.log([0.5, 0.5])), r"shape \(2,\); give \[K"),
        (
            lambda: component_mean_weights(np.zeros(3), np.zeros((2, 4)), np.zeros(3, int)),
            r"needs \[K, 3\]",
        ),
        (
            lambda: component_mean_weights(np.zeros(3), np.zeros((2, 3)), np.array([0, 1, 2])),
            r"labels holds 2 at \(2,\); components are numbered 0 to 1",
        ),
        (
            lambda: component_mean_weights(np.zeros(3), np.zeros((2, 3)), np.zeros(3)),
            "labels has dtype float32",
        ),
        (lambda: target_share(np.zeros(3), np.zeros(3), np.zeros(4, int)), "shapes differ"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_value_checks_are_skipped_where_there_is_no_value():
    jax.jit(lambda a: mixture_log_prob(jnp.zeros((2, 3)), a))(jnp.zeros(2))
