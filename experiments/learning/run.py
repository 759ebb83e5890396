"""What a learned adapter is worth as a proposal on the organism, exactly.

    tailrisk learn --model organism --start "0.8*ablation:refusal:0.1@2.5 + 0.2*checkpoint:unsafe" \
        --rounds 3 --samples 300 --steps 150 --out runs/learned
    python experiments/learning/run.py runs/learned    # the table; half a minute
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro

from tailrisk_jax import load_organism
from tailrisk_jax.organisms.efficiency import efficiency, load_responses, log_prob_of_responses
from tailrisk_jax.studies import parse_proposal

START = "0.7*ablation:refusal:0.1@2.5 + 0.2*checkpoint:unsafe"
TARGET_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    adapter: tyro.conf.Positional[Path]
    """Where `tailrisk learn` wrote it."""


def main(options: Options) -> None:
    """Prints the table: medians over the queries of a decade, the least in brackets."""
    organism, shipped = load_organism(), load_responses()
    queries = list(organism.forbidden)
    responses = [shipped[query.id] for query in queries]
    decades = np.asarray([query.decade for query in queries])
    shown = sorted(set(decades.tolist()), reverse=True)
    print("| proposal | figure | " + " | ".join(f"1e{decade}" for decade in shown) + " |")
    print("|---|---|" + "--:|" * len(shown))
    for name, text in {
        "the demo's": f"{TARGET_SHARE}*target + {START}",
        "adapter": f"{TARGET_SHARE}*target + {1 - TARGET_SHARE}*adapter:{options.adapter}",
        "adapter beside the demo's": f"{TARGET_SHARE}*target + 0.6*adapter:{options.adapter} "
        "+ 0.23*ablation:refusal:0.1@2.5 + 0.07*checkpoint:unsafe",
    }.items():
        proposal = parse_proposal(
            text,
            organism.target,
            vectors=organism.directions,
            checkpoints={"unsafe": organism.unsafe},
        )
        log_q = log_prob_of_responses(proposal.policy, organism, queries, responses)
        bounds = np.asarray(
            [
                efficiency(organism.truth(query), own, of_own, max_weight=1 / TARGET_SHARE)
                for query, own, of_own in zip(queries, responses, log_q, strict=True)
            ]
        )
        for figure, values in zip(("certain", "enumerated"), bounds.T, strict=True):
            of_decade = (values[decades == decade] for decade in shown)
            cells = (f"{np.median(own):,.0f} ({own.min():.2g})" for own in of_decade)
            print(f"| {name} | {figure} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
