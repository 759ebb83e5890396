"""One study: draw, weigh, judge, estimate, for all queries."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float

from tailrisk_jax.errors import InputError
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
from tailrisk_jax.judges import Judge, Response
from tailrisk_jax.policies import Mixture, Policy, Prompts, check_comparable, encode
from tailrisk_jax.rollouts import Draws, Weighed, draw, weigh
from tailrisk_jax.studies.queries import StudyQuery

BATCHES = 5  # of queries, at most: how finely progress is told


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a study's figures depend on, beside the policies, queries and judge.

    Attributes:
      num_samples: N, responses per query; with `until`, per query and round.
      max_new_tokens: T, where responses are cut; part of the estimand.
      seed: of every draw.
      level: of the intervals.
      until: sample on, round by round, each query until its `watched_interval` is no wider than
        this share of its estimate to either side, or `max_samples` are drawn; None for one round.
      max_samples: responses per query at most, with `until`.
      replicates: how many times N responses are drawn and estimated from; all count together.
      batch_size: responses on the device at once, None for what fits; changes no figure.
    """

    num_samples: int = 500
    max_new_tokens: int = 64
    seed: int = 0
    level: float = 0.95
    until: float | None = None
    max_samples: int = 20_000
    replicates: int = 1
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens", "max_samples", "replicates", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if not 0 < self.level < 1:
            raise InputError(f"level={self.level} must lie between 0 and 1, e.g. 0.95")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must lie between 0 and 2**32 - 1")
        if self.until is None:
            return
        if not self.until > 0:
            raise InputError(f"until={self.until} must be above 0, e.g. 0.2 for 20%")
        if self.replicates > 1:
            raise InputError(
                f"until={self.until} with replicates={self.replicates}: replicates have a fixed "
                "number of samples; give one of the two"
            )
        if self.max_samples < self.num_samples:
            raise InputError(
                f"max_samples={self.max_samples} is below num_samples={self.num_samples}, "
                "which is one round; raise it or draw less a round"
            )


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything a study found; arrays as in `Draws`, `Weighed` and `Report`.

    `present` [Q, N] is False where a query has fewer draws than the others; `scores` are NaN
    there. `target_index` is the component of the proposal that is the target itself, or None.
    """

    queries: list[StudyQuery]
    draws: Draws
    weighed: Weighed
    scores: Float[np.ndarray, "Q N"]
    present: Bool[np.ndarray, "Q N"]
    target_index: int | None
    report: Report
    running: Running
    replicates: Replicates | None


def run_study(
    target: Policy,
    proposal: Policy | Mixture,
    queries: Sequence[StudyQuery],
    judge: Judge,
    settings: Settings,
    on_progress: Callable[[int], Any] = lambda done: None,
) -> Results:
    """Estimates E_p[score] for every query from draws of the proposal.

    Args:
      on_progress: called with the number of queries done, after each batch of them.
    """
    components = proposal.components if isinstance(proposal, Mixture) else (proposal,)
    check_comparable([target, *components])
    prompts = encode(target.model, [query.content for query in queries])
    parts: list[_Part] = []
    active, first = np.arange(len(queries)), 0
    size = settings.num_samples * settings.replicates
    while True:
        for picked, kept in _batches(active):
            draws, weighed = _draw(target, proposal, prompts, picked, first, size, settings)
            scores = _judged(judge, [queries[q] for q in picked[:kept]], draws)
            parts.append(_Part(picked[:kept], first, draws, weighed, scores))
            if settings.until is None:
                on_progress(sum(len(part.picked) for part in parts))
        whole = _assemble(parts, len(queries))
        if settings.until is None:
            break
        first += size
        active = active[~_precise(whole, settings, settings.until)[active]]
        on_progress(len(queries) - len(active))
        size = min(size, settings.max_samples - first)
        if not len(active) or size == 0:
            break
    target_index = next((k for k, policy in enumerate(components) if policy is target), None)
    draws, weighed, scores, present = whole
    return Results(
        queries=list(queries),
        draws=dataclasses.replace(draws, prompts=prompts),
        weighed=weighed,
        scores=scores,
        present=present,
        target_index=target_index,
        **_analyse(proposal, target_index, whole, settings),
    )


class _Part(NamedTuple):
    """One batch of one round: samples first .. first + n - 1 of the queries `picked`."""

    picked: np.ndarray
    first: int
    draws: Draws
    weighed: Weighed
    scores: np.ndarray


class _Whole(NamedTuple):
    draws: Draws
    weighed: Weighed
    scores: np.ndarray
    present: np.ndarray


def _batches(active: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Query indices in batches of one size, so that all compile to one, and how many count."""
    size = math.ceil(len(active) / BATCHES)
    for start in range(0, len(active), size):
        yield active[np.arange(start, start + size) % len(active)], min(size, len(active) - start)


def _draw(
    target: Policy,
    proposal: Policy | Mixture,
    prompts: Prompts,
    picked: np.ndarray,
    first: int,
    size: int,
    settings: Settings,
) -> tuple[Draws, Weighed]:
    key, rows = jax.random.key(settings.seed), settings.batch_size
    draws = draw(
        key, proposal, prompts[picked], size, settings.max_new_tokens, first=first, batch_size=rows
    )
    weighed = weigh(target, proposal, draws, batch_size=rows)
    return draws, weighed


def _judged(judge: Judge, queries: Sequence[StudyQuery], draws: Draws) -> np.ndarray:
    """Scores [Q, N] of the responses to `queries`, the first of the draws."""
    tokens, lengths = np.asarray(draws.tokens), np.asarray(draws.mask).sum(axis=-1)
    ended = np.asarray(draws.ended)
    responses = [
        Response(
            query_id=query.id,
            query=query.content,
            text=text,
            tokens=tuple(tokens[q, n, : lengths[q, n]].tolist()),
            ended=bool(ended[q, n]),
        )
        for q, (query, texts) in enumerate(zip(queries, draws.text, strict=False))
        for n, text in enumerate(texts)
    ]
    return np.asarray(judge(responses).scores).reshape(len(queries), -1)


def _assemble(parts: Sequence[_Part], queries: int) -> _Whole:
    """All parts as [Q, N] arrays of numpy; 0 (scores: NaN) where a query has fewer draws."""
    total = max(part.first + part.scores.shape[1] for part in parts)

    def place(arrays: Sequence[Any], axis: int = 0, fill: Any = 0) -> np.ndarray:
        arrays = [np.asarray(array) for array in arrays]
        shape = list(arrays[0].shape)
        shape[axis : axis + 2] = queries, total
        whole = np.full(shape, fill, arrays[0].dtype)
        rows = np.moveaxis(whole, (axis, axis + 1), (0, 1))
        for part, array in zip(parts, arrays, strict=True):
            new = np.moveaxis(array, (axis, axis + 1), (0, 1))
            kept, size = part.scores.shape
            rows[part.picked, part.first : part.first + size] = new[:kept]
        return whole

    nothing: Any = None  # prompts have no axis of samples
    bare = [dataclasses.replace(part.draws, prompts=nothing) for part in parts]
    draws = jax.tree.map(lambda *arrays: place(arrays), *bare)
    fields: dict[str, Any] = {
        field.name: place(
            [getattr(part.weighed, field.name) for part in parts],
            axis=1 if field.name == "component_log_probs" else 0,
        )
        for field in dataclasses.fields(Weighed)
    }
    scores = place([part.scores for part in parts], fill=np.nan)
    present = place([np.ones(part.scores.shape, bool) for part in parts], fill=False)
    return _Whole(draws, Weighed(**fields), scores, present)


def _watched(whole: _Whole, settings: Settings) -> Interval:
    return in_float64(
        watched_interval,
        whole.scores,
        whole.weighed.log_weights,
        level=settings.level,
        mask=whole.present,
        tuned_for=settings.num_samples,
    )


def _precise(whole: _Whole, settings: Settings, until: float) -> np.ndarray:
    """Which queries have an estimate as precise as `until` asks for."""
    value = in_float64(
        importance, whole.scores, whole.weighed.log_weights, mask=whole.present
    ).value
    return np.asarray(relative_width(value, _watched(whole, settings)) <= until)


def _analyse(
    proposal: Policy | Mixture, target_index: int | None, whole: _Whole, settings: Settings
) -> dict[str, Any]:
    scores, log_weights = whole.scores, whole.weighed.log_weights
    options = {"level": settings.level, "mask": whole.present}
    mixed = None
    if isinstance(proposal, Mixture):
        mixed = MixtureDraws(
            log_p=whole.weighed.log_p,
            component_log_probs=whole.weighed.component_log_probs,
            log_alphas=np.log(proposal.weights),
            labels=whole.draws.labels,
            target_index=target_index,
        )
    plain = mixed is None and target_index is not None
    found = in_float64(
        report,
        scores,
        None if plain else log_weights,
        mixed,
        **options,
        rescore_noise=whole.weighed.rescore_noise.max(axis=1),
        truncated=np.mean(~whole.draws.ended, axis=1, where=whole.present),
    )
    if settings.until is not None:
        watched = _watched(whole, settings)
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
    return {
        "report": found,
        "running": in_float64(running, scores, log_weights, **options),
        "replicates": repeats,
    }
