"""Regression control variates for draws from a mixture of proposals."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.estimate import Estimate, importance
from tailrisk_jax.estimators.intervals import wald_interval
from tailrisk_jax.estimators.logspace import contributions, moments, unscale
from tailrisk_jax.estimators.weights import mixture_log_prob


def control_variates(
    scores: Float[ArrayLike, "*batch N"],
    log_p: Float[ArrayLike, "*batch N"],
    component_log_probs: Float[ArrayLike, "K *batch N"],
    log_alphas: Float[ArrayLike, " K"] | Float[ArrayLike, "*batch K"],
    *,
    folds: int = 5,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Estimate:
    """value = mean_i (w_i h_i - sum_k beta_k (q_k(y_i) / q_alpha(y_i) - 1)), y_i ~ q_alpha.

    Each q_k / q_alpha has mean 1, so any fixed beta leaves the mean as it is; beta by least squares
    takes away what the components explain of the spread of w h. One component is left out, since
    the alpha_k-weighted ratios sum to 1. Cross-fitted: the draws i with i mod folds = f get the
    beta of all other draws, so that value is unbiased for labels drawn at random. Asymptotically
    its variance is no more than that of importance sampling, nor than 1 / alpha_k times that of
    component k alone with as many draws.

    The interval is Wald's, cut at 0: value can be negative. stderr is that of the corrected draws.
    Other figures are those of `importance` on the same draws.

    Args:
      log_p, component_log_probs, log_alphas: as in `component_mean_weights` and
        `mixture_log_prob`.
      folds: at least 2, or 1 to fit and apply beta on the same draws, which is biased by O(1/n).

    Edges: as `importance`. With one component, or where a fold's other draws show no spread, beta
    is 0. A component with alpha_k = 0 is left out: its ratio has mean 1 only where the others reach
    all that it does.
    Raises: ValueError as `importance` and `mixture_log_prob`, and for folds < 1.
    Source: Owen & Zhou 2000, Safe and effective importance sampling, JASA 95.
    """
    if folds < 1:
        raise ValueError(f"folds is {folds}; give at least 2, or 1 for a fit that is not crossed")
    components = checks.real(component_log_probs)
    log_mixture = mixture_log_prob(components, log_alphas)
    log_weights = checks.real(log_p) - log_mixture
    scores, log_weights, mask = checks.draws(scores, log_weights, mask)
    plain = importance(scores, log_weights, level=level, mask=mask)
    log_x, scored = contributions(scores, log_weights, mask)
    log_alphas = checks.log_alphas(log_alphas, len(components), log_x.shape[:-1])
    used = jnp.moveaxis(log_alphas, -1, 0)[..., None] > -jnp.inf
    log_ratios = jnp.where(used, components - log_mixture[None], 0.0)
    value, stderr = _regressed(log_x, scored, log_ratios, folds)
    interval = wald_interval(value, stderr, level)
    return dataclasses.replace(
        plain,
        value=value,
        stderr=stderr,
        lower=jnp.maximum(interval.lower, 0.0),
        upper=interval.upper,
        estimator="control_variates",
        biased=folds == 1,
    )


@partial(jax.jit, static_argnames="folds")
def _regressed(
    log_x: Float[Array, "*batch N"],
    scored: Bool[Array, "*batch N"],
    log_ratios: Float[Array, "K *batch N"],
    folds: int,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    x = moments(log_x, scored)
    controls = jnp.moveaxis(jnp.exp(log_ratios[:-1]) - 1, 0, -1)  # [*batch, N, K - 1]
    controls = jnp.where(scored[..., None], controls, 0.0)
    fold = jnp.broadcast_to(jnp.arange(log_x.shape[-1]) % folds, log_x.shape)

    def corrected(number):
        others = scored & (fold != number) if folds > 1 else scored
        beta = _least_squares(x.scaled, controls, others)
        mine = scored & (fold == number) if folds > 1 else scored
        return jnp.where(mine, x.scaled - jnp.einsum("...nk,...k->...n", controls, beta), 0.0)

    values = jnp.sum(jax.lax.map(corrected, jnp.arange(folds)), axis=0)
    num = checks.real(x.count)
    mean = jnp.sum(values, axis=-1) / num
    deviations = jnp.where(scored, values - mean[..., None], 0.0)
    variance = jnp.sum(deviations**2, axis=-1) / (num - 1)
    stderr = jnp.where(variance > 0, jnp.sqrt(variance / num), jnp.nan)
    return unscale(mean, x.shift), unscale(stderr, x.shift)


def _least_squares(
    y: Float[Array, "*batch N"], z: Float[Array, "*batch N J"], kept: Bool[Array, "*batch N"]
) -> Float[Array, "*batch J"]:
    """Coefficients of the regression of y on z with an intercept, over the kept draws."""
    weight = checks.real(kept)[..., None]
    num = jnp.maximum(jnp.sum(weight, axis=-2, keepdims=True), 1.0)
    z = weight * (z - jnp.sum(weight * z, axis=-2, keepdims=True) / num)
    y = weight[..., 0] * (y - jnp.sum(weight[..., 0] * y, axis=-1, keepdims=True) / num[..., 0])
    gram = jnp.einsum("...nj,...nk->...jk", z, z)
    moment = jnp.einsum("...nj,...n->...j", z, y)
    inverse = jnp.linalg.pinv(gram, hermitian=True)
    return jnp.einsum("...jk,...k->...j", inverse, moment)
