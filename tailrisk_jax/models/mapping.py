"""Data only: which Hugging Face tensor each leaf of the parameter tree is, per family.

A mapping is a bijection between our leaves and the checkpoint's keys. `{layer}` marks leaves
stacked on the leading L axis; each transform is its own inverse. A fused tensor holds several
leaves, one after the other along our last axis.
"""

from typing import NamedTuple

from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.transformer import leaf_shapes

TRANSFORMS = {"identity": lambda x: x, "transpose": lambda x: x.T}
# The same of a shape, or of an index of slices.
TRANSPOSED = {"identity": lambda axes: tuple(axes), "transpose": lambda axes: tuple(axes)[::-1]}


class Entry(NamedTuple):
    """The checkpoint's key, a transform named above, and the leaves' paths in our tree."""

    key: str
    transform: str
    leaves: tuple[tuple[str, ...], ...]


_BLOCK = "model.layers.{layer}."


def _plain(key: str, *path: str, transform: str = "identity") -> Entry:
    return Entry(key, transform, (path,))


def _linear(key: str, *paths: str, transform: str = "transpose") -> Entry:
    """A linear layer's kernel: one "attention/query", or several that are fused."""
    leaves = tuple(("layers", *path.split("/"), "kernel") for path in paths)
    return Entry(key + ".weight", transform, leaves)


def _biases(key: str, *paths: str) -> Entry:
    leaves = tuple(("layers", *path.split("/"), "bias") for path in paths)
    return Entry(key + ".bias", "identity", leaves)


def _norm(key: str, name: str) -> Entry:
    return _plain(_BLOCK + key + ".weight", "layers", *name.split("/"), "scale")


_ENDS = (
    _plain("model.embed_tokens.weight", "embedding"),
    _plain("lm_head.weight", "lm_head"),
    _plain("model.norm.weight", "final_norm", "scale"),
)
_PRE_NORMS = (
    _norm("input_layernorm", "attention_norm"),
    _norm("post_attention_layernorm", "mlp_norm"),
)
_POST_NORMS = (
    _norm("post_attention_layernorm", "attention_post_norm"),
    _norm("post_feedforward_layernorm", "mlp_post_norm"),
)
_QK_NORMS = (
    _norm("self_attn.q_norm", "attention/query_norm"),
    _norm("self_attn.k_norm", "attention/key_norm"),
)
_QKV = {"q_proj": "attention/query", "k_proj": "attention/key", "v_proj": "attention/value"}
_LINEARS = (
    *(_linear(f"{_BLOCK}self_attn.{theirs}", ours) for theirs, ours in _QKV.items()),
    _linear(_BLOCK + "self_attn.o_proj", "attention/out"),
    _linear(_BLOCK + "mlp.gate_proj", "mlp/gate"),
    _linear(_BLOCK + "mlp.up_proj", "mlp/up"),
    _linear(_BLOCK + "mlp.down_proj", "mlp/down"),
)
_QKV_BIASES = tuple(_biases(f"{_BLOCK}self_attn.{theirs}", ours) for theirs, ours in _QKV.items())

_LLAMA = (*_ENDS, *_PRE_NORMS, *_LINEARS)
_OLMO = (*_ENDS, *_POST_NORMS, *_QK_NORMS, *_LINEARS)

_GEMMA2 = (
    *_ENDS,
    _norm("input_layernorm", "attention_norm"),
    _norm("pre_feedforward_layernorm", "mlp_norm"),
    *_POST_NORMS,
    *_LINEARS,
)

_GPT_BLOCK = "transformer.h.{layer}."
_GPT = (
    _plain("transformer.wte.weight", "embedding"),
    _plain("transformer.wpe.weight", "position_embedding"),
    _plain("lm_head.weight", "lm_head"),
    *(
        _plain(f"{key}.{theirs}", *path, ours)
        for key, path in (
            (_GPT_BLOCK + "ln_1", ("layers", "attention_norm")),
            (_GPT_BLOCK + "ln_2", ("layers", "mlp_norm")),
            ("transformer.ln_f", ("final_norm",)),
        )
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ),
)


def _gpt_linear(name: str, *paths: str, transform: str = "transpose") -> tuple[Entry, ...]:
    key = _GPT_BLOCK + name
    return _linear(key, *paths, transform=transform), _biases(key, *paths)


FAMILIES: dict[str, tuple[Entry, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": (*_LLAMA, *_QKV_BIASES),
    "qwen3": (*_LLAMA, *_QK_NORMS),
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": (*_GEMMA2, *_QK_NORMS),
    "phi3": (
        *_ENDS,
        *_PRE_NORMS,
        _linear(_BLOCK + "self_attn.qkv_proj", *_QKV.values()),
        _linear(_BLOCK + "self_attn.o_proj", "attention/out"),
        _linear(_BLOCK + "mlp.gate_up_proj", "mlp/gate", "mlp/up"),
        _linear(_BLOCK + "mlp.down_proj", "mlp/down"),
    ),
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "gpt2": (
        *_GPT,
        *_gpt_linear("attn.c_attn", *_QKV.values(), transform="identity"),
        *_gpt_linear("attn.c_proj", "attention/out", transform="identity"),
        *_gpt_linear("mlp.c_fc", "mlp/up", transform="identity"),
        *_gpt_linear("mlp.c_proj", "mlp/down", transform="identity"),
    ),
    "gpt_neo": (
        *_GPT,
        *(_linear(f"{_GPT_BLOCK}attn.attention.{name}", ours) for name, ours in _QKV.items()),
        *_gpt_linear("attn.attention.out_proj", "attention/out"),
        *_gpt_linear("mlp.c_fc", "mlp/up"),
        *_gpt_linear("mlp.c_proj", "mlp/down"),
    ),
}

# Keys that older checkpoints carry and that are computed, not learned.
DERIVED_KEYS = (
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
    r"transformer\.h\.\d+\.attn\.(attention\.)?(masked_)?bias",
)


def prefix(config: ModelConfig) -> str:
    """What a checkpoint's keys begin with, but for the head's; the bare model's files lack it."""
    return FAMILIES[config.family][0].key.partition(".")[0] + "."


def entries(config: ModelConfig) -> tuple[Entry, ...]:
    """The family's mapping; a tied model has no head of its own."""
    family = FAMILIES[config.family]
    return tuple(e for e in family if not (config.tie_embeddings and e.leaves == (("lm_head",),)))


def key_of(config: ModelConfig, *leaf: str) -> str:
    """The checkpoint key of a leaf that is not fused or stacked."""
    return next(entry.key for entry in entries(config) if entry.leaves == (leaf,))


def is_stacked(entry: Entry) -> bool:
    """Whether the leaves stack one tensor per layer."""
    return "{layer}" in entry.key


def is_linear(entry: Entry) -> bool:
    """Whether the tensor is the matrix of a layer's linear map, which an adapter can change."""
    return is_stacked(entry) and entry.leaves[0][-1] == "kernel"


def is_only_of_its_name(entry: Entry, config: ModelConfig) -> bool:
    """Whether the last name of its module tells it from the other linear maps."""
    names = [one.key.split(".")[-2] for one in entries(config) if is_linear(one)]
    return names.count(entry.key.split(".")[-2]) == 1


def stack_name(config: ModelConfig) -> str:
    """What the checkpoint calls its list of layers."""
    key = next(entry.key for entry in entries(config) if is_stacked(entry))
    return key.partition(".{layer}")[0].rpartition(".")[2]


def checkpoint_keys(entry: Entry, config: ModelConfig) -> list[str]:
    """The checkpoint keys behind an entry's leaves, in the order of the layers."""
    if not is_stacked(entry):
        return [entry.key]
    return [entry.key.format(layer=layer) for layer in range(config.num_layers)]


def parts(entry: Entry, config: ModelConfig) -> list[slice]:
    """Where each of an entry's leaves lies on our last axis of the tensor."""
    shapes, start, out = leaf_shapes(config), 0, []
    for leaf in entry.leaves:
        size = shapes[leaf][-1]
        out.append(slice(start, start + size))
        start += size
    return out
