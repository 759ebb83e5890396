"""A converted checkpoint kept as Orbax writes it, for a quick start on any mesh.

    FOLDER/NAME-FINGERPRINT/params         the parameter tree
    FOLDER/NAME-FINGERPRINT/cache.json     its files' sizes, a checksum of each leaf; written last

The fingerprint is of config, dtype and, for each safetensors file, its path, size, time of change
and header; a checkpoint that changes in any of these is another entry. What is read back must
have the checksums that were written, or it is made anew.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from tailrisk_jax.errors import InputError
from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.loading import Shardings
from tailrisk_jax.models.tensor_files import checkpoint_files, damaged, header
from tailrisk_jax.models.transformer import leaf_shapes

_VERSION = 1


def cached_params(
    cache: str | Path,
    checkpoint: Path,
    config: ModelConfig,
    dtype: Any,
    shardings: Shardings | None,
    make: Callable[[], Any],
) -> Any:
    """The parameters from a cache folder; what isn't there, or is damaged, is made and kept.

    Without shardings, what comes from the cache is committed to the first device.

    Args:
      cache: the folder, made if absent; it can hold many checkpoints.
      checkpoint: the folder that `make` reads.
      shardings: how each leaf is laid out, by its path; need not be as it was written.
      make: reads the checkpoint.

    Raises:
      InputError: a folder that can't be written, or several processes without a mesh
        over the devices of all.
    """
    own = shardings is None or all(one.is_fully_addressable for one in shardings.values())
    if jax.process_count() > 1 and own:
        raise InputError(
            f"weights cache {cache}: several processes can share one on a mesh of all their "
            "devices alone; lay the model out on such a mesh, or leave the cache out"
        )
    entry = Path(cache).absolute() / f"{checkpoint.name}-{_fingerprint(checkpoint, config, dtype)}"
    wanted = _abstract(config, dtype, shardings)
    params = _read(entry, wanted)
    if not _all_agree(params is not None):
        params = make()
        try:
            _write(entry, params)
        except OSError as error:
            raise InputError(f"weights cache {entry} can't be written ({error})") from error
    return params


def _fingerprint(checkpoint: Path, config: ModelConfig, dtype: Any) -> str:
    def of_file(path: Path) -> list[Any]:
        try:
            about = path.stat()
            start = hashlib.sha256(header(path)).hexdigest()
        except OSError as error:
            raise damaged(path, error) from error
        return [str(path.resolve()), about.st_size, about.st_mtime_ns, start]

    files = [of_file(path) for path in checkpoint_files(checkpoint)[0]]
    fields = dataclasses.asdict(config)
    content = json.dumps([_VERSION, jnp.dtype(dtype).name, fields, files], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _abstract(config: ModelConfig, dtype: Any, shardings: Shardings | None) -> Any:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return traverse_util.unflatten_dict(
        {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path] if shardings else one)
            for path, shape in leaf_shapes(config).items()
        }
    )


def _read(entry: Path, wanted: Any) -> Any:
    """None for what isn't there whole, or isn't what was written."""
    import orbax.checkpoint as ocp  # slow

    if not (entry / "cache.json").exists():
        return None
    try:
        kept = json.loads((entry / "cache.json").read_text())
        if kept["files"] != _sizes(entry / "params"):
            return None
        restore = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
        )
        with _checkpointer() as checkpointer:
            params = checkpointer.restore(entry / "params", restore)
        return params if _checksums(params) == kept["checksums"] else None
    except Exception:  # whatever damage makes orbax raise; the checkpoint is read instead
        return None


def _write(entry: Path, params: Any) -> None:
    import orbax.checkpoint as ocp  # slow

    first = jax.process_index() == 0
    if first:
        shutil.rmtree(entry, ignore_errors=True)
        entry.mkdir(parents=True)
    _wait("weights cache emptied")
    with _checkpointer() as checkpointer:
        checkpointer.save(entry / "params", ocp.args.PyTreeSave(params))
    checksums = _checksums(params)
    if first:
        part = entry / "cache.json.part"
        content = {"files": _sizes(entry / "params"), "checksums": checksums}
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.rename(entry / "cache.json")
    _wait("weights cache written")


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(files)}


def _checkpointer() -> Any:
    """Weights hardly compress; a gigabyte at once bounds host memory."""
    import orbax.checkpoint as ocp  # slow

    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False, save_concurrent_gb=1, restore_concurrent_gb=1
    )
    return ocp.Checkpointer(handler)


def _checksums(params: Any) -> dict[str, int]:
    """Of each leaf; of stacked leaves layer by layer, which takes little memory."""
    leaves: Any = traverse_util.flatten_dict(params)
    out = {}
    for path, leaf in leaves.items():
        if path[0] == "layers":
            parts = [int(_checksum_of_layer(leaf, layer)) for layer in range(len(leaf))]
            whole = sum((2 * layer + 1) * part for layer, part in enumerate(parts)) % 2**32
        else:
            whole = int(_checksum(leaf))
        out["/".join(path)] = whole
    return out


@jax.jit
def _checksum_of_layer(x: Array, layer: int) -> UInt32[Array, ""]:
    return _checksum(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False))


@jax.jit
def _checksum(x: Array) -> UInt32[Array, ""]:
    """sum_i (2 i + 1) bits_i mod 2^32: the same on every mesh, and another for any one change."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _all_agree(value: bool) -> bool:
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
