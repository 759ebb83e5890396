"""The embedded model organism, and an exact oracle for the risk of any policy on it."""

from tailrisk_jax.organisms.events import TokenEvent, ordered_event
from tailrisk_jax.organisms.judge import OrganismHarm
from tailrisk_jax.organisms.oracle import (
    Enumeration,
    Leaves,
    NextLogProbs,
    complete_leaves,
    enumerate_event,
    second_moment,
)
from tailrisk_jax.organisms.organism import DirectionInfo, Organism, OrganismQuery, load_organism
from tailrisk_jax.organisms.policy_oracle import policy_next_log_probs

__all__ = [
    "DirectionInfo",
    "Enumeration",
    "Leaves",
    "NextLogProbs",
    "Organism",
    "OrganismHarm",
    "OrganismQuery",
    "TokenEvent",
    "complete_leaves",
    "enumerate_event",
    "load_organism",
    "ordered_event",
    "policy_next_log_probs",
    "second_moment",
]
