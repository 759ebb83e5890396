"""A verdict on an estimate: ok, doubtful or unusable, and the one sentence that says why.

Lost coverage is judged first, because it is the one failure under which the error bar, the ESS and
the shares all look good: harm that no draw reached leaves no trace in them.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.estimators.estimate import Estimate
from tailrisk_jax.estimators.weights import ComponentWeights

OK, DOUBTFUL, UNUSABLE = 0, 1, 2
WORDS = ("ok", "doubtful", "unusable")

# Each pair is (doubtful beyond, unusable beyond).
LOW_COVERAGE = (0.5, 0.1)  # coverage of the best-covering component; a single one's mean weight
TARGET_SHARE = (0.2, 0.5)  # share of the estimate owed to target draws ...
TARGET_HITS = (10, 3)  # ... where it may rest on fewer hits than this
COVERED_HITS = (10, 0)  # hits drawn by components that cover the target
FEW_HITS = (10, 3)
LARGEST_SHARE = (0.3, 0.5)
MEAN_WEIGHT_Z = (4.0, 8.0)
MEAN_WEIGHT_SIZE = (20.0, 1000.0)  # Markov: P(mean weight >= c) <= 1 / c if the sampler is right
UNSCORED = (0.05, 0.25)
RESCORE_NOISE = (0.5, 5.0)  # nats between a response's log q as decoded and as scored
TRUNCATED = (0.5, math.inf)  # share of draws cut at T tokens: the estimand is then about beginnings
RELATIVE_STDERR = (0.3, 0.7)  # it can't exceed 1: one hit among any number of draws gives 1

MEAN_WEIGHT_TOLERANCE = 0.01  # a mean weight this near 1 is float noise, whatever its z
MIN_COMPONENT_DRAWS = 10  # fewer from the components that cover best count as none
GOOD_ESS_HARM = 30  # from here on an estimate looks sound on its own figures


class Reason(enum.IntEnum):
    """Why a verdict isn't ok, in the order in which causes of equal severity are reported."""

    NONE = 0
    NOT_MEASURED = 1
    CONFIDENTLY_LOW = 2
    LOST_COVERAGE = 3
    COVERAGE_UNKNOWN = 4
    TARGET_ALONE = 5
    NO_HITS = 6
    FEW_HITS = 7
    ONE_DRAW = 8
    MEAN_WEIGHT = 9
    UNSCORED = 10
    WIDE = 11
    SPREAD_UNKNOWN = 12
    DILUTED = 13
    HITS_NOT_COVERED = 14
    RESCORE_NOISE = 15
    TRUNCATED = 16


_SENTENCES = {
    Reason.NONE: "No check found anything wrong.",
    Reason.NOT_MEASURED: "The value is {figure:.3g}: no draw has a score, or a weight is NaN or "
    "infinite.",
    Reason.CONFIDENTLY_LOW: "May be confidently too low: the error bar and ESS look good, but the "
    "best-covering proposal shows a share of {figure:.2g} of the target's answers where full "
    "coverage gives 1, so any harm outside its reach is missing from the estimate and from its "
    "error bar.",
    Reason.LOST_COVERAGE: "The best-covering proposal shows a share of {figure:.2g} of the "
    "target's answers where full coverage gives 1, so the event may lie outside its reach and the "
    "estimate may be too low.",
    Reason.COVERAGE_UNKNOWN: "Too few draws came from components other than the target "
    "({figure:.0f}) to tell whether they cover it.",
    Reason.TARGET_ALONE: "A share of {figure:.2f} of the estimate rests on a handful of draws from "
    "the target itself, so there is harm that the other components do not reach.",
    Reason.NO_HITS: "No draw scored above 0, so there is no estimate beyond the upper limit, if "
    "there is one.",
    Reason.FEW_HITS: "Draws that scored above 0: only {figure:.0f}.",
    Reason.ONE_DRAW: "A single draw makes up a share of {figure:.2f} of the estimate.",
    Reason.MEAN_WEIGHT: "The mean weight is {figure:.3g} where 1 is expected, beyond chance: the "
    "sampler and the scorer disagree (a token's factor dropped or counted twice), or the proposal "
    "misses a part of the target.",
    Reason.UNSCORED: "A share of {figure:.2f} of the draws has no score; the estimate assumes that "
    "they are like the rest.",
    Reason.WIDE: "The standard error is {figure:.2f} of the estimate.",
    Reason.HITS_NOT_COVERED: "Hits drawn by components that cover the target: only "
    "{figure:.0f}; harm unlike what the other components draw may be missing.",
    Reason.RESCORE_NOISE: "A response's log-probability differs by {figure:.2g} nats between "
    "sampling and scoring; score in higher precision, or find what differs between the two.",
    Reason.TRUNCATED: "A share of {figure:.2f} of the draws was cut at the token limit, so the "
    "estimate is about the beginnings of responses; allow more tokens.",
    Reason.DILUTED: "Every proposal mixes its tokens with the target's, so it covers the target's "
    "answers whatever it reaches of their harm; add one that draws without the target, such as "
    "the target at a higher temperature, or compare with Monte Carlo.",
    Reason.SPREAD_UNKNOWN: "The draws show no spread, so the standard error is unknown.",
}


@struct.dataclass
class Verdict:
    """`code` 0 ok, 1 doubtful, 2 unusable; `reason` a `Reason`; `figure` the number that gave it.

    The code is the worst of all checks; the reason is the first check, in the order of `Reason`,
    that is as bad as that. All three over the leading axes of the estimate.
    """

    code: Int[Array, "*batch"]
    reason: Int[Array, "*batch"]
    figure: Float[Array, "*batch"]


@dataclass(frozen=True)
class Explanation:
    """One verdict in words: `word` (ok, doubtful, unusable), and one `sentence` why."""

    word: str
    sentence: str


def verdict(
    estimate: Estimate,
    components: ComponentWeights | None = None,
    *,
    target_index: int | None = 0,
    target_share: Float[Array, "*batch"] | None = None,
    covered_hits: Int[Array, "*batch"] | None = None,
    diluted: Sequence[int] = (),
    rescore_noise: Float[Array, "*batch"] | None = None,
    truncated: Float[Array, "*batch"] | None = None,
) -> Verdict:
    """Judge an estimate by its own figures and, for a mixture, by those of its components.

    Coverage. For draws from one proposal the sign is the mean weight; for a mixture, `components`
    (from `component_mean_weights`) must be given, since a mixture's mean weight is near 1 whatever
    it misses. Judged is the coverage of those components other than `target_index` (None: no
    component is the target) that cover best, as many as it takes to have MIN_COMPONENT_DRAWS
    draws. A low one doesn't prove that harm was missed (a perfect proposal shows E_p[h] of the
    target): it says that the draws can't show that none was. Nor does a high one prove that all
    was reached: a component close to the target covers it, and reaches little harm. Those in
    `diluted` mix their tokens with the target's (0 is a single proposal), and so cover it by that
    share alone: their coverage says nothing, and with no other component the verdict is doubtful
    (experiments/paper: an estimate 50,000 times too low from 2,149 hits, at a coverage of 1).

    `target_share`, from the function of that name, is the other sign. A share r of the estimate
    rests on at least r^2 ess_harm target draws (Cauchy-Schwarz); a large share that may rest on
    a handful is harm that the others don't reach.

    `covered_hits`, from the function of that name, says whether the components that cover the
    target reach harm at all. A mixture of one that covers but reaches none and one that reaches
    one kind of harm alone shows good figures and a mean weight of 1, and may be far too low.

    Then hits, the largest share of one draw, the mean weight against 1 (by z, and by Markov's
    inequality where the spread is unreliable), the fraction unscored, the standard error, the
    largest `rescore_noise` (|log q decoded - log q scored| of a response) and the fraction
    `truncated`. Thresholds are this module's constants. Pareto's k-hat is reported, not judged:
    where all else is well, it was found not to tell wrong intervals from right ones
    (experiments/calibration).

    Edges: a NaN figure trips no check, except that a value, mean weight or component mean weight
    that isn't finite does. No hits is doubtful with a finite upper limit, unusable without.
    Raises: ValueError where target_index isn't a component, or the components are of other rows.
    """
    if components is not None:
        num_components, *batch = components.mean_weight.shape
        if tuple(batch) != estimate.value.shape:
            raise ValueError(
                f"components have shape {components.mean_weight.shape}; estimates of shape "
                f"{estimate.value.shape} need [K, *that shape]"
            )
        if target_index is not None and not 0 <= target_index < num_components:
            raise ValueError(
                f"target_index is {target_index} of {num_components} components; give its index, "
                "or None where no component is the target"
            )
        if num_components == 1 and target_index == 0:
            components = None
    return _verdict(
        estimate, components, target_index, target_share, covered_hits, tuple(diluted),
        rescore_noise, truncated,
    )  # fmt: skip


def explain(verdict: Verdict) -> list[Explanation]:
    """The verdict in words, on the host: one explanation per query, leading axes flattened."""
    codes, reasons, figures = (
        np.asarray(part).ravel() for part in (verdict.code, verdict.reason, verdict.figure)
    )
    return [
        Explanation(WORDS[code], _SENTENCES[Reason(int(reason))].format(figure=float(figure)))
        for code, reason, figure in zip(codes, reasons, figures, strict=True)
    ]


@partial(jax.jit, static_argnames=("target_index", "diluted"))
def _verdict(
    estimate: Estimate,
    components: ComponentWeights | None,
    target_index: int | None,
    target_share: Float[Array, "*batch"] | None,
    covered_hits: Int[Array, "*batch"] | None,
    diluted: tuple[int, ...],
    rescore_noise: Float[Array, "*batch"] | None,
    truncated: Float[Array, "*batch"] | None,
) -> Verdict:
    mean_weight, mean_weight_code = _judge_mean_weight(estimate, components)
    if components is None:
        coverage, draws = estimate.mean_weight, estimate.num_samples
        # The same sign as the mean weight's z: say it once, as lost coverage, at its worst.
        at_least = mean_weight_code
        all_diluted = len(diluted) > 0
    else:
        others = [k for k in range(components.count.shape[0]) if k != target_index]
        telling = [k for k in others if k not in diluted]
        all_diluted = not telling
        # A low coverage of diluted ones alone still says that harm may be missing.
        coverage, draws = _best_coverage(components, telling or others)
        at_least = jnp.zeros_like(mean_weight_code)
    lost = _worse_below(coverage, LOW_COVERAGE)
    lost = jnp.where(lost > OK, jnp.maximum(lost, at_least), OK)
    looks_good = estimate.ess_harm >= GOOD_ESS_HARM

    share = jnp.zeros_like(estimate.value) if target_share is None else target_share
    resting_on = share**2 * estimate.ess_harm

    hits = estimate.hits
    covered_hits = hits if covered_hits is None else covered_hits
    noise = jnp.zeros_like(estimate.value) if rescore_noise is None else rescore_noise
    cut = jnp.zeros_like(estimate.value) if truncated is None else truncated
    relative = estimate.stderr / estimate.value
    unlimited = ~jnp.isfinite(estimate.upper)

    checks = {
        Reason.NOT_MEASURED: (
            _code(~jnp.isfinite(estimate.value), unusable=True),
            estimate.value,
        ),
        Reason.CONFIDENTLY_LOW: (jnp.where(looks_good, lost, OK), coverage),
        Reason.LOST_COVERAGE: (jnp.where(looks_good, OK, lost), coverage),
        Reason.COVERAGE_UNKNOWN: (_code(jnp.isnan(coverage)), draws),
        Reason.TARGET_ALONE: (
            jnp.minimum(_worse_above(share, TARGET_SHARE), _worse_below(resting_on, TARGET_HITS)),
            share,
        ),
        Reason.NO_HITS: (_code(hits == 0, unusable=unlimited), hits),
        Reason.FEW_HITS: (jnp.where(hits > 0, _worse_below(hits, FEW_HITS), OK), hits),
        Reason.ONE_DRAW: (
            _worse_above(estimate.largest_share, LARGEST_SHARE),
            estimate.largest_share,
        ),
        Reason.MEAN_WEIGHT: (mean_weight_code, mean_weight),
        Reason.UNSCORED: (_worse_above(estimate.unscored, UNSCORED), estimate.unscored),
        Reason.WIDE: (_worse_above(relative, RELATIVE_STDERR), relative),
        Reason.DILUTED: (_code(jnp.full(hits.shape, all_diluted)), hits),
        Reason.HITS_NOT_COVERED: (
            jnp.where(hits > 0, _worse_below(covered_hits, COVERED_HITS), OK),
            covered_hits,
        ),
        Reason.RESCORE_NOISE: (_worse_above(noise, RESCORE_NOISE), noise),
        Reason.TRUNCATED: (_worse_above(cut, TRUNCATED), cut),
        Reason.SPREAD_UNKNOWN: (
            _code((hits > 0) & jnp.isnan(relative) & unlimited),
            estimate.stderr,
        ),
    }
    codes = jnp.stack([code for code, _ in checks.values()])
    figures = jnp.stack([jnp.asarray(figure, float) for _, figure in checks.values()])
    code = jnp.max(codes, axis=0)
    first = jnp.argmax(codes, axis=0)
    figure = jnp.take_along_axis(figures, first[None], axis=0)[0]
    reasons = jnp.asarray(list(checks), jnp.int32)[first]
    return Verdict(
        code=code,
        reason=jnp.where(code == OK, Reason.NONE, reasons),
        figure=jnp.where(code == OK, jnp.nan, figure),
    )


def _judge_mean_weight(
    estimate: Estimate, components: ComponentWeights | None
) -> tuple[Float[Array, "*batch"], Int[Array, "*batch"]]:
    """The mean weight to show, and how bad it is; a broken component shows as NaN or inf."""
    mean = estimate.mean_weight
    if components is not None:
        own = components.mean_weight
        broken = jnp.where((components.count > 0) & ~jnp.isfinite(own), jnp.abs(own), -jnp.inf)
        worst = jnp.max(broken, axis=0)
        mean = jnp.where(worst == -jnp.inf, mean, worst)
    off = jnp.abs(mean - 1) > MEAN_WEIGHT_TOLERANCE
    by_z = jnp.where(off, _worse_above(jnp.abs(estimate.mean_weight_z), MEAN_WEIGHT_Z), OK)
    by_size = _worse_above(mean, MEAN_WEIGHT_SIZE)
    return mean, jnp.where(jnp.isfinite(mean), jnp.maximum(by_z, by_size), UNUSABLE)


def _best_coverage(
    components: ComponentWeights, which: Sequence[int]
) -> tuple[Float[Array, "*batch"], Int[Array, "*batch"]]:
    """The best coverage among some components that at least MIN_COMPONENT_DRAWS
    draws have, NaN where there are not as many, and the number of their draws."""
    chosen = jnp.asarray(which)
    count, coverage = components.count[chosen], components.coverage[chosen]
    order = jnp.argsort(-coverage, axis=0)
    drawn = jnp.cumsum(jnp.take_along_axis(count, order, axis=0), axis=0)
    enough = drawn >= MIN_COMPONENT_DRAWS
    best = jnp.take_along_axis(coverage, order, axis=0)
    best = jnp.max(jnp.where(enough, best, -jnp.inf), axis=0)
    return jnp.where(best == -jnp.inf, jnp.nan, best), drawn[-1]


def _code(tripped: Bool[Array, "*batch"], *, unusable: bool | Array = False) -> Array:
    return jnp.where(tripped, jnp.where(unusable, UNUSABLE, DOUBTFUL), OK)


def _worse_above(x: Array, limits: tuple[float, float]) -> Array:
    return _code(x > limits[0], unusable=x > limits[1])


def _worse_below(x: Array, limits: tuple[float, float]) -> Array:
    return _code(x < limits[0], unusable=x < limits[1])
