"""From logits to the distribution of the next token: the same rule draws and scores.

The distribution of one policy is softmax(logits / temperature), in float32. Truncation (top-k,
top-p) would change the estimand and is not offered. That of K experts is made of their log-masses,
unnormalised log-probabilities.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def log_distribution(
    logits: Float[Array, "... V"], temperature: Float[Array, ""]
) -> Float[Array, "... V"]:
    """log softmax(logits / temperature), float32."""
    top = _top(logits)
    log_masses = _log_masses(logits, top, temperature)
    return log_masses - jnp.log(jnp.sum(jnp.exp(log_masses), axis=-1, keepdims=True))


def token_log_prob(
    logits: Float[Array, "... V"], tokens: Int[Array, "..."], temperature: Float[Array, ""]
) -> Float[Array, "..."]:
    """The log-probability of one token per row, without materialising the distribution."""
    top = _top(logits)
    total = jnp.sum(jnp.exp(_log_masses(logits, top, temperature)), axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return _log_masses(chosen, top, temperature)[..., 0] - jnp.log(total)


def draw(
    uniforms: Float[Array, "... 2"], logits: Float[Array, "... V"], temperature: Float[Array, ""]
) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """Draws a token per row by inversion; returns it and its log-probability.

    The vocabulary is cut into about sqrt(V) blocks: the first uniform picks a block by its
    mass, the second a token within it. So cumulative sums stay short (cheap, and exact to
    float32 rounding) and a token of probability zero is never drawn. Blocks resolve at 2^-23 and
    tokens within a block at 2^-46: a block's mass may be off by about 1e-7, in absolute terms.

    Args:
      uniforms: in [0, 1), two per row.
      logits: broadcast against `uniforms` on the leading axes.
    """
    vocab, size = logits.shape[-1], block_size(logits.shape[-1])
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -vocab % size)]
    blocks = jnp.pad(logits, padding, constant_values=-jnp.inf) if vocab % size else logits
    blocks = blocks.reshape(*logits.shape[:-1], -1, size)
    top = _top(logits)
    masses = jnp.sum(jnp.exp(_log_masses(blocks, top[..., None], temperature)), axis=-1)
    block = _invert(uniforms[..., 0], masses)
    blocks = jnp.broadcast_to(blocks, (*uniforms.shape[:-1], *blocks.shape[-2:]))
    chosen = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    chosen = _log_masses(chosen, top, temperature)
    within = _invert(uniforms[..., 1], jnp.exp(chosen))
    log_mass = jnp.take_along_axis(chosen, within[..., None], axis=-1)[..., 0]
    return block * size + within, log_mass - jnp.log(jnp.sum(masses, axis=-1))


def log_masses(
    logits: Float[Array, "... V"], temperature: Float[Array, ""]
) -> Float[Array, "... V"]:
    """logits / temperature, shifted so that the largest is 0, float32."""
    return _log_masses(logits, _top(logits), temperature)


def draw_from_mixture(
    uniforms: Float[Array, "... 3"],
    masses: Float[Array, "K ... V"],
    weights: Float[Array, "... K"],
) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """Draws a token per row from sum_k w_k q_k; returns it and its log-probability.

    The last uniform picks an expert, from which the token is drawn by the other two. An expert of
    weight 0 is never picked, and one of weight 1 draws as it does alone.

    Args:
      masses: log-masses of the K experts.
    """
    expert = _invert(uniforms[..., 2], weights)
    picked = jnp.take_along_axis(masses, expert[None, ..., None], axis=0)[0]
    token, _ = draw(uniforms[..., :2], picked, jnp.float32(1))
    each = token_log_prob(masses, token[None], jnp.float32(1))
    weighted = jnp.log(jnp.moveaxis(weights, -1, 0)) + each
    return token, jax.nn.logsumexp(weighted, axis=0)


def path_log_masses(
    masses: Float[Array, "K ... V"], coefficients: Float[Array, "... K"]
) -> Float[Array, "... V"]:
    """sum_k c_k log q_k up to a constant; a coefficient of 1 among zeros gives the expert's own."""
    return sum(coefficients[..., k, None] * one for k, one in enumerate(masses))  # type: ignore[return-value]


def block_size(vocab: int) -> int:
    """About sqrt(V): a divisor of V where there is one within a factor of 4.

    One that gives a multiple of 16 blocks comes first: devices that share the vocabulary then
    hold whole blocks.
    """
    root = math.isqrt(vocab - 1) + 1
    divisors = [size for size in range(root // 4 + 1, 4 * root) if vocab % size == 0]
    shared = [size for size in divisors if vocab // size % 16 == 0]
    return min(shared or divisors, key=lambda size: abs(math.log(size / root)), default=root)


def _top(logits):
    return jnp.max(logits.astype(jnp.float32), axis=-1, keepdims=True)


def _log_masses(logits, top, temperature):
    """Unnormalised log-probabilities, the largest 0."""
    return (logits.astype(jnp.float32) - top) / temperature


def _invert(uniform, masses):
    """The first index of positive mass whose cumulative mass exceeds uniform * total."""
    # A parallel cumsum rounds differently at each index, so it may move where the mass is zero.
    cumulative = jnp.where(masses > 0, jnp.cumsum(masses, axis=-1), 0.0)
    total = jnp.max(cumulative, axis=-1)
    level = jnp.minimum(uniform * total, jnp.nextafter(total, jnp.float32(0)))
    return jnp.argmax(cumulative > level[..., None], axis=-1)
