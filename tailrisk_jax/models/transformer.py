"""The decoder: one Flax Linen module for every family, layers stacked on L and scanned.

The forward pass works on tokens [Q, N, S] (queries, samples, new positions) that may attend to
a prefix shared by all samples of a query, to a suffix of earlier response positions of each
sample, and causally to each other. Prefill, one decoding step and teacher-forced scoring are
three uses of the same method.

Steering enters every layer as arguments, where Arditi et al. 2024 (arXiv 2406.11717) act:
x <- x - a (x . d) d on the layer's input and on the output of attention and MLP, and
x <- x + v on the layer's output.

A LoRA adapter is a second collection of variables, `lora`, a tree beside the parameters that
holds a `LowRank` (adapters.py) for each adapted kernel; it is scanned with the layers.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.models.cache import KeyValues, Prefix
from tailrisk_jax.models.config import ModelConfig, Rope
from tailrisk_jax.models.sharding import constrain

MASKED = -1e30  # finite, so that a row without any key stays free of NaN


@struct.dataclass
class Steering:
    """Directional ablation and vector addition, per layer.

    An axis of size 2 is (at prompt positions, at response positions).

    Attributes:
      direction: unit vectors to ablate, [L, D].
      ablation: the share of the component along it that is removed, [L, 2].
      addition: vectors added to the layer's output, coefficient included, [L, 2, D].
    """

    direction: Float[Array, "L D"]
    ablation: Float[Array, "L 2"]
    addition: Float[Array, "L 2 D"]


def no_steering(config: ModelConfig) -> Steering:
    """Zero coefficients: exactly the unsteered model."""
    layers, width = config.num_layers, config.width
    return Steering(
        direction=jnp.zeros((layers, width)),
        ablation=jnp.zeros((layers, 2)),
        addition=jnp.zeros((layers, 2, width)),
    )


def rope_frequencies(rope: Rope, head_dim: int) -> Float[Array, " half"]:
    """Inverse frequencies theta^(-2i/d), rescaled as Llama 3.1 does for "llama3"."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    freqs = 1.0 / rope.theta**exponents
    if rope.scaling == "default":
        return freqs
    wavelengths = 2 * jnp.pi / freqs
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    blend = rope.original_max_positions / wavelengths - rope.low_freq_factor
    blend = jnp.clip(blend / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    blended = (1 - blend) * freqs / rope.factor + blend * freqs
    return jnp.where(
        wavelengths > low, freqs / rope.factor, jnp.where(wavelengths < high, freqs, blended)
    )


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates pairs (i, i + d/2) of the last axis of x [Q, N, S, H, d] by its position's angle."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


@struct.dataclass
class Context:
    """What all layers of one forward pass share.

    Attributes:
      cos, sin: rotary angles of the new positions, [Q, 1 or N, S, d/2].
      response: True where the new token belongs to the response, broadcastable to [Q, N, S].
      self_mask: which new positions each new position may attend to, [Q, 1, S, S].
      prefix_mask: valid prompt positions, [Q, P]; None without a prefix.
      suffix_mask: valid suffix positions, [Q, N, T]; None without a suffix.
    """

    cos: Array
    sin: Array
    response: Array
    self_mask: Array
    prefix_mask: Any = None
    suffix_mask: Any = None


def attend(
    queries: Float[Array, "Q N S H d"], segments: list[tuple[Array, Array, Array]]
) -> Float[Array, "Q N S Hd"]:
    """Softmax attention over several segments of keys, without concatenating their keys.

    Each segment is (keys, values, mask): keys and values [Q, N or 1, H_kv, T, d] (1: shared by
    all samples), mask broadcastable to [Q, N, H_kv, G, S, T]. Grouped heads share their keys.
    """
    q, n, s, heads, dim = queries.shape
    kv_heads = segments[0][0].shape[2]
    queries = queries.reshape(q, n, s, kv_heads, heads // kv_heads, dim) * dim**-0.5
    scores = []
    for keys, _, mask in segments:
        shared = keys.shape[1] == 1
        score = jnp.einsum(
            "qnshgd,qhtd->qnhgst" if shared else "qnshgd,qnhtd->qnhgst",
            queries, keys[:, 0] if shared else keys, preferred_element_type=jnp.float32,
        )  # fmt: skip
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


def pin(x: Float[Array, "Q N S D"]) -> Float[Array, "Q N S D"]:
    """Keeps samples on their devices, where mesh axes that cut parameters could cut D instead."""
    return x if x.shape[1] == 1 else constrain(x, "queries", "samples", "positions", "width")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467).

    With `unit_offset` the factor is 1 + scale, and is applied before rounding to x's dtype.
    """

    eps: float
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        init = nn.with_logical_partitioning(start, ("embed",))
        scale = self.param("scale", init, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.eps)
        if self.unit_offset:
            return (x32 * (1 + jnp.asarray(scale, jnp.float32))).astype(x.dtype)
        return x32.astype(x.dtype) * scale


class Linear(nn.Module):
    """x @ kernel, kernel [in, out]; where an adapter has this kernel, + scale (x A^T) B^T.

    The adapter's part is computed in the adapter's own dtype and added in float32.
    """

    features: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), self.axes)
        out = x @ self.param("kernel", init, (x.shape[-1], self.features))
        if not self.has_variable("lora", "kernel"):
            return out
        low_rank: Any = self.get_variable("lora", "kernel")
        inner = low_rank.scale * (x.astype(low_rank.a.dtype) @ low_rank.a.T)
        return (out.astype(jnp.float32) + inner @ low_rank.b.T).astype(out.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (Ainslie et al. 2023, arXiv 2305.13245)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, ctx: Context, prefix: KeyValues | None, suffix: KeyValues | None):
        config, dim = self.config, self.config.head_dim

        def heads(name, count, axis):
            out = Linear(count * dim, ("embed", axis), name=name)(x)
            return out.reshape(*x.shape[:-1], count, dim)

        queries = rotate(heads("query", config.num_heads, "heads"), ctx.cos, ctx.sin)
        keys = rotate(heads("key", config.num_kv_heads, "kv_heads"), ctx.cos, ctx.sin)
        values = heads("value", config.num_kv_heads, "kv_heads")
        keys, values = jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3)
        segments = []
        if prefix is not None:
            segments.append((*prefix, ctx.prefix_mask[:, None, None, None, None, :]))
        if suffix is not None:
            segments.append((*suffix, ctx.suffix_mask[:, :, None, None, None, :]))
        segments.append((keys, values, ctx.self_mask[:, :, None, None]))
        out = attend(queries, segments)
        return Linear(config.width, ("heads", "embed"), name="out")(out), KeyValues(keys, values)


ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        size = self.config.mlp_width
        gate = Linear(size, ("embed", "mlp"), name="gate")(x)
        up = Linear(size, ("embed", "mlp"), name="up")(x)
        hidden = ACTIVATIONS[self.config.activation](gate) * up
        return Linear(self.config.width, ("mlp", "embed"), name="down")(hidden)


class Layer(nn.Module):
    """One pre-norm block with its three ablation sites and its addition.

    Its input, the residual stream before steering, is sown as intermediates/residual: applying
    with mutable=["intermediates"] returns it as [L, Q, N, S, D].
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x, per_layer, ctx: Context):
        steering, prefix, suffix = per_layer
        x = pin(x)
        self.sow("intermediates", "residual", x)
        pick = ctx.response[..., None]
        share = jnp.where(pick, steering.ablation[1], steering.ablation[0])

        def ablate(y):
            y32 = y.astype(jnp.float32)
            along = jnp.einsum("...d,d->...", y32, steering.direction, precision="highest")[
                ..., None
            ]
            return (y32 - share * along * steering.direction).astype(y.dtype)

        norm = functools.partial(
            RMSNorm, self.config.norm_eps, unit_offset=self.config.unit_offset_norm
        )
        x = ablate(x)
        out, kv = Attention(self.config, name="attention")(
            norm(name="attention_norm")(x), ctx, prefix, suffix
        )
        x = x + ablate(out)
        x = x + ablate(MLP(self.config, name="mlp")(norm(name="mlp_norm")(x)))
        added = jnp.where(pick, steering.addition[1], steering.addition[0])
        return (x.astype(jnp.float32) + added).astype(x.dtype), kv


class Decoder(nn.Module):
    """A decoder-only language model; see the module docstring for the shapes."""

    config: ModelConfig

    def setup(self):
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        shape = (config.vocab_size, config.width)
        self.embedding: Any = self.param("embedding", init, shape)
        if not config.tie_embeddings:
            self.lm_head = self.param("lm_head", init, shape)
        self.layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "lora": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # type: ignore[arg-type]
            length=config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)
        self.final_norm = RMSNorm(config.norm_eps, unit_offset=config.unit_offset_norm)

    def __call__(
        self,
        tokens: Int[Array, "Q N S"],
        positions: Int[Array, "Q #N S"],
        steering: Steering,
        *,
        response: Bool[Array, "#Q #N #S"],
        valid: Bool[Array, "Q S"] | None = None,
        prefix: Prefix | None = None,
        suffix: tuple[KeyValues, Bool[Array, "Q N T"]] | None = None,
    ) -> tuple[Float[Array, "Q N S D"], KeyValues]:
        """Final hidden states of the new tokens, and their keys and values.

        Args:
          tokens: new tokens.
          positions: their positions, for the rotary embedding.
          steering: per-layer coefficients and vectors.
          response: True where a token belongs to the response.
          valid: False for padding among the new tokens; None where there is none.
          prefix: a prefilled prompt.
          suffix: (cache, which of its positions belong to the response so far).
        """
        angles = positions[..., None].astype(jnp.float32)
        angles = angles * rope_frequencies(self.config.rope, self.config.head_dim)
        size = tokens.shape[-1]
        self_mask = jnp.tri(size, dtype=bool)[None, None]
        if valid is not None:
            self_mask = self_mask & valid[:, None, None, :]
        suffix_kv, suffix_mask = (None, None) if suffix is None else suffix
        ctx = Context(
            cos=jnp.cos(angles),
            sin=jnp.sin(angles),
            response=response,
            self_mask=self_mask,
            prefix_mask=None if prefix is None else prefix.mask,
            suffix_mask=suffix_mask,
        )
        per_layer = (steering, None if prefix is None else prefix.kv, suffix_kv)
        embedded = self.embedding[tokens]
        if self.config.scale_embeddings:
            embedded *= jnp.float32(self.config.width**0.5).astype(embedded.dtype)
        hidden, kv = self.layers(pin(embedded), per_layer, ctx)
        return self.final_norm(pin(hidden)), kv

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits in float32."""
        head = self.embedding if self.config.tie_embeddings else self.lm_head
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


@functools.cache
def parameter_shapes(config: ModelConfig):
    """The parameter tree as ShapeDtypeStructs boxed with their logical axes (nothing computed)."""

    def init():
        token, response = jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1, 1), bool)
        key, steering = jax.random.key(0), no_steering(config)
        return Decoder(config).init(key, token, token, steering, response=response)

    shapes: Any = jax.eval_shape(init)
    return shapes["params"]


def forward(
    config: ModelConfig, params, *args, adapter: Any = None, **kwargs
) -> tuple[Array, KeyValues]:
    """`Decoder.__call__` as a function of the parameters, and of an adapter's tree or None."""
    variables = {"params": params} if adapter is None else {"params": params, "lora": adapter}
    return Decoder(config).apply(variables, *args, **kwargs)  # type: ignore[return-value]


def next_logits(config: ModelConfig, params, hidden: Float[Array, "... D"]) -> Array:
    """`Decoder.logits` as a function of the parameters, [..., V] float32."""
    return Decoder(config).apply(  # type: ignore[return-value]
        {"params": params}, hidden, method="logits"
    )


def prompt_positions(mask: Bool[Array, "Q P"]) -> Int[Array, "Q P"]:
    """The position of each token in its own prompt; padding gets any position."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


def at_last_token(x: Float[Array, "... P D"], mask: Bool[Array, "... P"]) -> Float[Array, "... D"]:
    """The entry of each prompt's last token."""
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[-1]), 0), axis=-1)
    return jnp.take_along_axis(x, last[..., None, None], axis=-2)[..., 0, :]


def prefill(
    config: ModelConfig,
    params,
    steering: Steering,
    tokens: Int[Array, "Q P"],
    mask: Bool[Array, "Q P"],
    *,
    adapter: Any = None,
) -> Prefix:
    """Runs each prompt once; padding may stand on either side."""
    hidden, kv = forward(
        config,
        params,
        tokens[:, None],
        prompt_positions(mask)[:, None],
        steering,
        response=jnp.zeros((1, 1, 1), bool),
        valid=mask,
        adapter=adapter,
    )
    return Prefix(
        kv=kv,
        mask=mask,
        lengths=jnp.sum(mask, axis=-1),
        last_hidden=at_last_token(hidden[:, 0], mask),
    )
