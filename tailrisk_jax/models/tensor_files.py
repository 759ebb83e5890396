"""Safetensors files, single or indexed: what is in them, and slices of it when they are wanted."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tailrisk_jax.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "BF16", "F16")
# safetensors has no numpy type for these.
_FLOATS8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_MAPPED_BYTES = 2**26  # read through one mapping of a file before it is made anew
_LFS = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, by its name there; nothing of it is read yet.

    Attributes:
      file, name: where it is.
      kind: its dtype as safetensors writes it, such as "BF16".
      shape: its shape.
    """

    file: "TensorFile"
    name: str
    kind: str
    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The part that an index of slices (one for each axis, of step 1) picks; None is all."""
        index = tuple(slice(0, size) for size in self.shape) if index is None else index
        return self.file.read(self, index)


class TensorFile:
    """One open file.

    What is read through a mapping counts as the process's memory until the mapping is closed, so
    that it is closed and made again now and then.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open()

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        return {
            name: Tensor(self, name, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }

    def read(self, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor.

        Raises:
          InputError: not a tensor of floats, or a file that can't be read any more.
        """
        check_float(tensor, self.path)
        if tensor.kind in _FLOATS8:
            return self._read_float8(tensor, index)
        if self._mapped > _MAPPED_BYTES:
            self._open()
        try:
            if tensor.shape:
                part = self._file.get_slice(tensor.name)[index]
            else:
                part = self._file.get_tensor(tensor.name)
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, error) from error
        rows = index[0].stop - index[0].start if index else 1
        self._mapped += rows * math.prod(tensor.shape[1:]) * part.itemsize
        return part

    def _open(self) -> None:
        try:
            self._file: Any = safe_open(self.path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, error) from error
        self._mapped = 0

    def _read_float8(self, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        content = header(self.path)
        start = 8 + len(content) + json.loads(content)[tensor.name]["data_offsets"][0]
        kind = _FLOATS8[tensor.kind]
        if not math.prod(tensor.shape):
            return np.empty(tensor.shape, kind)[index]
        whole = np.memmap(self.path, kind, mode="r", offset=start, shape=tensor.shape)
        return np.array(whole[index])


def check_float(tensor: Tensor, path: Path) -> None:
    """Raises InputError for a tensor that isn't of floats."""
    if tensor.kind not in (*_FLOATS, *_FLOATS8):
        raise InputError(
            f"{path}: tensor {tensor.name} is {tensor.kind}; only f32, bf16, f16 and fp8 are read"
        )


def header(path: Path) -> bytes:
    """The JSON that a safetensors file begins with, after its length in 8 bytes."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return stream.read(min(length, path.stat().st_size))


def checkpoint_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a checkpoint, and of an indexed one each tensor's file name.

    Raises:
      InputError: none, an unreadable index, or one that names a file which isn't there.
    """
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if single.exists():
            return [single], None
        raise InputError(
            f"{folder} holds neither {SINGLE} nor {INDEX}{_half_downloaded(folder)}; "
            "convert the checkpoint to safetensors, or finish its download"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise InputError(f"{index} has no weight_map; fetch it again")
    paths = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise InputError(
            f"{index} names {missing[0]}, which is missing ({len(missing)} of {len(paths)} files "
            f"are){_half_downloaded(folder)}; finish the download"
        )
    return paths, weight_map


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by key.

    Raises:
      InputError: as `checkpoint_files`; a file that is cut off or damaged, or that the index is
        not of.
    """
    paths, weight_map = checkpoint_files(folder)
    tensors = {}
    for path in paths:
        own = TensorFile(path).tensors()
        if weight_map is not None:
            listed = {key for key, name in weight_map.items() if name == path.name}
            if listed != own.keys():
                key = sorted(listed ^ own.keys())[0]
                raise InputError(
                    f"{folder / INDEX} and {path.name} disagree on tensor {key}; fetch them again"
                )
        tensors |= own
    return tensors


def damaged(path: Path, error: Exception) -> InputError:
    """What is wrong with a file that couldn't be opened."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            start = stream.read(len(_LFS))
    except OSError:
        size, start = -1, b""
    if size == 0:
        return InputError(f"{path} is empty; fetch it again")
    if start == _LFS:
        return InputError(f"{path} is a Git LFS pointer, not the file; run git lfs pull")
    try:
        content = header(path)
        ends = [one["data_offsets"][1] for one in json.loads(content).values() if "dtype" in one]
        wanted = 8 + len(content) + max(ends)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError):
        wanted = 0
    if 0 < size < wanted:
        return InputError(f"{path} is cut off, {size:,} of {wanted:,} bytes; fetch it again")
    reason = " ".join(str(error).split())
    return InputError(f"{path} is cut off or damaged ({reason}); fetch it again")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
      InputError: no such file, or something else in it.
    """
    if not path.exists():
        raise InputError(f"{path} is missing; give a complete Hugging Face checkpoint folder")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; fetch it again")
    return content


def _half_downloaded(folder: Path) -> str:
    """What the hub's client leaves of a download that was stopped."""
    left = sorted(path.name for path in folder.rglob("*.incomplete"))
    return f", and there is {left[0]}, half downloaded" if left else ""
