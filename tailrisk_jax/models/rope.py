"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and the ways they are rescaled."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tailrisk_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary embedding; which of the fields matter depends on `scaling`.

    Attributes:
      theta: inverse frequencies are theta^(-2i/d), i < d/2, before they are rescaled.
      scaling: "default" (not rescaled); "linear" (all divided by `factor`); "llama3" (low ones
        divided by `factor`, high ones kept, a linear blend between; Llama 3.1); "yarn" (likewise,
        with a ramp over dimensions; Peng et al. 2023, arXiv 2309.00071); "longrope" (each divided
        by its own `short_factors`; Ding et al. 2024, arXiv 2402.13753).
      factor: of linear, llama3 and yarn.
      low_freq_factor, high_freq_factor: where llama3 blends, in turns per original context.
      beta_fast, beta_slow: where yarn's ramp starts and ends, in turns per original context.
      short_factors, long_factors: of longrope, [d/2]. Texts of up to `original_max_positions`
        tokens are computed with the short ones, as transformers does; it switches all positions
        to the long ones as soon as a text is longer, so that a token's probability would depend
        on what follows it. Longer texts are refused, and the long factors are only kept.
      original_max_positions: the context length of pretraining.
      extended_positions: of longrope, max_position_embeddings of the config.
      attention_factor: what cosines and sines are multiplied by (yarn and longrope).
      partial: the share of a head's dimensions that is rotated; the others stay as they are.
    """

    theta: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    original_max_positions: int = 8192
    extended_positions: int = 0
    attention_factor: float = 1.0
    partial: float = 1.0


def rotary_size(rope: Rope, head_dim: int) -> int:
    """How many of a head's dimensions are rotated."""
    return int(head_dim * rope.partial)


def rope_frequencies(rope: Rope, head_dim: int) -> Float[Array, " half"]:
    """The rescaled inverse frequencies, one for each rotated pair of dimensions."""
    size = rotary_size(rope, head_dim)
    exponents = jnp.arange(0, size, 2, dtype=jnp.float32) / size
    freqs = 1.0 / rope.theta**exponents
    return _SCALINGS[rope.scaling](rope, size, freqs)


def _linear(rope: Rope, size: int, freqs: Array) -> Array:
    return freqs / rope.factor


def _llama3(rope: Rope, size: int, freqs: Array) -> Array:
    wavelengths = 2 * jnp.pi / freqs
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    blend = rope.original_max_positions / wavelengths - rope.low_freq_factor
    blend = jnp.clip(blend / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    blended = (1 - blend) * freqs / rope.factor + blend * freqs
    return jnp.where(
        wavelengths > low, freqs / rope.factor, jnp.where(wavelengths < high, freqs, blended)
    )


def _yarn(rope: Rope, size: int, freqs: Array) -> Array:
    def dimension(turns: float) -> float:
        """The pair, as a real number, that makes so many turns in the original context."""
        log = math.log(rope.original_max_positions / (turns * 2 * math.pi))
        return size * log / (2 * math.log(rope.theta))

    start = max(math.floor(dimension(rope.beta_fast)), 0)
    stop = min(math.ceil(dimension(rope.beta_slow)), size - 1)
    stop = stop + 0.001 if start == stop else stop
    ramp = jnp.clip((jnp.arange(size // 2, dtype=jnp.float32) - start) / (stop - start), 0, 1)
    return freqs / rope.factor * ramp + freqs * (1 - ramp)


def _longrope(rope: Rope, size: int, freqs: Array) -> Array:
    return freqs / jnp.asarray(rope.short_factors, jnp.float32)


_SCALINGS = {
    "default": lambda rope, size, freqs: freqs,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates pairs (i, i + r/2) of the first r entries of the last axis of x [Q, N, S, H, d].

    Args:
      cos, sin: of each position's angles, [Q, 1 or N, S, r/2].
    """
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], axis=-1)


# Hugging Face field -> ours, by scaling: what has to be there, and what may be.
_REQUIRED = {
    "default": {"rope_theta": "theta"},
    "linear": {"rope_theta": "theta", "factor": "factor"},
    "llama3": {
        "rope_theta": "theta",
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_positions",
    },
    "yarn": {
        "rope_theta": "theta",
        "factor": "factor",
        "original_max_position_embeddings": "original_max_positions",
    },
    "longrope": {
        "rope_theta": "theta",
        "short_factor": "short_factors",
        "long_factor": "long_factors",
        "original_max_position_embeddings": "original_max_positions",
    },
}
_OPTIONAL = {
    "yarn": {
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
    "longrope": {"attention_factor": "attention_factor"},
}
# Read to work out the attention factor, and not written again.
_OF_ATTENTION_FACTOR = {"yarn": {"mscale", "mscale_all_dim"}, "longrope": {"factor"}}


def rope_from_hf(
    fields: Mapping[str, Any], *, max_positions: int, head_dim: int, partial: bool = False
) -> Rope:
    """A Rope from Hugging Face's rope_parameters.

    Args:
      max_positions: max_position_embeddings of the config.
      partial: whether the family's code heeds partial_rotary_factor.

    Raises:
      InputError: a kind or a field that isn't supported, or a field that is missing, by name.
    """
    kind = fields.get("rope_type") or fields.get("type", "default")
    if kind not in _REQUIRED:
        raise InputError(
            f"config has rope_type={kind!r}, which isn't supported "
            f"(only {', '.join(map(repr, _REQUIRED))} are); use a checkpoint without it"
        )
    required, optional = _REQUIRED[kind], _OPTIONAL.get(kind, {})
    known = {"rope_type", "type", *required, *optional, *_OF_ATTENTION_FACTOR.get(kind, ())}
    harmless = {"partial_rotary_factor": 1.0, "truncate": True}
    for name, value in fields.items():
        rotated = partial and name == "partial_rotary_factor"
        if name in known or rotated or value is None or harmless.get(name) == value:
            continue
        raise InputError(
            f"config has the rope parameter {name}={value!r}, which isn't supported with "
            f"rope_type={kind!r}; use a checkpoint without it"
        )
    missing = {name for name in required if fields.get(name) is None}
    if missing:
        raise InputError(
            f"config has rope_type={kind!r} without {', '.join(sorted(missing))}; "
            "add it to rope_parameters in config.json"
        )
    given: dict[str, Any] = {
        ours: fields[name]
        for name, ours in (required | optional).items()
        if fields.get(name) is not None
    }
    given = {ours: tuple(v) if isinstance(v, list) else v for ours, v in given.items()}
    rope = Rope(scaling=kind, **given)
    if partial and fields.get("partial_rotary_factor") is not None:
        rope = dataclasses.replace(rope, partial=fields["partial_rotary_factor"])
    if kind == "longrope":
        rope = dataclasses.replace(rope, extended_positions=max_positions)
        size = rotary_size(rope, head_dim)
        for name in ("short_factor", "long_factor"):
            if 2 * len(fields[name]) != size:
                raise InputError(
                    f"config has {name} with {len(fields[name])} entries where {size} rotated "
                    "dimensions need half as many; check rope_parameters in config.json"
                )
    if "attention_factor" in optional and "attention_factor" not in given:
        factor = _attention_factor(kind, fields, max_positions)
        rope = dataclasses.replace(rope, attention_factor=factor)
    return rope


def _attention_factor(kind: str, fields: Mapping[str, Any], max_positions: int) -> float:
    """The published default: of yarn 0.1 log(factor) + 1, of longrope sqrt(1 + log ratio)."""
    original = fields["original_max_position_embeddings"]
    factor = fields.get("factor") or max_positions / original
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    above, below = fields.get("mscale"), fields.get("mscale_all_dim")
    if not (above and below):
        above, below = 1.0, 0.0
    return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """Hugging Face's rope_parameters: the inverse of `rope_from_hf`."""
    names = _REQUIRED[rope.scaling] | _OPTIONAL.get(rope.scaling, {})
    values = {name: getattr(rope, ours) for name, ours in names.items()}
    if rope.partial != 1:
        values["partial_rotary_factor"] = rope.partial
    return {
        "rope_type": rope.scaling,
        **{name: list(v) if isinstance(v, tuple) else v for name, v in values.items()},
    }
