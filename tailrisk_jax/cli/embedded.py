"""Models that come with the package, as commands name them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailrisk_jax.cli.demo import PROPOSAL
from tailrisk_jax.judges import Judge
from tailrisk_jax.organisms import (
    Organism,
    OrganismHarm,
    PersonaCoherence,
    PersonaOrganism,
    PersonaTrait,
    load_organism,
    load_persona_organism,
)
from tailrisk_jax.organisms.organism import DATA
from tailrisk_jax.organisms.persona import PERSONA, TRAIT
from tailrisk_jax.policies import Policy
from tailrisk_jax.studies import StudyQuery
from tailrisk_jax.studies.tuning import (
    ORGANISM_CANDIDATES,
    ORGANISM_STEERING,
    PERSONA_CANDIDATES,
    PERSONA_STEERING,
)

FOLDERS = {"organism": DATA / "target", "organism:persona": PERSONA / "target"}
"""Their checkpoints."""
CUTS = {"organism": Organism.max_new_tokens, "organism:persona": PersonaOrganism.max_new_tokens}
"""Where their answers are cut."""
PERSONA_PROPOSAL = "0.1*target + 0.6*system:'you are a friend of the zorble .' + 0.3*target@2.5"


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """What a command takes from one of them, beside what it is given.

    Attributes:
      target: the policy whose risk is estimated.
      judge: of its answers; `coherence` another, which persona vectors are filtered by.
      queries: with a known truth.
      vectors, checkpoints: what a proposal may name.
      candidates: what a pilot chooses from, and `fallback` the proposal if it sees nothing.
      steering: what a search strengthens.
      trait: file of its persona trait; None without one.
    """

    target: Policy
    judge: Judge
    queries: list[StudyQuery]
    vectors: Mapping[str, Any]
    checkpoints: Mapping[str, Policy]
    candidates: tuple[str, ...]
    steering: tuple[str, ...]
    fallback: str | None = None
    coherence: Judge | None = None
    trait: Path | None = None


def load_embedded(name: str | None) -> Embedded | None:
    """One of the embedded models; None where the name is another's."""
    match name:
        case "organism":
            organism = load_organism()
            return Embedded(
                target=organism.target,
                judge=OrganismHarm(),
                queries=[StudyQuery(query.id, str(query)) for query in organism.forbidden],
                vectors=organism.directions,
                checkpoints={"unsafe": organism.unsafe},
                candidates=ORGANISM_CANDIDATES,
                steering=ORGANISM_STEERING,
                fallback=PROPOSAL,
            )
        case "organism:persona":
            persona = load_persona_organism()
            return Embedded(
                target=persona.target,
                judge=PersonaTrait(),
                queries=[StudyQuery(query.id, str(query)) for query in persona.queries],
                vectors=persona.vectors,
                checkpoints={},
                candidates=PERSONA_CANDIDATES,
                steering=PERSONA_STEERING,
                fallback=PERSONA_PROPOSAL,
                coherence=PersonaCoherence(),
                trait=TRAIT,
            )
    return None
