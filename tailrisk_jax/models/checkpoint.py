"""Hugging Face checkpoint folders, and PEFT adapters, to parameter trees; checkpoints back."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import adapters, mapping
from tailrisk_jax.models.config import ModelConfig, from_hf, is_complete, to_hf
from tailrisk_jax.models.transformer import parameter_shapes

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


def load_model(path_or_hub_id: str | Path, *, dtype: Any = jnp.float32) -> Model:
    """Loads a Hugging Face checkpoint.

    Args:
      path_or_hub_id: a folder with config.json and safetensors (single or indexed; f32, bf16 or
        f16), or a repository id on the hub.
      dtype: of the parameters and so of the computation (norms, softmax and logits are float32).

    Raises:
      InputError: no such folder or repository, an unsupported config field, a missing,
        truncated or unknown tensor, a wrong shape.
    """
    folder = locate(path_or_hub_id)
    config = load_config(folder)
    params = load_params(folder, config, jnp.dtype(dtype))
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
        missing, unknown or of another shape.
    """
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
    settings = _read_json(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise InputError(
            f"{path} is missing; "
            + ("convert adapter_model.bin to safetensors" if pickled else "finish the download")
        )
    with ExitStack() as stack:
        files = _open_file(path, stack)
        tensors = dict(_read_tensors(files, list(files), folder))
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
        base = _read_json(adapter).get("base_model_name_or_path")
        raise InputError(
            f"{folder} holds an adapter of the model {base!r}, not a model; give that model as well"
        )
    fields = _read_json(folder / "config.json")
    if not is_complete(fields):
        fields = _normalise(folder, fields)
    generation = folder / "generation_config.json"
    end = _read_json(generation).get("eos_token_id") if generation.exists() else None
    if end is None:
        end = fields.get("eos_token_id")
    end_ids = tuple(end) if isinstance(end, list) else () if end is None else (end,)
    return from_hf(fields, end_ids)


def load_params(folder: str | Path, config: ModelConfig, dtype) -> Any:
    """Reads the parameter tree, one leaf at a time; the mapping must be a bijection."""
    folder = Path(folder)
    shapes: Any = traverse_util.flatten_dict(nn.meta.unbox(parameter_shapes(config)))
    leaves = {}
    with ExitStack() as stack:
        files = _open_shards(folder, stack)
        _check_keys(files, config, folder)
        for entry in mapping.entries(config):
            tensors = _read_tensors(files, mapping.checkpoint_keys(entry, config), folder)
            transform = mapping.TRANSFORMS[entry.transform]
            expected = shapes[entry.leaf].shape
            leaf = np.empty(expected, dtype)
            for layer, (key, tensor) in enumerate(tensors):
                slot = leaf[layer] if mapping.is_stacked(entry) else leaf
                tensor = transform(tensor)
                if tensor.shape != slot.shape:
                    raise InputError(
                        f"{folder}: tensor {key} has shape {list(tensor.shape)} where config.json "
                        f"asks for {list(slot.shape)} (as {entry.transform}); "
                        "config and weights are not of one checkpoint"
                    )
                slot[...] = tensor.astype(dtype)
            leaves[entry.leaf] = jnp.asarray(leaf)
    return traverse_util.unflatten_dict(leaves)


def save_model(model: Model, folder: str | Path, *, shard_bytes: int = 5 * 10**9) -> None:
    """Writes a checkpoint folder that `load_model` and transformers load, bit for bit.

    Args:
      model: what to write; the tensors keep their dtype.
      folder: made if absent.
      shard_bytes: a larger checkpoint is split into indexed files of at most this size
        (one tensor each at least).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_checkpoint(model.params, model.config)
    dtype = next(iter(tensors.values())).dtype.name
    _write_json(folder / "config.json", to_hf(model.config) | {"dtype": dtype})
    _write_json(
        folder / "generation_config.json", {"eos_token_id": list(model.config.end_ids) or None}
    )
    single, index_file = folder / "model.safetensors", folder / "model.safetensors.index.json"
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


def to_checkpoint(params: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """A parameter tree as Hugging Face tensors by key: the inverse of the mapping."""
    leaves = traverse_util.flatten_dict(params)
    tensors = {}
    for entry in mapping.entries(config):
        leaf = np.asarray(leaves[entry.leaf])
        slices = leaf if mapping.is_stacked(entry) else [leaf]
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
        from_hf({"model_type": raw.get("model_type")})
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder / 'config.json'} can't be read: {reason}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path} is missing; give a complete Hugging Face checkpoint folder")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; fetch it again")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _open_shards(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Checkpoint key -> open file."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    weight_map = None
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index} has no weight_map; fetch it again")
        names = sorted(set(weight_map.values()))
    elif single.exists():
        names = [single.name]
    else:
        raise InputError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; "
            "convert the checkpoint to safetensors, or finish its download"
        )
    files: dict[str, Any] = {}
    for name in names:
        path = folder / name
        if not path.exists():
            raise InputError(f"{index} names {name}, which is missing; finish the download")
        files |= _open_file(path, stack)
    if weight_map is not None and set(weight_map) != set(files):
        key = sorted(set(weight_map) ^ set(files))[0]
        raise InputError(f"{index} and its files disagree on tensor {key}; fetch them again")
    return files


def _open_file(path: Path, stack: ExitStack) -> dict[str, Any]:
    """Key -> open file, for one file."""
    try:
        file = stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is cut off or damaged ({error}); fetch it again") from error
    return dict.fromkeys(file.keys(), file)


def _check_keys(files: dict[str, Any], config: ModelConfig, folder: Path) -> None:
    found = {key for key in files if not any(re.fullmatch(p, key) for p in mapping.DERIVED_KEYS)}
    wanted = {
        key for entry in mapping.entries(config) for key in mapping.checkpoint_keys(entry, config)
    }
    if config.tie_embeddings and "lm_head.weight" in found:
        head = files["lm_head.weight"].get_tensor("lm_head.weight")
        embedding = files["model.embed_tokens.weight"].get_tensor("model.embed_tokens.weight")
        if np.array_equal(head, embedding):
            found.remove("lm_head.weight")
    if found - wanted:
        raise InputError(
            f"{folder} holds the tensor {sorted(found - wanted)[0]}, which a {config.family} model "
            f"of this config has no place for ({len(found - wanted)} such); "
            "check that config.json belongs to these weights"
        )
    if wanted - found:
        raise InputError(
            f"{folder} lacks the tensor {sorted(wanted - found)[0]} "
            f"({len(wanted - found)} missing); finish the download or check config.json"
        )


def _read_tensors(
    files: dict[str, Any], keys: list[str], folder: Path
) -> Iterator[tuple[str, np.ndarray]]:
    for key in keys:
        tensor = files[key].get_tensor(key)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise InputError(
                f"{folder}: tensor {key} is {tensor.dtype}; only f32, bf16 and f16 are read"
            )
        yield key, tensor


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's Hugging Face tokenizer; None where it has no tokenizer files."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    import transformers

    settings = folder / "tokenizer_config.json"
    named = _read_json(settings).get("tokenizer_class") if settings.exists() else None
    # AutoTokenizer would find this class too, after importing torch where there is one.
    plain = named in ("PreTrainedTokenizerFast", "TokenizersBackend")
    loader = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises no other class
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the tokenizer in {folder} can't be read: {reason}") from error
