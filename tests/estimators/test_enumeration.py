"""Every estimator's expectation, summed over all samples of a 4-token, 3-step model."""

import itertools

import numpy as np
import pytest

from tailrisk_jax.estimators import (
    balance_log_weights,
    combine_rounds,
    control_variates,
    importance,
    in_float64,
    mixture_log_prob,
    monte_carlo,
    psis,
    self_normalised,
)

TOKENS, STEPS, END = 4, 3, 3


def responses() -> list[tuple[int, ...]]:
    """All responses: ended by END, or cut at STEPS."""
    found = []
    for length in range(1, STEPS + 1):
        for body in itertools.product(range(TOKENS - 1), repeat=length - 1):
            last = range(TOKENS) if length == STEPS else [END]
            found += [(*body, token) for token in last]
    return found


def distribution(seed: int, sharpness: float) -> np.ndarray:
    """Probabilities of all responses under a random token model; END counts as a token."""
    rng = np.random.default_rng(seed)
    tables = {}
    probs = []
    for response in RESPONSES:
        prob = 1.0
        for t, token in enumerate(response):
            logits = tables.setdefault(response[:t], rng.normal(size=TOKENS) * sharpness)
            prob *= np.exp(logits[token]) / np.exp(logits).sum()
        probs.append(prob)
    return np.array(probs)


RESPONSES = responses()
P, Q, U = (distribution(seed, sharpness) for seed, sharpness in ((0, 1.0), (1, 1.0), (2, 0.5)))
H = np.array([1.0 if 2 in response else 0.25 * (0 in response) for response in RESPONSES])
TRUTH = float(P @ H)
PAIRS = np.array(list(itertools.product(range(len(RESPONSES)), repeat=2)))
ALPHAS = np.array([0.3, 0.7])
MIXED = ALPHAS @ np.stack([Q, U])


def test_the_model_is_one():
    assert len(RESPONSES) == 1 + 3 + 9 * 4
    for prob in (P, Q, U):
        np.testing.assert_allclose(prob.sum(), 1, rtol=1e-12)
    assert 0.05 < TRUTH < 0.95


UNBIASED = {
    "monte carlo": (P, lambda y: monte_carlo(H[y])),
    "importance": (Q, lambda y: importance(H[y], np.log(P / Q)[y])),
    "balance heuristic": (
        MIXED,
        lambda y: importance(
            H[y],
            np.log(P)[y]
            - np.asarray(mixture_log_prob(np.log(np.stack([Q, U]))[:, y], np.log(ALPHAS))),
        ),
    ),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_estimators_have_the_exact_mean_and_variance(name):
    proposal, estimator = UNBIASED[name]
    found = in_float64(estimator, PAIRS)
    prob = proposal[PAIRS].prod(axis=1)
    np.testing.assert_allclose(prob @ found.value, TRUTH, rtol=1e-10)
    one_draw = proposal @ (P / proposal * H - TRUTH) ** 2
    np.testing.assert_allclose(prob @ (found.value - TRUTH) ** 2, one_draw / 2, rtol=1e-10)
    claimed = np.nan_to_num(found.stderr) ** 2
    np.testing.assert_allclose(prob @ claimed, one_draw / 2, rtol=1e-10)
    assert not found.biased


def test_stratified_counts_of_a_mixture_are_unbiased_with_less_variance():
    alphas = np.array([0.5, 0.5])
    mixed = alphas @ np.stack([Q, U])
    weights = in_float64(
        balance_log_weights, np.log(P)[PAIRS], np.log(np.stack([Q, U]))[:, PAIRS], np.array([1, 1])
    )
    np.testing.assert_allclose(weights, np.log(P / mixed)[PAIRS], rtol=1e-10)
    value = in_float64(importance, H[PAIRS], weights).value
    prob = Q[PAIRS[:, 0]] * U[PAIRS[:, 1]]
    x = P / mixed * H
    np.testing.assert_allclose(prob @ value, TRUTH, rtol=1e-10)
    variance = (Q @ x**2 - (Q @ x) ** 2 + U @ x**2 - (U @ x) ** 2) / 4
    np.testing.assert_allclose(prob @ (value - TRUTH) ** 2, variance, rtol=1e-10)
    assert variance < (mixed @ x**2 - TRUTH**2) / 2


def test_rounds_with_fixed_shares_have_the_exact_mean_and_variance():
    rounds = [in_float64(importance, H[:, None], np.log(P / q)[:, None]) for q in (Q, U)]
    first, second = PAIRS.T
    values = np.stack([rounds[0].value[first], rounds[1].value[second]])
    pilot = np.broadcast_to(np.array([[2.0], [0.5]]), values.shape)
    found = in_float64(combine_rounds, values, np.ones_like(values), pilot)
    prob = Q[first] * U[second]
    shares = np.array([0.2, 0.8])
    np.testing.assert_allclose(found.shares[:, 0], shares)
    np.testing.assert_allclose(prob @ found.value, TRUTH, rtol=1e-10)
    one = [q @ (P / q * H - TRUTH) ** 2 for q in (Q, U)]
    np.testing.assert_allclose(prob @ (found.value - TRUTH) ** 2, shares**2 @ one, rtol=1e-10)
    np.testing.assert_allclose(found.stderr, np.sqrt((shares**2).sum()))


def test_cross_fitted_control_variates_are_unbiased_and_in_sample_ones_are_not():
    """All samples of four draws; the response space is merged to seven so that it is small."""
    groups = np.array_split(np.argsort(P / MIXED * H), 7)
    p, q, u = (np.array([prob[group].sum() for group in groups]) for prob in (P, Q, U))
    h = np.array([H[group].mean() for group in groups])
    components, mixed = np.stack([q, u]), ALPHAS @ np.stack([q, u])
    y = np.array(list(itertools.product(range(7), repeat=4)))
    prob = mixed[y].prod(axis=1)

    def mean(folds):
        found = in_float64(
            control_variates,
            h[y],
            np.log(p)[y],
            np.log(components)[:, y],
            np.log(ALPHAS),
            folds=folds,
        )
        assert found.biased == (folds == 1)
        return prob @ found.value, prob @ (found.value - p @ h) ** 2

    plain = (mixed @ (p / mixed * h) ** 2 - (p @ h) ** 2) / 4
    crossed, variance = mean(2)
    np.testing.assert_allclose(crossed, p @ h, rtol=1e-10)
    assert abs(variance - plain) > 1e-3 * plain  # beta isn't 0
    assert abs(mean(1)[0] - p @ h) > 1e-4


def test_self_normalised_has_the_mean_that_its_formula_has_over_all_pairs():
    w = (P / Q)[PAIRS]
    wanted = (w * H[PAIRS]).sum(axis=1) / w.sum(axis=1)
    found = in_float64(self_normalised, H[PAIRS], np.log(w))
    prob = Q[PAIRS].prod(axis=1)
    np.testing.assert_allclose(prob @ found.value, prob @ wanted, rtol=1e-10)
    assert found.biased and abs(prob @ found.value - TRUTH) > 1e-3


def test_psis_without_a_tail_to_smooth_is_importance():
    found = in_float64(psis, H[PAIRS], np.log(P / Q)[PAIRS])
    prob = Q[PAIRS].prod(axis=1)
    np.testing.assert_allclose(prob @ found.value, TRUTH, rtol=1e-10)
    assert found.biased
