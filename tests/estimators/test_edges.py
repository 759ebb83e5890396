"""The edges that all weighted estimators share, as they are and under jit and vmap."""

import numpy as np
import pytest

from tailrisk_jax.estimators import (
    control_variates,
    importance,
    monte_carlo,
    psis,
    self_normalised,
)

NAN, INF = np.nan, np.inf


def mixture_of_one(scores, log_weights):
    """Control variates where q is one component: log p is the log-weight, log q is 0."""
    zeros = 0 * np.zeros(scores.shape, np.float32)
    return control_variates(scores, log_weights, zeros[None], np.zeros(1, np.float32))


ESTIMATORS = {
    "importance": importance,
    "self-normalised": self_normalised,
    "psis": psis,
    "control variates": mixture_of_one,
}

# scores, log-weights, and the value of (all but the self-normalised, self-normalised)
CASES = {
    "no hits": ([0, 0, 0, 0], [0, 1, 2, 90], (0, 0)),
    "one hit": ([1, 0, 0, 0], [0, 0, 0, 0], (0.25, 0.25)),
    "one draw": ([1], [-1], (np.exp(-1), 1)),
    "all weights 0": ([1, 1, 0, 0], [-INF] * 4, (0, NAN)),
    "unscored draws": ([1, NAN, 0, NAN], [0, 5, 0, 5], (0.5, 0.5)),
    "nothing scored": ([NAN] * 4, [0] * 4, (NAN, NAN)),
    "overflow on no hit": ([0, 0, 0, 0], [90] * 4, (0, 0)),
    "overflow on a hit": ([1, 1, 0, 0], [90] * 4, (INF, 0.5)),
    "draws from the target": ([1, 0, 0.5, 0], [0] * 4, (0.375, 0.375)),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("case", CASES)
def test_values(name, case, transform):
    scores, log_w, values = CASES[case]
    scores, log_w = np.asarray(scores, np.float32), np.asarray(log_w, np.float32)
    found = transform(ESTIMATORS[name])(scores, log_w)
    wanted = values[name == "self-normalised"]
    np.testing.assert_allclose(found.value, np.float32(wanted), rtol=1e-6)
    if np.isfinite(wanted):
        assert found.lower <= found.value <= found.upper


@pytest.mark.parametrize("name", ESTIMATORS)
def test_masked_draws_are_absent(name):
    scores = np.array([1, 0, 0.5, NAN], np.float32)
    padded = np.array([1, 7, 0, 0.5, NAN, NAN], np.float32)
    log_w = np.array([0.3, -1.0, 0.2, 0.0], np.float32)
    mask = np.array([True, False, True, True, True, False])
    weights = np.zeros(6, np.float32)
    weights[mask], weights[~mask] = log_w, NAN
    if name == "control variates":
        zeros, one = np.zeros((1, 6), np.float32), np.zeros(1, np.float32)
        found = control_variates(padded, weights, zeros, one, mask=mask)
        wanted = control_variates(scores, log_w, zeros[:, :4], one)
    else:
        found = ESTIMATORS[name](padded, weights, mask=mask)
        wanted = ESTIMATORS[name](scores, log_w)
    for field in ("value", "stderr", "upper", "unscored", "num_samples", "ess", "mean_weight"):
        one, other = getattr(found, field), getattr(wanted, field)
        np.testing.assert_allclose(one, other, rtol=1e-5, err_msg=field)


@pytest.mark.parametrize("name", [*ESTIMATORS, "monte carlo"])
def test_scores_outside_the_unit_interval_are_refused(name):
    estimator = (ESTIMATORS | {"monte carlo": lambda s, w: monte_carlo(s)})[name]
    with pytest.raises(ValueError, match=r"scores holds 1.5 at \(1,\), outside \[0, 1\]"):
        estimator(np.array([0.0, 1.5]), np.zeros(2))
