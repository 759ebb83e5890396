"""Directions and persona vectors in files: those of others read, PyTorch's without PyTorch.

| file | content | of |
|---|---|---|
| direction.pt, direction_metadata.json | [D]; {"pos", "layer"} | Arditi et al. 2024, 2406.11717 |
| mean_diffs.pt | [positions, L, D] | the same |
| TRAIT_response_avg_diff.pt | [L + 1, D] | Chen et al. 2025, 2507.21509 |
| direction.safetensors, direction.json | [D], named "direction" | `tailrisk direction` |
| persona.safetensors, persona.json | [L + 1, D] each, by name | `tailrisk persona` |
| any .safetensors or .npy | one array, or one of `NAMES` | anyone |

A .pt file is a zip archive of a pickle and the raw bytes of its storages. The pickle is run by a
reader that knows tensors and nothing else: it calls no code that a file names.
"""

import collections
import dataclasses
import io
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tailrisk_jax.errors import InputError

VECTOR_FILES = ("direction.safetensors", "direction.pt", "persona.safetensors")
NAMES = ("direction", "response_avg")
METADATA_FILES = ("direction.json", "direction_metadata.json")

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
}
_LEGACY = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch's old format begins with
)
_ADVICE = "save one tensor in PyTorch with torch.save(tensor.detach().cpu().clone(), FILE)"


@dataclasses.dataclass(frozen=True)
class Direction:
    """A direction or persona vectors, with where it was measured.

    Attributes:
      vector: [D], or one for each row of the residual stream [L + 1, D]; not normalised.
      pos: the prompt position, counted from the end; None where nothing says so.
      layer: the layer at whose input it was measured; None as well.
      file: that the vector is in.
    """

    vector: np.ndarray
    pos: int | None
    layer: int | None
    file: Path


def vector_file(path: str | Path) -> Path:
    """The file itself, or the one in a folder that holds its direction or persona vectors.

    Raises:
      InputError: neither is there.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = [path / name for name in VECTOR_FILES if (path / name).exists()]
    if not found:
        raise InputError(
            f"direction folder {str(path)!r} holds none of {', '.join(VECTOR_FILES)}; "
            "name the file itself"
        )
    return found[0]


def read_direction(path: str | Path) -> Direction:
    """A direction from a file or a folder, with the metadata beside it.

    From an array [positions, L, D] the row is taken that the metadata names.

    Raises:
      InputError: as `read_array`; damaged metadata, none where it is needed, or a row out of range.
    """
    file = vector_file(path)
    array = read_array(file)
    described = file.stem == "direction" or array.ndim == 3
    pos, layer = _metadata(file.parent) if described else (None, None)
    if array.ndim == 3:
        if pos is None or layer is None:
            raise InputError(
                f"{file} has a direction for each of {array.shape[0]} positions and "
                f"{array.shape[1]} layers; put direction_metadata.json beside it: "
                '{"pos": -1, "layer": 12}'
            )
        if not (-array.shape[0] <= pos < 0 <= layer < array.shape[1]):
            raise InputError(
                f"{file} has shape {list(array.shape)}, so pos={pos} and layer={layer} beside it "
                "are out of range; they are not of one model"
            )
        array = array[pos, layer]
    return Direction(array, pos, layer, file)


def read_array(path: str | Path) -> np.ndarray:
    """The array in a .safetensors, .npy or .pt file, in its own dtype.

    Where a .safetensors file holds several, the one whose name is of `NAMES`. A .pt file holds one
    tensor of float64, float32, float16 or bfloat16, from any device.

    Raises:
      InputError: no such file, one that is cut off or damaged, or several arrays of other names;
        of .pt files also the format from before PyTorch 1.6, anything but one tensor, or a tensor
        that doesn't lie within its storage.
    """
    path = Path(path)
    try:
        if path.suffix in (".pt", ".pth", ".bin"):
            return _read_torch(path, path.read_bytes())
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        tensors = load_file(path)
    except InputError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(
            f"direction file {str(path)!r} can't be read ({error}); "
            "give .safetensors, .npy or PyTorch's .pt"
        ) from error
    named = [name for name in NAMES if name in tensors]
    if len(tensors) != 1 and not named:
        raise InputError(
            f"direction file {str(path)!r} holds {len(tensors)} tensors "
            f"({', '.join(sorted(tensors))}); it needs one, or one named {' or '.join(NAMES)}"
        )
    return tensors[named[0] if named else next(iter(tensors))]


def _read_torch(path: Path, content: bytes) -> np.ndarray:
    """The tensor in a file of torch.save; a view is read by its offset and strides."""
    if content.startswith(_LEGACY):
        raise InputError(
            f"{path} is in the format from before PyTorch 1.6; "
            f"save it again there: torch.save(torch.load({path.name!r}), {path.name!r})"
        )
    if not content.startswith(b"PK"):
        raise InputError(f"{path} is no file of torch.save; {_ADVICE}")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            tensor = _Reader(archive, path).load()
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is cut off or damaged ({error}); fetch it again") from error
    if not isinstance(tensor, np.ndarray):
        raise InputError(f"{path} holds a {type(tensor).__name__}, not one tensor; {_ADVICE}")
    return tensor


class _Storage:
    """What stands for a torch storage class: it says the dtype, and can't be called."""

    def __init__(self, name: str):
        self.dtype = np.dtype(_STORAGES[name])


class _Reader(pickle.Unpickler):
    """Reads the pickle of one archive; only what tensors are made of is known to it."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self._archive, self._path = archive, path
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(f"{path} has no data.pkl, so it is no file of torch.save; {_ADVICE}")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise InputError(f"{path} is compressed, as torch.save never writes it; {_ADVICE}")
        self._root = pickles[0].removesuffix("data.pkl")
        if self._root + "byteorder" in archive.namelist():
            order = archive.read(self._root + "byteorder")
            if order != b"little":
                raise InputError(
                    f"{path} has byte order {order.decode(errors='replace')!r}; "
                    "save it again on a little-endian machine"
                )
        super().__init__(io.BytesIO(archive.read(pickles[0])))

    def load(self) -> Any:
        try:
            return super().load()
        except (InputError, zipfile.BadZipFile):
            raise
        except Exception as error:  # of a damaged pickle: any
            reason = " ".join(str(error).split())
            raise InputError(f"{self._path} is damaged ({reason}); fetch it again") from error

    def find_class(self, module_name: str, global_name: str) -> Any:
        match module_name, global_name:
            case "torch._utils", "_rebuild_tensor_v2":
                return self._tensor
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch", name if name in _STORAGES:
                return _Storage(name)
        raise InputError(
            f"{self._path} asks for {module_name}.{global_name}, which isn't part of a plain "
            f"tensor of floats, and nothing of it was run; if you trust it, {_ADVICE}"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage's numbers."""
        _, storage, key, _, count = pid  # the fourth is the device that it was on
        name = f"{self._root}data/{key}"
        try:
            size = self._archive.getinfo(name).file_size
        except KeyError as error:
            raise InputError(f"{self._path} lacks its storage {key}; fetch it again") from error
        if size != count * storage.dtype.itemsize:
            raise InputError(
                f"{self._path}: storage {key} has {size} bytes where {count} {storage.dtype.name} "
                "numbers are announced; fetch it again"
            )
        return np.frombuffer(self._archive.read(name), storage.dtype)

    def _tensor(
        self, storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any
    ) -> np.ndarray:
        """torch._utils._rebuild_tensor_v2; what follows the stride is of gradients."""
        numbers = (offset, *size, *stride)
        valid = len(size) == len(stride) and all(isinstance(n, int) and n >= 0 for n in numbers)
        count = math.prod(size)
        if count:
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=False))
            valid = valid and last < len(storage) and count <= len(storage)
        if not valid:
            raise InputError(
                f"{self._path}: a tensor of size {list(size)}, stride {list(stride)} and offset "
                f"{offset} doesn't lie within its storage of {len(storage)}; fetch it again"
            )
        if not count:
            return np.empty(size, storage.dtype)
        steps = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def _metadata(folder: Path) -> tuple[int | None, int | None]:
    """Position and layer, from what stands beside a direction."""
    path = next((folder / name for name in METADATA_FILES if (folder / name).exists()), None)
    if path is None:
        return None, None
    try:
        content = json.loads(path.read_text())
        pos, layer = content["pos"], content["layer"]
        if not (isinstance(pos, int) and isinstance(layer, int)):
            raise ValueError("they are not whole numbers")
        return pos, layer
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f'{path} can\'t be read for "pos" and "layer" ({error}); mend it'
        ) from error
