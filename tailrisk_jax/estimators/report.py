"""Everything that is worth knowing of one set of weighted draws, in one call."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.certificates import betting_lower, betting_upper
from tailrisk_jax.estimators.diagnostics import Verdict, verdict
from tailrisk_jax.estimators.estimate import Estimate, importance, monte_carlo
from tailrisk_jax.estimators.logspace import contributions
from tailrisk_jax.estimators.pareto import pareto_k
from tailrisk_jax.estimators.weights import (
    ComponentWeights,
    component_mean_weights,
    covered_hits,
    target_share,
)


@struct.dataclass
class MixtureDraws:
    """What is known of draws from a mixture of proposals, beside their weights.

    Attributes:
      log_p: log-probability under the target.
      component_log_probs: under each component.
      log_alphas: the mixture's weights, shared or one row for each of the batch.
      labels: the component that made each draw.
      target_index: the component that is the target itself; None if none is.
    """

    log_p: Float[ArrayLike, "*batch N"]
    component_log_probs: Float[ArrayLike, "K *batch N"]
    log_alphas: Float[ArrayLike, " K"] | Float[ArrayLike, "*batch K"]
    labels: Int[ArrayLike, "*batch N"]
    target_index: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Report:
    """An estimate, its certificates, its diagnostics and the verdict, over the leading axes.

    Attributes:
      estimate: by `importance`; its interval is asymptotic.
      lower_certificate: `betting_lower`, one-sided at the level: it holds for every N.
      upper_certificate: `betting_upper`, one-sided at the level, where the target is a component
        of the proposal, and inf elsewhere. It holds for every N, and is loose.
      k_hat, k_hat_harm: `pareto_k` of w and of w h; above 0.7 their tails are heavy.
      components: `component_mean_weights`; None for a single proposal.
      target_share: the share of the estimate owed to target draws, 0 without a target component.
      covered_hits: hits drawn by components that cover the target.
      verdict: `verdict` on all of it.
    """

    estimate: Estimate
    lower_certificate: Float[Array, "*batch"]
    upper_certificate: Float[Array, "*batch"]
    k_hat: Float[Array, "*batch"]
    k_hat_harm: Float[Array, "*batch"]
    components: ComponentWeights | None
    target_share: Float[Array, "*batch"]
    covered_hits: Int[Array, "*batch"]
    verdict: Verdict


def report(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"] | None,
    mixture: MixtureDraws | None = None,
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
    diluted: Sequence[int] = (),
    rescore_noise: Float[ArrayLike, "*batch"] | None = None,
    truncated: Float[ArrayLike, "*batch"] | None = None,
) -> Report:
    """The default report on an importance-sampling estimate of E_p[h].

    Args:
      scores, log_weights, mask: as in `importance`; None for log_weights says that the draws are
        from the target: the estimate is `monte_carlo`'s, and the upper certificate needs no more.
      mixture: for draws from several proposals; without it, coverage is judged by the mean weight.
      level: of the interval and of both certificates.
      diluted, rescore_noise, truncated: for the verdict; see there.

    Edges: those of the functions named in `Report`.
    Raises: ValueError as they do.
    """
    if log_weights is None:
        if mixture is not None:
            raise ValueError("log_weights is None with a mixture; give log p - log q of the draws")
        mask = checks.mask(mask, scores)
        scores = checks.scores(scores, mask)
    else:
        scores, log_weights, mask = checks.draws(scores, log_weights, mask)
        if mixture is not None:
            mixture = _checked(mixture, scores, log_weights, mask)
    told = tuple(None if x is None else checks.real(x) for x in (rescore_noise, truncated))
    return _report(scores, log_weights, mixture, mask, told, checks.level(level), tuple(diluted))


def _checked(mixture: MixtureDraws, scores: Array, log_weights: Array, mask: Array) -> MixtureDraws:
    *batch, _ = checks.same_shape(scores=scores, log_p=mixture.log_p, labels=mixture.labels)
    num_components = jnp.shape(mixture.component_log_probs)[0]
    log_alphas = checks.log_alphas(mixture.log_alphas, num_components, tuple(batch))
    if mixture.target_index is not None:
        log_x, _ = contributions(scores, log_weights, mask)
        checks.bound(-log_alphas[..., mixture.target_index], log_x)
    return dataclasses.replace(
        mixture, labels=checks.labels(mixture.labels, num_components), log_alphas=log_alphas
    )


@partial(jax.jit, static_argnames=("level", "diluted"))
def _report(
    scores: Float[Array, "*batch N"],
    log_weights: Float[Array, "*batch N"] | None,
    mixture: MixtureDraws | None,
    mask: Bool[Array, "*batch N"],
    told: tuple[Float[Array, "*batch"] | None, Float[Array, "*batch"] | None],
    level: float,
    diluted: tuple[int, ...],
) -> Report:
    options: Any = {"level": level, "mask": mask}
    if log_weights is None:
        log_weights = jnp.zeros_like(scores)
        estimate = monte_carlo(scores, **options)
        upper = betting_upper(scores, log_weights, 0.0, **options)
    else:
        estimate = importance(scores, log_weights, **options)
        upper = jnp.full_like(estimate.value, jnp.inf)
    harm_weights, scored = contributions(scores, log_weights, mask)
    own, target_index = None, None
    share = jnp.zeros_like(estimate.value)
    covered = estimate.hits
    if mixture is not None:
        target_index = mixture.target_index
        own = component_mean_weights(
            mixture.log_p, mixture.component_log_probs, mixture.labels, mask=mask
        )
        covered = covered_hits(scores, mixture.labels, own, diluted=diluted, mask=mask)
        if target_index is not None:
            share = target_share(scores, log_weights, mixture.labels, target_index, mask=mask)
            log_bound = -checks.real(mixture.log_alphas)[..., target_index]
            bounded = betting_upper(scores, log_weights, log_bound, **options)
            upper = jnp.where(log_bound < jnp.inf, bounded, jnp.inf)
    return Report(
        estimate=estimate,
        lower_certificate=betting_lower(scores, log_weights, **options),
        upper_certificate=upper,
        k_hat=pareto_k(log_weights, mask=scored),
        k_hat_harm=pareto_k(harm_weights, mask=scored),
        components=own,
        target_share=share,
        covered_hits=covered,
        verdict=verdict(
            estimate,
            own,
            target_index=target_index,
            target_share=None if own is None else share,
            covered_hits=None if own is None else covered,
            diluted=diluted,
            rescore_noise=told[0],
            truncated=told[1],
        ),
    )
