"""Key-value caches: one prefix per query, shared by all its samples, and one suffix per sample.

Memory is 2 L H_kv d (Q P + Q N T) numbers: the prompt's part does not grow with N.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.sharding import constrain


class KeyValues(NamedTuple):
    """Keys and values, both [L, Q, N, H_kv, S, d] (without L inside a layer)."""

    keys: Array
    values: Array


@struct.dataclass
class Prefix:
    """A prefilled prompt.

    Attributes:
      kv: keys and values [L, Q, 1, H_kv, P, d].
      mask: True where the prompt has a token, [Q, P].
      lengths: tokens in each prompt, [Q]; the first response token has this position.
      last_hidden: final hidden state of each prompt's last token, [Q, D].
    """

    kv: KeyValues
    mask: Bool[Array, "Q P"]
    lengths: Int[Array, " Q"]
    last_hidden: Float[Array, "Q D"]


@struct.dataclass
class Suffix:
    """The responses' keys and values so far.

    Attributes:
      kv: keys and values [L, Q, N, H_kv, T, d].
      mask: which of the T places belong to the response so far, [Q, N, T].
      positions: of these tokens in their text, prompt included, [Q, N, T]; others mean nothing.
    """

    kv: KeyValues
    mask: Bool[Array, "Q N T"]
    positions: Int[Array, "Q N T"]


def prompt_positions(mask: Bool[Array, "Q P"]) -> Int[Array, "Q P"]:
    """The position of each token in its own prompt; padding gets any position."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


def empty_suffix(config: ModelConfig, queries: int, samples: int, length: int, dtype) -> KeyValues:
    """Zeroed response keys and values, [L, Q, N, H_kv, T, d]."""
    shape = (
        config.num_layers, queries, samples, config.num_kv_heads, length, config.head_dim,
    )  # fmt: skip
    zeros = jnp.zeros(shape, dtype)
    return KeyValues(*(constrain_kv(zeros) for _ in range(2)))


def write_suffix(suffix: KeyValues, new: KeyValues, step) -> KeyValues:
    """The suffix with position `step` of all layers set to `new` ([L, Q, N, H_kv, 1, d])."""

    def write(old, entry):
        return constrain_kv(lax.dynamic_update_slice(old, entry, (0, 0, 0, 0, step, 0)))

    return jax.tree.map(write, suffix, new)


def constrain_kv(x):
    """Pins one of the stacked cache arrays to the current mesh."""
    return constrain(x, "layers", "queries", "samples", "kv_heads", "positions", "head_dim")
