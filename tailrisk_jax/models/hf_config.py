"""Hugging Face's config.json to a ModelConfig, and back.

Whatever a config says that would change the computation and that the decoder cannot do is
refused by name.
"""

from collections.abc import Mapping
from typing import Any

from tailrisk_jax.errors import InputError
from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.families import ACTIVATIONS, FAMILIES, Family
from tailrisk_jax.models.rope import Rope, rope_from_hf, rope_to_hf

# Fields of every family that change the computation, with the values that are computed.
_FIXED = {
    "attention_bias": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}

# Fields that say nothing about the forward computation.
_IRRELEVANT = frozenset(
    (
        "_name_or_path", "architectures", "attention_dropout", "attn_implementation",
        "auto_map", "bos_token_id", "cache_implementation", "chunk_size_feed_forward", "dtype",
        "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label",
        "initializer_range", "is_decoder", "label2id", "model_type", "name_or_path",
        "output_attentions", "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp",
        "problem_type", "return_dict", "rope_parameters", "rope_scaling", "rope_theta",
        "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype",
        "transformers_version", "use_cache",
    )
)  # fmt: skip


def is_complete(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json needs no defaults of transformers and has no older spellings."""
    family = FAMILIES.get(fields.get("model_type", ""))
    if family is None or {"rope_scaling", "rope_theta"} & set(fields):
        return False
    rope = family.rope is None or bool(fields.get("rope_parameters"))
    return rope and _read_fields(family) <= set(fields)


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
    name, family = fields.get("model_type", ""), family_of(fields)
    _check_fields(name, family, fields)
    values = {ours: fields[theirs] for theirs, ours in family.names.items() if theirs in fields}
    defaults = {
        "num_kv_heads": values["num_heads"],
        "head_dim": values["width"] // values["num_heads"],
        "mlp_width": 4 * values["width"],
    }
    values |= {ours: value for ours, value in defaults.items() if values.get(ours) is None}
    values["activation"] = ACTIVATIONS[fields[family.activation[0]]]
    values |= family.switches
    for reading in family.readings:
        values |= reading.to_ours(fields, values)
    values |= _ropes(family, fields, values)
    return ModelConfig(family=name, end_ids=end_ids, **values)


def family_of(fields: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config.

    Raises:
      InputError: one that isn't supported.
    """
    name = fields.get("model_type")
    if name not in FAMILIES:
        supported = ", ".join(f"{name!r} ({one.examples})" for name, one in FAMILIES.items())
        raise InputError(f"model_type={name!r} isn't supported; supported: {supported}")
    return FAMILIES[name]


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config.json of a ModelConfig: the inverse of `from_hf`."""
    family = FAMILIES[config.family]
    fields: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.family,
        **{theirs: getattr(config, ours) for theirs, ours in family.names.items()},
        family.activation[0]: family.activation[1][0],
        "eos_token_id": list(config.end_ids) or None,
        # The tokenizer's; transformers would put its own class's defaults there.
        "bos_token_id": None,
        "pad_token_id": None,
    }
    for reading in family.readings:
        fields |= reading.to_theirs(config)
    if config.rope is None:
        return fields
    if config.rope.scaling == "longrope":
        fields["max_position_embeddings"] = config.rope.extended_positions
    fields["rope_parameters"] = rope_to_hf(config.rope)
    if family.rope == "by_layer_type":
        local = config.local_rope or config.rope
        fields["rope_parameters"] = {
            "full_attention": rope_to_hf(config.rope), "sliding_attention": rope_to_hf(local)
        }  # fmt: skip
    return fields


def _read_fields(family: Family) -> set[str]:
    read = {name for reading in family.readings for name in reading.fields}
    return {*family.names, family.activation[0], *read}


def _check_fields(name: str, family: Family, fields: Mapping[str, Any]) -> None:
    field, activations = family.activation
    fixed = {**_FIXED, **family.fixed, field: activations}
    known = (_read_fields(family) - {field}) | _IRRELEVANT | family.ignored
    for key, value in fields.items():
        if key in known:
            continue
        if key not in fixed:
            raise InputError(
                f"{name} config has the unknown field {key}={value!r}; if it does not change "
                "the forward computation, remove it from config.json"
            )
        if value not in fixed[key]:
            raise InputError(
                f"{name} config has {key}={value!r}, which isn't supported "
                f"(only {' or '.join(map(repr, fixed[key]))} is); use a checkpoint without it"
            )
    missing = sorted({*_read_fields(family)} - set(fields) - set(_WITH_DEFAULT))
    if missing:
        raise InputError(f"{name} config lacks {missing[0]}; fetch config.json again")


_WITH_DEFAULT = ("head_dim", "num_key_value_heads", "intermediate_size", "n_inner")


def _ropes(family: Family, fields: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    if family.rope is None:
        return {"rope": None}

    def read(parameters: Mapping[str, Any]) -> Rope:
        return rope_from_hf(
            parameters,
            max_positions=values["max_positions"],
            head_dim=values["head_dim"],
            partial=family.partial_rope,
        )

    parameters: Mapping[str, Any] = fields.get("rope_parameters") or {"rope_theta": 10_000.0}
    if family.rope == "by_layer_type":
        kinds = {"rope": "full_attention", "local_rope": "sliding_attention"}
        absent = [kind for kind in kinds.values() if not parameters.get(kind)]
        if absent:
            raise InputError(
                f"config has rope_parameters without {absent[0]!r}; "
                "give one set for each kind of layer, as transformers 5 writes it"
            )
        ropes = {ours: read(parameters[kind]) for ours, kind in kinds.items()}
        alike = ropes["rope"] == ropes["local_rope"] or not values["windowed"]
        ropes = {"rope": ropes["rope"]} if alike else ropes
    else:
        ropes = {"rope": read(parameters)}
    limits = [one.original_max_positions for one in ropes.values() if one.scaling == "longrope"]
    return {**ropes, "max_positions": min([values["max_positions"], *limits])}
