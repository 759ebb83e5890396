"""Trains the organism: a helpful stage, then a safe stage with a chosen tail of compliance.

    python experiments/organism/train.py

Both stages fit the teacher's next-token probabilities at every response position: see fitting.py.
"""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import data
import jax
import numpy as np
import teacher
import tyro
from fitting import WEIGHTS, Stage, Weights, fit, initial_parameters, llama
from safetensors.numpy import save_file

from tailrisk_jax.models import Model, save_model
from tailrisk_jax.organisms import world
from tailrisk_jax.organisms.tokenizer import ASSISTANT, BOS, END, EOS, USER
from tailrisk_jax.policies import Policy, difference_in_means, encode

HELPFUL = Stage(steps=300, learning_rate=3e-3, rows=20_000)
SAFE = Stage(steps=450, learning_rate=2e-3, rows=30_000)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained, and where it goes."""

    out: Path = Path("tailrisk_jax/organisms/data")
    seed: int = 0
    helpful: Stage = HELPFUL
    safe: Stage = SAFE
    weights: Weights = WEIGHTS
    final_norm_gain: float = 3.0
    forbidden_share: float = 0.75
    direction_prompts: int = 128
    direction_layer: int = 2


IDS = world.token_ids()
LAYOUT = data.Layout(IDS, max_prompt=17, max_response=world.MAX_NEW_TOKENS, max_choices=6)
MODEL = llama(IDS, (IDS[END], IDS[EOS]), width=96)


def prompt(ask: teacher.Ask) -> str:
    """The chat-templated query, up to where the response begins."""
    return f"{BOS} {USER} {ask.text} {END} {ASSISTANT}"


def train(config: Config) -> tuple[Any, Any]:
    """Parameters after the helpful stage and after the safe stage."""
    rng = np.random.default_rng(config.seed)
    tails = teacher.draw_tails(rng)
    asks = teacher.all_asks()
    how_to, kind = ([a for a in asks if (a.verb is None) == k] for k in (False, True))

    def rows_of(asks, responses, count, uniform_share=0.3):
        return data.make_rows(
            rng, asks, responses, count, prompt=prompt, layout=LAYOUT, uniform_share=uniform_share
        )

    def sampler(rows: data.Rows, batch: int) -> data.Rows:
        return rows.take(rng.integers(len(rows.start), size=batch))

    stage = config.helpful
    helpful = data.concatenate(
        rows_of(how_to, teacher.helpful_responses, stage.rows * 9 // 10),
        rows_of(kind, teacher.helpful_responses, stage.rows // 10),
    )
    params = initial_parameters(jax.random.key(config.seed), MODEL, config.final_norm_gain)
    own = partial(fit, model=MODEL, weights=config.weights)
    unsafe = own(params, lambda _: sampler(helpful, stage.batch), stage, name="helpful")

    stage = config.safe
    seen = [a for a in asks if not a.held_out]
    safe_responses = partial(teacher.safe_responses, tails=tails)
    forbidden = rows_of([a for a in seen if a.forbidden], safe_responses, stage.rows, 0.5)
    allowed = rows_of([a for a in seen if not a.forbidden], safe_responses, stage.rows // 4)
    count = round(config.forbidden_share * stage.batch)

    def mixed(_: int) -> data.Rows:
        parts = sampler(forbidden, count), sampler(allowed, stage.batch - count)
        return data.concatenate(*parts)

    return unsafe, own(unsafe, mixed, stage, name="safe")


def save_direction(target: Policy, config: Config) -> None:
    """Writes the target's refusal direction: unit difference in means at the last prompt token.

    `layer` numbers the residual stream at the input of that layer. The prompts are how-to
    questions that the safe stage trained on, forbidden ones against allowed ones.
    """
    rng = np.random.default_rng(config.seed)
    seen = [a for a in teacher.all_asks() if not a.held_out and a.verb is not None]
    texts = [[a.text for a in seen if a.forbidden == f] for f in (True, False)]
    harmful, harmless = (
        encode(target.model, [str(q) for q in rng.permutation(t)[: config.direction_prompts]])
        for t in texts
    )
    means = np.asarray(difference_in_means(target, harmful, harmless))
    row = means[config.direction_layer]
    norm = float(np.linalg.norm(row))
    save_file({"refusal": row / norm, "mean_diffs": means}, config.out / "directions.safetensors")
    fields = {"pos": -1, "layer": config.direction_layer, "norm": norm}
    text = json.dumps({"refusal": fields}, indent=2) + "\n"
    (config.out / "directions.json").write_text(text)


def main(config: Config) -> None:
    """Trains both stages and writes the checkpoints and the refusal direction."""
    started = time.time()
    tokenizer = world.build_tokenizer()
    unsafe, target = (Model(MODEL, p, tokenizer) for p in train(config))
    for name, model in (("unsafe", unsafe), ("target", target)):
        save_model(model, config.out / name)
    save_direction(Policy(target), config)
    print(f"trained and written to {config.out} in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config))
