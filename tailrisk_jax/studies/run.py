"""One study: draw, weigh, judge, estimate, for all queries."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import (
    ComponentWeights,
    Estimate,
    Verdict,
    component_mean_weights,
    covered_hits,
    importance,
    target_share,
    verdict,
)
from tailrisk_jax.judges import Judge
from tailrisk_jax.policies import Mixture, Policy, check_comparable, encode
from tailrisk_jax.rollouts import Draws, Weighed, draw, weigh
from tailrisk_jax.studies.queries import StudyQuery

_QUERY_AXIS = {"log_p": 0, "component_log_probs": 1, "log_q": 0, "rescore_noise": 0}
BATCHES = 5  # of queries, at most: how finely progress is told


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a study's figures depend on, beside the policies, queries and judge.

    Attributes:
      num_samples: N, responses per query.
      max_new_tokens: T, where responses are cut; part of the estimand.
      seed: of every draw.
      level: of the intervals.
      batch_size: responses on the device at once, None for what fits; changes no figure.
    """

    num_samples: int = 500
    max_new_tokens: int = 64
    seed: int = 0
    level: float = 0.95
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if not 0 < self.level < 1:
            raise InputError(f"level={self.level} must lie between 0 and 1, e.g. 0.95")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must lie between 0 and 2**32 - 1")


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything a study found; arrays as in `Draws`, `Weighed` and `Estimate`.

    `components` and `target_index` (the component that is the target itself, or None) describe
    the proposal; `scores` is [Q, N].
    """

    queries: list[StudyQuery]
    draws: Draws
    weighed: Weighed
    scores: Float[np.ndarray, "Q N"]
    estimate: Estimate
    components: ComponentWeights
    target_index: int | None
    target_share: Float[np.ndarray, " Q"]
    verdict: Verdict


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
    key = jax.random.key(settings.seed)
    per_batch = math.ceil(len(queries) / BATCHES)
    parts: list[tuple[Any, dict[str, np.ndarray]]] = []
    for start in range(0, len(queries), per_batch):
        # The last batch is filled up, so that all have one shape and one compilation.
        picked = np.arange(start, start + per_batch) % len(queries)
        kept = min(per_batch, len(queries) - start)
        sizes = settings.num_samples, settings.max_new_tokens
        draws = draw(key, proposal, prompts[picked], *sizes, batch_size=settings.batch_size)
        weighed = weigh(target, proposal, draws, batch_size=settings.batch_size)
        parts.append(
            (
                jax.tree.map(lambda x, kept=kept: np.asarray(x)[:kept], draws),
                {
                    name: np.take(np.asarray(getattr(weighed, name)), np.arange(kept), axis)
                    for name, axis in _QUERY_AXIS.items()
                },
            )
        )
        on_progress(start + kept)
    draws = jax.tree.map(lambda *x: np.concatenate(x), *(part[0] for part in parts))
    fields: Any = {
        name: np.concatenate([part[1][name] for part in parts], axis)
        for name, axis in _QUERY_AXIS.items()
    }
    weighed = Weighed(**fields)
    scores = np.stack(
        [judge(query.content, texts) for query, texts in zip(queries, draws.text, strict=True)]
    )
    return _analyse(target, components, list(queries), draws, weighed, scores, settings)


def _analyse(target, components, queries, draws, weighed, scores, settings) -> Results:
    estimate = importance(scores, weighed.log_weights, level=settings.level)
    own = component_mean_weights(weighed.log_p, weighed.component_log_probs, draws.labels)
    target_index = next((k for k, policy in enumerate(components) if policy is target), None)
    share = np.zeros(len(queries), np.float32)
    if target_index is not None:
        share = np.asarray(target_share(scores, weighed.log_weights, draws.labels, target_index))
    single = len(components) == 1
    judged = verdict(
        estimate,
        None if single else own,
        target_index=target_index,
        target_share=None if single else jnp.asarray(share),
        covered_hits=None if single else covered_hits(scores, draws.labels, own),
    )
    return Results(
        queries=queries,
        draws=draws,
        weighed=weighed,
        scores=scores,
        estimate=estimate,
        components=own,
        target_index=target_index,
        target_share=share,
        verdict=judged,
    )
