"""Everything that is worth knowing of one set of weighted draws, in one call."""

import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators import weights as component_figures
from tailrisk_jax.estimators.certificates import betting_lower, betting_upper
from tailrisk_jax.estimators.diagnostics import Verdict, verdict
from tailrisk_jax.estimators.estimate import Estimate, importance
from tailrisk_jax.estimators.logspace import contributions
from tailrisk_jax.estimators.pareto import pareto_k
from tailrisk_jax.estimators.weights import ComponentWeights


@struct.dataclass
class MixtureDraws:
    """What is known of draws from a mixture of proposals, beside their weights.

    Attributes:
      log_p: log-probability under the target.
      component_log_probs: under each component.
      log_alphas: the mixture's weights.
      labels: the component that made each draw.
      target_index: the component that is the target itself; None if none is.
    """

    log_p: Float[ArrayLike, "*batch N"]
    component_log_probs: Float[ArrayLike, "K *batch N"]
    log_alphas: Float[ArrayLike, " K"]
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
      k_hat, k_hat_harm: `pareto_k` of w and of w h; above 0.7 the mean is not to be relied on.
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
    log_weights: Float[ArrayLike, "*batch N"],
    mixture: MixtureDraws | None = None,
    *,
    level: float = 0.95,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Report:
    """The default report on an importance-sampling estimate of E_p[h].

    Args:
      scores, log_weights, mask: as in `importance`.
      mixture: for draws from several proposals; without it, coverage is judged by the mean weight.
      level: of the interval and of both certificates.

    Edges: those of the functions named in `Report`.
    Raises: ValueError as they do.
    """
    options = {"level": level, "mask": mask}
    estimate = importance(scores, log_weights, **options)
    harm_weights, scored = contributions(
        checks.scores(scores, mask), checks.real(log_weights), checks.mask(mask, scores)
    )
    own, target_index = None, None
    share = jnp.zeros_like(estimate.value)
    covered, upper = estimate.hits, jnp.full_like(estimate.value, jnp.inf)
    if mixture is not None:
        target_index = mixture.target_index
        own = component_figures.component_mean_weights(
            mixture.log_p, mixture.component_log_probs, mixture.labels, mask=mask
        )
        covered = component_figures.covered_hits(scores, mixture.labels, own, mask=mask)
        if target_index is not None:
            share = component_figures.target_share(
                scores, log_weights, mixture.labels, target_index, mask=mask
            )
            log_bound = -checks.real(mixture.log_alphas)[target_index]
            upper = betting_upper(scores, log_weights, log_bound, **options)
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
        ),
    )
