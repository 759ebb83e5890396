"""Data only: which Hugging Face tensor each leaf of the parameter tree is, per family.

A mapping is a bijection between our leaves and the checkpoint's keys. `{layer}` marks leaves
stacked on the leading L axis; each transform is its own inverse.
"""

from typing import NamedTuple

from tailrisk_jax.models.config import ModelConfig

TRANSFORMS = {"identity": lambda x: x, "transpose": lambda x: x.T}


class Entry(NamedTuple):
    """One leaf: its path in our tree, the checkpoint's key, and a transform named above."""

    leaf: tuple[str, ...]
    key: str
    transform: str


_BLOCK = "model.layers.{layer}."

_LLAMA = (
    Entry(("embedding",), "model.embed_tokens.weight", "identity"),
    Entry(("lm_head",), "lm_head.weight", "identity"),
    Entry(("final_norm", "scale"), "model.norm.weight", "identity"),
    Entry(("layers", "attention_norm", "scale"), _BLOCK + "input_layernorm.weight", "identity"),
    Entry(("layers", "mlp_norm", "scale"), _BLOCK + "post_attention_layernorm.weight", "identity"),
    *(
        Entry(("layers", room, ours, "kernel"), _BLOCK + theirs + ".weight", "transpose")
        for room, ours, theirs in (
            ("attention", "query", "self_attn.q_proj"),
            ("attention", "key", "self_attn.k_proj"),
            ("attention", "value", "self_attn.v_proj"),
            ("attention", "out", "self_attn.o_proj"),
            ("mlp", "gate", "mlp.gate_proj"),
            ("mlp", "up", "mlp.up_proj"),
            ("mlp", "down", "mlp.down_proj"),
        )
    ),
)

FAMILIES: dict[str, tuple[Entry, ...]] = {"llama": _LLAMA, "gemma": _LLAMA}

# Keys that older checkpoints carry and that are computed, not learned.
DERIVED_KEYS = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
)


def entries(config: ModelConfig) -> tuple[Entry, ...]:
    """The family's mapping; a tied model has no head of its own."""
    family = FAMILIES[config.family]
    return tuple(e for e in family if not (config.tie_embeddings and e.leaf == ("lm_head",)))


def is_stacked(entry: Entry) -> bool:
    """Whether the leaf stacks one tensor per layer."""
    return "{layer}" in entry.key


def checkpoint_keys(entry: Entry, config: ModelConfig) -> list[str]:
    """The checkpoint keys behind one leaf, in the order of the layers."""
    if not is_stacked(entry):
        return [entry.key]
    return [entry.key.format(layer=layer) for layer in range(config.num_layers)]
