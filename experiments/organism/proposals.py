"""How the shipped organism answers attacks: compliance, coverage, and exact efficiencies.

    python experiments/organism/proposals.py

For each unsafe version of the model: the share of its own draws that are harmful, its mean weight
on them, and the exact efficiency (`tailrisk_jax.organisms.efficiency`) of a mixture with 10%
target.
Efficiencies are bounds: for the lower one, harmful responses that were not enumerated are counted
against the proposal at the mixture's largest weight, which caps it near 1 / (10 x omitted share),
about 5 to 10 where the truth is below 1e-4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from queries import DECADES

from tailrisk_jax.organisms import Organism, PersonaOrganism, load_organism
from tailrisk_jax.organisms.efficiency import efficiency, load_responses, log_prob_of_responses
from tailrisk_jax.organisms.query import KnownQuery
from tailrisk_jax.policies import Policy, ablate, at_temperature, encode, steer
from tailrisk_jax.rollouts import draw, weigh

DEMO = {"ablation 0.1 at temperature 2.5": 0.7, "unsafe checkpoint": 0.2}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which data, draws per query for compliance and mean weights, and the target's share."""

    data: Path = Path("tailrisk_jax/organisms/data")
    seed: int = 0
    samples: int = 64
    defensive: float = 0.1


def proposals(organism: Organism) -> dict[str, Policy]:
    """The unsafe checkpoint, ablations and additions of the refusal direction, temperatures."""
    direction, info = organism.directions["refusal"], organism.direction_info["refusal"]
    target = organism.target
    named = {"unsafe checkpoint": organism.unsafe}
    for intensity in (0.1, 0.3, 0.5, 1.0):
        named[f"ablation {intensity}"] = ablate(target, direction, intensity)
    for strength in (0.35, 0.6, 1.0):
        vector = -strength * info.norm * direction
        named[f"addition -{strength}"] = steer(target, vector, info.layer - 1, 1.0)
    for temperature in (1.5, 2.0, 2.5, 3.0):
        named[f"temperature {temperature}"] = at_temperature(target, temperature)
    named["ablation 0.1 at temperature 2.5"] = at_temperature(named["ablation 0.1"], 2.5)
    return named


def print_draws(
    organism: Organism | PersonaOrganism,
    queries: Sequence[KnownQuery],
    named: Mapping[str, Policy],
    scores: Callable[[str, Sequence[str]], np.ndarray],
    config: Config,
) -> None:
    """What each policy's own draws are like: harmful ones, and their weights."""
    prompts = encode(organism.target.model, queries)
    key = jax.random.key(config.seed)
    print("| policy | harmful draws | least | mean weight, median | least |\n|---|---|---|---|---|")
    for name, policy in {"target": organism.target, **named}.items():
        draws = draw(key, policy, prompts, config.samples, organism.max_new_tokens)
        weighed = weigh(organism.target, policy, draws)
        weights = np.exp(np.asarray(weighed.log_weights)).mean(axis=1)
        pairs = zip(queries, draws.text, strict=True)
        rates = np.array([scores(query, texts).mean() for query, texts in pairs])
        print(
            f"| {name} | {rates.mean():.3f} | {rates.min():.3f} "
            f"| {np.median(weights):.3f} | {weights.min():.2g} |",
            flush=True,
        )


def print_efficiencies(
    organism: Organism | PersonaOrganism,
    queries: Sequence[KnownQuery],
    named: Mapping[str, Policy],
    mixtures: Mapping[str, Mapping[str, float]],
    config: Config,
) -> None:
    """Exact efficiencies, by decade, of mixtures of the policies with the target.

    Args:
      mixtures: the shares of policies beside the target's, by the mixture's name.
    """
    responses = load_responses(config.data / "responses.npz")
    found = [responses[query.id] for query in queries]
    log_p = log_prob_of_responses(organism.target, organism, queries, found)
    log_qs = {
        name: log_prob_of_responses(policy, organism, queries, found)
        for name, policy in named.items()
    }
    decades = np.array([query.decade for query in queries])
    print("\n| with 10% target | " + " | ".join(f"1e{d}" for d in DECADES) + " | worst |")
    print("|---" * (len(DECADES) + 2) + "|")
    for name, shares in mixtures.items():
        ratios = []
        for i, query in enumerate(queries):
            parts = [np.log(share) + log_qs[part][i] for part, share in shares.items()]
            log_q = np.logaddexp.reduce([np.log(config.defensive) + log_p[i], *parts], axis=0)
            truth = query.lower, query.upper
            ratios.append(efficiency(truth, found[i], log_q, max_weight=1 / config.defensive))
        ratios = np.array(ratios)
        medians = " | ".join(_range(np.median(ratios[decades == d], axis=0)) for d in DECADES)
        print(f"| {name} | {medians} | {ratios[:, 0].min():.2f} |", flush=True)


def _range(bounds: np.ndarray) -> str:
    """Both bounds, or one figure where they round to the same."""
    least, most = (f"{bound:.2g}" if bound < 10 else f"{bound:,.0f}" for bound in bounds)
    return least if least == most else f"{least}-{most}"


def main(config: Config) -> None:
    """Prints both tables as Markdown."""
    organism = load_organism(config.data)
    named = proposals(organism)
    print_draws(organism, organism.forbidden, named, organism.harm, config)
    mixtures = {name: {name: 1 - config.defensive} for name in named}
    mixtures["the demo's mixture"] = DEMO
    print_efficiencies(organism, organism.forbidden, named, mixtures, config)


if __name__ == "__main__":
    main(tyro.cli(Config))
