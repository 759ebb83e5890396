"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), as the peft library saves them.

An adapter adds scale * B A to some of the base model's matrices W [out, in]. It is a tree beside
the parameters: what it adapts has a `LowRank` where the parameters have a kernel. Files are read
in checkpoint.py; the functions here take what is in them.

What a field means is what peft does with it (github.com/huggingface/peft, Apache-2.0).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from jaxtyping import Array, Float

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import mapping
from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.transformer import leaf_shapes


@struct.dataclass
class LowRank:
    """What is added to one kernel of all layers: (scale * B A)^T, since kernels are [L, in, out].

    Attributes:
      a: [L, r, in]; r is the largest rank of any layer, zeros fill the others.
      b: [L, out, r].
      scale: [L]; 0 for a layer that the adapter leaves as it is.
    """

    a: Float[Array, "L r in"]
    b: Float[Array, "L out r"]
    scale: Float[Array, " L"]


# Fields that say what is computed, and are read.
_READ = frozenset(
    (
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern",
    )
)  # fmt: skip

# Fields with values that leave the computation as it is. Some initialisations also change the base
# model (pissa, olora, corda, loftq), so that the adapter doesn't fit the checkpoint.
_HARMLESS = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}

# Fields for training, for kernels or for features that another field turns on. fan_in_fan_out is
# one of them: peft itself sets it as the module asks for.
_IRRELEVANT = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
        "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout",
        "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
        "runtime_config",
    )
)  # fmt: skip

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")


def from_peft(
    settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], config: ModelConfig
) -> dict[str, Any]:
    """The adapter tree of a PEFT folder; its tensors and the modules that it adapts must agree.

    Args:
      settings: adapter_config.json.
      tensors: adapter_model.safetensors.
      config: of the base model.

    Raises:
      InputError: a field that changes the computation in a way that isn't supported, a tensor
        without a place, one that is missing, or one of another shape, each by name.
    """
    _check(settings, config)
    targets = _targets(settings, config)
    found = _by_module(tensors, targets)
    shapes = leaf_shapes(config)
    leaves = {}
    for entry in mapping.entries(config):
        modules = [_module(key) for key in mapping.checkpoint_keys(entry, config)]
        adapted = [module in targets for module in modules]
        if not any(adapted):
            continue
        places = mapping.parts(entry, config)
        layers, inputs, _ = shapes[entry.leaves[0]]
        ranks = [_setting(settings, "rank_pattern", "r", module) for module in modules]
        rank = max(rank for rank, used in zip(ranks, adapted, strict=True) if used)
        a = np.zeros((layers, rank, inputs), np.float32)
        b = np.zeros((layers, places[-1].stop, rank), np.float32)
        scale = np.zeros(layers, np.float32)
        for layer, module in enumerate(modules):
            if not adapted[layer]:
                continue
            r = ranks[layer]
            for factor, slot in (("A", a[layer, :r]), ("B", b[layer, :, :r])):
                key, tensor = found[module, factor]
                if tensor.shape != slot.shape:
                    raise InputError(
                        f"adapter tensor {key} has shape {list(tensor.shape)} where rank {r} and "
                        f"the base model ask for {list(slot.shape)}; the adapter was made for "
                        f"{settings.get('base_model_name_or_path')!r}"
                    )
                slot[...] = tensor.astype(np.float32)
            alpha = _setting(settings, "alpha_pattern", "lora_alpha", module)
            scale[layer] = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
        for leaf, place in zip(entry.leaves, places, strict=True):
            leaves[leaf] = LowRank(jnp.asarray(a), jnp.asarray(b[:, place]), jnp.asarray(scale))
    return traverse_util.unflatten_dict(leaves)


def to_peft(
    adapter: Mapping[str, Any], config: ModelConfig, base: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors of an adapter tree: the inverse of `from_peft`.

    A layer whose `LowRank` is all zero is left out. Layers that differ in rank are written with
    the largest, the zeros that fill them included. The parts of a fused module that don't share
    their A are written as one adapter of the sum of their ranks.

    Raises:
      InputError: as `check_adapter`.
    """
    check_adapter(adapter, config)
    leaves = _leaves(adapter)
    targets: list[str] = []
    transposed = False
    ranks, alphas, tensors = {}, {}, {}
    for entry in mapping.entries(config):
        low_rank = _fused(entry, leaves, config)
        if low_rank is None:
            continue
        transposed |= entry.transform == "identity"
        a, b, scale = (np.asarray(x) for x in (low_rank.a, low_rank.b, low_rank.scale))
        modules = [_module(key) for key in mapping.checkpoint_keys(entry, config)]
        used = [a[i].any() or b[i].any() or scale[i] != 0 for i in range(len(modules))]
        own = [module for module, one in zip(modules, used, strict=True) if one]
        whole = all(used) and mapping.is_only_of_its_name(entry, config)
        targets += [own[0].rpartition(".")[2]] if whole else own
        for layer in np.flatnonzero(used):
            module, rank = modules[layer], a.shape[1]
            # In float64 the product is exact, so that dividing by the rank gives `scale` again.
            ranks[module], alphas[module] = rank, float(scale[layer]) * rank
            for factor, tensor in (("A", a[layer]), ("B", b[layer])):
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = tensor.copy()
    if not targets:
        raise InputError("the adapter is zero in every layer, so there is nothing to write")
    rank, alpha = (max(set(found := list(x.values())), key=found.count) for x in (ranks, alphas))
    settings = {
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": transposed,
        "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "lora_dropout": 0.0, "modules_to_save": None,
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
        "target_modules": targets, "r": rank, "lora_alpha": alpha,
        "rank_pattern": {m: one for m, one in ranks.items() if one != rank},
        "alpha_pattern": {m: one for m, one in alphas.items() if one != alpha},
    }  # fmt: skip
    return settings, tensors


def _fused(
    entry: mapping.Entry, leaves: Mapping[tuple[str, ...], LowRank], config: ModelConfig
) -> LowRank | None:
    """The adapter of an entry's whole tensor; None where it has none."""
    own = [leaves.get(leaf) for leaf in entry.leaves]
    present = [one for one in own if one is not None]
    if not present or len(own) == 1:
        return own[0]
    first = present[0]
    if not all(np.array_equal(one.scale, first.scale) for one in present):
        raise InputError(
            f"the adapter scales the parts of {entry.key} differently, and peft has one scale for "
            "all; move the scales into b"
        )
    places = mapping.parts(entry, config)
    shared = len(present) == len(own) and all(np.array_equal(one.a, first.a) for one in present)
    a = first.a if shared else np.concatenate([one.a for one in present], axis=1)
    b = np.zeros((a.shape[0], places[-1].stop, a.shape[1]), np.float32)
    start = 0
    for one, place in zip(own, places, strict=True):
        if one is not None:
            rank = one.a.shape[1]
            b[:, place, start : start + rank] = one.b
            start += 0 if shared else rank
    return LowRank(a, b, first.scale)  # type: ignore[arg-type]


def check_adapter(adapter: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuses a tree that isn't an adapter of a model of this config.

    Raises:
      InputError: no `LowRank`, one where the model has no such kernel, or one of another shape.
    """
    leaves = _leaves(adapter)
    shapes = leaf_shapes(config)
    if not leaves:
        raise InputError("the adapter is empty; give a LowRank for one kernel at least")
    for path, low_rank in leaves.items():
        name = "/".join(path)
        if not isinstance(low_rank, LowRank) or path[-1] != "kernel" or path not in shapes:
            raise InputError(
                f"the adapter has {type(low_rank).__name__} at {name}, where a {config.family} "
                "model has no kernel to adapt; check that it was made for this model"
            )
        layers, inputs, outputs = shapes[path]
        rank = low_rank.a.shape[1]
        wanted = [(layers, rank, inputs), (layers, outputs, rank), (layers,)]
        found = [low_rank.a.shape, low_rank.b.shape, low_rank.scale.shape]
        if found != wanted:
            raise InputError(
                f"the adapter's {name} has a, b, scale of shapes {found} where the model needs "
                f"{wanted}; check that it was made for this model"
            )


def scaled(adapter: Mapping[str, Any], strength: Any) -> dict[str, Any]:
    """The adapter with every scale times `strength`."""
    leaves = _leaves(adapter)
    return traverse_util.unflatten_dict(
        {path: one.replace(scale=one.scale * strength) for path, one in leaves.items()}
    )


def stack(adapters: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """K adapters of one model as one tree, a leading K on every array; None if all are None.

    What one of them doesn't adapt, and what a smaller rank lacks, is filled with zeros.
    """
    trees = [_leaves(one or {}) for one in adapters]
    paths = sorted({path for tree in trees for path in tree})
    leaves = {path: _stack_leaf([tree.get(path) for tree in trees]) for path in paths}
    return traverse_util.unflatten_dict(leaves) if leaves else None


def _stack_leaf(low_ranks: Sequence[LowRank | None]) -> LowRank:
    largest = max((one for one in low_ranks if one is not None), key=lambda one: one.a.shape[1])

    def widened(one: LowRank | None) -> LowRank:
        if one is None:
            return jax.tree.map(jnp.zeros_like, largest)
        more = largest.a.shape[1] - one.a.shape[1]
        return LowRank(
            a=jnp.pad(one.a, [(0, 0), (0, more), (0, 0)]),
            b=jnp.pad(one.b, [(0, 0), (0, 0), (0, more)]),
            scale=one.scale,
        )

    return jax.tree.map(lambda *x: jnp.stack(x), *map(widened, low_ranks))


def fold(params: Any, adapter: Mapping[str, Any]) -> Any:
    """The parameters with the adapter added, in float32, then rounded to their own dtype.

    Leaves that the adapter doesn't touch are shared with `params`.
    """
    leaves = traverse_util.flatten_dict(params)
    for path, low_rank in traverse_util.flatten_dict(adapter).items():
        leaves[path] = _fold_leaf(leaves[path], low_rank)
    return traverse_util.unflatten_dict(leaves)


@jax.jit
def _fold_leaf(kernel: Float[Array, "L in out"], low_rank: LowRank) -> Float[Array, "L in out"]:
    def fold_layer(layer):
        kernel, one = layer
        change = one.scale * jnp.einsum("ri,or->io", one.a, one.b, precision="highest")
        return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)

    return jax.lax.map(fold_layer, (kernel, low_rank))


def _leaves(adapter: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Each `LowRank` by its path."""
    return traverse_util.flatten_dict(adapter)  # type: ignore[return-value]


def _check(settings: Mapping[str, Any], config: ModelConfig) -> None:
    """Refuses what isn't supported; a field that isn't known is passed over while it is empty."""
    for name, value in settings.items():
        if name in _READ or name in _IRRELEVANT:
            continue
        allowed = _HARMLESS.get(name)
        if value not in allowed if allowed else value:
            raise InputError(
                f"adapter has {name}={value!r}, which isn't supported"
                + (f" (only {allowed[0]!r} is)" if allowed else "")
                + "; merge it into its base model with the peft library, and load that"
            )
    if not settings.get("target_modules"):
        raise InputError(
            f"adapter has target_modules={settings.get('target_modules')!r}; "
            "name the adapted modules in adapter_config.json"
        )
    layers, pattern = settings.get("layers_to_transform"), settings.get("layers_pattern")
    if layers is not None and isinstance(settings["target_modules"], str):
        raise InputError(
            f"adapter has layers_to_transform={layers!r} with "
            f"target_modules={settings['target_modules']!r}; peft takes it with a list alone"
        )
    stack = mapping.stack_name(config)
    if pattern not in (None, "", [], stack, [stack]):
        raise InputError(
            f"adapter has layers_pattern={pattern!r}, but the layers are in {stack!r}; "
            "check that it was made for this base model"
        )


def _targets(settings: Mapping[str, Any], config: ModelConfig) -> set[str]:
    """The adapted modules by their names in the base model."""
    target, excluded = settings["target_modules"], settings.get("exclude_modules") or []
    layers = settings.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    chosen = set()
    for entry in mapping.FAMILIES[config.family]:
        if entry.leaves[0][-1] == "bias":  # of the same module as the kernel
            continue
        stacked, linear = mapping.is_stacked(entry), mapping.is_linear(entry)
        for layer, key in enumerate(mapping.checkpoint_keys(entry, config)):
            module = _module(key)
            if target == "all-linear":
                matches = linear
            else:
                named = not isinstance(target, str) and module in target
                in_layers = not layers or (stacked and layer in layers)
                matches = named or (in_layers and _matches(target, module))
            if not matches or _matches(excluded, module):
                continue
            if not linear:
                raise InputError(
                    f"adapter has target_modules={target!r}, which adapts {module}; only the "
                    "linear layers of attention and MLP can be adapted"
                )
            chosen.add(module)
    if not chosen:
        raise InputError(
            f"adapter has target_modules={target!r} and layers_to_transform={layers!r}, which "
            f"names no module of a {config.family} model; check that it was made for this model"
        )
    return chosen


def _by_module(
    tensors: Mapping[str, np.ndarray], targets: Iterable[str]
) -> dict[tuple[str, str], tuple[str, np.ndarray]]:
    """(module, "A" or "B") -> its key and tensor, exactly those of the adapted modules."""
    wanted = {(module, factor) for module in targets for factor in "AB"}
    found = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        place = (match["module"], match["factor"]) if match else None
        if place not in wanted or place in found:
            why = "stands there twice" if place in found else "target_modules has no place for"
            raise InputError(
                f"the adapter holds the tensor {key}, which {why}; "
                "check that adapter_config.json belongs to these weights"
            )
        found[place] = key, tensor
    if wanted - set(found):
        module, factor = sorted(wanted - set(found))[0]
        raise InputError(
            f"the adapter lacks the tensor base_model.model.{module}.lora_{factor}.weight "
            f"({len(wanted) - len(found)} missing); finish the download or check target_modules"
        )
    return found


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _matches(names: str | Iterable[str], module: str) -> bool:
    """As peft selects modules: a string is a regular expression, a list has endings of names."""
    if isinstance(names, str):
        return _compile(names).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _setting(settings: Mapping[str, Any], pattern: str, default: str, module: str) -> Any:
    """A module's rank or alpha: of the first matching pattern, or else the adapter's own."""
    for name, value in (settings.get(pattern) or {}).items():
        if _compile(rf"(.*\.)?({name})$").match(module):
            return value
    return settings.get(default, 8)


def _compile(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise InputError(
            f"adapter has the regular expression {expression!r}, which can't be read ({error}); "
            "correct it in adapter_config.json"
        ) from error
