"""The parts that attention and MLP are made of: norms, linear layers, the MLP itself."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tailrisk_jax.models.config import ModelConfig


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467).

    The kinds are those of `ModelConfig.norm`; "layer" is (x - mean) / sqrt(var + eps) * scale +
    bias (Ba et al. 2016, arXiv 1607.06450).
    """

    config: ModelConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x):
        kind = self.config.norm
        ones, zeros = nn.initializers.ones, nn.initializers.zeros

        def parameter(name, start):
            init = nn.with_logical_partitioning(start, (self.axis,))
            return self.param(name, init, (x.shape[-1],))

        scale = parameter("scale", zeros if kind == "rms_offset" else ones)
        x32 = x.astype(jnp.float32)
        if kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.config.norm_eps)
        if kind == "rms":
            return x32.astype(x.dtype) * scale
        scale = jnp.asarray(scale, jnp.float32)
        x32 = x32 * (1 + scale if kind == "rms_offset" else scale)
        if kind == "layer":
            x32 = x32 + jnp.asarray(parameter("bias", zeros), jnp.float32)
        return x32.astype(x.dtype)


class Linear(nn.Module):
    """x @ kernel + bias, kernel [in, out]; where an adapter has this kernel, + scale (x A^T) B^T.

    The kernel is an array or an `Int8` (quantised.py). The adapter's part is computed in the
    adapter's own dtype and added in float32.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), self.axes)
        out = x @ self.param("kernel", init, (x.shape[-1], self.features))
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            out = out + self.param("bias", init, (self.features,))
        if not self.has_variable("lora", "kernel"):
            return out
        low_rank: Any = self.get_variable("lora", "kernel")
        inner = low_rank.scale * (x.astype(low_rank.a.dtype) @ low_rank.a.T)
        return (out.astype(jnp.float32) + inner @ low_rank.b.T).astype(out.dtype)


ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), or without the gate."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        config, activation = self.config, ACTIVATIONS[self.config.activation]

        def widen(name):
            return Linear(config.mlp_width, ("embed", "mlp"), config.mlp_bias, name=name)(x)

        if config.gated:
            hidden = activation(widen("gate")) * widen("up")
        else:
            hidden = activation(widen("up"))
        return Linear(config.width, ("mlp", "embed"), config.mlp_bias, name="down")(hidden)
