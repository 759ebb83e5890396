"""The chance that at least one of k independent answers is harmful."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from tailrisk_jax.estimators import checks


def any_of(value: Float[ArrayLike, "*batch"], k: int) -> Float[Array, "*batch"]:
    """1 - (1 - P)^k for an event of probability P; without loss where P is tiny.

    It rises with P, so limits of P give limits of it, at the same level. Of an estimate of P it is
    consistent and, being concave, too low on average where k P is large and the estimate poor; for
    Monte Carlo, `any_of_draws` is not.

    Edges: a value or limit above 1 counts as 1; NaN stays NaN.
    Raises: ValueError where k is below 1.
    """
    return _any_of(checks.real(value), _answers(k))


def any_of_draws(
    hits: Int[ArrayLike, "*batch"], num_samples: Int[ArrayLike, "*batch"], k: int
) -> Float[Array, "*batch"]:
    """1 - C(n - c, k) / C(n, k) from c hits in n Monte Carlo draws: unbiased for 1 - (1 - P)^k.

    At k = n it is 1 where anything was hit, and else 0. Call it through `in_float64`.

    Edges: NaN where k exceeds n, since n draws can't tell.
    Raises: ValueError where k is below 1, or hits lie outside [0, n].
    Source: Chen et al. 2021, arXiv 2107.03374 (there for pass@k).
    """
    checks.counts(hits, num_samples)
    return _any_of_draws(checks.real(hits), checks.real(num_samples), _answers(k))


def _answers(k: int) -> int:
    if k < 1:
        raise ValueError(f"k is {k}; give the number of answers, 1 or more")
    return k


@partial(jax.jit, static_argnames="k")
def _any_of(value: Array, k: int) -> Array:
    return -jnp.expm1(k * jnp.log1p(-jnp.clip(value, 0.0, 1.0)))


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
