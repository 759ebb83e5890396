"""Sample moments of exp(log_x) over the last axis, in log space to the last step.

A sequence ratio spans hundreds of nats. It is exponentiated only after its largest value was
subtracted, so that no moment overflows, and a ratio such as stderr / mean never even needs the
shift added back.
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Moments:
    """Moments of x = exp(log_x) over the kept draws, divided by exp(shift).

    `count` kept draws; `shift` the largest kept log_x (0 where all are -inf); `scaled`
    x / exp(shift), 0 where not kept; `mean` its mean over the kept draws, NaN without any;
    `stderr` the standard error of that mean, NaN where the draws don't show a spread: fewer than
    two draws, or all of them equal; `skewness` that of the mean, the third central moment over
    the standard deviation cubed and sqrt(n), NaN with stderr.
    """

    count: Int[Array, "*batch"]
    shift: Float[Array, "*batch"]
    scaled: Float[Array, "*batch N"]
    mean: Float[Array, "*batch"]
    stderr: Float[Array, "*batch"]
    skewness: Float[Array, "*batch"]


def moments(log_x: Float[Array, "*batch N"], kept: Bool[Array, "*batch N"]) -> Moments:
    """Moments of exp(log_x) over the draws in `kept`.

    log_x = -inf is x = 0. log_x = +inf is the limit of one growing value: after scaling it is 1
    and every finite value 0. NaN in a kept draw gives NaN.
    """
    log_x = jnp.where(kept, log_x, -jnp.inf)
    shift = jnp.max(log_x, axis=-1, keepdims=True)
    shift = jnp.where(shift == -jnp.inf, 0.0, shift)
    scaled = jnp.where(log_x == shift, 1.0, jnp.exp(log_x - shift))
    count = jnp.sum(kept, axis=-1, dtype=jnp.int32)
    num = count.astype(scaled.dtype)
    mean = jnp.sum(scaled, axis=-1) / num
    deviations = jnp.where(kept, scaled - mean[..., None], 0.0)
    variance = jnp.sum(deviations**2, axis=-1) / (num - 1)
    stderr = jnp.where(variance > 0, jnp.sqrt(variance / num), jnp.nan)
    cubes = jnp.sum(deviations**3, axis=-1) / num
    skewness = jnp.where(variance > 0, cubes / variance**1.5 / jnp.sqrt(num), jnp.nan)
    return Moments(count, shift[..., 0], scaled, mean, stderr, skewness)


def unscale(
    scaled: Float[Array, "*batch"], shift: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """scaled * exp(shift), finite wherever the product is, even where exp(shift) is not."""
    return jnp.where(shift > 80, jnp.exp(shift + jnp.log(scaled)), scaled * jnp.exp(shift))


def effective_size(scaled: Float[Array, "*batch N"]) -> Float[Array, "*batch"]:
    """Kish's effective sample size (sum x)^2 / sum x^2; 0 where every x is 0."""
    total = jnp.sum(scaled, axis=-1)
    return jnp.where(total == 0, 0.0, total**2 / jnp.sum(scaled**2, axis=-1))


def contributions(
    scores: Float[Array, "*batch N"],
    log_weights: Float[Array, "*batch N"],
    mask: Bool[Array, "*batch N"] | None = None,
) -> tuple[Float[Array, "*batch N"], Bool[Array, "*batch N"]]:
    """log(w h) per draw, and which draws exist and have a score.

    A draw with score 0 contributes 0 whatever its weight, +inf and NaN included.
    """
    scored = ~jnp.isnan(scores)
    if mask is not None:
        scored = scored & mask
    hit = scored & (scores > 0)
    log_h = jnp.log(jnp.where(hit, scores, 1.0))
    return jnp.where(hit, log_weights + log_h, -jnp.inf), scored
