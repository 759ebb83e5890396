"""The shipped organism: a small model that refuses, with exactly known tail risks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from tailrisk_jax.models import Model
from tailrisk_jax.models.checkpoint import load_params
from tailrisk_jax.models.config import from_hf
from tailrisk_jax.organisms import world
from tailrisk_jax.organisms.events import TokenEvent
from tailrisk_jax.policies import Policy

DATA = Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True)
class OrganismQuery:
    """A query with its exact risk under the target.

    Attributes:
      id: stable name.
      text: the user's message.
      forbidden: whether the target should refuse it; the harm of allowed queries is 0.
      thing: the object asked about, and `category` its category.
      held_out: whether safety training never saw its thing, verb, template or prefix.
      lower, upper: enumeration bounds on p(harm | query), cut at `world.MAX_NEW_TOKENS`.
      decade: d where 10^d <= risk < 10^(d+1); None for allowed queries.
      drift_share: share of the harmful mass that begins like a refusal; None for allowed queries.
      helpful: enumerated lower bound on the probability of a helpful answer, for allowed queries;
        None for forbidden ones.
    """

    id: str
    text: str
    forbidden: bool
    thing: str
    category: str
    held_out: bool
    lower: float
    upper: float
    decade: int | None
    drift_share: float | None
    helpful: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector [D] of the residual stream at the input of layer `layer`.

    `position` is the prompt position it was measured at, counted from the end; `norm` is the
    length of the difference in means before normalisation, the natural unit for adding it.
    """

    vector: Float[np.ndarray, " D"]
    layer: int
    position: int
    norm: float


@dataclasses.dataclass(frozen=True, eq=False)
class Organism:
    """What `load_organism` returns.

    Attributes:
      target: the safety-tuned policy.
      unsafe: the helpful policy that the target was tuned from.
      directions: by name; "refusal" is the target's difference in means.
      queries: forbidden and allowed ones.
      max_new_tokens: where responses are cut; the truths hold for this value alone.
    """

    target: Policy
    unsafe: Policy
    directions: dict[str, Direction]
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

    def truth(self, query: str | OrganismQuery) -> tuple[float, float]:
        """Bounds (lower, upper) on p(harm | query) under the target, by id, text or record.

        Raises KeyError for a query that isn't shipped.
        """
        key = query if isinstance(query, str) else query.id
        for record in self.queries:
            if key in (record.id, record.text):
                return record.lower, record.upper
        raise KeyError(f"{key!r} is no shipped query; see Organism.queries, or enumerate it")

    def harm(self, query: str | OrganismQuery, texts: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Scores in {0, 1} of response texts; see `world.harm`."""
        return world.harm(query if isinstance(query, str) else query.text, texts)

    def event(self, query: str | OrganismQuery) -> TokenEvent:
        """The same as a token event, for the oracle; see `world.harm_event`."""
        return world.harm_event(query if isinstance(query, str) else query.text)


def load_organism(folder: Path = DATA) -> Organism:
    """Loads the shipped organism, or one that experiments/organism wrote elsewhere."""
    vectors = load_file(folder / "directions.safetensors")
    metadata = json.loads((folder / "directions.json").read_text())
    lines = (folder / "queries.jsonl").read_text().splitlines()
    return Organism(
        target=Policy(_load_checkpoint(folder / "target")),
        unsafe=Policy(_load_checkpoint(folder / "unsafe")),
        directions={
            name: Direction(vectors[name], fields["layer"], fields["pos"], fields["norm"])
            for name, fields in metadata.items()
        },
        queries=tuple(OrganismQuery(**json.loads(line)) for line in lines),
    )


def _load_checkpoint(folder: Path) -> Model:
    """`load_model` without transformers' AutoConfig, which would import torch where it is found.

    Our own config.json has no older spellings that would need it.
    """
    from transformers import PreTrainedTokenizerFast

    fields = json.loads((folder / "config.json").read_text())
    config = from_hf(fields, end_ids=tuple(fields["eos_token_id"]))
    params = load_params(folder, config, jnp.float32)
    return Model(config, params, PreTrainedTokenizerFast.from_pretrained(folder))
