"""Proposals written as text, such as "0.1*target + 0.9*ablation:direction.safetensors:0.5"."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import load_model, locate
from tailrisk_jax.policies import Mixture, Policy, ablate, at_temperature, mixture, steer

GRAMMAR = (
    "target | ablation:DIRECTION:INTENSITY | addition:VECTOR:LAYER:COEFFICIENT | "
    "checkpoint:FOLDER_OR_HUB_ID, each with @T for a temperature of its own, several joined as "
    "'W*TERM + W*TERM'"
)


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a text describes.

    Attributes:
      policy: to draw from.
      names: of its components.
      files: what was read for it, by the name in the text: vector files and checkpoint folders.
    """

    policy: Policy | Mixture
    names: list[str]
    files: dict[str, Path]


def parse_proposal(
    text: str,
    target: Policy,
    *,
    vectors: Mapping[str, Any] | None = None,
    checkpoints: Mapping[str, Policy] | None = None,
    dtype: Any = jnp.float32,
) -> Proposal:
    """The proposal that a text describes.

    Args:
      text: one term of the grammar above, or a weighted sum of several (a sequence-level mixture).
      target: what ablation and addition start from, and the term "target".
      vectors: named directions and vectors, looked up before files (.safetensors, .npy).
      checkpoints: named policies, looked up before folders and hub ids.
      dtype: for checkpoints that are loaded.

    Raises:
      InputError: text outside the grammar, an unreadable file, a wrong width.
    """
    parser = _Parser(text, target, vectors or {}, checkpoints or {}, dtype)
    names, weights = [], []
    for term in text.split(" + "):
        weight, star, rest = term.strip().rpartition("*")
        names.append(rest)
        weights.append(_number(weight, "weight", text) if star else None)
    if len(names) > 1 and None in weights:
        raise InputError(f"proposal {text!r} needs a weight before each of its terms: 'W*TERM'")
    policies = [parser.term(name) for name in names]
    if len(policies) == 1 and weights[0] in (None, 1.0):
        return Proposal(policies[0], names, parser.files)
    whole = mixture(policies, [weight for weight in weights if weight is not None])
    return Proposal(whole, names, parser.files)


class _Parser:
    """Terms of one text to policies; remembers the files that were read."""

    def __init__(
        self,
        text: str,
        target: Policy,
        vectors: Mapping[str, Any],
        checkpoints: Mapping[str, Policy],
        dtype: Any,
    ):
        self.text, self.target, self.dtype = text, target, dtype
        self.vectors, self.checkpoints = vectors, checkpoints
        self.files: dict[str, Path] = {}

    def term(self, term: str) -> Policy:
        base, at, temperature = term.rpartition("@")
        if at:
            return at_temperature(self.term(base), self._number(temperature, "temperature"))
        kind, *arguments = term.split(":")
        match kind, arguments:
            case "target", []:
                return self.target
            case "checkpoint", [*name] if name:
                return self._checkpoint(":".join(name))
            case "ablation", [*name, intensity] if name:
                direction = self._vector(":".join(name))
                return ablate(self.target, direction, self._number(intensity, "intensity"))
            case "addition", [*name, layer, coefficient] if name:
                vector, index = self._vector(":".join(name)), self._number(layer, "layer")
                if index != int(index):
                    raise InputError(f"proposal {self.text!r}: layer {layer} is no whole number")
                scale = self._number(coefficient, "coefficient")
                return steer(self.target, vector, int(index), scale)
        raise InputError(f"proposal {term!r} isn't understood; give {GRAMMAR}")

    def _number(self, value: str, name: str) -> float:
        return _number(value, name, self.text)

    def _checkpoint(self, name: str) -> Policy:
        if name in self.checkpoints:
            return self.checkpoints[name]
        self.files[name] = locate(name)
        return Policy(load_model(self.files[name], dtype=self.dtype))

    def _vector(self, name: str) -> Any:
        if name in self.vectors:
            return self.vectors[name]
        self.files[name] = Path(name)
        return _load_vector(name, self.vectors)


def _number(value: str, name: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise InputError(f"proposal {text!r}: {name} {value!r} is not a finite number")
    return number


def _load_vector(name: str, vectors: Mapping[str, Any]) -> Any:
    path = Path(name)
    if not path.exists():
        known = f" (named here: {', '.join(vectors)})" if vectors else ""
        raise InputError(f"direction file {name!r} does not exist{known}; check the path")
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(
            f"direction file {name!r} can't be read ({error}); give .safetensors or .npy"
        ) from error
    if len(tensors) != 1 and "direction" not in tensors:
        raise InputError(
            f"direction file {name!r} holds {len(tensors)} tensors ({', '.join(sorted(tensors))}); "
            "it needs one, or one named 'direction'"
        )
    return tensors["direction"] if "direction" in tensors else next(iter(tensors.values()))
