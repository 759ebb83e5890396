"""Estimates watched while sampling: coverage at the time of stopping, by known draws."""

import numpy as np
import pytest

from tailrisk_jax.estimators import (
    MixtureDraws,
    betting_lower,
    betting_upper,
    component_mean_weights,
    control_variates,
    importance,
    in_float64,
    mixture_log_prob,
    monte_carlo,
    pareto_k,
    relative_width,
    replicates,
    report,
    running,
    target_share,
    verdict,
    wald_interval,
    watched_interval,
)

P = np.array([0.97, 0.02, 0.01])
Q = np.array([0.4, 0.4, 0.2])
H = np.array([0.0, 1.0, 1.0])
TRUTH = float(P @ H)
LOG_W = np.log(P / Q)


def test_stopping_on_the_watched_interval_keeps_its_coverage_and_wald_loses_it():
    """Looks every 20 draws; stops when the interval is narrow, or first excludes TRUTH."""
    repeats, most = 400, 1600
    y = np.random.default_rng(0).choice(3, size=(repeats, most), p=Q)
    scores, log_w = H[y], LOG_W[y]
    wrong_stop, wrong_ever, wald_ever = (np.zeros(repeats, bool) for _ in range(3))
    going = np.ones(repeats, bool)
    for n in range(100, most + 1, 100):
        first = np.broadcast_to(np.arange(most) < n, scores.shape)
        found = importance(scores, log_w, mask=first)
        watched = watched_interval(scores, log_w, level=0.9, tuned_for=400, mask=first)
        wrong = np.asarray((watched.lower > TRUTH) | (watched.upper < TRUTH))
        done = going & np.asarray(relative_width(found.value, watched) <= 0.15)
        wrong_stop |= done & wrong
        going &= ~done
        wrong_ever |= wrong
        wald = wald_interval(found.value, found.stderr, 0.9)
        wald_ever |= np.asarray((wald.lower > TRUTH) | (wald.upper < TRUTH))
    slack = 4 * np.sqrt(0.09 / repeats)
    assert going.mean() < 0.05
    assert wrong_stop.mean() < 0.1 + slack
    assert wrong_ever.mean() < 0.1 + slack
    assert wald_ever.mean() > 0.2


def test_watched_interval_is_made_of_its_two_limits():
    y = np.random.default_rng(1).choice(3, size=200, p=Q)
    found = in_float64(watched_interval, H[y], LOG_W[y])
    lower = in_float64(betting_lower, H[y], LOG_W[y], level=0.975, block=1)
    assert found.lower == lower and found.kind == "watched" and not found.certified
    nothing = watched_interval(np.zeros(50), np.zeros(50))
    assert nothing.lower == 0 and nothing.upper == np.inf
    assert relative_width(0.0, nothing) == np.inf


def test_running_is_importance_on_the_first_draws():
    y = np.random.default_rng(2).choice(3, size=(2, 300), p=Q)
    mask = np.arange(300) < np.array([[300], [120]])
    found = in_float64(running, H[y], LOG_W[y], points=7, mask=mask)
    assert found.num_samples[0] == 1 and found.num_samples[-1] == 300
    for s, n in enumerate(found.num_samples):
        for row, kept in enumerate((n, min(n, 120))):
            wanted = in_float64(importance, H[y][row, :kept], LOG_W[y][row, :kept])
            np.testing.assert_allclose(found.value[row, s], wanted.value, rtol=1e-12)
            np.testing.assert_allclose(found.upper[row, s], wanted.upper, rtol=1e-9)


def test_replicates_spread_as_the_variance_says():
    repeats, num = 300, 200
    y = np.random.default_rng(3).choice(3, size=(2, repeats, num), p=Q)
    found = in_float64(replicates, H[y], LOG_W[y])
    exact = np.sqrt((Q @ (P / Q * H - TRUTH) ** 2) / num)
    np.testing.assert_allclose(found.spread, exact, rtol=4 / np.sqrt(2 * repeats))
    np.testing.assert_allclose(found.claimed, exact, rtol=0.05)
    one = in_float64(replicates, H[y][:, :1], LOG_W[y][:, :1])
    assert np.isnan(one.spread).all()


def mixed(rows=3, num=400, seed=4):
    rng = np.random.default_rng(seed)
    alphas, components = np.array([0.2, 0.8]), np.stack([P, Q])
    labels = (rng.random((rows, num)) < alphas[1]).astype(int)
    y = np.where(labels == 0, rng.choice(3, (rows, num), p=P), rng.choice(3, (rows, num), p=Q))
    draws = MixtureDraws(np.log(P)[y], np.log(components)[:, y], np.log(alphas), labels, 0)
    log_w = np.log(P)[y] - np.asarray(mixture_log_prob(draws.component_log_probs, np.log(alphas)))
    return H[y], log_w, draws


def test_a_report_is_what_its_parts_are():
    scores, log_w, draws = mixed()
    found = in_float64(report, scores, log_w, draws, level=0.9)
    estimate = in_float64(importance, scores, log_w, level=0.9)
    own = in_float64(component_mean_weights, draws.log_p, draws.component_log_probs, draws.labels)
    np.testing.assert_allclose(found.estimate.upper, estimate.upper)
    np.testing.assert_allclose(found.components.mean_weight, own.mean_weight)
    np.testing.assert_allclose(
        found.target_share, in_float64(target_share, scores, log_w, draws.labels)
    )
    np.testing.assert_allclose(
        found.lower_certificate, in_float64(betting_lower, scores, log_w, level=0.9)
    )
    np.testing.assert_allclose(
        found.upper_certificate,
        in_float64(betting_upper, scores, log_w, -np.log(0.2), level=0.9),
    )
    np.testing.assert_allclose(found.k_hat, in_float64(pareto_k, log_w))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(found.k_hat_harm, in_float64(pareto_k, log_w + np.log(scores)))
    judged = verdict(
        found.estimate, found.components, target_share=found.target_share,
        covered_hits=found.covered_hits,
    )  # fmt: skip
    np.testing.assert_array_equal(found.verdict.code, judged.code)
    assert np.all(found.lower_certificate < TRUTH) and np.all(found.upper_certificate > TRUTH)


def test_rows_of_different_length_are_reported_as_if_alone():
    scores, log_w, draws = mixed(rows=2)
    counts = (400, 31)
    mask = np.arange(400) < np.array(counts)[:, None]
    scores, log_w = np.where(mask, scores, 7.0), np.where(mask, log_w, 50.0)  # absent: no bound
    found = in_float64(report, scores, log_w, draws, mask=mask)
    for row, n in enumerate(counts):
        alone = MixtureDraws(
            draws.log_p[row, :n], draws.component_log_probs[:, row, :n], draws.log_alphas,
            draws.labels[row, :n], 0,
        )  # fmt: skip
        wanted = in_float64(report, scores[row, :n], log_w[row, :n], alone)
        for name in ("value", "stderr", "lower", "upper", "ess", "unscored", "hits", "kl"):
            one, other = getattr(found.estimate, name)[row], getattr(wanted.estimate, name)
            np.testing.assert_allclose(one, other, rtol=1e-9, err_msg=name)
        for name in ("lower_certificate", "upper_certificate", "k_hat", "target_share"):
            one, other = getattr(found, name)[row], getattr(wanted, name)
            np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)
        assert found.verdict.code[row] == wanted.verdict.code


def test_rows_with_weights_of_their_own_are_reported_as_if_alone():
    """And one without target draws has no bound on its weights."""
    rng, num = np.random.default_rng(5), 400
    alphas, components = np.array([[0.2, 0.8], [0.6, 0.4], [0.0, 1.0]]), np.stack([P, Q])
    labels = (rng.random((3, num)) < alphas[:, 1:]).astype(int)
    y = np.where(labels == 0, rng.choice(3, (3, num), p=P), rng.choice(3, (3, num), p=Q))
    with np.errstate(divide="ignore"):
        log_alphas = np.log(alphas)
    draws = MixtureDraws(np.log(P)[y], np.log(components)[:, y], log_alphas, labels, 0)
    log_w = np.log(P / (alphas @ components))[np.arange(3)[:, None], y]
    np.testing.assert_allclose(
        log_w, np.log(P)[y] - mixture_log_prob(draws.component_log_probs, log_alphas), atol=1e-6
    )
    found = in_float64(report, H[y], log_w, draws, level=0.9)
    controlled = in_float64(
        control_variates, H[y], draws.log_p, np.log(components)[:, y], log_alphas
    )
    for row in range(3):
        scores, log_p, log_q, own, weights = (
            np.stack([x] * 3, axis=-2)
            for x in (H[y][row], draws.log_p[row], np.log(components)[:, y[row]], labels[row],
                      log_w[row])
        )  # fmt: skip
        alone = MixtureDraws(log_p, log_q, log_alphas[row], own, 0)
        wanted = in_float64(report, scores, weights, alone, level=0.9)
        for name in ("lower_certificate", "upper_certificate", "target_share", "covered_hits"):
            one, other = getattr(found, name)[row], getattr(wanted, name)[0]
            np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)
        assert found.verdict.code[row] == wanted.verdict.code[0]
        single = in_float64(control_variates, scores, log_p, log_q, log_alphas[row])
        np.testing.assert_allclose(controlled.value[row], single.value[0], rtol=1e-6)
    np.testing.assert_allclose(  # with nothing to regress on, importance sampling
        controlled.value[2], in_float64(importance, H[y][2], log_w[2]).value, rtol=1e-6
    )
    assert found.components.count[0, 2] == 0 and found.upper_certificate[2] == np.inf
    assert np.all(found.upper_certificate[:2] < 1)


def test_draws_from_the_target_are_reported_as_monte_carlo():
    scores = np.array([[1.0] * 3 + [0.0] * 97, [0.0] * 100])
    found = in_float64(report, scores, None)
    exact = in_float64(monte_carlo, scores)
    np.testing.assert_array_equal(found.estimate.upper, exact.upper)
    assert found.estimate.estimator == "monte_carlo" and found.estimate.certified.all()
    assert np.all(found.upper_certificate < 0.3)


def test_errors():
    scores, log_w, draws = mixed()
    with pytest.raises(ValueError, match="log_weights is None with a mixture"):
        report(scores, None, draws)
    with pytest.raises(ValueError, match="above log_bound"):
        report(np.ones_like(scores), log_w + 3, draws)
    with pytest.raises(ValueError, match="mask has dtype"):
        report(scores, log_w, mask=np.ones_like(scores))
