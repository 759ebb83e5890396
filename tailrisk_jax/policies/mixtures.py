"""Sequence-level mixtures: each response is drawn whole from one component."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies.policy import check_comparable
from tailrisk_jax.policies.token_mixtures import Component


@struct.dataclass
class Mixture:
    """q(y) = sum_k alpha_k q_k(y).

    With the target as a component ("defensive", Hesterberg 1995) no weight p/q exceeds
    1 / alpha of the target.

    Attributes:
      components: the K policies, token mixtures or logit paths.
      weights: alpha, [K], positive, summing to 1.
    """

    components: tuple[Component, ...]
    weights: Float[Array, " K"]


def mixture(components: Sequence[Component], weights: Sequence[float]) -> Mixture:
    """A sequence-level mixture of policies, token mixtures and logit paths.

    Raises:
      InputError: no components, as many weights as components not given, a weight that isn't
        positive, weights that don't sum to 1 (within 1e-6), or policies over different
        vocabularies or end tokens.
    """
    alphas = np.asarray(weights, np.float64)
    if not components or alphas.shape != (len(components),):
        raise InputError(
            f"mixture has {len(components)} components and weights of shape {list(alphas.shape)}; "
            "give one weight for each component"
        )
    if any(isinstance(component, Mixture) for component in components):
        raise InputError("a component is itself a mixture; list its policies with their weights")
    if not np.all(alphas > 0) or abs(alphas.sum() - 1) > 1e-6:
        raise InputError(f"mixture weights {list(weights)} must be positive and sum to 1")
    check_comparable(components)
    return Mixture(tuple(components), jnp.asarray(alphas / alphas.sum(), jnp.float32))
