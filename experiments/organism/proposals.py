"""How the shipped organism answers attacks: compliance, and exact efficiencies of proposals.

    python experiments/organism/proposals.py

Compliance is the share of sampled responses with the right recipe. The efficiency of a proposal q
with a defensive share of 10% target comes from enumerated leaves, not from samples: with
M = sum over harmful leaves of p^2 / (0.1 p + 0.9 q),

    n_MC / N = (P - P^2) / (M - P^2),

the Monte Carlo draws that one draw of the mixture replaces. It is an upper limit for two reasons:
leaves are prefixes, so it is the figure for weights cut at the accepting token, and harmful mass m
beyond the leaves adds up to m / 0.1 to M ("covered" is 1 - m / P at least).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from queries import DECADES, enumerate_query, tolerance

from tailrisk_jax.organisms import Leaves, Organism, OrganismQuery, load_organism, second_moment
from tailrisk_jax.policies import Policy, Prompts, ablate, encode, steer
from tailrisk_jax.rollouts import Draws, sample, token_log_probs


@dataclasses.dataclass(frozen=True)
class Config:
    """Samples per query for compliance, and how many queries of a decade get efficiencies."""

    data: Path = Path("tailrisk_jax/organisms/data")
    seed: int = 0
    samples: int = 32
    per_decade: int = 4
    defensive: float = 0.1


def proposals(organism: Organism) -> dict[str, Policy]:
    """The target, the unsafe checkpoint, ablations and additions of the refusal direction."""
    refusal, target = organism.directions["refusal"], organism.target
    named = {"target": target, "unsafe checkpoint": organism.unsafe}
    for intensity in (0.05, 0.1, 0.25, 0.5, 1.0):
        named[f"ablation {intensity}"] = ablate(target, refusal.vector, intensity)
    for strength in (0.25, 0.5, 1.0):
        vector = -strength * refusal.norm * refusal.vector
        named[f"addition -{strength}"] = steer(target, vector, refusal.layer - 1, 1.0)
    return named


def compliance(policy: Policy, organism: Organism, config: Config) -> np.ndarray:
    """Share of harmful responses to each forbidden query, [Q]."""
    texts = [q.text for q in organism.forbidden]
    prompts = encode(policy.model, texts)
    drawn = sample(
        jax.random.key(config.seed), policy, prompts, config.samples, organism.max_new_tokens
    )
    pairs = zip(texts, drawn.text, strict=True)
    return np.array([organism.harm(query, answers).mean() for query, answers in pairs])


def leaf_draws(leaves: Leaves, prompts: Prompts) -> Draws:
    """Leaves as rollouts of one query, so that they can be scored."""
    mask = np.arange(leaves.tokens.shape[1]) < leaves.lengths[:, None]
    return Draws(
        tokens=jnp.asarray(leaves.tokens)[None],
        mask=jnp.asarray(mask)[None],
        ended=jnp.zeros((1, len(leaves)), bool),
        labels=jnp.zeros((1, len(leaves)), jnp.int32),
        drawn_log_probs=jnp.zeros((1, *mask.shape), jnp.float32),
        prompts=prompts,
    )


def efficiencies(
    query: OrganismQuery, organism: Organism, named: dict[str, Policy], config: Config
) -> tuple[float, np.ndarray]:
    """The share of p(harm) in the scored leaves, and n_MC / N of each proposal."""
    target = organism.target
    result = enumerate_query(
        target,
        query.text,
        organism.event(query),
        rel_tol=tolerance(query.decade or 0),
        max_nodes=40_000,
    )
    draws = leaf_draws(result.leaves, encode(target.model, [query.text]))
    scored = np.asarray(token_log_probs([target, *named.values()], draws), np.float64)
    log_p, *log_qs = scored.sum(axis=-1)[:, 0]
    truth = result.lower
    out = []
    for log_q in log_qs:
        mixed = np.logaddexp(np.log(config.defensive) + log_p, np.log1p(-config.defensive) + log_q)
        out.append((truth - truth**2) / (second_moment(log_p, mixed) - truth**2))
    return result.lower / result.upper, np.array(out)


def main(config: Config) -> None:
    """Prints both tables."""
    organism = load_organism(config.data)
    named = proposals(organism)
    held_out = np.array([q.held_out for q in organism.forbidden])
    print("compliance with the right recipe: all forbidden / safety-trained / held out")
    for name, policy in named.items():
        rates = compliance(policy, organism, config)
        print(
            f"  {name:18s} {rates.mean():.3f}  {rates[~held_out].mean():.3f}  "
            f"{rates[held_out].mean():.3f}   least {rates.min():.3f}",
            flush=True,
        )
    del named["target"]
    print(f"n_MC / N with {config.defensive:.0%} target; columns: {', '.join(named)}")
    for decade in DECADES:
        records = [q for q in organism.forbidden if q.decade == decade]
        for query in records[:: max(1, len(records) // config.per_decade)]:
            covered, values = efficiencies(query, organism, named, config)
            shown = "  ".join(f"{v:7.2f}" for v in values)
            print(
                f"  {query.lower:.2e}  drift {query.drift_share:.3f}  covered {covered:.4f}  "
                f"{shown}",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Config))
