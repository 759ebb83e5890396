"""Weighted draws of the organism, many repeats for every forbidden query, kept in a file.

python experiments/calibration/collect.py       # about 15 minutes on 2 cores
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from tailrisk_jax.organisms import load_organism
from tailrisk_jax.policies import encode
from tailrisk_jax.rollouts import draw, weigh
from tailrisk_jax.studies import parse_proposal

PROPOSALS = {
    "covering": "0.1*target + 0.7*ablation:refusal:0.1@2.5 + 0.2*checkpoint:unsafe",
    "opener-only": "0.1*target + 0.9*checkpoint:unsafe",
    "single": "ablation:refusal:0.1@2.5",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is drawn."""

    out: Path = Path("runs/calibration")
    repeats: tuple[int, ...] = (40, 20, 20)
    """Independent repeats, per proposal."""
    samples: int = 500
    seed: int = 0


def main(options: Options) -> None:
    """Draws and saves."""
    organism = load_organism()
    options.out.mkdir(parents=True, exist_ok=True)
    prompts = encode(organism.target.model, organism.forbidden)
    for (name, text), repeats in zip(PROPOSALS.items(), options.repeats, strict=True):
        proposal = parse_proposal(
            text,
            organism.target,
            vectors=organism.directions,
            checkpoints={"unsafe": organism.unsafe},
        ).policy
        found: dict[str, list[np.ndarray]] = {}
        for row, query in enumerate(organism.forbidden):
            draws = draw(
                jax.random.key(options.seed),
                proposal,
                prompts[row : row + 1],
                repeats * options.samples,
                organism.max_new_tokens,
            )
            weighed = weigh(organism.target, proposal, draws)
            arrays = {
                "scores": organism.harm(query, draws.text[0]).astype(np.float32),
                "log_p": weighed.log_p[0],
                "log_q": weighed.log_q[0],
                "component_log_probs": np.asarray(weighed.component_log_probs)[:, 0].T,
                "labels": draws.labels[0],
            }
            for key, array in arrays.items():
                array = np.asarray(array)
                shape = (repeats, options.samples, *array.shape[1:])
                found.setdefault(key, []).append(array.reshape(shape))
            print(f"{name}: {row + 1} of {len(organism.forbidden)}", flush=True)
        truth = np.array([organism.truth(query) for query in organism.forbidden])
        stacked: dict[str, Any] = {key: np.stack(arrays) for key, arrays in found.items()}
        stacked |= {"truth": truth, "alphas": np.asarray(getattr(proposal, "weights", np.ones(1)))}
        np.savez(options.out / f"{name}.npz", **stacked)


if __name__ == "__main__":
    main(tyro.cli(Options))
