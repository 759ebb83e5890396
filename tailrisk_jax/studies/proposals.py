"""Proposals written as text, such as "0.1*target + 0.9*ablation:direction.safetensors:0.5"."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import load_model
from tailrisk_jax.policies import Mixture, Policy, ablate, at_temperature, mixture, steer

GRAMMAR = (
    "target | ablation:DIRECTION:INTENSITY | addition:VECTOR:LAYER:COEFFICIENT | "
    "checkpoint:FOLDER_OR_HUB_ID, each with @T for a temperature of its own, several joined as "
    "'W*TERM + W*TERM'"
)


def parse_proposal(
    text: str,
    target: Policy,
    *,
    vectors: Mapping[str, Any] | None = None,
    checkpoints: Mapping[str, Policy] | None = None,
    dtype: Any = jnp.float32,
) -> tuple[Policy | Mixture, list[str]]:
    """The proposal that a text describes, and the name of each of its components.

    Args:
      text: one term of the grammar above, or a weighted sum of several (a sequence-level mixture).
      target: what ablation and addition start from, and the term "target".
      vectors: named directions and vectors, looked up before files (.safetensors, .npy).
      checkpoints: named policies, looked up before folders and hub ids.
      dtype: for checkpoints that are loaded.

    Raises:
      InputError: text outside the grammar, an unreadable file, a wrong width.
    """
    vectors, checkpoints = vectors or {}, checkpoints or {}
    names, weights = [], []
    for term in text.split(" + "):
        weight, star, rest = term.strip().rpartition("*")
        names.append(rest)
        weights.append(_number(weight, "weight", text) if star else None)
    if len(names) > 1 and None in weights:
        raise InputError(f"proposal {text!r} needs a weight before each of its terms: 'W*TERM'")
    policies = [_parse_term(name, text, target, vectors, checkpoints, dtype) for name in names]
    if len(policies) == 1 and weights[0] in (None, 1.0):
        return policies[0], names
    return mixture(policies, [weight for weight in weights if weight is not None]), names


def _parse_term(term, text, target, vectors, checkpoints, dtype) -> Policy:
    base, at, temperature = term.rpartition("@")
    if at:
        policy = _parse_term(base, text, target, vectors, checkpoints, dtype)
        return at_temperature(policy, _number(temperature, "temperature", text))
    kind, *arguments = term.split(":")
    if kind == "checkpoint" and arguments:
        name = ":".join(arguments)
        if name in checkpoints:
            return checkpoints[name]
        return Policy(load_model(name, dtype=dtype))
    match kind, arguments:
        case "target", []:
            return target
        case "ablation", [*name, intensity] if name:
            direction = _load_vector(":".join(name), vectors)
            return ablate(target, direction, _number(intensity, "intensity", text))
        case "addition", [*name, layer, coefficient] if name:
            vector = _load_vector(":".join(name), vectors)
            index = _number(layer, "layer", text)
            if index != int(index):
                raise InputError(f"proposal {text!r}: layer {layer} is not a whole number")
            return steer(target, vector, int(index), _number(coefficient, "coefficient", text))
    raise InputError(f"proposal {term!r} isn't understood; give {GRAMMAR}")


def _number(value: str, name: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise InputError(f"proposal {text!r}: {name} {value!r} is not a finite number")
    return number


def _load_vector(name: str, vectors: Mapping[str, Any]) -> Any:
    if name in vectors:
        return vectors[name]
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
