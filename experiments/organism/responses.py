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

from tailrisk_jax.organisms import complete_leaves, load_organism, policy_next_log_probs
from tailrisk_jax.organisms.efficiency import HarmfulResponses, save_responses


@dataclasses.dataclass(frozen=True)
class Config:
    """Which data, and how much of the harmful mass found is kept, most probable first."""

    data: Path = Path("tailrisk_jax/organisms/data")
    keep: float = 0.9999
    max_nodes: int = 40_000


def main(config: Config) -> None:
    """Writes responses.npz beside the queries."""
    organism = load_organism(config.data)
    target = organism.target
    found = {}
    for query in organism.forbidden:
        assert query.decade is not None
        leaves = enumerate_query(
            target,
            query,
            organism.event(query),
            rel_tol=tolerance(query.decade),
            max_nodes=config.max_nodes,
        ).leaves
        complete = complete_leaves(
            policy_next_log_probs(target, query),
            leaves,
            end_tokens=target.model.config.end_ids,
            rel_tol=(1 - config.keep) / 2,
            max_nodes=config.max_nodes,
        )
        mass = np.cumsum(np.exp(complete.leaves.log_probs))
        kept = int(np.searchsorted(mass, config.keep * mass[-1])) + 1
        found[query.id] = HarmfulResponses(
            tokens=complete.leaves.tokens[:kept],
            lengths=complete.leaves.lengths[:kept],
            log_p=complete.leaves.log_probs[:kept],
            omitted=query.upper - math.fsum(np.exp(complete.leaves.log_probs[:kept])),
        )
        share = found[query.id].omitted / query.lower
        print(f"{query.id}  {kept:5d} responses  omitted share {share:.2%}  {query}", flush=True)
    save_responses(found, config.data / "responses.npz")


if __name__ == "__main__":
    main(tyro.cli(Config))
