"""From logits to the distribution of the next token: the same rule draws and scores.

The distribution is softmax(logits / temperature), in float32. Truncation (top-k, top-p) would
change the estimand and is not offered.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def log_distribution(
    logits: Float[Array, "... V"], temperature: Float[Array, ""]
) -> Float[Array, "... V"]:
    """log softmax(logits / temperature), float32."""
    scaled, log_total = _scale(logits, temperature)
    return scaled - log_total[..., None]


def token_log_prob(
    logits: Float[Array, "... V"], tokens: Int[Array, "..."], temperature: Float[Array, ""]
) -> Float[Array, "..."]:
    """The log-probability of one token per row, without materialising the distribution."""
    scaled, log_total = _scale(logits, temperature)
    return jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0] - log_total


def draw(
    uniforms: Float[Array, "... 2"], logits: Float[Array, "... V"], temperature: Float[Array, ""]
) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """Draws a token per row by inversion; returns it and its log-probability.

    The vocabulary is cut into about sqrt(V) blocks: the first uniform picks a block by its
    mass, the second a token within it. So cumulative sums stay short (cheap, and exact to
    float32 rounding), the resolution is 2^-46 rather than one uniform's 2^-23, and a token of
    probability zero is never drawn.

    Args:
      uniforms: in [0, 1), two per row.
      logits: broadcast against `uniforms` on the leading axes.
    """
    scaled, log_total = _scale(logits, temperature)
    vocab = scaled.shape[-1]
    size = math.isqrt(vocab - 1) + 1
    padding = [(0, 0)] * (scaled.ndim - 1) + [(0, -vocab % size)]
    blocks = jnp.pad(scaled, padding, constant_values=-jnp.inf)
    blocks = blocks.reshape(*scaled.shape[:-1], -1, size)
    rows = uniforms.shape[:-1]
    block = _invert(uniforms[..., 0], jnp.sum(jnp.exp(blocks), axis=-1))
    blocks = jnp.broadcast_to(blocks, (*rows, *blocks.shape[-2:]))
    chosen = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    within = _invert(uniforms[..., 1], jnp.exp(chosen))
    log_prob = jnp.take_along_axis(chosen, within[..., None], axis=-1)[..., 0] - log_total
    return block * size + within, log_prob


def _scale(logits, temperature):
    """Logits over temperature, shifted to a maximum of 0, and the log of their total mass."""
    scaled = logits.astype(jnp.float32) / temperature
    scaled = scaled - jnp.max(scaled, axis=-1, keepdims=True)
    return scaled, jnp.log(jnp.sum(jnp.exp(scaled), axis=-1))


def _invert(uniform, masses):
    """The first index of positive mass whose cumulative mass exceeds uniform * total."""
    # A parallel cumsum rounds differently at each index, so it may move where the mass is zero.
    cumulative = jnp.where(masses > 0, jnp.cumsum(masses, axis=-1), 0.0)
    total = jnp.max(cumulative, axis=-1)
    level = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.float32(0)))
    return jnp.argmax(cumulative > level[..., None], axis=-1)
