"""The decoder: one Flax Linen module for every family, layers stacked on L and scanned.

The forward pass works on tokens [Q, N, S] (queries, samples, new positions) that may attend to
a prefix shared by all samples of a query, to a suffix of earlier response positions of each
sample, and causally to each other. Prefill, one decoding step and teacher-forced scoring are
three uses of the same method.

Steering enters every layer as arguments, where Arditi et al. 2024 (arXiv 2406.11717) act:
x <- x - a (x . d) d on the layer's input and on what attention and MLP write to the residual
stream (after the norm that some families put there), and x <- x + v on the layer's output.

A LoRA adapter is a second collection of variables, `lora`, a tree beside the parameters that
holds a `LowRank` (adapters.py) for each adapted kernel; it is scanned with the layers. So is
what layers differ in (attention.py): a window, no rope or another rope.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.models.attention import Attention, Context, context, layer_kinds
from tailrisk_jax.models.cache import KeyValues, Prefix, Suffix, prompt_positions
from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.layers import MLP, Norm
from tailrisk_jax.models.sharding import constrain


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


def pin(x: Float[Array, "Q N S D"]) -> Float[Array, "Q N S D"]:
    """Keeps samples on their devices, where mesh axes that cut parameters could cut D instead."""
    return x if x.shape[1] == 1 else constrain(x, "queries", "samples", "positions", "width")


class Layer(nn.Module):
    """One block with its three ablation sites and its addition.

    Its input, the residual stream before steering, is sown as intermediates/residual: applying
    with mutable=["intermediates"] returns it as [L, Q, N, S, D].
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x, per_layer, ctx: Context):
        steering, kind, prefix, suffix = per_layer
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

        def norm(y, name, wanted):
            return Norm(self.config, name=name)(y) if wanted else y

        def write(x, out, name):
            out = norm(out, name, self.config.post_norm)
            if self.config.residual_multiplier != 1:
                out = out * self.config.residual_multiplier
            return x + ablate(out)

        x, pre_norm = ablate(x), self.config.pre_norm
        out, kv = Attention(self.config, name="attention")(
            norm(x, "attention_norm", pre_norm), kind, ctx, prefix, suffix
        )
        x = write(x, out, "attention_post_norm")
        out = MLP(self.config, name="mlp")(norm(x, "mlp_norm", pre_norm))
        x = write(x, out, "mlp_post_norm")
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
        if config.rope is None:
            positions = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
            table = (config.max_positions, config.width)
            self.position_embedding: Any = self.param("position_embedding", positions, table)
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
        self.final_norm = Norm(config)

    def __call__(
        self,
        tokens: Int[Array, "Q N S"],
        positions: Int[Array, "Q #N S"],
        steering: Steering,
        *,
        response: Bool[Array, "#Q #N #S"],
        valid: Bool[Array, "Q S"] | None = None,
        prefix: Prefix | None = None,
        suffix: Suffix | None = None,
    ) -> tuple[Float[Array, "Q N S D"], KeyValues]:
        """Final hidden states of the new tokens, and their keys and values.

        Args:
          tokens: new tokens.
          positions: their positions in their own text.
          steering: per-layer coefficients and vectors.
          response: True where a token belongs to the response.
          valid: False for padding among the new tokens; None where there is none.
          prefix: a prefilled prompt.
          suffix: what each sample's response has cached so far.
        """
        config = self.config
        ctx = context(
            config, positions, response=response, valid=valid, prefix=prefix, suffix=suffix
        )
        per_layer = (
            steering,
            layer_kinds(config),
            None if prefix is None else prefix.kv,
            None if suffix is None else suffix.kv,
        )
        embedded = self.embedding[tokens]
        if config.embedding_multiplier != 1:
            embedded *= jnp.float32(config.embedding_multiplier).astype(embedded.dtype)
        if config.rope is None:
            # Beyond the table there is NaN, not the table's last row.
            table = self.position_embedding
            embedded += jnp.take(table, positions, axis=0, mode="fill", fill_value=jnp.nan)
        hidden, kv = self.layers(pin(embedded), per_layer, ctx)
        return self.final_norm(pin(hidden)), kv

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits in float32."""
        config = self.config
        head = self.embedding if config.tie_embeddings else self.lm_head
        logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
        if config.logit_divisor != 1:
            logits = logits / config.logit_divisor
        if config.logit_cap is not None:
            logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
        return logits


@functools.cache
def parameter_shapes(config: ModelConfig):
    """The parameter tree as ShapeDtypeStructs boxed with their logical axes (nothing computed)."""

    def init():
        token, response = jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1, 1), bool)
        key, steering = jax.random.key(0), no_steering(config)
        return Decoder(config).init(key, token, token, steering, response=response)

    shapes: Any = jax.eval_shape(init)
    return shapes["params"]


def leaf_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of each leaf of the parameter tree, by its path."""
    leaves: Any = traverse_util.flatten_dict(nn.meta.unbox(parameter_shapes(config)))
    return {path: leaf.shape for path, leaf in leaves.items()}


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
