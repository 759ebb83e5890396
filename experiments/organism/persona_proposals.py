"""How the persona organism answers system prompts and its persona vector: exact efficiencies.

    python experiments/organism/persona_proposals.py

The tables are those of proposals.py, with the trait in place of harm.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro
from proposals import Config as OfHarm
from proposals import print_draws, print_efficiencies

from tailrisk_jax.organisms import PersonaOrganism, load_persona_organism
from tailrisk_jax.organisms import persona_world as world
from tailrisk_jax.policies import Policy, at_temperature, in_context, steer, vector_of_layer

FRIEND, RARELY = (f'system "{text}"' for text in (world.INSTRUCTIONS[4][0], world.MILD[1]))
MIXTURES = {
    "60% friend, 30% temperature 2.5": {FRIEND: 0.6, "temperature 2.5": 0.3},
    "60% friend, 30% addition 1:2": {FRIEND: 0.6, "addition 1:2": 0.3},
    "60% temperature 2.5, 30% addition 2:2": {"temperature 2.5": 0.6, "addition 2:2": 0.3},
    "30% each of friend, temperature 2.5, addition 1:2": {
        FRIEND: 0.3,
        "temperature 2.5": 0.3,
        "addition 1:2": 0.3,
    },
}
WARM = (RARELY, "addition 1:2", "addition 3:1", "addition 3:2")


@dataclasses.dataclass(frozen=True)
class Config(OfHarm):
    """The same, for the persona organism, and which layers and coefficients are tried."""

    data: Path = Path("tailrisk_jax/organisms/data/persona")
    layers: tuple[int, ...] = (1, 2, 3)
    coefficients: tuple[float, ...] = (1.0, 2.0, 3.0)


def proposals(organism: PersonaOrganism, config: Config) -> dict[str, Policy]:
    """System prompts, additions of the persona vector, temperatures."""
    target, vectors = organism.target, organism.vectors["trait"]
    prompts = (organism.instructions[0][0], organism.instructions[4][0], *world.MILD)
    named = {f'system "{text}"': in_context(target, system=text) for text in prompts}
    for layer in config.layers:
        vector = vector_of_layer(vectors, layer, target.model.config.num_layers)
        for coefficient in config.coefficients:
            named[f"addition {layer}:{coefficient:g}"] = steer(target, vector, layer, coefficient)
    for temperature in (1.5, 2.0, 2.5):
        named[f"temperature {temperature}"] = at_temperature(target, temperature)
    for name in WARM:
        named[f"{name} at temperature 2"] = at_temperature(named[name], 2.0)
    return named


def main(config: Config) -> None:
    """Prints both tables as Markdown."""
    organism = load_persona_organism(config.data)
    named = proposals(organism, config)
    print_draws(organism, organism.queries, named, lambda _, texts: organism.trait(texts), config)
    mixtures = {name: {name: 1 - config.defensive} for name in named}
    print_efficiencies(organism, organism.queries, named, mixtures | MIXTURES, config)


if __name__ == "__main__":
    main(tyro.cli(Config))
