"""The embedded model organisms, and an exact oracle for the risk of any policy on them."""

from tailrisk_jax.organisms.events import TokenEvent, ordered_event
from tailrisk_jax.organisms.judge import OrganismHarm, PersonaCoherence, PersonaTrait
from tailrisk_jax.organisms.oracle import (
    Enumeration,
    Leaves,
    NextLogProbs,
    complete_leaves,
    enumerate_event,
    second_moment,
)
from tailrisk_jax.organisms.organism import DirectionInfo, Organism, OrganismQuery, load_organism
from tailrisk_jax.organisms.persona import PersonaOrganism, PersonaQuery, load_persona_organism
from tailrisk_jax.organisms.policy_oracle import policy_next_log_probs

__all__ = [
    "DirectionInfo",
    "Enumeration",
    "Leaves",
    "NextLogProbs",
    "Organism",
    "OrganismHarm",
    "OrganismQuery",
    "PersonaCoherence",
    "PersonaOrganism",
    "PersonaQuery",
    "PersonaTrait",
    "TokenEvent",
    "complete_leaves",
    "enumerate_event",
    "load_organism",
    "load_persona_organism",
    "ordered_event",
    "policy_next_log_probs",
    "second_moment",
]
