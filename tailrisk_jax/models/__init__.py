"""One Flax decoder, Hugging Face checkpoints in and out, logical sharding."""

from tailrisk_jax.models.adapters import LowRank
from tailrisk_jax.models.cache import (
    KeyValues,
    Prefix,
    Suffix,
    empty_suffix,
    prompt_positions,
    write_suffix,
)
from tailrisk_jax.models.checkpoint import (
    Model,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    read_adapter,
    save_adapter,
    save_model,
)
from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.quantised import Int8, is_quantised, quantise
from tailrisk_jax.models.rope import Rope
from tailrisk_jax.models.sharding import DEFAULT_RULES, shard
from tailrisk_jax.models.transformer import (
    Decoder,
    Steering,
    at_last_token,
    forward,
    next_logits,
    no_steering,
    prefill,
)

__all__ = [
    "DEFAULT_RULES",
    "Decoder",
    "Int8",
    "KeyValues",
    "LowRank",
    "Model",
    "ModelConfig",
    "Prefix",
    "Rope",
    "Steering",
    "Suffix",
    "at_last_token",
    "empty_suffix",
    "forward",
    "is_quantised",
    "load_adapter",
    "load_config",
    "load_model",
    "load_tokenizer",
    "locate",
    "next_logits",
    "no_steering",
    "prefill",
    "prompt_positions",
    "quantise",
    "read_adapter",
    "save_adapter",
    "save_model",
    "shard",
    "write_suffix",
]
