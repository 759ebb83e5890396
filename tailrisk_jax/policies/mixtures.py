"""Sequence-level mixtures: each response is drawn whole from one component."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies.policy import check_comparable
from tailrisk_jax.policies.token_mixtures import Component


@struct.dataclass
class Mixture:
    """q(y | x) = sum_k alpha_k q_k(y | x), with weights shared by all queries or per query.

    With the target as a component ("defensive", Hesterberg 1995) no weight p/q exceeds
    1 / alpha of the target.

    Attributes:
      components: the K policies, token mixtures or logit paths.
      weights: alpha, summing to 1. [K], positive; or [Q, K], a row for each query that the mixture
        is used with, in their order. A component of weight 0 is never drawn for that query, and
        adds nothing to the density of its responses.
    """

    components: tuple[Component, ...]
    weights: Float[Array, " K"] | Float[Array, "Q K"]

    @property
    def per_query(self) -> bool:
        """Whether each query has weights of its own."""
        return self.weights.ndim == 2

    def for_queries(self, queries: Any) -> "Mixture":
        """Of a slice or an array of query indices; itself where the weights are shared."""
        if not self.per_query:
            return self
        return dataclasses.replace(self, weights=jnp.asarray(np.asarray(self.weights)[queries]))

    def log_alphas(self, num_queries: int) -> Float[np.ndarray, "Q K"]:
        """log alpha of each of Q queries; -inf for a weight of 0.

        Raises:
          InputError: weights for another number of queries.
        """
        if self.per_query and len(self.weights) != num_queries:
            raise InputError(
                f"the mixture has weights for {len(self.weights)} queries and is used with "
                f"{num_queries}; give one row for each, or pick rows by for_queries"
            )
        weights = np.asarray(self.weights)
        with np.errstate(divide="ignore"):
            return np.log(np.broadcast_to(weights, (num_queries, weights.shape[-1])))


def mixture(components: Sequence[Component], weights: ArrayLike | Sequence[Any]) -> Mixture:
    """A sequence-level mixture of policies, token mixtures and logit paths.

    Args:
      components: K of them.
      weights: [K], shared by all queries; or [Q, K], a row per query, with zeros where a component
        is left out for a query.

    Raises:
      InputError: no components, as many weights as components not given, a shared weight that isn't
        positive or one below 0, weights that don't sum to 1 (within 1e-6), a component that has no
        weight for any query, or policies over different vocabularies or end tokens.
    """
    alphas = np.asarray(weights, np.float64)
    if not alphas.size or alphas.shape[-1:] != (len(components),) or alphas.ndim > 2:
        raise InputError(
            f"mixture has {len(components)} components and weights of shape {list(alphas.shape)}; "
            "give one weight for each component, or a row of them for each query"
        )
    if any(isinstance(component, Mixture) for component in components):
        raise InputError("a component is itself a mixture; list its policies with their weights")
    sums = alphas.sum(axis=-1, keepdims=True)
    if alphas.ndim == 1 and not (np.all(alphas > 0) and abs(sums[0] - 1) <= 1e-6):
        raise InputError(f"mixture weights {alphas.tolist()} must be positive and sum to 1")
    if alphas.ndim == 2:
        _check_rows(alphas)
    check_comparable(components)
    return Mixture(tuple(components), jnp.asarray(alphas / sums, jnp.float32))


def _check_rows(alphas: Float[np.ndarray, "Q K"]) -> None:
    good = np.all(alphas >= 0, axis=1) & (abs(alphas.sum(axis=1) - 1) <= 1e-6)
    if not good.all():
        row = int(np.argmin(good))
        raise InputError(
            f"row {row} of the mixture weights sums to {alphas[row].sum():.6g}, its least is "
            f"{alphas[row].min():.6g}; give weights of 0 or more that sum to 1"
        )
    unused = np.flatnonzero(~alphas.any(axis=0))
    if unused.size:
        raise InputError(f"component {unused[0]} has no weight for any query; leave it out")
