"""Published models by name: their config.json, so that one can plan without any download.

Facts of each model's config.json on the Hugging Face hub; fields that say nothing of shapes or of
the computation are left out.
"""

from typing import Any

from tailrisk_jax.models import ModelConfig
from tailrisk_jax.models.hf_config import from_hf

_LLAMA_2: dict[str, Any] = {
    "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "vocab_size": 32000, "max_position_embeddings": 4096, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}  # fmt: skip
_LLAMA_3: dict[str, Any] = _LLAMA_2 | {
    "vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8,
    "eos_token_id": [128001, 128009],
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}  # fmt: skip


def _llama_3_1(factor: float) -> dict[str, Any]:
    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return _LLAMA_3 | {
        "max_position_embeddings": 131072, "eos_token_id": [128001, 128008, 128009],
        "rope_parameters": rope,
    }  # fmt: skip


_GEMMA: dict[str, Any] = {
    "model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "vocab_size": 256000, "max_position_embeddings": 8192,
    "head_dim": 256, "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}  # fmt: skip


def _shape(layers: int, width: int, heads: int, kv_heads: int, mlp: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp,
    }  # fmt: skip


PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7B": _LLAMA_2 | _shape(32, 4096, 32, 32, 11008),
    "Llama-2-13B": _LLAMA_2 | _shape(40, 5120, 40, 40, 13824),
    "Llama-2-70B": _LLAMA_2 | _shape(80, 8192, 64, 8, 28672),
    "Llama-3-8B": _LLAMA_3 | _shape(32, 4096, 32, 8, 14336),
    "Llama-3-70B": _LLAMA_3 | _shape(80, 8192, 64, 8, 28672),
    "Llama-3.1-8B": _llama_3_1(8.0) | _shape(32, 4096, 32, 8, 14336),
    "Llama-3.1-70B": _llama_3_1(8.0) | _shape(80, 8192, 64, 8, 28672),
    "Llama-3.1-405B": _llama_3_1(8.0) | _shape(126, 16384, 128, 8, 53248),
    "Llama-3.2-1B": _llama_3_1(32.0)
    | _shape(16, 2048, 32, 8, 8192)
    | {"head_dim": 64, "tie_word_embeddings": True},
    "Llama-3.2-3B": _llama_3_1(32.0)
    | _shape(28, 3072, 24, 8, 8192)
    | {"head_dim": 128, "tie_word_embeddings": True},
    "Llama-3.3-70B": _llama_3_1(8.0) | _shape(80, 8192, 64, 8, 28672),
    "gemma-2b": _GEMMA | _shape(18, 2048, 8, 1, 16384),
    "gemma-7b": _GEMMA | _shape(28, 3072, 16, 16, 24576),
}
"""Hugging Face configs of published models, by name."""


def published(name: str) -> ModelConfig | None:
    """The config of a published model, None for a name that is not in the table.

    Instruction-tuned versions have the shapes of their base: "meta-llama/Llama-3.1-8B-Instruct"
    is "Llama-3.1-8B".
    """
    short = name.rpartition("/")[2].lower()
    for suffix in ("-instruct", "-chat-hf", "-chat", "-hf", "-it"):
        short = short.removesuffix(suffix)
    short = short.replace("meta-llama-", "llama-")
    fields = {one.lower(): fields for one, fields in PUBLISHED.items()}.get(short)
    if fields is None:
        return None
    end = fields["eos_token_id"]
    return from_hf(fields, tuple(end) if isinstance(end, list) else (end,))
