"""Random tiny models of transformers on PyTorch, of every family; Llamas are in torch_llama."""

import functools

import transformers
from transformers import GemmaConfig, GemmaForCausalLM

from tests.models import torch_llama


def gemma_config(**overrides) -> GemmaConfig:
    fields = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 10, "rms_norm_eps": 1e-6,
        "eos_token_id": [2, 7, 11], "bos_token_id": 1, "max_position_embeddings": 256,
    }  # fmt: skip
    return GemmaConfig(**(fields | overrides))


def gemma(seed: int = 0, **overrides) -> GemmaForCausalLM:
    """A random Gemma; its norms multiply by one more than their weights."""
    config = gemma_config(**overrides)
    # Embeddings are scaled up by sqrt(width), and would drown what the layers add.
    return torch_llama.randomised(GemmaForCausalLM, config, seed, norms=(-0.5, 0.5), embeddings=0.2)


# Name -> what makes the model.
MODELS = {
    **{
        name: functools.partial(torch_llama.llama, **fields)
        for name, fields in torch_llama.CONFIGS.items()
    },
    "gemma-multi-query": gemma,
    "gemma-multi-head": functools.partial(
        gemma, num_key_value_heads=4, head_dim=16, tie_word_embeddings=False
    ),
}

_SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "eos_token_id": [2, 7, 11], "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip

_END = {"eos_token_id": [2, 7, 11], "bos_token_id": 1, "pad_token_id": 0}

# Wavelengths from 6 to 350 positions: the ramp lies between them.
YARN = {
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
    "original_max_position_embeddings": 16, "beta_fast": 3.0, "beta_slow": 0.2,
}  # fmt: skip
DEFAULT = {"rope_type": "default", "rope_theta": 50.0}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]

# Family -> (prefix of its classes' names, fields, standard deviation of embeddings).
# Windows are shorter than the prompts; each has several features at once.
FAMILIES = {
    "mistral": ("Mistral", _SIZES | {"sliding_window": 5, "head_dim": 10}, 0.5),
    "qwen2": (
        "Qwen2",
        _SIZES
        | {
            "num_key_value_heads": 1, "tie_word_embeddings": True, "use_sliding_window": True,
            "sliding_window": 4, "max_window_layers": 1, "rope_parameters": YARN,
        },
        0.5,
    ),
    "qwen3": ("Qwen3", _SIZES | {"head_dim": 10, "rope_parameters": LINEAR}, 0.5),
    "olmo2": ("Olmo2", _SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}, 0.5),
    "olmo3": (
        "Olmo3",
        _SIZES
        | {
            "sliding_window": 5, "layer_types": MIXED,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT},
        },
        0.5,
    ),
    "gemma2": (
        "Gemma2",
        _SIZES
        | {
            "head_dim": 10, "query_pre_attn_scalar": 3, "sliding_window": 5,
            "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
        },
        0.2,
    ),
    "gemma3_text": (
        "Gemma3Text",
        _SIZES
        | {
            "head_dim": 8, "num_key_value_heads": 1, "query_pre_attn_scalar": 6,
            "sliding_window": 5, "layer_types": MIXED, "tie_word_embeddings": False,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": DEFAULT},
        },
        0.2,
    ),
    "phi3": (
        "Phi3",
        _SIZES
        | {
            "hidden_size": 32, "sliding_window": 6, "tie_word_embeddings": True,
            "max_position_embeddings": 256, "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.3, 2.5], "long_factor": [2.0, 4.0, 9.0],
            },
        },
        0.5,
    ),
    "smollm3": (
        "SmolLM3",
        _SIZES
        | {
            "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 5,
            "rope_parameters": torch_llama.LLAMA3_ROPE, "tie_word_embeddings": False,
        },
        0.5,
    ),
    "granite": (
        "Granite",
        _SIZES
        | {
            "embedding_multiplier": 3.0, "attention_multiplier": 0.7, "residual_multiplier": 0.4,
            "logits_scaling": 0.6, "tie_word_embeddings": True,
        },
        0.2,
    ),
    "gpt2": (
        "GPT2",
        _END
        | {"vocab_size": 61, "n_embd": 21, "n_layer": 3, "n_head": 3, "n_inner": 34,
           "n_positions": 64},
        0.5,
    ),
    "gpt_neo": (
        "GPTNeo",
        _END
        | {"vocab_size": 61, "hidden_size": 21, "num_layers": 3, "num_heads": 3,
           "attention_types": [[["global"], 1], [["local"], 2]], "window_size": 5,
           "max_position_embeddings": 64},
        0.5,
    ),
}  # fmt: skip


def config_of(family: str, **overrides):
    """The config of one of `FAMILIES`, with some of its fields changed."""
    name, fields, _ = FAMILIES[family]
    return getattr(transformers, name + "Config")(**(fields | overrides))


def make(family: str, seed: int = 0, **overrides):
    """A random model of one of `FAMILIES`, with some of its fields changed."""
    name, _, embeddings = FAMILIES[family]
    config = config_of(family, **overrides)
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    architecture = getattr(transformers, name.removesuffix("Text") + suffix)
    norms = (-0.5, 0.5) if name.startswith("Gemma") else (0.5, 1.5)
    return torch_llama.randomised(architecture, config, seed, norms=norms, embeddings=embeddings)
