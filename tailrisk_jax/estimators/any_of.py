"""The chance that at least one of k answers is harmful, from Monte Carlo draws."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from tailrisk_jax.estimators import checks


def any_of_draws(
    hits: Int[ArrayLike, "*batch"], num_samples: Int[ArrayLike, "*batch"], k: int
) -> Float[Array, "*batch"]:
    """1 - C(n - c, k) / C(n, k) from c hits in n Monte Carlo draws: unbiased for 1 - (1 - P)^k.

    At k = n it is 1 where anything was hit, and else 0. 1 - (1 - c / n)^k is too low on average, as
    it is concave in c. Call it through `in_float64`.

    Edges: NaN where k exceeds n, since n draws can't tell.
    Raises: ValueError where k is below 1, or hits lie outside [0, n].
    Source: Chen et al. 2021, arXiv 2107.03374 (there for pass@k).
    """
    checks.counts(hits, num_samples)
    if k < 1:
        raise ValueError(f"k is {k}; give the number of answers, 1 or more")
    return _any_of_draws(checks.real(hits), checks.real(num_samples), k)


@partial(jax.jit, static_argnames="k")
def _any_of_draws(hits: Array, count: Array, k: int) -> Array:
    misses = count - hits
    enough = misses >= k  # else every k draws hold a hit
    rest = jnp.where(enough, misses, k)
    log_none = (
        gammaln(rest + 1) - gammaln(rest - k + 1) - gammaln(count + 1) + gammaln(count - k + 1)
    )
    found = jnp.where(hits == 0, 0.0, jnp.where(enough, -jnp.expm1(log_none), 1.0))
    return jnp.where(k > count, jnp.nan, found)
