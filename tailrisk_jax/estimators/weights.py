"""Weights of mixtures of proposals, and what they tell about each component."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.estimators import checks
from tailrisk_jax.estimators.logspace import contributions, moments, unscale

COVERAGE_RATIO = 100.0  # p / q_k beyond which hundreds of draws from q_k don't show p


def mixture_log_prob(
    component_log_probs: Float[ArrayLike, "K *batch N"],
    log_alphas: Float[ArrayLike, " K"] | Float[ArrayLike, "*batch K"],
) -> Float[Array, "*batch N"]:
    """log q_alpha(y) = logsumexp_k(log alpha_k + log q_k(y)), the balance heuristic's density.

    log p - log q_alpha is an unbiased log-weight for draws from the mixture, whether labels were
    drawn at random with probabilities alpha or alpha_k N draws came from component k. With the
    target as component 0 (a defensive mixture) no weight exceeds 1 / alpha_0. The weights alpha
    are shared, [K], or each row of the batch has its own, [*batch, K].

    Edges: a component with alpha_k = 0 drops out; -inf where every component gives -inf, not NaN.
    Raises: ValueError where log_alphas has another shape, or the weights don't sum to 1.
    Source: Veach & Guibas 1995; Hesterberg 1995; Owen & Zhou 2000.
    """
    shape = jnp.shape(component_log_probs)
    if len(shape) < 2:
        raise ValueError(f"component_log_probs has shape {shape}; give [K, ..., N]")
    return _mixture_log_prob(
        checks.real(component_log_probs), checks.log_alphas(log_alphas, shape[0], shape[1:-1])
    )


@jax.jit
def _mixture_log_prob(
    component_log_probs: Float[Array, "K *batch N"], log_alphas: Float[Array, "*batch K"]
) -> Float[Array, "*batch N"]:
    per_component = jnp.moveaxis(log_alphas, -1, 0)[..., None]
    return jax.nn.logsumexp(component_log_probs + per_component, axis=0)


@struct.dataclass
class ComponentWeights:
    """Per component, how it relates to the target.

    `mean_weight` is E_{q_k}[p / q_k] over the draws that the component made itself; NaN where it
    made none. `stderr` is NaN where its draws show no spread (none, one, or all weights equal, as
    for the target itself). `count` is its draws. `coverage` is the share of the target on which
    p / q_k is at most `COVERAGE_RATIO`, about: E_p[min(1, COVERAGE_RATIO q_k / p)], over all draws.
    """

    mean_weight: Float[Array, "K *batch"]
    stderr: Float[Array, "K *batch"]
    count: Int[Array, "K *batch"]
    coverage: Float[Array, "K *batch"]


def component_mean_weights(
    log_p: Float[ArrayLike, "*batch N"],
    component_log_probs: Float[ArrayLike, "K *batch N"],
    labels: Int[ArrayLike, "*batch N"],
    *,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> ComponentWeights:
    """The mean of p(y) / q_k(y) over the draws that component k itself made, and its coverage.

    The mean weight is unbiased for the target's mass inside the reach of q_k, 1 if q_k > 0 wherever
    p > 0. Far below 1, it says that the draws of q_k do not show a part of the target (or that the
    sampler is broken). A mixture's own mean weight is near 1 whatever its components miss, and
    can't say this. With few draws of its own, neither can a component's.

    The coverage says the same from the draws of all components. With c = `COVERAGE_RATIO`, n_k
    draws of component k and m = sum_k (n_k / N) q_k,

        C_k = sum_y min(p(y), c q_k(y)),  estimated by  1/N sum_i min(p(y_i), c q_k(y_i)) / m(y_i),

    without bias where m > 0, and bounded where the target is a component, since no draw counts
    more than N / n_target. It is divided by the mean of p / m where that is above 1.

    Edges: NaN mean where a component made no draw (its coverage is known all the same); 0 where log
    p is -inf on all its draws; +inf where q_k gives one of its own draws probability 0 (a broken
    sampler), NaN if log p is -inf too. Coverage 0 without a draw, or with NaN for log p.
    Raises: ValueError for shapes that differ, and labels that aren't integers in [0, K).
    """
    shape = checks.same_shape(log_p=log_p, labels=labels)
    all_shape = jnp.shape(component_log_probs)
    if all_shape[1:] != shape or not all_shape:
        raise ValueError(
            f"component_log_probs has shape {all_shape}; log_p of shape {shape} needs "
            f"[K, {', '.join(map(str, shape))}]"
        )
    return _component_mean_weights(
        checks.real(log_p),
        checks.real(component_log_probs),
        checks.labels(labels, all_shape[0]),
        checks.mask(mask, log_p),
    )


@jax.jit
def _component_mean_weights(
    log_p: Float[Array, "*batch N"],
    component_log_probs: Float[Array, "K *batch N"],
    labels: Int[Array, "*batch N"],
    mask: Bool[Array, "*batch N"],
) -> ComponentWeights:
    ids = jnp.arange(component_log_probs.shape[0], dtype=labels.dtype)
    log_q = jnp.take_along_axis(component_log_probs, labels[None], axis=0)[0]
    log_weights = log_p - log_q

    counts = jax.lax.map(lambda k: jnp.sum(mask & (labels == k), axis=-1, dtype=jnp.int32), ids)
    num = checks.real(jnp.sum(counts, axis=0))
    shares = jnp.log(checks.real(counts)) - jnp.log(num)[None]
    log_m = jax.nn.logsumexp(component_log_probs + shares[..., None], axis=0)
    drawn = mask & (log_m > -jnp.inf)
    mixed = moments(log_p - log_m, drawn)
    most = jnp.maximum(jnp.exp(-mixed.shift), mixed.mean)

    def one(component):
        k, log_probs = component
        own = moments(log_weights, mask & (labels == k))
        shown = jnp.minimum(log_p, log_probs + jnp.log(COVERAGE_RATIO)) - log_m
        shown = jnp.where(drawn, jnp.exp(shown - mixed.shift[..., None]), 0.0)
        coverage = jnp.sum(shown, axis=-1) / (num * most)
        return ComponentWeights(
            mean_weight=unscale(own.mean, own.shift),
            stderr=unscale(own.stderr, own.shift),
            count=own.count,
            coverage=jnp.where(coverage > 0, coverage, 0.0),
        )

    return jax.lax.map(one, (ids, component_log_probs))


def target_share(
    scores: Float[ArrayLike, "*batch N"],
    log_weights: Float[ArrayLike, "*batch N"],
    labels: Int[ArrayLike, "*batch N"],
    target_index: int = 0,
    *,
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Float[Array, "*batch"]:
    """The share of the estimate owed to the target's draws: sum over them of w h, over all w h.

    Small where the other components reach the harm. A large share that rests on a handful of draws
    says that there is harm the others do not reach.

    Edges: NaN scores are left out; NaN where there are no hits.
    Raises: ValueError for shapes that differ, labels that aren't integers, and values as
    `importance`.
    """
    checks.same_shape(scores=scores, log_weights=log_weights, labels=labels)
    mask = checks.mask(mask, scores)
    log_weights = checks.log_weights(log_weights, scores, mask)
    from_target = checks.labels(labels, None) == target_index
    return _share(checks.scores(scores, mask), log_weights, from_target, mask)


@jax.jit
def _share(
    scores: Float[Array, "*batch N"],
    log_weights: Float[Array, "*batch N"],
    from_target: Bool[Array, "*batch N"],
    mask: Bool[Array, "*batch N"],
) -> Float[Array, "*batch"]:
    scaled = moments(*contributions(scores, log_weights, mask)).scaled
    return jnp.sum(jnp.where(from_target, scaled, 0.0), axis=-1) / jnp.sum(scaled, axis=-1)


def covered_hits(
    scores: Float[ArrayLike, "*batch N"],
    labels: Int[ArrayLike, "*batch N"],
    components: ComponentWeights,
    least_coverage: float = 0.5,
    *,
    diluted: Sequence[int] = (),
    mask: Bool[ArrayLike, "*batch N"] | None = None,
) -> Int[Array, "*batch"]:
    """How many draws with a score above 0 came from components that cover the target.

    A component covers the target if its coverage is at least `least_coverage`; the target itself
    does. Where there are none, all the harm seen was drawn by proposals that miss most of the
    target, and what they miss of the harm can't be told. Of a dictionary of windows, those that
    begin late, and those of a policy near the target, cover; an unsafe policy's opener does not.
    `diluted` ones don't count as covering; see `verdict`.

    Raises: ValueError for shapes that differ, and labels that aren't integers in [0, K).
    """
    checks.same_shape(scores=scores, labels=labels)
    covers = components.coverage >= least_coverage
    covers = covers.at[jnp.asarray(diluted, int)].set(False)
    drawn_by = checks.labels(labels, covers.shape[0])
    covered = jnp.take_along_axis(jnp.moveaxis(covers, 0, -1), drawn_by, axis=-1)
    mask = checks.mask(mask, scores)
    hits = mask & (checks.scores(scores, mask) > 0)
    return jnp.sum(hits & covered, axis=-1, dtype=jnp.int32)
