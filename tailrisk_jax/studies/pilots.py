"""Pilot draws: a few answers to a few of the queries, judged, for a proposal to be tuned by.

They come from a mixture of everything considered, the target with it, for queries that the seed
chooses. Their keys are folded from the seed by a number of their own, so that no draw of an
estimate, under the same seed or another, is one of the pilot's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from tailrisk_jax.adaptation import Costs, pilot_queries, pilot_tokens
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge, Response
from tailrisk_jax.policies import Component, Mixture, Policy
from tailrisk_jax.rollouts import Draws, draw
from tailrisk_jax.studies.proposals import Proposal
from tailrisk_jax.studies.queries import StudyQuery
from tailrisk_jax.studies.run import check_study
from tailrisk_jax.studies.settings import Settings

LEAST_QUERIES = 5  # of a pilot, where there are as many
_KEY = 0x70696C6F  # folded into the seed, so that a pilot has draws of its own


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """What a proposal is tuned for, and from.

    Attributes:
      target: the policy whose risk is estimated.
      parse: from the text of a proposal, by `parse_proposal` for this target.
      queries: of the study; the pilot takes a share of them.
      judge: of the study.
      settings: of the pilot: `num_samples` per pilot query, `max_new_tokens`, `seed` and
        `batch_size`.
      share: of the queries that are the pilot's, but at least 5 of them if there are as many.
    """

    target: Policy
    parse: Callable[[str], Proposal]
    queries: Sequence[StudyQuery]
    judge: Judge
    settings: Settings
    share: float = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class PilotDraws:
    """Draws from a mixture, the target first, with their scores.

    Attributes:
      queries: the pilot's M queries.
      mixed: what was drawn from.
      draws: [M, N].
      scores: [M, N].
      tokens: through the network, to draw them and score them under every policy of the mixture.
    """

    queries: list[StudyQuery]
    mixed: Mixture
    draws: Draws
    scores: Float[np.ndarray, "M N"]
    tokens: int

    @property
    def lengths(self) -> Int[np.ndarray, "M N"]:
        """Tokens of each response, end token included."""
        return np.asarray(self.draws.mask).sum(axis=-1)

    @property
    def hits(self) -> Int[np.ndarray, " M"]:
        """Draws with a score above 0, per query."""
        return np.sum(self.scores > 0, axis=1)

    @property
    def none_harmful(self) -> str:
        """The beginning of a sentence, where that is so."""
        return (
            f"None of {self.scores.size:,} pilot draws of {len(self.queries)} queries was harmful"
        )

    def record(self) -> dict[str, Any]:
        """The account, as JSON."""
        return {
            "queries": [query.id for query in self.queries],
            "samples": self.scores.shape[1],
            "hits": self.hits.tolist(),
            "without_hits": [q.id for q, n in zip(self.queries, self.hits, strict=True) if not n],
            "unscored": int(np.isnan(self.scores).sum()),
            "tokens": self.tokens,
        }


def equal_parts(terms: Sequence[str], material: Material) -> Proposal:
    """The target and the terms in equal shares.

    Raises:
      InputError: no terms but the target, one that is a mixture, and as `parse_proposal`.
    """
    names = ["target", *(term for term in dict.fromkeys(terms) if term != "target")]
    if len(names) < 2:
        raise InputError("there is nothing to tune: give candidates beside the target")
    share = 1 / len(names)
    return material.parse(" + ".join(f"{share!r}*{name}" for name in names))


def draw_pilot(mixed: Component | Mixture, material: Material) -> PilotDraws:
    """Draws from a mixture for the pilot's queries, and has them judged.

    Raises:
      InputError: a share outside (0, 1], and as `check_study` and the judge.
    """
    assert isinstance(mixed, Mixture)
    settings, total = material.settings, len(material.queries)
    key = jax.random.fold_in(jax.random.key(settings.seed), _KEY)
    share = material.share
    if 0 < share <= 1:  # any other is refused below
        share = min(1.0, max(share, LEAST_QUERIES / total))
    picked = pilot_queries(jax.random.fold_in(key, 0), total, share)
    queries = [material.queries[q] for q in picked]
    prompts = check_study(material.target, mixed, queries, settings)
    draws = draw(
        jax.random.fold_in(key, 1), mixed, prompts, settings.num_samples, settings.max_new_tokens,
        batch_size=settings.batch_size,
    )  # fmt: skip
    lengths = np.asarray(draws.mask).sum(axis=-1)
    scores = material.judge(_responses(draws, queries)).scores
    policies = len({id(one) for part in mixed.components for one in part.experts})
    experts = np.array([len(part.experts) for part in mixed.components])
    tokens = pilot_tokens(
        np.asarray(prompts.mask).sum(axis=1), lengths, drawing=policies, scoring=policies
    )
    tokens += int(np.sum(lengths * (experts[np.asarray(draws.labels)] - 1)))
    return PilotDraws(
        queries, mixed, draws, np.asarray(scores, np.float64).reshape(lengths.shape), tokens
    )


def costs_of(pilot: PilotDraws) -> Costs:
    """Of a response from each component, in tokens.

    A draw costs its tokens once for each policy that draws it in lock-step, and its share of the
    prompt. A policy's scoring is charged to the first component that it is part of. A component
    that drew nothing has the mean length of all.
    """
    lengths, labels = pilot.lengths, np.asarray(pilot.draws.labels)
    prompt = np.asarray(pilot.draws.prompts.mask).sum(axis=1).mean() / lengths.shape[1]
    mean, seen, draw_costs, score_costs = float(lengths.mean()), set[int](), [], []
    for k, part in enumerate(pilot.mixed.components):
        own = lengths[labels == k]
        length = float(own.mean()) if own.size else mean
        draw_costs.append(len(part.experts) * (length + prompt))
        new = {id(expert) for expert in part.experts} - seen
        score_costs.append(len(new) * (mean + prompt))
        seen |= new
    return Costs(tuple(draw_costs), tuple(score_costs))


def _responses(draws: Draws, queries: Sequence[StudyQuery]) -> list[Response]:
    tokens, mask, ended = (np.asarray(x) for x in (draws.tokens, draws.mask, draws.ended))
    return [
        Response(
            query.id, query.content, text, tuple(tokens[q, n][mask[q, n]].tolist()),
            bool(ended[q, n]), query.metadata,
        )
        for q, (query, texts) in enumerate(zip(queries, draws.text, strict=True))
        for n, text in enumerate(texts)
    ]  # fmt: skip
