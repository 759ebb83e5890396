"""Steered policies: directional ablation and vector addition.

Coefficients are arrays, never branches: a policy steered with strength zero is the target bit
for bit, and strengths can be vmapped or differentiated.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies.policy import Policy

POSITIONS = {"all": (1.0, 1.0), "prompt": (1.0, 0.0), "response": (0.0, 1.0)}


def ablate(policy: Policy, direction: Any, intensity: Any, *, positions: str = "all") -> Policy:
    """Removes a direction from the residual stream: x <- x - a (x . d) d.

    It acts on every layer's input and on each attention and MLP output (Arditi et al. 2024,
    arXiv 2406.11717), so an intensity below 1 compounds over the 3 L sites. The outputs are what
    is written to the residual stream: after the norm that follows attention and MLP in OLMo 2 and
    3, Gemma 2 and 3. Where there is none, intensity 1 equals orthogonalising the weights that
    write to the stream.

    Args:
      direction: [D], one for all layers, or [L, D]; its length is divided out.
      intensity: a, a scalar or one per layer [L]; 0 is the target exactly.
      positions: "all", "prompt" or "response": which tokens' positions are changed. The first
        response token is predicted from the last prompt position.

    Raises:
      InputError: wrong width, a zero or non-finite direction, an unknown `positions`, or a policy
        that ablates a direction already.
    """
    config = policy.model.config
    steering = policy.steering_or_zero
    if _concrete(steering.ablation) and np.any(np.asarray(steering.ablation)):
        raise InputError(
            "the policy already ablates a direction, and a policy has room for one; "
            "ablate the original policy, or give one direction per layer"
        )
    direction = jnp.asarray(direction, jnp.float32)
    shape = (config.num_layers, config.width)
    if direction.shape not in (shape, shape[1:]):
        raise InputError(
            f"direction has shape {list(direction.shape)}; this model needs [{config.width}] "
            f"or [{config.num_layers}, {config.width}]"
        )
    norm = jnp.linalg.norm(direction, axis=-1, keepdims=True)
    if _concrete(norm) and not (np.all(np.isfinite(norm)) and np.all(np.asarray(norm) > 0)):
        raise InputError("direction has zero or non-finite length; give a finite non-zero vector")
    intensity = jnp.broadcast_to(jnp.asarray(intensity, jnp.float32), (config.num_layers,))
    return dataclasses.replace(
        policy,
        steering=dataclasses.replace(
            steering,
            direction=jnp.broadcast_to(direction / norm, shape),
            ablation=intensity[:, None] * jnp.asarray(_positions(positions)),
        ),
    )


def steer(
    policy: Policy, vector: Any, layer: int, coefficient: Any, positions: str = "all"
) -> Policy:
    """Adds a vector to one layer's output: x <- x + c v (Turner et al. 2023, arXiv 2308.10248).

    Additions accumulate: steering twice adds both vectors.

    Args:
      vector: [D], added as it is (not normalised).
      layer: index of the block whose output is changed, 0 to L - 1. (Persona vectors number
        the residual stream instead: their row l is the output of block l - 1.)
      coefficient: c, a scalar; 0 is the target exactly.
      positions: "all", "prompt" or "response", as in `ablate`.

    Raises:
      InputError: wrong width, a non-finite vector, a layer out of range, an unknown `positions`.
    """
    config = policy.model.config
    steering = policy.steering_or_zero
    vector = jnp.asarray(vector, jnp.float32)
    if vector.shape != (config.width,):
        raise InputError(
            f"vector has shape {list(vector.shape)}; this model needs [{config.width}]"
        )
    if _concrete(vector) and not np.all(np.isfinite(vector)):
        raise InputError("vector has non-finite entries; give a finite vector")
    if not 0 <= layer < config.num_layers:
        raise InputError(
            f"layer={layer} is out of range; this model has 0 to {config.num_layers - 1}"
        )
    weights = jnp.asarray(_positions(positions)) * coefficient
    addition = steering.addition.at[layer].add(weights[:, None] * vector)
    return dataclasses.replace(policy, steering=dataclasses.replace(steering, addition=addition))


def _positions(name: str) -> tuple[float, float]:
    if name not in POSITIONS:
        raise InputError(f"positions={name!r} is unknown; give one of {', '.join(POSITIONS)}")
    return POSITIONS[name]


def _concrete(x: Any) -> bool:
    return not isinstance(x, Tracer)
