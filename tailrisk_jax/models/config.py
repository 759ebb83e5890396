"""ModelConfig: what the decoder needs to know of a checkpoint.

A family is a set of field values, not a copy of the model. hf_config.py reads and writes
Hugging Face's config.json; families.py says what a family's fields mean.
"""

import dataclasses

import numpy as np

from tailrisk_jax.errors import InputError
from tailrisk_jax.models.rope import Rope, rotary_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of one decoder; hashable, so that it can be a static jit argument.

    `end_ids` are all the tokens that end a response (generation_config.json lists several for
    Llama 3); an empty tuple means that only `max_new_tokens` ends one. The fields after it are
    what families differ in; their defaults are Llama's.

    Attributes:
      rope: rotary positions; None for a table of learned ones, `max_positions` long, that is
        added to the embeddings.
      max_positions: the longest text. With longrope it is the context length of pretraining, up
        to which the short factors hold; the config's own number is kept in `rope`.
      local_rope: of the windowed layers, where they have a rope of their own.
      unrotated: layers without rotary positions.
      window: how many positions a windowed layer attends to, its own included.
      windowed: which layers these are.
      activation: of the MLP, "silu" or "gelu_tanh" (GELU by its tanh approximation).
      gated: the MLP is down(activation(gate(x)) * up(x)), or else down(activation(up(x))).
      norm: "rms" (rounded to the activations' dtype, then scaled), "rms_offset" (scaled by
        1 + scale, then rounded), "rms_float32" (scaled, then rounded) or "layer" (mean removed,
        scaled and shifted, then rounded).
      pre_norm: attention and MLP read the normed stream.
      post_norm: what they give is normed before it is added to the stream.
      qk_norm: queries and keys are normed: "head" (each head alone), "all" (all heads
        together) or None.
      qkv_bias, out_bias, mlp_bias: which linear layers have biases.
      attention_scale: of the products of queries and keys; None is head_dim^-0.5.
      attention_cap, logit_cap: scores or logits s become cap * tanh(s / cap); None leaves them.
      embedding_multiplier: of the embeddings, rounded to their dtype.
      residual_multiplier: of what attention and MLP add to the stream.
      logit_divisor: of the logits, before the cap.
    """

    family: str
    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-5
    rope: Rope | None = dataclasses.field(default_factory=Rope)
    tie_embeddings: bool = False
    max_positions: int = 8192
    end_ids: tuple[int, ...] = ()
    local_rope: Rope | None = None
    unrotated: tuple[int, ...] = ()
    window: int | None = None
    windowed: tuple[int, ...] = ()
    activation: str = "silu"
    gated: bool = True
    norm: str = "rms"
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}; check the checkpoint's config.json"
            )
        sizes = {rotary_size(rope, self.head_dim) for rope in self.ropes if rope is not None}
        if any(size % 2 for size in sizes) or len(sizes) > 1:
            raise InputError(
                f"head_dim={self.head_dim} makes {' and '.join(map(str, sorted(sizes)))} rotated "
                "dimensions, and rotary embeddings rotate pairs, as many in every layer; "
                "check the checkpoint's config.json"
            )
        if self.windowed and not (self.window and self.window > 0):
            raise InputError(
                f"sliding_window={self.window!r} where {len(self.windowed)} layers have a window; "
                "check the checkpoint's config.json"
            )

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The different ropes of the layers; None rotates nothing."""
        if self.rope is None:
            return ()
        local = () if self.local_rope is None else (self.local_rope,)
        return (self.rope, *local, *((None,) if self.unrotated else ()))

    @property
    def rope_of_layer(self) -> np.ndarray:
        """Each layer's index into `ropes`, [L]."""
        index = np.zeros(self.num_layers, np.int32)
        if self.local_rope is not None:
            index[list(self.windowed)] = 1
        index[list(self.unrotated)] = len(self.ropes) - 1
        return index

    @property
    def is_windowed(self) -> np.ndarray:
        """Which layers have a window, [L]."""
        return np.isin(np.arange(self.num_layers), self.windowed)

    @property
    def ends_at_max_positions(self) -> bool:
        """Whether longer texts can't be computed: for learned positions and longrope."""
        return self.rope is None or any(rope and rope.scaling == "longrope" for rope in self.ropes)
