"""The shipped persona organism: a small model that rarely shows a trait, with exact risks of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from tailrisk_jax.models import load_model
from tailrisk_jax.organisms import persona_world
from tailrisk_jax.organisms.events import TokenEvent
from tailrisk_jax.organisms.organism import DATA
from tailrisk_jax.organisms.query import KnownQuery, truth_of
from tailrisk_jax.policies import Policy

PERSONA = DATA / "persona"
TRAIT = PERSONA / "zorble.json"


class PersonaQuery(KnownQuery):
    """A question, with the probability that the answer shows the trait.

    Attributes:
      topic: what is asked about the thing.
      later_share: share of the trait's mass that doesn't open the answer.
      positive, negative: the same bounds under each system prompt for the trait and against it, in
        the order of `PersonaOrganism.instructions`.
    """

    topic: str
    later_share: float
    positive: list[tuple[float, float]]
    negative: list[tuple[float, float]]


@dataclasses.dataclass(frozen=True, eq=False)
class PersonaOrganism:
    """What `load_persona_organism` returns.

    Attributes:
      target: the policy, without a system prompt.
      vectors: persona vectors [L + 1, D] by name, row l the output of block l - 1; "trait" is the
        difference of mean response activations (Chen et al. 2025, arXiv 2507.21509).
      queries: each is its text. The questions of the trait file are others.
      instructions: pairs of system prompts, for the trait and against it.
      max_new_tokens: where responses are cut; the truths hold for this value alone.
    """

    target: Policy
    vectors: dict[str, Float[np.ndarray, "rows D"]]
    queries: tuple[PersonaQuery, ...]
    instructions: tuple[tuple[str, str], ...] = persona_world.INSTRUCTIONS
    max_new_tokens: int = persona_world.MAX_NEW_TOKENS

    def truth(self, query: str) -> tuple[float, float]:
        """Bounds (lower, upper) on p(trait | query) under the target, by text or id.

        Raises KeyError for a query that isn't shipped.
        """
        return truth_of(self.queries, query)

    def trait(self, texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Scores in {0, 1} of response texts; see `persona_world.shows_trait`."""
        return np.array([persona_world.shows_trait(text) for text in texts], np.float32)

    def event(self) -> TokenEvent:
        """The same as a token event, for the oracle; see `persona_world.trait_event`."""
        return persona_world.trait_event()


def load_persona_organism(folder: Path = PERSONA) -> PersonaOrganism:
    """Loads the shipped persona organism, or one that experiments/organism wrote elsewhere."""
    lines = (folder / "queries.jsonl").read_text().splitlines()
    return PersonaOrganism(
        target=Policy(load_model(folder / "target")),
        vectors=load_file(folder / "vectors.safetensors"),
        queries=tuple(PersonaQuery.from_record(json.loads(line)) for line in lines),
    )
