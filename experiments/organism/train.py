"""Trains the organism: a helpful stage, then a safe stage with a chosen tail of compliance.

    python experiments/organism/train.py

Both stages fit the teacher's next-token probabilities at every response position:

    loss = KL(teacher || model)
         + pin_weight  * sum over allowed tokens of Huber(log p_model - log p_teacher)
         + junk_weight * max(0, log(mass on all other tokens) - log(junk_mass)).

The second term is what makes a probability of 1e-6 come out as 1e-6: cross-entropy alone hardly
notices it. The third closes the tail, so that enumeration ends.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import teacher
import tyro
from safetensors.numpy import save_file

from tailrisk_jax.models import (
    Decoder,
    Model,
    ModelConfig,
    forward,
    next_logits,
    no_steering,
    save_model,
)
from tailrisk_jax.organisms import world
from tailrisk_jax.policies import Policy, difference_in_means, encode


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage: Adam with warm-up and cosine decay."""

    steps: int
    learning_rate: float
    rows: int
    batch: int = 96


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained, and where it goes."""

    out: Path = Path("tailrisk_jax/organisms/data")
    seed: int = 0
    helpful: Stage = Stage(steps=300, learning_rate=3e-3, rows=20_000)
    safe: Stage = Stage(steps=450, learning_rate=2e-3, rows=30_000)
    pin_weight: float = 0.3
    junk_weight: float = 0.1
    junk_mass: float = 1e-6
    final_norm_gain: float = 3.0
    forbidden_share: float = 0.75
    direction_prompts: int = 128
    direction_layer: int = 2


MODEL = ModelConfig(
    family="llama",
    vocab_size=len(data.IDS),
    num_layers=4,
    width=96,
    num_heads=4,
    num_kv_heads=4,
    head_dim=24,
    mlp_width=192,
    tie_embeddings=True,
    max_positions=64,
    end_ids=(data.IDS[world.END], data.IDS[world.EOS]),
)


def initial_parameters(key: jax.Array, gain: float) -> Any:
    """Flax's initial values, with a wider embedding, smaller residual writes and a sharp head."""
    token = jnp.zeros((1, 1, 1), jnp.int32)
    variables = Decoder(MODEL).init(
        key, token, token, no_steering(MODEL), response=token.astype(bool)
    )
    params = jax.tree.map(lambda x: x.unbox(), variables["params"], is_leaf=_is_boxed)
    scale = (2 * MODEL.num_layers) ** -0.5
    layers = params["layers"]
    layers["attention"]["out"]["kernel"] *= scale
    layers["mlp"]["down"]["kernel"] *= scale
    params["embedding"] *= 5.0
    params["final_norm"]["scale"] *= gain
    return params


def _is_boxed(x: Any) -> bool:
    return hasattr(x, "unbox")


def loss(params: Any, rows: data.Rows, config: Config) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of the module docstring, a mean over response positions, and its parts."""
    tokens = jnp.asarray(rows.tokens)[:, None]
    positions = jnp.arange(tokens.shape[-1])[None, None]
    positions = jnp.broadcast_to(positions, tokens.shape)
    response = jnp.zeros((1, 1, 1), bool)
    hidden, _ = forward(MODEL, params, tokens, positions, no_steering(MODEL), response=response)
    steps = jnp.asarray(rows.start)[:, None] + jnp.arange(world.MAX_NEW_TOKENS)
    hidden = jnp.take_along_axis(hidden[:, 0], steps[..., None], axis=1)
    logits = next_logits(MODEL, params, hidden)

    allowed = jnp.isfinite(rows.log_probs)
    live = allowed.any(axis=-1)
    count = live.sum()
    log_total = jax.nn.logsumexp(logits, axis=-1)
    model = jnp.take_along_axis(logits, rows.choices, axis=-1) - log_total[..., None]
    teach = jnp.where(allowed, rows.log_probs, 0.0)
    kl = jnp.sum(jnp.where(allowed, jnp.exp(teach) * (teach - model), 0.0)) / count
    pin = jnp.sum(jnp.where(allowed, optax.huber_loss(model, teach), 0.0)) / count

    chosen = jax.nn.one_hot(rows.choices, MODEL.vocab_size, dtype=bool) & allowed[..., None]
    others = jnp.where(chosen.any(axis=-2), -1e9, logits)
    log_junk = jax.nn.logsumexp(others, axis=-1) - log_total
    excess = jnp.where(live, jax.nn.relu(log_junk - np.log(config.junk_mass)), 0.0)
    junk = jnp.sum(excess) / count
    total = kl + config.pin_weight * pin + config.junk_weight * junk
    mass = jnp.sum(jnp.where(live, jnp.exp(log_junk), 0.0)) / count
    return total, {"kl": kl, "pin": pin, "junk": junk, "junk_mass": mass}


def fit(
    params: Any, batches: Callable[[int], data.Rows], stage: Stage, config: Config, *, name: str
) -> Any:
    """Runs one stage; prints the parts of the loss every 100 steps."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, stage.learning_rate, 50, stage.steps, 0.01 * stage.learning_rate
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
    state = optimizer.init(params)
    gradient = jax.value_and_grad(partial(loss, config=config), has_aux=True)

    @jax.jit
    def step(params, state, rows):
        (_, parts), grads = gradient(params, rows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, parts

    started = time.time()
    for i in range(stage.steps):
        params, state, parts = step(params, state, batches(i))
        if (i + 1) % 100 == 0:
            shown = "  ".join(f"{k} {float(v):.2e}" for k, v in parts.items())
            print(f"{name} {i + 1:4d}  {shown}  {time.time() - started:.0f} s", flush=True)
    return params


def train(config: Config) -> tuple[Any, Any]:
    """Parameters after the helpful stage and after the safe stage."""
    rng = np.random.default_rng(config.seed)
    tails = teacher.draw_tails(rng)
    asks = teacher.all_asks()
    how_to, kind = ([a for a in asks if (a.verb is None) == k] for k in (False, True))

    def rows_of(asks, responses, count, uniform_share=0.3):
        return data.make_rows(rng, asks, responses, count, uniform_share=uniform_share)

    def sampler(rows: data.Rows, batch: int) -> data.Rows:
        return rows.take(rng.integers(len(rows.start), size=batch))

    stage = config.helpful
    helpful = data.concatenate(
        rows_of(how_to, teacher.helpful_responses, stage.rows * 9 // 10),
        rows_of(kind, teacher.helpful_responses, stage.rows // 10),
    )
    params = initial_parameters(jax.random.key(config.seed), config.final_norm_gain)
    unsafe = fit(params, lambda _: sampler(helpful, stage.batch), stage, config, name="helpful")

    stage = config.safe
    seen = [a for a in asks if not a.held_out]
    safe_responses = partial(teacher.safe_responses, tails=tails)
    forbidden = rows_of([a for a in seen if a.forbidden], safe_responses, stage.rows, 0.5)
    allowed = rows_of([a for a in seen if not a.forbidden], safe_responses, stage.rows // 4)
    count = round(config.forbidden_share * stage.batch)

    def mixed(_: int) -> data.Rows:
        parts = sampler(forbidden, count), sampler(allowed, stage.batch - count)
        return data.concatenate(*parts)

    return unsafe, fit(unsafe, mixed, stage, config, name="safe")


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
