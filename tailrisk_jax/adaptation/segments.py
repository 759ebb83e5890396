"""Log-probabilities of stretches of a response, by cumulative sums that know of -inf."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class Segments:
    """Sums of log-probabilities, with the impossible tokens counted: -inf - (-inf) is no number.

    Attributes:
      sums: of the finite log-probabilities.
      impossible: how many were -inf.
    """

    sums: Float[Array, "..."]
    impossible: Int[Array, "..."]

    def __getitem__(self, index) -> "Segments":
        return Segments(self.sums[index], self.impossible[index])

    def __add__(self, other: "Segments") -> "Segments":
        return jax.tree.map(jnp.add, self, other)

    def __sub__(self, other: "Segments") -> "Segments":
        return jax.tree.map(jnp.subtract, self, other)

    @property
    def log_prob(self) -> Float[Array, "..."]:
        """-inf where a token is impossible."""
        return jnp.where(self.impossible > 0, -jnp.inf, self.sums)


def prefixes(token_log_probs: Float[Array, "... T"]) -> Segments:
    """The first 0, 1, ... T tokens, as arrays [T + 1, ...]."""
    values = jnp.moveaxis(token_log_probs, -1, 0)
    impossible = values == -jnp.inf

    def cumulative(x: Array) -> Array:
        return jnp.pad(jnp.cumsum(x, axis=0), [(1, 0), *[(0, 0)] * (x.ndim - 1)])

    finite = jnp.where(impossible, 0.0, values)
    return Segments(cumulative(finite), cumulative(impossible.astype(jnp.int32)))
