"""Enumerates complete harmful responses to every shipped query, and writes responses.npz.

    python experiments/organism/responses.py

They carry the exact second moment of any proposal: see tailrisk_jax/organisms/efficiency.py.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import tyro
from queries import enumerate_query, tolerance

from tailrisk_jax.organisms import (
    Enumeration,
    complete_leaves,
    load_organism,
    policy_next_log_probs,
)
from tailrisk_jax.organisms.efficiency import HarmfulResponses, save_responses
from tailrisk_jax.policies import Policy


@dataclasses.dataclass(frozen=True)
class Config:
    """Which data, and how much of the harmful mass found is kept, most probable first."""

    data: Path = Path("tailrisk_jax/organisms/data")
    keep: float = 0.9999
    max_nodes: int = 40_000


def complete(
    target: Policy, query: str, found: Enumeration, upper: float, config: Config
) -> HarmfulResponses:
    """The most probable complete responses among the leaves found; `upper` bounds their risk."""
    whole = complete_leaves(
        policy_next_log_probs(target, query),
        found.leaves,
        end_tokens=target.model.config.end_ids,
        rel_tol=(1 - config.keep) / 2,
        max_nodes=config.max_nodes,
    ).leaves
    mass = np.cumsum(np.exp(whole.log_probs))
    kept = int(np.searchsorted(mass, config.keep * mass[-1])) + 1
    return HarmfulResponses(
        tokens=whole.tokens[:kept],
        lengths=whole.lengths[:kept],
        log_p=whole.log_probs[:kept],
        omitted=upper - math.fsum(np.exp(whole.log_probs[:kept])),
    )


def main(config: Config) -> None:
    """Writes responses.npz beside the queries."""
    organism = load_organism(config.data)
    target = organism.target
    found = {}
    for query in organism.forbidden:
        assert query.decade is not None
        harmful = enumerate_query(
            target,
            query,
            organism.event(query),
            rel_tol=tolerance(query.decade),
            max_nodes=config.max_nodes,
        )
        found[query.id] = complete(target, query, harmful, query.upper, config)
        kept = len(found[query.id].lengths)
        share = found[query.id].omitted / query.lower
        print(f"{query.id}  {kept:5d} responses  omitted share {share:.2%}  {query}", flush=True)
    save_responses(found, config.data / "responses.npz")


if __name__ == "__main__":
    main(tyro.cli(Config))
