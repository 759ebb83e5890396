"""The report of parts of a run's draws."""

import dataclasses

import numpy as np

from tailrisk_jax.studies import observations, read_samples, read_study, report_of


def test_parts_are_means_of_their_own_draws_with_weights_per_query_too(whole):
    """Draws beyond the last whole part are left out."""
    study = read_study(whole)
    observed = observations(study.queries, read_samples(whole))
    own = [[0.5, 0.5], [0.3, 0.7], [0.4, 0.6]]
    weighting = dataclasses.replace(study.weighting, per_query=own)
    parts = report_of(observed, weighting, level=0.95, size=10)
    terms = (np.exp(np.float64(observed.log_weights)) * observed.scores)[:, :20].reshape(3, 2, 10)
    assert terms.any()
    np.testing.assert_allclose(parts.estimate.value, terms.mean(axis=-1), rtol=1e-12)
    drawn = (observed.components[:, :20, None] == [0, 1]).reshape(3, 2, 10, 2).sum(axis=2)
    assert parts.components is not None
    np.testing.assert_array_equal(parts.components.count, np.moveaxis(drawn, -1, 0))
