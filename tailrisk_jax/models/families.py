"""Data only: what the fields of each family's Hugging Face config mean to the decoder.

A family has fields that are ours under another name, fields that take more than renaming
(`Reading`), fields that are supported with some values alone, and fields without meaning for the
forward computation. What is in none of these is refused.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tailrisk_jax.errors import InputError

if TYPE_CHECKING:
    from tailrisk_jax.models.config import ModelConfig

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Reading:
    """Fields that take more than renaming.

    Attributes:
      fields: what is read.
      to_ours: (config.json, fields of ModelConfig so far) -> more fields of ModelConfig.
      to_theirs: the inverse.
    """

    fields: tuple[str, ...]
    to_ours: Callable[[Fields, Fields], dict[str, Any]]
    to_theirs: Callable[["ModelConfig"], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type.

    Attributes:
      architecture: its class in transformers.
      examples: for the user whose model isn't supported.
      names: Hugging Face field -> field of ModelConfig.
      activation: the field's name, and the activations that are supported; the first is written.
      readings: fields that take more than renaming.
      fixed: fields that change the computation, with the values that the decoder computes.
      ignored: more fields that say nothing about the forward computation.
      switches: fields of ModelConfig that are the family's own.
      rope: "one", "by_layer_type" (one for full attention, one for windowed layers) or None.
      partial_rope: its code heeds partial_rotary_factor.
    """

    architecture: str
    examples: str
    names: Mapping[str, str]
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", ("silu",))
    readings: tuple[Reading, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rope: str | None = "one"
    partial_rope: bool = False


ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu_tanh",  # what Gemma's first configs say; its released models mean the other
}

_WINDOWED, _FULL = "sliding_attention", "full_attention"


def _windows_by_layer(fields: Fields, values: Fields) -> dict[str, Any]:
    kinds, window = fields["layer_types"], fields.get("sliding_window")
    for kind in kinds:
        if kind not in (_WINDOWED, _FULL):
            raise InputError(
                f"config has layer_types with {kind!r}, which isn't supported "
                f"(only {_FULL!r} and {_WINDOWED!r} are); use a checkpoint without it"
            )
    if len(kinds) != values["num_layers"]:
        raise InputError(
            f"config has layer_types of {len(kinds)} layers where num_hidden_layers is "
            f"{values['num_layers']}; check config.json"
        )
    windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == _WINDOWED)
    if windowed and fields.get("use_sliding_window") is False:
        raise InputError(
            f"config has use_sliding_window=False with {_WINDOWED!r} in layer_types; "
            "check config.json"
        )
    return {"windowed": windowed, "window": window if windowed else None}


def _layer_types(config: "ModelConfig") -> list[str]:
    return [_WINDOWED if windowed else _FULL for windowed in config.is_windowed]


WINDOWS_BY_LAYER = Reading(
    ("layer_types", "sliding_window"),
    _windows_by_layer,
    lambda config: {"layer_types": _layer_types(config), "sliding_window": config.window},
)

SWITCHED_WINDOWS = Reading(
    ("layer_types", "sliding_window", "use_sliding_window"),
    _windows_by_layer,
    lambda config: {
        "layer_types": _layer_types(config),
        "sliding_window": config.window,
        "use_sliding_window": bool(config.windowed),
    },
)

ONE_WINDOW = Reading(
    ("sliding_window",),
    lambda fields, values: (
        {"window": fields["sliding_window"], "windowed": tuple(range(values["num_layers"]))}
        if fields.get("sliding_window") is not None
        else {}
    ),
    lambda config: {"sliding_window": config.window},
)

GPT_NEO_WINDOWS = Reading(
    ("attention_types", "attention_layers", "window_size"),
    lambda fields, values: {
        "window": fields["window_size"] if "local" in fields["attention_layers"] else None,
        "windowed": tuple(i for i, one in enumerate(fields["attention_layers"]) if one == "local"),
    },
    lambda config: {
        "attention_layers": (kinds := ["local" if one else "global" for one in config.is_windowed]),
        "attention_types": [[[kind], 1] for kind in kinds],
        "window_size": config.window or 256,
    },
)

UNROTATED_LAYERS = Reading(
    ("no_rope_layers",),
    lambda fields, values: {
        "unrotated": tuple(i for i, rotated in enumerate(fields["no_rope_layers"]) if not rotated)
    },
    lambda config: {
        "no_rope_layers": [int(i not in config.unrotated) for i in range(config.num_layers)]
    },
)

QUERY_SCALAR = Reading(
    ("query_pre_attn_scalar",),
    lambda fields, values: {"attention_scale": fields["query_pre_attn_scalar"] ** -0.5},
    lambda config: {"query_pre_attn_scalar": round((config.attention_scale or 1.0) ** -2)},
)

EMBEDDINGS_BY_WIDTH = Reading(
    (), lambda fields, values: {"embedding_multiplier": values["width"] ** 0.5}, lambda config: {}
)

# Phi-3 notes the context length of pretraining outside its rope as well.
PRETRAINED_LENGTH = Reading(
    ("original_max_position_embeddings",),
    lambda fields, values: {},
    lambda config: {
        "original_max_position_embeddings": (
            config.rope.original_max_positions
            if config.rope and config.rope.scaling == "longrope"
            else config.max_positions
        )
    },
)

_SIZES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "width",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_width",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "max_positions",
}

_CAUSAL = {"use_bidirectional_attention": (None, False)}
_GEMMA_CAPS = {"attn_logit_softcapping": "attention_cap", "final_logit_softcapping": "logit_cap"}
_GEMMA_ACTIVATION = ("hidden_activation", ("gelu_pytorch_tanh",))
_GPT_ACTIVATION = ("activation_function", ("gelu_new",))
_GPT = {"norm": "layer", "gated": False, "out_bias": True, "mlp_bias": True}
_OLMO = {"norm": "rms_float32", "pre_norm": False, "post_norm": True, "qk_norm": "all"}
_DROPOUT = frozenset(
    (
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout", "embed_dropout",
        "classifier_dropout", "summary_type", "summary_use_proj", "summary_activation",
        "summary_proj_to_labels", "summary_first_dropout",
    )
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        examples="Llama 2, 3, 3.1, 3.2, Yi",
        names=_SIZES,
        fixed={"mlp_bias": (False,)},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        examples="Mistral 7B",
        names=_SIZES,
        readings=(ONE_WINDOW,),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        examples="Qwen 2, 2.5",
        names=_SIZES,
        readings=(SWITCHED_WINDOWS,),
        ignored=frozenset(("max_window_layers",)),
        switches={"qkv_bias": True},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        examples="Qwen 3",
        names=_SIZES,
        readings=(SWITCHED_WINDOWS,),
        ignored=frozenset(("max_window_layers",)),
        switches={"qk_norm": "head"},
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        examples="OLMo 2",
        names=_SIZES,
        switches=_OLMO,
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        examples="Olmo 3",
        names=_SIZES,
        readings=(WINDOWS_BY_LAYER,),
        switches=_OLMO,
        rope="by_layer_type",
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        examples="Gemma 1",
        names=_SIZES,
        activation=("hidden_act", ("gelu_pytorch_tanh", "gelu")),
        readings=(EMBEDDINGS_BY_WIDTH,),
        fixed={"hidden_activation": (None, "gelu_pytorch_tanh"), **_CAUSAL},
        switches={"norm": "rms_offset"},
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        examples="Gemma 2",
        names=_SIZES | _GEMMA_CAPS,
        activation=_GEMMA_ACTIVATION,
        readings=(EMBEDDINGS_BY_WIDTH, QUERY_SCALAR, WINDOWS_BY_LAYER),
        fixed=_CAUSAL | {"hidden_act": (*_GEMMA_ACTIVATION[1], None)},
        ignored=frozenset(("sliding_window_size",)),
        switches={"norm": "rms_offset", "post_norm": True},
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        examples="Gemma 3, the text-only checkpoints",
        names=_SIZES | _GEMMA_CAPS,
        activation=_GEMMA_ACTIVATION,
        readings=(EMBEDDINGS_BY_WIDTH, QUERY_SCALAR, WINDOWS_BY_LAYER),
        fixed=_CAUSAL,
        ignored=frozenset(("sliding_window_pattern", "_sliding_window_pattern")),
        switches={"norm": "rms_offset", "post_norm": True, "qk_norm": "head"},
        rope="by_layer_type",
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        examples="Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
        names=_SIZES,
        readings=(ONE_WINDOW, PRETRAINED_LENGTH),
        fixed={
            "mlp_bias": (False,), "lm_head_bias": (False,), "full_attn_mod": (1,),
            "interpolate_factor": (1,),
        },
        ignored=_DROPOUT | {"partial_rotary_factor"},
        partial_rope=True,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        examples="SmolLM3",
        names=_SIZES,
        readings=(SWITCHED_WINDOWS, UNROTATED_LAYERS),
        fixed={"mlp_bias": (False,)},
        ignored=frozenset(("max_window_layers", "no_rope_layer_interval")),
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        examples="Granite 3",
        names=_SIZES | {
            "embedding_multiplier": "embedding_multiplier",
            "attention_multiplier": "attention_scale",
            "residual_multiplier": "residual_multiplier",
            "logits_scaling": "logit_divisor",
        },
        fixed={"mlp_bias": (False,)},
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        examples="GPT-2",
        names={
            "vocab_size": "vocab_size",
            "n_layer": "num_layers",
            "n_embd": "width",
            "n_head": "num_heads",
            "n_inner": "mlp_width",
            "n_positions": "max_positions",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        activation=_GPT_ACTIVATION,
        fixed={
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False, True),
        },
        ignored=_DROPOUT | {"n_ctx"},
        switches=_GPT | {"qkv_bias": True},
        rope=None,
    ),
    "gpt_neo": Family(
        architecture="GPTNeoForCausalLM",
        examples="GPT-Neo, TinyStories",
        names={
            "vocab_size": "vocab_size",
            "num_layers": "num_layers",
            "hidden_size": "width",
            "num_heads": "num_heads",
            "intermediate_size": "mlp_width",
            "max_position_embeddings": "max_positions",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        activation=_GPT_ACTIVATION,
        readings=(GPT_NEO_WINDOWS,),
        ignored=_DROPOUT,
        switches=_GPT | {"attention_scale": 1.0},
        rope=None,
    ),
}  # fmt: skip
