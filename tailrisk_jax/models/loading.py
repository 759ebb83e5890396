"""A checkpoint's tensors to the parameter tree, laid out over devices as it is read.

Each leaf is built from the slices that this process's devices need, a few layers at a time:
beside the parameters, host memory holds one such piece, of `PIECE_BYTES` or one tensor.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import mapping
from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.tensor_files import Tensor, check_float, open_tensors
from tailrisk_jax.models.transformer import leaf_shapes

PIECE_BYTES = 2**26
_HEAD = "lm_head.weight"

Index = tuple[slice, ...]
Shardings = Mapping[tuple[str, ...], Sharding]


def load_params(
    folder: str | Path,
    config: ModelConfig,
    dtype: Any,
    *,
    shardings: Shardings | None = None,
    on_progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Any:
    """Reads the parameter tree; the mapping must be a bijection.

    Args:
      folder: of the checkpoint.
      config: what it must fit.
      dtype: what the tensors are cast to.
      shardings: how each leaf is laid out, by its path; None puts all on one device.
      on_progress: told the bytes of parameters made so far, and those of all, this process's
        share alone.

    Raises:
      InputError: a damaged file; a tensor that is missing, unknown, of another shape, or not of
        floats. Nothing is read before all of this is checked.
    """
    folder, dtype = Path(folder), jnp.dtype(dtype)
    leaves = _leaves(folder, config)
    layouts = {path: shardings[path] if shardings else None for path in leaves}
    total = sum(_own_bytes(leaf.shape, layouts[path], dtype) for path, leaf in leaves.items())
    done, out = 0, {}

    def read(leaf: _Leaf, index: Index) -> np.ndarray:
        nonlocal done
        part = leaf.read(index, dtype)
        done += part.nbytes
        on_progress(done, total)
        return part

    for path, leaf in leaves.items():
        out[path] = _build(leaf, dtype, layouts[path], functools.partial(read, leaf))
    return traverse_util.unflatten_dict(out)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of the tree and where it is kept.

    Attributes:
      shape: of the leaf.
      tensors: one, or one for each layer.
      is_stacked: whether the leaf has a leading axis of layers.
      transform: from a tensor's axes to ours, by its name in the mapping.
      start: where the leaf begins on our last axis of a fused tensor.
    """

    shape: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    is_stacked: bool
    transform: str
    start: int

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """The part of the leaf that an index picks."""
        index = tuple(
            slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True)
        )
        out = np.empty([part.stop - part.start for part in index], dtype)
        slots, tensors, own = [out], self.tensors, index
        if self.is_stacked:
            slots, tensors, own = list(out), self.tensors[index[0]], index[1:]
        last = slice(own[-1].start + self.start, own[-1].stop + self.start)
        source = mapping.TRANSPOSED[self.transform]((*own[:-1], last))
        transform = mapping.TRANSFORMS[self.transform]
        for slot, tensor in zip(slots, tensors, strict=True):
            _cast(transform(tensor.read(source)), slot)
        return out


def _cast(source: np.ndarray, out: np.ndarray) -> None:
    """Copies and casts, in blocks of columns: a transposed matrix would thrash the cache."""
    for start in range(0, out.shape[-1], 64):
        columns = (..., slice(start, start + 64))
        out[columns] = source[columns].astype(out.dtype, copy=False)


def _leaves(folder: Path, config: ModelConfig) -> dict[tuple[str, ...], _Leaf]:
    """Every leaf of the tree, checked against the headers of the files."""
    files = _with_prefix(open_tensors(folder), mapping.prefix(config))
    _check_keys(files, config, folder)
    shapes, leaves = leaf_shapes(config), {}
    for entry in mapping.entries(config):
        places = mapping.parts(entry, config)
        keys = mapping.checkpoint_keys(entry, config)
        tensors = tuple(files[key] for key in keys)
        stacked = mapping.is_stacked(entry)
        whole = (*shapes[entry.leaves[0]][stacked:-1], places[-1].stop)
        for key, tensor in zip(keys, tensors, strict=True):
            check_float(tensor, tensor.file.path)
            if mapping.TRANSPOSED[entry.transform](tensor.shape) != whole:
                raise InputError(
                    f"{folder}: tensor {key} has shape {list(tensor.shape)} where config.json "
                    f"asks for {list(mapping.TRANSPOSED[entry.transform](whole))}; "
                    "config and weights are not of one checkpoint"
                )
        for leaf, place in zip(entry.leaves, places, strict=True):
            leaves[leaf] = _Leaf(shapes[leaf], tensors, stacked, entry.transform, place.start)
    return leaves


def _build(
    leaf: _Leaf, dtype: np.dtype, sharding: Sharding | None, read: Callable[[Index], np.ndarray]
) -> jax.Array:
    """The leaf on its devices, a few layers at a time where it is large."""
    shape = leaf.shape
    layer = dtype.itemsize * int(np.prod(shape[1:]))
    step = max(1, PIECE_BYTES // max(layer, 1))
    if not leaf.is_stacked or step >= shape[0]:
        return _laid_out(shape, sharding, read)
    empty, write = _writer(shape, dtype, sharding)
    whole = empty()
    for start in range(0, shape[0], step):
        size = min(step, shape[0] - start)

        def read_piece(index: Index, start=start, size=size) -> np.ndarray:
            first, last, _ = index[0].indices(size)
            return read((slice(start + first, start + last), *index[1:]))

        piece = _laid_out((size, *shape[1:]), _of_layers(sharding), read_piece)
        whole = write(whole, piece, start)
        whole.block_until_ready()  # else pieces pile up
    return whole


def _laid_out(
    shape: tuple[int, ...], sharding: Sharding | None, read: Callable[[Index], np.ndarray]
) -> jax.Array:
    """An array of what `read` gives for an index; devices that hold the same share one read."""
    if sharding is None:
        return jnp.asarray(read(tuple(slice(0, size) for size in shape)))
    kept: dict[tuple, np.ndarray] = {}

    def shard(index: Index | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if bounds not in kept:
            kept[bounds] = read(tuple(slice(*bound) for bound in bounds))
        return kept[bounds]

    return jax.make_array_from_callback(shape, sharding, shard)


def _writer(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None):
    """An empty array, and a function that writes layers into one in place."""
    empty = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)

    def write(whole, piece, start):
        return jax.lax.dynamic_update_slice_in_dim(whole, piece, start, 0)

    return empty, jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _of_layers(sharding: Sharding | None) -> Sharding | None:
    """The sharding of a few layers: the layers themselves aren't split."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    return jax.sharding.NamedSharding(
        sharding.mesh, jax.sharding.PartitionSpec(None, *sharding.spec[1:])
    )


def _own_bytes(shape: tuple[int, ...], sharding: Sharding | None, dtype: np.dtype) -> int:
    """Of the different parts that this process's devices hold."""
    if sharding is None:
        return dtype.itemsize * int(np.prod(shape))
    indices = sharding.addressable_devices_indices_map(shape).values()
    parts = {tuple(p.indices(n)[:2] for p, n in zip(i or (), shape, strict=True)) for i in indices}
    return len(parts) * dtype.itemsize * int(np.prod(sharding.shard_shape(shape)))


def _with_prefix(files: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The bare model's tensors under the names that they have in the model with its head."""
    if any(key.startswith(prefix) for key in files):
        return files
    return {key if key == _HEAD else prefix + key: tensor for key, tensor in files.items()}


def _check_keys(files: dict[str, Tensor], config: ModelConfig, folder: Path) -> None:
    found = {key for key in files if not any(re.fullmatch(p, key) for p in mapping.DERIVED_KEYS)}
    entries = mapping.entries(config)
    wanted = {key for entry in entries for key in mapping.checkpoint_keys(entry, config)}
    embedding = mapping.key_of(config, "embedding")
    repeated = config.tie_embeddings and {_HEAD, embedding} <= found
    if repeated and _are_equal(files[_HEAD], files[embedding]):
        found.remove(_HEAD)
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


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices are equal, compared some rows at a time."""
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    rows, columns = one.shape
    step = max(1, PIECE_BYTES // (8 * max(columns, 1)))
    parts = ((slice(i, min(i + step, rows)), slice(0, columns)) for i in range(0, rows, step))
    return all(np.array_equal(one.read(part), other.read(part)) for part in parts)
