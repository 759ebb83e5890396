"""ModelConfig: what the decoder needs to know of a checkpoint, read from its Hugging Face config.

A family is a set of field values, not a copy of the model. Whatever a config says that would
change the computation and that the decoder cannot do is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tailrisk_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    `scaling` is "default" (inverse frequencies theta^(-2i/d)) or "llama3" (low frequencies
    divided by `factor`, high ones kept, a linear blend between; Llama 3.1). The fields after
    `scaling` matter for "llama3" alone.
    """

    theta: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of one decoder; hashable, so that it can be a static jit argument.

    `end_ids` are all the tokens that end a response (generation_config.json lists several for
    Llama 3); an empty tuple means that only `max_new_tokens` ends one. The fields after it are
    what families differ in; their defaults are Llama's.

    Attributes:
      activation: of the MLP's gate, "silu" or "gelu_tanh" (GELU by its tanh approximation).
      unit_offset_norm: a norm multiplies by 1 + scale, in float32, before it rounds.
      scale_embeddings: embeddings are multiplied by sqrt(width), rounded to their dtype.
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
    rope: Rope = dataclasses.field(default_factory=Rope)
    tie_embeddings: bool = False
    max_positions: int = 8192
    end_ids: tuple[int, ...] = ()
    activation: str = "silu"
    unit_offset_norm: bool = False
    scale_embeddings: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}; check the checkpoint's config.json"
            )
        if self.head_dim % 2:
            raise InputError(
                f"head_dim={self.head_dim} is odd, and rotary embeddings rotate pairs; "
                "check the checkpoint's config.json"
            )


# Hugging Face field -> ours. Fields with one name on both sides would still be listed here.
_FIELDS = {
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

# Fields that change the computation, with the values that the decoder computes alike.
_FIXED = {
    "attention_bias": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}


@dataclasses.dataclass(frozen=True)
class _Family:
    """One model_type.

    Attributes:
      architecture: its class in transformers.
      examples: for the user whose model isn't supported.
      hidden_act: the activation's Hugging Face name, the one that is written first.
      fixed: more fields of `_FIXED`'s kind.
      switches: fields of ModelConfig that the family sets.
    """

    architecture: str
    examples: str
    hidden_act: tuple[str, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    switches: Mapping[str, Any]


_FAMILIES = {
    "llama": _Family(
        architecture="LlamaForCausalLM",
        examples="Llama 2, 3, 3.1, 3.2",
        hidden_act=("silu",),
        fixed={"mlp_bias": (False,)},
        switches={},
    ),
    "gemma": _Family(
        architecture="GemmaForCausalLM",
        examples="Gemma 1",
        # "gelu" is what its first configs say; the released models were trained with the other.
        hidden_act=("gelu_pytorch_tanh", "gelu"),
        fixed={
            "hidden_activation": (None, "gelu_pytorch_tanh"),
            "use_bidirectional_attention": (None, False),
        },
        switches={
            "activation": "gelu_tanh",
            "unit_offset_norm": True,
            "scale_embeddings": True,
        },
    ),
}

_ROPE_FIELDS = {
    "rope_theta": "theta",
    "rope_type": "scaling",
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_positions",
}
_ROPE_REQUIRED = {
    "default": {"rope_theta"},
    "llama3": set(_ROPE_FIELDS) - {"rope_type"},
}

# Fields that say nothing about the forward computation.
_IRRELEVANT = frozenset(
    (
        "_name_or_path", "architectures", "attention_dropout", "attn_implementation",
        "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
        "finetuning_task", "id2label", "initializer_range", "is_decoder", "label2id",
        "model_type", "name_or_path", "output_attentions", "output_hidden_states",
        "pad_token_id", "prefix", "pretraining_tp", "problem_type", "return_dict",
        "rope_parameters", "rope_scaling", "rope_theta", "sep_token_id",
        "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version",
        "use_cache",
    )
)  # fmt: skip


def is_complete(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json needs no defaults of transformers and has no older spellings."""
    complete = {*_FIELDS, "hidden_act"} <= set(fields) and fields.get("rope_parameters")
    return bool(complete) and not {"rope_scaling", "rope_theta"} & set(fields)


def from_hf(fields: Mapping[str, Any], end_ids: tuple[int, ...] = ()) -> ModelConfig:
    """Builds a ModelConfig from a Hugging Face config as a mapping.

    Args:
      fields: `PretrainedConfig.to_dict()`, that is, after transformers has normalised the older
        spellings of the rope fields.
      end_ids: end tokens, from generation_config.json where there is one.

    Raises:
      InputError: an unsupported family, or a field, named with its value, that changes the
        computation or is unknown.
    """
    family = fields.get("model_type")
    if family not in _FAMILIES:
        supported = ", ".join(f"{name!r} ({one.examples})" for name, one in _FAMILIES.items())
        raise InputError(f"model_type={family!r} isn't supported; supported: {supported}")
    traits = _FAMILIES[family]
    fixed = {**_FIXED, **traits.fixed, "hidden_act": traits.hidden_act}
    for name, value in fields.items():
        if name in _FIELDS or name in _IRRELEVANT:
            continue
        if name not in fixed:
            raise InputError(
                f"{family} config has the unknown field {name}={value!r}; if it does not change "
                "the forward computation, remove it from config.json"
            )
        if value not in fixed[name]:
            raise InputError(
                f"{family} config has {name}={value!r}, which isn't supported "
                f"(only {' or '.join(map(repr, fixed[name]))} is); use a checkpoint without it"
            )
    values = {ours: fields[name] for name, ours in _FIELDS.items() if name in fields}
    if values.get("num_kv_heads") is None:
        values["num_kv_heads"] = values["num_heads"]
    if values.get("head_dim") is None:
        values["head_dim"] = values["width"] // values["num_heads"]
    rope = _rope_from_hf(fields.get("rope_parameters") or {"rope_theta": 10_000.0})
    return ModelConfig(family=family, rope=rope, end_ids=end_ids, **values, **traits.switches)


def _rope_from_hf(fields: Mapping[str, Any]) -> Rope:
    kind = fields.get("rope_type", "default")
    if kind not in _ROPE_REQUIRED:
        raise InputError(
            f"config has rope_type={kind!r}, which isn't supported "
            f"(only {', '.join(map(repr, _ROPE_REQUIRED))} are); use a checkpoint without it"
        )
    for name, value in fields.items():
        harmless = name == "rope_type" or (name == "partial_rotary_factor" and value == 1.0)
        if not harmless and name not in _ROPE_REQUIRED[kind]:
            raise InputError(
                f"config has the rope parameter {name}={value!r}, which isn't supported with "
                f"rope_type={kind!r}; use a checkpoint without it"
            )
    missing = _ROPE_REQUIRED[kind] - set(fields)
    if missing:
        raise InputError(
            f"config has rope_type={kind!r} without {', '.join(sorted(missing))}; "
            "add it to rope_parameters in config.json"
        )
    return Rope(**{ours: fields[name] for name, ours in _ROPE_FIELDS.items() if name in fields})


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config.json of a ModelConfig: the inverse of `from_hf`."""
    names = set(_ROPE_REQUIRED[config.rope.scaling]) | {"rope_type"}
    rope = {
        name: getattr(config.rope, ours) for name, ours in _ROPE_FIELDS.items() if name in names
    }
    traits = _FAMILIES[config.family]
    return {
        "architectures": [traits.architecture],
        "model_type": config.family,
        **{name: getattr(config, ours) for name, ours in _FIELDS.items()},
        "rope_parameters": rope,
        "hidden_act": traits.hidden_act[0],
        "eos_token_id": list(config.end_ids) or None,
    }
