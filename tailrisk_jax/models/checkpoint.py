"""Hugging Face checkpoint folders, and PEFT adapters, to parameter trees; checkpoints back."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from jax.sharding import Mesh
from safetensors.numpy import save_file

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import adapters, mapping
from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.hf_config import family_of, from_hf, is_complete, to_hf
from tailrisk_jax.models.loading import load_params
from tailrisk_jax.models.quantised import is_quantised
from tailrisk_jax.models.sharding import (
    DEFAULT_RULES,
    Rules,
    current_mesh,
    fetch,
    leaf_shardings,
)
from tailrisk_jax.models.tensor_files import INDEX, SINGLE, TensorFile, read_json
from tailrisk_jax.models.weights_cache import cached_params

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@struct.dataclass
class Model:
    """A loaded checkpoint.

    Attributes:
      config: shapes and switches (static).
      params: the parameter tree; layers are stacked on a leading L axis.
      tokenizer: the Hugging Face tokenizer (static), None for a folder without one.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    params: Any
    tokenizer: Any = struct.field(pytree_node=False, default=None)


def load_model(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
    cache: str | Path | None = None,
    on_progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Model:
    """Loads a Hugging Face checkpoint.

    Each process reads the bytes that its devices need, a few layers at a time.

    Args:
      path_or_hub_id: a folder with config.json and safetensors (single or indexed; f32, bf16, f16
        or fp8 without scales), or a repository id on the hub.
      dtype: of the parameters and so of the computation (norms, softmax and logits are float32).
      mesh: to lay the parameters out on; by default the one that `jax.set_mesh` made current, and
        one device without any.
      rules: from logical axes to those of the mesh.
      cache: a folder where the converted parameters are kept, and read from the next time, onto
        any mesh; see weights_cache.py.
      on_progress: told the bytes of parameters made so far, and those of all, this process's
        share alone. Nothing is told of a read from the cache.

    Raises:
      InputError: no such folder or repository, an unsupported config field, a missing,
        truncated or unknown tensor, a wrong shape, a cache that can't be written.
    """
    folder, dtype = locate(path_or_hub_id), jnp.dtype(dtype)
    config = load_config(folder)
    mesh = current_mesh() if mesh is None else mesh
    shardings = None if mesh is None else leaf_shardings(config, mesh, rules)

    def make() -> Any:
        return load_params(folder, config, dtype, shardings=shardings, on_progress=on_progress)

    if cache is None:
        params = make()
    else:
        params = cached_params(cache, folder, config, dtype, shardings, make)
    return Model(config=config, params=params, tokenizer=load_tokenizer(folder))


def load_adapter(model: Model, path_or_hub_id: str | Path) -> Model:
    """The model with a LoRA adapter of the peft library folded into its parameters.

    The sum is taken in float32 and rounded to the dtype of the parameters. The tokenizer stays
    the model's.

    Args:
      model: the base model; it stays as it is, and shares what the adapter doesn't touch.
      path_or_hub_id: a folder with adapter_config.json and adapter_model.safetensors, or a
        repository id on the hub.

    Raises:
      InputError: no such folder or repository, an unsupported kind of adapter, a tensor that is
        missing, unknown or of another shape, a model in int8.
    """
    _check_floats(model, "an adapter can't be folded into it; fold it in before")
    return dataclasses.replace(
        model, params=adapters.fold(model.params, read_adapter(model, path_or_hub_id))
    )


def read_adapter(model: Model, path_or_hub_id: str | Path) -> dict[str, Any]:
    """A LoRA adapter of the peft library as a tree beside the model's parameters, float32.

    Args:
      model: the base model.
      path_or_hub_id: as in `load_adapter`, which folds the same tree into the parameters.

    Raises:
      InputError: as `load_adapter`.
    """
    folder = locate(path_or_hub_id)
    settings = read_json(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise InputError(
            f"{path} is missing; "
            + ("convert adapter_model.bin to safetensors" if pickled else "finish the download")
        )
    tensors = {key: tensor.read() for key, tensor in TensorFile(path).tensors().items()}
    return adapters.from_peft(settings, tensors, model.config)


def save_adapter(
    adapter: Mapping[str, Any], model: Model, folder: str | Path, *, base: str | None = None
) -> None:
    """Writes an adapter folder that `read_adapter` and the peft library load, bit for bit.

    Args:
      adapter: a tree of `LowRank`.
      model: the base model.
      folder: made if absent.
      base: the base model's name or path, as peft notes it.

    Raises:
      InputError: a tree that doesn't fit the model.
    """
    settings, tensors = adapters.to_peft(adapter, model.config, base)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "adapter_config.json", settings)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def load_config(folder: str | Path) -> ModelConfig:
    """Reads config.json, and the end tokens from generation_config.json where there is one."""
    folder = Path(folder)
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not (folder / "config.json").exists():
        base = read_json(adapter).get("base_model_name_or_path")
        raise InputError(
            f"{folder} holds an adapter of the model {base!r}, not a model; give that model as well"
        )
    fields = read_json(folder / "config.json")
    if not is_complete(fields):
        fields = _normalise(folder, fields)
    generation = folder / "generation_config.json"
    end = read_json(generation).get("eos_token_id") if generation.exists() else None
    if end is None:
        end = fields.get("eos_token_id")
    end_ids = tuple(end) if isinstance(end, list) else () if end is None else (end,)
    return from_hf(fields, end_ids)


def save_model(model: Model, folder: str | Path, *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes a checkpoint folder that `load_model` and transformers load, bit for bit.

    Args:
      model: what to write; the tensors keep their dtype.
      folder: made if absent.
      shard_bytes: a larger checkpoint is split into indexed files of at most this size
        (one tensor each at least).

    Raises:
      InputError: a model in int8.
    """
    _check_floats(model, "it can't be written; write the original")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_checkpoint(model.params, model.config)
    dtype = next(iter(tensors.values())).dtype.name
    _write_json(folder / "config.json", to_hf(model.config) | {"dtype": dtype})
    _write_json(
        folder / "generation_config.json", {"eos_token_id": list(model.config.end_ids) or None}
    )
    single, index_file = folder / SINGLE, folder / INDEX
    for earlier in (single, index_file):  # either would be read in place of the other
        earlier.unlink(missing_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    for key, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][key] = tensor
    if len(shards) == 1:
        save_file(shards[0], single, {"format": "pt"})
    else:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, folder / name, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(index_file, index)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def _check_floats(model: Model, otherwise: str) -> None:
    if is_quantised(model):
        raise InputError(f"the model is in int8, so {otherwise}")


def to_checkpoint(params: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """A parameter tree as Hugging Face tensors by key: the inverse of the mapping."""
    leaves = traverse_util.flatten_dict(params)
    tensors = {}
    for entry in mapping.entries(config):
        own = [fetch(leaves[leaf]) for leaf in entry.leaves]
        whole = own[0] if len(own) == 1 else np.concatenate(own, axis=-1)
        slices = whole if mapping.is_stacked(entry) else [whole]
        transform = mapping.TRANSFORMS[entry.transform]
        for key, tensor in zip(mapping.checkpoint_keys(entry, config), slices, strict=True):
            tensors[key] = np.ascontiguousarray(transform(tensor))
    return tensors


def locate(path_or_hub_id: str | Path, *, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of a checkpoint; one named by its hub id is fetched if it isn't here.

    Args:
      path_or_hub_id: as in `load_model`.
      files: patterns of what is fetched.

    Raises:
      InputError: neither a folder nor a repository that can be fetched.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(
            f"model {name!r} is neither a folder nor a hub id like 'org/name'; give either"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the client's errors share no base class
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model {name!r} is not a folder here and could not be fetched from the hub "
            f"({type(error).__name__}: {reason}); check the name, or download it first"
        ) from error


def _normalise(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The config with defaults filled in and older spellings replaced."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except (ValueError, KeyError, OSError) as error:
        # A type that transformers does not know is refused by name; the rest is its message.
        family_of(raw)
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder / 'config.json'} can't be read: {reason}") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's Hugging Face tokenizer; None where it has no tokenizer files."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    import transformers

    settings = folder / "tokenizer_config.json"
    named = read_json(settings).get("tokenizer_class") if settings.exists() else None
    # AutoTokenizer would find this class too, after importing torch where there is one.
    plain = named in ("PreTrainedTokenizerFast", "TokenizersBackend")
    loader = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises no other class
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the tokenizer in {folder} can't be read: {reason}") from error
