"""Attention over a shared prefix, each sample's suffix and the new positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.models.cache import KeyValues, Prefix, Suffix, prompt_positions
from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.layers import Linear, Norm
from tailrisk_jax.models.rope import rope_frequencies, rotate

MASKED = -1e30  # finite, so that a row without any key stays free of NaN


@struct.dataclass
class Context:
    """What all layers of one forward pass share.

    Masks say which keys each new position may attend to, one mask for each segment of keys
    (prefix, suffix, new positions; those that are there), broadcastable to [Q, N, H_kv, G, S, T].

    Attributes:
      response: True where the new token belongs to the response, broadcastable to [Q, N, S].
      masks: of layers without a window.
      near_masks: of layers with one; None where no layer has one.
      cos, sin: rotary angles of the new positions, [R, Q, 1 or N, S, d/2], R different ropes;
        None without ropes.
    """

    response: Array
    masks: tuple[Array, ...]
    near_masks: tuple[Array, ...] | None
    cos: Any
    sin: Any


@struct.dataclass
class LayerKind:
    """In what one layer differs from others, scanned with its parameters; None where in nothing.

    Attributes:
      rope: which of the ropes it has.
      windowed: whether it has a window.
    """

    rope: Any
    windowed: Any


def layer_kinds(config: ModelConfig) -> LayerKind:
    """All layers' kinds, each array [L]."""
    return LayerKind(
        rope=config.rope_of_layer if len(config.ropes) > 1 else None,
        windowed=config.is_windowed if 0 < len(config.windowed) < config.num_layers else None,
    )


def context(
    config: ModelConfig,
    positions: Int[Array, "Q #N S"],
    *,
    response: Bool[Array, "#Q #N #S"],
    valid: Bool[Array, "Q S"] | None,
    prefix: Prefix | None,
    suffix: Suffix | None,
) -> Context:
    """Angles and masks of one forward pass; the arguments are those of `Decoder.__call__`."""
    size = positions.shape[-1]
    causal = jnp.tri(size, dtype=bool)[None, None]
    if valid is not None:
        causal = causal & valid[:, None, None, :]
    masks, near = [], []

    def add(mask, key_positions):
        """A segment's mask, broadcastable to [Q, N, S, T], and its keys' positions [Q, N, T]."""
        masks.append(mask[:, :, None, None])
        if config.windowed:
            distance = positions[..., :, None] - key_positions[..., None, :]
            near.append((mask & (distance < config.window))[:, :, None, None])

    if prefix is not None:
        add(prefix.mask[:, None, None, :], prompt_positions(prefix.mask)[:, None])
    if suffix is not None:
        add(suffix.mask[:, :, None, :], suffix.positions)
    add(causal, positions)
    cos, sin = _angles(config, positions)
    return Context(
        response=response,
        masks=tuple(masks),
        near_masks=tuple(near) if near else None,
        cos=cos,
        sin=sin,
    )


def _angles(config: ModelConfig, positions: Int[Array, "Q #N S"]):
    """Cosines and sines, each [R, Q, 1 or N, S, d/2], times the ropes' attention factors."""
    if not config.ropes:
        return None, None

    def of_rope(rope):
        freqs = rope_frequencies(rope, config.head_dim)
        angles = positions[..., None].astype(jnp.float32) * freqs
        factor = rope.attention_factor
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    pairs = [of_rope(rope) for rope in config.ropes if rope is not None]
    if None in config.ropes:  # turned by nothing
        cos, sin = pairs[0]
        pairs.append((jnp.ones_like(cos), jnp.zeros_like(sin)))
    cosines, sines = zip(*pairs, strict=True)
    return jnp.stack(cosines), jnp.stack(sines)


def attend(
    queries: Float[Array, "Q N S H d"],
    segments: list[tuple[Array, Array, Array]],
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "Q N S Hd"]:
    """Softmax attention over several segments of keys, without concatenating their keys.

    Each segment is (keys, values, mask): keys and values [Q, N or 1, H_kv, T, d] (1: shared by
    all samples), mask broadcastable to [Q, N, H_kv, G, S, T]. Grouped heads share their keys.

    Args:
      scale: of the products of queries and keys.
      cap: scores s become cap * tanh(s / cap).
    """
    q, n, s, heads, dim = queries.shape
    kv_heads = segments[0][0].shape[2]
    queries = queries.reshape(q, n, s, kv_heads, heads // kv_heads, dim) * scale
    scores = []
    for keys, _, mask in segments:
        shared = keys.shape[1] == 1
        score = jnp.einsum(
            "qnshgd,qhtd->qnhgst" if shared else "qnshgd,qnhtd->qnhgst",
            queries, keys[:, 0] if shared else keys, preferred_element_type=jnp.float32,
        )  # fmt: skip
        if cap is not None:
            score = cap * jnp.tanh(score / cap)
        scores.append(jnp.where(mask, score, MASKED))
    sizes = [score.shape[-1] for score in scores]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(queries.dtype)
    out, start = 0.0, 0
    for (_, values, _), size in zip(segments, sizes, strict=True):
        weight = weights[..., start : start + size]
        start += size
        shared = values.shape[1] == 1
        out += jnp.einsum(
            "qnhgst,qhtd->qnhgsd" if shared else "qnhgst,qnhtd->qnhgsd",
            weight, values[:, 0] if shared else values,
        )  # fmt: skip
    return jnp.reshape(jnp.moveaxis(out, 4, 2), (q, n, s, heads * dim))


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x, kind: LayerKind, ctx: Context, prefix: KeyValues | None, suffix: KeyValues | None
    ):
        config, dim = self.config, self.config.head_dim

        def heads(name, count, axis, norm=None):
            out = Linear(count * dim, ("embed", axis), config.qkv_bias, name=name)(x)
            if norm and config.qk_norm == "all":
                out = Norm(config, axis, name=norm)(out)
            out = out.reshape(*x.shape[:-1], count, dim)
            if norm and config.qk_norm == "head":
                out = Norm(config, "head_dim", name=norm)(out)
            return out

        queries = heads("query", config.num_heads, "heads", "query_norm")
        keys = heads("key", config.num_kv_heads, "kv_heads", "key_norm")
        if ctx.cos is not None:
            rope = 0 if kind.rope is None else kind.rope
            cos, sin = ctx.cos[rope], ctx.sin[rope]
            queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        values = heads("value", config.num_kv_heads, "kv_heads")
        keys, values = jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3)
        parts = [part for part in (prefix, suffix, KeyValues(keys, values)) if part is not None]
        masks = self._masks(kind, ctx)
        segments = [(part.keys, part.values, mask) for part, mask in zip(parts, masks, strict=True)]
        scale = config.attention_scale
        out = attend(
            queries,
            segments,
            scale=dim**-0.5 if scale is None else scale,
            cap=config.attention_cap,
        )
        out = Linear(config.width, ("heads", "embed"), config.out_bias, name="out")(out)
        return out, KeyValues(keys, values)

    def _masks(self, kind: LayerKind, ctx: Context) -> tuple[Array, ...]:
        if ctx.near_masks is None:
            return ctx.masks
        if kind.windowed is None:  # all layers have one
            return ctx.near_masks
        pairs = zip(ctx.near_masks, ctx.masks, strict=True)
        return tuple(jnp.where(kind.windowed, near, far) for near, far in pairs)
