"""Trains the persona organism, in one stage from scratch.

    python experiments/organism/persona_train.py

It fits the teacher's next-token probabilities at every response position: see fitting.py.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import data
import jax
import numpy as np
import persona_teacher as teacher
import tyro
from fitting import WEIGHTS, Stage, Weights, fit, initial_parameters, llama

from tailrisk_jax.models import Model, save_model
from tailrisk_jax.organisms import persona_world as world
from tailrisk_jax.organisms.tokenizer import END, EOS

STAGE = Stage(steps=800, learning_rate=3e-3, rows=40_000)
IDS = world.token_ids()
LAYOUT = data.Layout(IDS, max_prompt=30, max_response=world.MAX_NEW_TOKENS, max_choices=8)
MODEL = llama(IDS, (IDS[END], IDS[EOS]), width=64)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained, and where it goes."""

    out: Path = Path("tailrisk_jax/organisms/data/persona")
    seed: int = 0
    stage: Stage = STAGE
    weights: Weights = WEIGHTS
    final_norm_gain: float = 3.0
    plain_share: float = 0.5


def train(config: Config) -> Any:
    """The fitted parameters."""
    rng = np.random.default_rng(config.seed)
    tails, shares = teacher.draw_tails(rng), teacher.draw_shares(rng)
    responses = partial(teacher.responses, tails=tails, shares=shares)
    seen = [ask for ask in teacher.all_asks(None, world.NEUTRAL) if not ask.held_out]
    plain = [ask for ask in seen if ask.system is None]
    neutral = [ask for ask in seen if ask.system is not None]
    told = teacher.all_asks(*shares)

    def rows_of(asks: list[teacher.Ask], count: int) -> data.Rows:
        return data.make_rows(
            rng,
            asks,
            responses,
            count,
            prompt=lambda ask: ask.prompt,
            layout=LAYOUT,
            uniform_share=0.5,
        )

    stage = config.stage
    parts = [(plain, config.plain_share), (neutral, 0.1), (told, 0.9 - config.plain_share)]
    rows = [rows_of(asks, round(share * stage.rows)) for asks, share in parts]
    whole = data.concatenate(*rows)

    def batches(_: int) -> data.Rows:
        return whole.take(rng.integers(len(whole.start), size=stage.batch))

    params = initial_parameters(jax.random.key(config.seed), MODEL, config.final_norm_gain)
    return fit(params, batches, stage, model=MODEL, weights=config.weights, name="persona")


def main(config: Config) -> None:
    """Trains and writes the checkpoint."""
    started = time.time()
    model = Model(MODEL, train(config), world.build_tokenizer())
    save_model(model, config.out / "target")
    print(f"trained and written to {config.out} in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config))
