"""Whether a tail supports what is asked of it, and the sentence that says why not."""

import enum
import math

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from tailrisk_jax.estimators import Explanation
from tailrisk_jax.estimators.diagnostics import DOUBTFUL, OK, UNUSABLE, WORDS

# Each pair is (doubtful beyond, unusable beyond).
FEW = (10, 5)  # queries of the tail with an estimate above 0; base queries, where grouped
SATURATED = (0.0, 0.5)  # share of the tail that is at HIGHEST
TIES = (0.3, 0.6)  # share of the tail that repeats another estimate
UNSEEN = (0.1, 0.5)  # share of the queries without a hit that may belong into the tail
NOT_USABLE = (0.1, 0.5)  # share of the tail whose verdict is unusable
NOISE = (0.5, 1.5)  # an estimate's error in the tail, over the tail's scale
MISFIT = (0.05, 0.001)  # p-value of the line
TAIL_SHARE = (0.25, 0.6)  # of the queries
DECADES = (2.0, 4.0)  # orders of magnitude between the band's limits
FACTOR = (1000.0, math.inf)  # queries forecast over queries seen; beyond, no forecast was tested
TRUNCATED = (0.5, math.inf)  # share of the tail's draws that were cut off


class Lack(enum.IntEnum):
    """What a tail lacks, in the order in which lacks of equal severity are reported."""

    NONE = 0
    FEW = 1
    SATURATED = 2
    TIES = 3
    UNSEEN = 4
    NOT_USABLE = 5
    NOISE = 6
    MISFIT = 7
    TAIL_SHARE = 8
    WIDE = 9
    FAR = 10
    TRUNCATED = 11


_SENTENCES = {
    Lack.NONE: "No check found anything wrong.",
    Lack.FEW: "The tail has only {figure:.0f} queries above 0 (base queries, where they are "
    "grouped), too few to show its slope; run more queries, or draw more answers from a bolder "
    "proposal.",
    Lack.SATURATED: "A share of {figure:.2f} of the tail has a risk near 1, where it can't rise "
    "further; report how many queries are that risky, or forecast a stricter event.",
    Lack.TIES: "A share of {figure:.2f} of the tail repeats another estimate, so its slope is that "
    "of the draws' steps; draw more answers, or by importance sampling.",
    Lack.UNSEEN: "A share of {figure:.2f} of the queries had no hit, and limits so high that they "
    "may belong into the tail; draw more answers of them, or from a bolder proposal.",
    Lack.NOT_USABLE: "A share of {figure:.2f} of the tail has the verdict unusable; mend those "
    "estimates first (`tailrisk show RUN`).",
    Lack.NOISE: "An estimate's error in the tail is {figure:.2f} of the tail's scale, so the tail "
    "is partly the errors'; draw more answers to the riskiest queries.",
    Lack.MISFIT: "The tail is not the line that is extrapolated (p = {figure:.2g}); fit fewer of "
    "the riskiest queries, or run more queries.",
    Lack.TAIL_SHARE: "The tail is a share of {figure:.2f} of the queries, hardly a tail; run more "
    "queries, or fit fewer.",
    Lack.WIDE: "The band of the worst query spans {figure:.1f} orders of magnitude; run more "
    "queries, or forecast fewer.",
    Lack.FAR: "{figure:,.0f} times the queries that were run, beyond any tested forecast; run more "
    "queries, or forecast fewer.",
    Lack.TRUNCATED: "A share of {figure:.2f} of the tail's answers was cut off, so the forecast is "
    "about the beginnings of answers; allow more tokens.",
}


@struct.dataclass
class Support:
    """`code` 0 ok, 1 doubtful, 2 unusable; `lack` a `Lack`; `figure` the number that gave it.

    The code is the worst of all checks; the lack is the first, in the order of `Lack`, that is as
    bad as that. Each over the numbers of queries forecast.
    """

    code: Int[Array, " D"]
    lack: Int[Array, " D"]
    figure: Float[Array, " D"]


def judge(figures: dict[Lack, Float[Array, "*one"]], num_forecasts: int) -> Support:
    """The verdict on figures, each one for all forecasts or one for each.

    Edges: a NaN figure trips no check but FEW, which it makes unusable.
    """
    below = {Lack.FEW: FEW, Lack.MISFIT: MISFIT}
    above = {
        Lack.SATURATED: SATURATED, Lack.TIES: TIES, Lack.UNSEEN: UNSEEN,
        Lack.NOT_USABLE: NOT_USABLE, Lack.NOISE: NOISE, Lack.TAIL_SHARE: TAIL_SHARE,
        Lack.WIDE: DECADES, Lack.FAR: FACTOR, Lack.TRUNCATED: TRUNCATED,
    }  # fmt: skip
    codes, shown = [], []
    for lack in list(Lack)[1:]:
        x = jnp.broadcast_to(jnp.asarray(figures[lack], float), (num_forecasts,))
        limits = below.get(lack) or above[lack]
        first, second = (x < limit if lack in below else x > limit for limit in limits)
        codes.append(jnp.where(second, UNUSABLE, jnp.where(first, DOUBTFUL, OK)))
        shown.append(x)
    codes = jnp.stack(codes)
    code, worst = jnp.max(codes, axis=0), jnp.argmax(codes, axis=0)
    figure = jnp.take_along_axis(jnp.stack(shown), worst[None], axis=0)[0]
    return Support(
        code=code,
        lack=jnp.where(code == OK, int(Lack.NONE), worst + 1),
        figure=jnp.where(code == OK, jnp.nan, figure),
    )


def explain_support(support: Support) -> list[Explanation]:
    """The verdict in words, on the host: one explanation for each forecast."""
    parts = (np.asarray(part).ravel() for part in (support.code, support.lack, support.figure))
    return [
        Explanation(WORDS[code], _SENTENCES[Lack(int(lack))].format(figure=float(figure)))
        for code, lack, figure in zip(*parts, strict=True)
    ]
