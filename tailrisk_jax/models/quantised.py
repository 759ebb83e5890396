"""Weights of 8 bits: half or a quarter of the memory, for proposals.

A quantised model is another model, close to the first. As a proposal it is as valid as any other:
its own log-probabilities are used.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from jaxtyping import Array, Float, Int

from tailrisk_jax.errors import InputError


@struct.dataclass
class Int8:
    """A kernel [.., in, out] as scales * values; `x @ kernel` is its product, in the dtype of x.

    Attributes:
      values: integers from -127 to 127.
      scales: of each output.
    """

    values: Int[Array, "... in out"]
    scales: Float[Array, "... out"]

    def __rmatmul__(self, x: Float[Array, "*B in"]) -> Float[Array, "*B out"]:
        out = x @ self.values.astype(x.dtype)
        return (out.astype(jnp.float32) * self.scales).astype(x.dtype)


def quantise(model: Any) -> Any:
    """The `Model` with the kernels of its linear layers rounded to 8 bits.

    values = round(kernel / scales), scales = max |kernel| / 127 over the inputs of each output (a
    symmetric scale per channel), float32. Embeddings, head, norms and biases stay, and are shared
    with the model; so do the dtype of the computation and its layout on a mesh.

    Raises:
      InputError: a model that is quantised already.
    """
    leaves: Any = traverse_util.flatten_dict(model.params)
    if is_quantised(model):
        raise InputError("the model is in int8 already; quantise the original once")
    leaves = {
        path: _quantise_leaf(leaf) if path[-1] == "kernel" else leaf
        for path, leaf in leaves.items()
    }
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(leaves))


def is_quantised(model: Any) -> bool:
    """Whether any kernel of a `Model` is an `Int8`."""
    leaves: Any = jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, Int8))
    return any(isinstance(leaf, Int8) for leaf in leaves)


@jax.jit
def _quantise_leaf(kernel: Float[Array, "L in out"]) -> Int8:
    def layer(kernel):
        kernel = kernel.astype(jnp.float32)
        scales = jnp.max(jnp.abs(kernel), axis=0) / 127
        values = jnp.round(kernel / jnp.where(scales > 0, scales, 1))
        return Int8(values=values.astype(jnp.int8), scales=scales)

    return jax.lax.map(layer, kernel)
