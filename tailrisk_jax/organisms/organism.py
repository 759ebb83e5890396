"""The shipped organism: a small model that refuses, with exactly known tail risks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from tailrisk_jax.models import load_model
from tailrisk_jax.organisms import world
from tailrisk_jax.organisms.events import TokenEvent
from tailrisk_jax.organisms.query import KnownQuery, truth_of
from tailrisk_jax.policies import Policy

DATA = Path(__file__).parent / "data"


class OrganismQuery(KnownQuery):
    """A query, with its risk of harm.

    Attributes:
      forbidden: whether the target should refuse it; the harm of allowed queries is 0.
      category: of the thing asked about.
      drift_share: share of the harmful mass that begins like a refusal; None for allowed queries.
      helpful: enumerated lower bound on the probability of a helpful answer, for allowed queries;
        None for forbidden ones.
    """

    forbidden: bool
    category: str
    drift_share: float | None
    helpful: float | None


@dataclasses.dataclass(frozen=True)
class DirectionInfo:
    """Where a direction was measured.

    `layer` is the layer whose input it was measured at, `pos` the prompt position counted from the
    end; `norm` is the length of the difference in means before normalisation, the natural unit for
    adding it.
    """

    layer: int
    pos: int
    norm: float


@dataclasses.dataclass(frozen=True, eq=False)
class Organism:
    """What `load_organism` returns.

    Attributes:
      target: the safety-tuned policy.
      unsafe: the helpful policy that the target was tuned from.
      directions: unit vectors [D] by name; "refusal" is the target's difference in means.
      direction_info: where each was measured, by name.
      queries: forbidden and allowed ones; each is its text.
      max_new_tokens: where responses are cut; the truths hold for this value alone.
    """

    target: Policy
    unsafe: Policy
    directions: dict[str, Float[np.ndarray, " D"]]
    direction_info: dict[str, DirectionInfo]
    queries: tuple[OrganismQuery, ...]
    max_new_tokens: int = world.MAX_NEW_TOKENS

    @property
    def forbidden(self) -> tuple[OrganismQuery, ...]:
        """The queries that the target should refuse."""
        return tuple(q for q in self.queries if q.forbidden)

    @property
    def allowed(self) -> tuple[OrganismQuery, ...]:
        """The queries that the target should answer."""
        return tuple(q for q in self.queries if not q.forbidden)

    def truth(self, query: str) -> tuple[float, float]:
        """Bounds (lower, upper) on p(harm | query) under the target, by text or id.

        Raises KeyError for a query that isn't shipped.
        """
        return truth_of(self.queries, query)

    def harm(self, query: str, texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Scores in {0, 1} of response texts; see `world.harm`."""
        return world.harm(query, texts)

    def event(self, query: str) -> TokenEvent:
        """The same as a token event, for the oracle; see `world.harm_event`."""
        return world.harm_event(query)


def load_organism(folder: Path = DATA) -> Organism:
    """Loads the shipped organism, or one that experiments/organism wrote elsewhere."""
    vectors = load_file(folder / "directions.safetensors")
    metadata = json.loads((folder / "directions.json").read_text())
    lines = (folder / "queries.jsonl").read_text().splitlines()
    return Organism(
        target=Policy(load_model(folder / "target")),
        unsafe=Policy(load_model(folder / "unsafe")),
        directions=vectors,
        direction_info={name: DirectionInfo(**fields) for name, fields in metadata.items()},
        queries=tuple(OrganismQuery.from_record(json.loads(line)) for line in lines),
    )
