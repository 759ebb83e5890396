"""From observations to everything that a study reports; pure functions of arrays."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from tailrisk_jax.estimators import (
    Interval,
    MixtureDraws,
    Replicates,
    Report,
    Running,
    importance,
    in_float64,
    relative_width,
    replicates,
    report,
    running,
    watched_interval,
)
from tailrisk_jax.studies.observations import Observations
from tailrisk_jax.studies.settings import Settings


@dataclasses.dataclass(frozen=True)
class Weighting:
    """How the proposal's density is made up.

    Attributes:
      names: of its components, for people.
      weights: of the components of a mixture, the mean over queries where they differ, [K]; None
        for a single policy.
      target_index: the component that is the target itself, or None.
      per_query: the weights of each query, in their order, where they differ, [Q, K]; or None.
      diluted: components whose coverage says nothing; see `estimators.verdict`.
    """

    names: Sequence[str]
    weights: Sequence[float] | None
    target_index: int | None
    per_query: Sequence[Sequence[float]] | None = None
    diluted: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything a study found; `samples` has a row per response, in order."""

    observations: Observations
    samples: pa.Table
    weighting: Weighting
    report: Report
    running: Running
    replicates: Replicates | None


def analyse(
    observed: Observations, samples: pa.Table, weighting: Weighting, settings: Settings
) -> Results:
    """All statistics of a study, per query; sums in float64."""
    scores, log_weights = observed.scores, observed.log_weights
    present, level = observed.present, settings.level
    found = report_of(observed, weighting, level=level)
    if settings.until is not None:
        watched = _watched(scores, log_weights, present, settings)
        estimate = dataclasses.replace(
            found.estimate,
            lower=watched.lower,
            upper=watched.upper,
            certified=np.zeros_like(found.estimate.certified),
        )
        found = dataclasses.replace(found, estimate=estimate)
    repeats = None
    if settings.replicates > 1:
        shape = (len(scores), settings.replicates, settings.num_samples)
        repeats = in_float64(replicates, scores.reshape(shape), log_weights.reshape(shape))
    return Results(
        observations=observed,
        samples=samples,
        weighting=weighting,
        report=found,
        running=in_float64(running, scores, log_weights, level=level, mask=present),
        replicates=repeats,
    )


def report_of(
    observed: Observations, weighting: Weighting, *, level: float, size: int | None = None
) -> Report:
    """`estimators.report` of each query, [Q]; or of its draws in parts of `size`, [Q, R].

    Draws beyond the last whole part are left out.
    """

    def cut(array: np.ndarray) -> np.ndarray:
        if size is None:
            return array
        parts = array.shape[-1] // size
        return array[..., : parts * size].reshape(*array.shape[:-1], parts, size)

    present, mixed = cut(observed.present), None
    if weighting.weights is not None:
        alphas = np.asarray(
            weighting.weights if weighting.per_query is None else weighting.per_query, np.float32
        )
        if alphas.ndim > 1 and size is not None:
            alphas = np.broadcast_to(alphas[:, None], (*present.shape[:-1], alphas.shape[-1]))
        with np.errstate(divide="ignore"):
            log_alphas = np.log(alphas)
        mixed = MixtureDraws(
            log_p=cut(observed.log_p),
            component_log_probs=cut(observed.component_log_q),
            log_alphas=log_alphas,
            labels=cut(observed.components),
            target_index=weighting.target_index,
        )
    plain = mixed is None and weighting.target_index is not None
    return in_float64(
        report,
        cut(observed.scores),
        None if plain else cut(observed.log_weights),
        mixed,
        level=level,
        mask=present,
        diluted=tuple(weighting.diluted),
        rescore_noise=cut(observed.rescore_noise).max(axis=-1),
        truncated=np.mean(~cut(observed.ended), axis=-1, where=present),
    )


def watched_widths(observed: Observations, settings: Settings) -> Float[np.ndarray, " Q"]:
    """Each query's watched interval to either side, as a share of its estimate; inf: unknown."""
    # Rounds make N grow; filled up to the next doubling, most need no new compilation.
    rounds = math.ceil(observed.present.shape[1] / settings.num_samples)
    size = settings.num_samples * 2 ** math.ceil(math.log2(rounds))
    filling = [(0, 0), (0, size - observed.present.shape[1])]
    scores, log_weights, mask = (
        np.pad(array, filling)
        for array in (observed.scores, observed.log_weights, observed.present)
    )
    value = in_float64(importance, scores, log_weights, mask=mask).value
    width = np.asarray(relative_width(value, _watched(scores, log_weights, mask, settings)))
    return np.where(np.isnan(width), np.inf, width)


def _watched(
    scores: np.ndarray, log_weights: np.ndarray, mask: np.ndarray, settings: Settings
) -> Interval:
    return in_float64(
        watched_interval,
        scores,
        log_weights,
        level=settings.level,
        mask=mask,
        tuned_for=settings.num_samples,
    )
