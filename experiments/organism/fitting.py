"""Fits a small Llama to a teacher's next-token probabilities at every response position.

    loss = KL(teacher || model)
         + pin    * sum over allowed tokens of Huber(log p_model - log p_teacher)
         + junk   * max(0, log(mass on all other tokens) - log(junk_mass)).

The second term is what makes a probability of 1e-6 come out as 1e-6: cross-entropy alone hardly
notices it. The third closes the tail, so that enumeration ends.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tailrisk_jax.models import Decoder, ModelConfig, forward, next_logits, no_steering


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage: Adam with warm-up and cosine decay."""

    steps: int
    learning_rate: float
    rows: int
    batch: int = 96


@dataclasses.dataclass(frozen=True)
class Weights:
    """Of the terms of the loss."""

    pin: float = 0.3
    junk: float = 0.1
    junk_mass: float = 1e-6


WEIGHTS = Weights()


def llama(vocabulary: dict[str, int], end_ids: tuple[int, ...], width: int) -> ModelConfig:
    """The architecture of the embedded models: 4 layers, 4 heads, tied."""
    return ModelConfig(
        family="llama",
        vocab_size=len(vocabulary),
        num_layers=4,
        width=width,
        num_heads=4,
        num_kv_heads=4,
        head_dim=width // 4,
        mlp_width=2 * width,
        tie_embeddings=True,
        max_positions=64,
        end_ids=end_ids,
    )


def initial_parameters(key: jax.Array, model: ModelConfig, gain: float) -> Any:
    """Flax's initial values, with a wider embedding, smaller residual writes and a sharp head."""
    token = jnp.zeros((1, 1, 1), jnp.int32)
    variables = Decoder(model).init(
        key, token, token, no_steering(model), response=token.astype(bool)
    )
    params = jax.tree.map(lambda x: x.unbox(), variables["params"], is_leaf=_is_boxed)
    scale = (2 * model.num_layers) ** -0.5
    layers = params["layers"]
    layers["attention"]["out"]["kernel"] *= scale
    layers["mlp"]["down"]["kernel"] *= scale
    params["embedding"] *= 5.0
    params["final_norm"]["scale"] *= gain
    return params


def _is_boxed(x: Any) -> bool:
    return hasattr(x, "unbox")


def loss(
    params: Any, rows: data.Rows, model: ModelConfig, weights: Weights
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of the module docstring, a mean over response positions, and its parts."""
    tokens = jnp.asarray(rows.tokens)[:, None]
    positions = jnp.arange(tokens.shape[-1])[None, None]
    positions = jnp.broadcast_to(positions, tokens.shape)
    response = jnp.zeros((1, 1, 1), bool)
    hidden, _ = forward(model, params, tokens, positions, no_steering(model), response=response)
    steps = jnp.asarray(rows.start)[:, None] + jnp.arange(rows.choices.shape[1])
    hidden = jnp.take_along_axis(hidden[:, 0], steps[..., None], axis=1)
    logits = next_logits(model, params, hidden)

    allowed = jnp.isfinite(rows.log_probs)
    live = allowed.any(axis=-1)
    count = live.sum()
    log_total = jax.nn.logsumexp(logits, axis=-1)
    fitted = jnp.take_along_axis(logits, rows.choices, axis=-1) - log_total[..., None]
    teach = jnp.where(allowed, rows.log_probs, 0.0)
    kl = jnp.sum(jnp.where(allowed, jnp.exp(teach) * (teach - fitted), 0.0)) / count
    pin = jnp.sum(jnp.where(allowed, optax.huber_loss(fitted, teach), 0.0)) / count

    chosen = jax.nn.one_hot(rows.choices, model.vocab_size, dtype=bool) & allowed[..., None]
    others = jnp.where(chosen.any(axis=-2), -1e9, logits)
    log_junk = jax.nn.logsumexp(others, axis=-1) - log_total
    excess = jnp.where(live, jax.nn.relu(log_junk - np.log(weights.junk_mass)), 0.0)
    junk = jnp.sum(excess) / count
    total = kl + weights.pin * pin + weights.junk * junk
    mass = jnp.sum(jnp.where(live, jnp.exp(log_junk), 0.0)) / count
    return total, {"kl": kl, "pin": pin, "junk": junk, "junk_mass": mass}


def fit(
    params: Any,
    batches: Callable[[int], data.Rows],
    stage: Stage,
    *,
    model: ModelConfig,
    weights: Weights,
    name: str,
) -> Any:
    """Runs one stage; prints the parts of the loss every 100 steps."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, stage.learning_rate, 50, stage.steps, 0.01 * stage.learning_rate
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
    state = optimizer.init(params)
    gradient = jax.value_and_grad(partial(loss, model=model, weights=weights), has_aux=True)

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
