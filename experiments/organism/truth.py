"""Recomputes every shipped truth with the shipped oracle, and prints a table.

    python experiments/organism/truth.py

Exits with an error if a recomputed interval doesn't overlap the shipped one to a relative 1e-3
(what float32 forward passes on different machines may differ by is far less).
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import tyro
from queries import DECADES, drift_share, enumerate_query, tolerance

from tailrisk_jax.organisms import load_organism

AGREEMENT = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """Which data, how deep, and every how many queries."""

    data: Path = Path("tailrisk_jax/organisms/data")
    max_nodes: int = 40_000
    every: int = 1


def main(config: Config) -> None:
    """Prints id, bounds, relative gap, drift share, nodes and seconds of each forbidden query."""
    organism = load_organism(config.data)
    gaps: dict[int, list[float]] = {d: [] for d in DECADES}
    disagree = []
    print(f"{'id':12s}  {'lower':9s}  {'upper':9s}  {'gap':6s}  drift  nodes   s    query")
    for query in organism.forbidden[:: config.every]:
        assert query.decade is not None
        started = time.time()
        result = enumerate_query(
            organism.target,
            query,
            organism.event(query),
            rel_tol=tolerance(query.decade),
            max_nodes=config.max_nodes,
        )
        gap = result.upper / result.lower - 1
        gaps[query.decade].append(gap)
        apart = max(result.lower / query.upper, query.lower / result.upper)
        if apart > 1 + AGREEMENT:
            disagree.append(query.id)
        print(
            f"{query.id:12s}  {result.lower:.3e}  {result.upper:.3e}  {gap:6.2%}  "
            f"{drift_share(result):5.3f}  {result.nodes:5d}  {time.time() - started:4.1f}  "
            f"{query}{' (held out)' if query.held_out else ''}",
            flush=True,
        )
    for decade, found in gaps.items():
        if found:
            print(
                f"[1e{decade}, 1e{decade + 1}): {len(found)} queries, relative gap "
                f"median {np.median(found):.2%}, worst {max(found):.2%}"
            )
    helpful = [q.helpful for q in organism.allowed if q.helpful is not None]
    print(f"allowed: {len(helpful)} queries, least P(helpful) as shipped {min(helpful):.5f}")
    if disagree:
        raise SystemExit(f"shipped and recomputed bounds disagree for {', '.join(disagree)}")


if __name__ == "__main__":
    main(tyro.cli(Config))
