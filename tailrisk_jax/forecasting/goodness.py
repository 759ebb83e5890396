"""Whether the tail is the line that was fitted to it."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key


@struct.dataclass
class Goodness:
    """How well the peaks over the threshold are exponential.

    Attributes:
      r_squared: of log(j / m) on psi_(j), as Jones et al. report it; near 1 for any smooth tail.
      anderson_darling: of the peaks and the exponential distribution of their mean.
      p_value: the share of exponential samples of that size with a statistic as large.
    """

    r_squared: Float[Array, ""]
    anderson_darling: Float[Array, ""]
    p_value: Float[Array, ""]


@partial(jax.jit, static_argnames="num_resamples")
def goodness_of_fit(
    key: Key[Array, ""], largest: Float[ArrayLike, " k"], *, num_resamples: int = 999
) -> Goodness:
    """Checks the k largest psi, the largest first; -inf (estimates of 0) is left out.

        A^2 = -n - 1/n sum_i (2i - 1) (log F(x_(i)) + log(1 - F(x_(n+1-i)))),

    over the n = k - 1 peaks x = psi_(j) - psi_(k), with F exponential of their mean. Its
    distribution without an error of the estimates doesn't depend on the scale, and is simulated.

    Edges: NaN with fewer than two peaks, or none above 0.
    Source: Stephens 1974, Journal of the American Statistical Association 69.
    """
    largest = jnp.asarray(largest, float)
    fitted = largest > -jnp.inf
    count = jnp.sum(fitted)
    threshold = jnp.min(largest, where=fitted, initial=jnp.inf)
    above = jnp.where(fitted, largest - threshold, 0.0)
    is_peak = jnp.arange(largest.shape[0]) < count - 1

    found = _anderson_darling(jnp.where(is_peak, above, 0.0), is_peak)

    # Ordered exponential draws are sums of spacings (Renyi): x_(j) - x_(j+1) has the mean 1 / j.
    shape = (num_resamples, *largest.shape)
    rank = jnp.arange(1.0, largest.shape[0] + 1, dtype=largest.dtype)
    spacings = jax.random.exponential(key, shape, largest.dtype) / rank
    drawn = jnp.cumsum(jnp.where(is_peak, spacings, 0.0)[:, ::-1], axis=-1)[:, ::-1]
    drawn = _anderson_darling(jnp.where(is_peak, drawn, 0.0), is_peak)
    p_value = (1 + jnp.sum(drawn >= found)) / (1 + num_resamples)
    x, y = (
        jnp.where(fitted, v - jnp.sum(jnp.where(fitted, v, 0.0)) / count, 0.0)
        for v in (above, jnp.log(rank))
    )
    r_squared = jnp.sum(x * y) ** 2 / (jnp.sum(x * x) * jnp.sum(y * y))
    known = (count >= 3) & (jnp.sum(above) > 0)
    return Goodness(
        r_squared=jnp.where(known, r_squared, jnp.nan),
        anderson_darling=jnp.where(known, found, jnp.nan),
        p_value=jnp.where(known, p_value, jnp.nan),
    )


def _anderson_darling(
    peaks: Float[Array, "*batch k"], is_peak: Bool[Array, " k"]
) -> Float[Array, "*batch"]:
    """A^2 of the first peaks, the largest first; both sums by the rank from the top."""
    num = jnp.sum(is_peak).astype(peaks.dtype)
    z = peaks * num / jnp.sum(peaks, axis=-1, keepdims=True)
    z = jnp.where(is_peak, jnp.maximum(z, jnp.finfo(z.dtype).tiny), 1.0)
    from_top = jnp.arange(1.0, peaks.shape[-1] + 1, dtype=peaks.dtype)
    # The j-th from the top is i = n + 1 - j from below in log F, and j in log(1 - F).
    terms = (2 * (num - from_top) + 1) * jnp.log(-jnp.expm1(-z)) - (2 * from_top - 1) * z
    return -num - jnp.sum(jnp.where(is_peak, terms, 0.0), axis=-1) / num
