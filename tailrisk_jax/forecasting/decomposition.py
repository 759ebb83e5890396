"""What the differences between estimates are owed to: queries, kinds, variants, or error."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

_RANK = 1e-6  # eigenvalues of counts below this share of all are float noise


@struct.dataclass
class Decomposition:
    """Variance components, in squared orders of magnitude where estimates are log10 of risks.

    Attributes:
      queries: between base queries.
      kinds: between kinds of variants, the same shift in every query; 0 where there is one kind.
      variants: between variants of one query and kind.
      error: mean square of the standard errors.
    """

    queries: Float[Array, "*batch"]
    kinds: Float[Array, "*batch"]
    variants: Float[Array, "*batch"]
    error: Float[Array, "*batch"]

    @property
    def total(self) -> Float[Array, "*batch"]:
        """Of all four, negative estimates counted as 0."""
        parts = (self.queries, self.kinds, self.variants, self.error)
        return sum(jnp.maximum(part, 0.0) for part in parts)  # pyright: ignore[reportReturnType]


@partial(jax.jit, static_argnames="num_kinds")
def decompose(
    estimates: Float[ArrayLike, "Q M"],
    stderr: Float[ArrayLike, "Q M"],
    *,
    mask: Bool[ArrayLike, "Q M"],
    kinds: Int[ArrayLike, "Q M"] | None = None,
    num_kinds: int = 1,
) -> Decomposition:
    """Components of y_qi = mu + query_q + kind_k(i) + variant_qi + e_qi, e_qi ~ (0, s_qi^2).

    By the method of moments (Henderson's method III): the reductions in the sum of squares owed to
    variants, to kinds beyond queries, and to queries beyond kinds are set equal to their
    expectations, in which the known s^2 enter. Unbiased for any design and any distribution with
    these moments. A component near 0 can come out negative; it is left so.

    Args:
      estimates, stderr: y and s; a row for each base query.
      mask: True where there is an estimate.
      kinds: numbers from 0; None for one kind.
      num_kinds: how many there are.

    Edges: NaN where there is nothing to tell a component by (one query, no query with two
    variants of one kind and the like). Kinds that can't be told from queries are 0.
    Source: Henderson 1953, Biometrics 9; Searle, Casella & McCulloch 1992, Variance Components, 5.
    """
    y, s, kept = jnp.asarray(estimates, float), jnp.asarray(stderr, float), jnp.asarray(mask, bool)
    labels = jnp.zeros(y.shape, int) if kinds is None else jnp.asarray(kinds)
    return _decompose(y, s, kept, labels, num_kinds)


@partial(jax.jit, static_argnames=("num_kinds", "level", "resamples"))
def decomposition_interval(
    key: Key[Array, ""],
    estimates: Float[ArrayLike, "Q M"],
    stderr: Float[ArrayLike, "Q M"],
    *,
    mask: Bool[ArrayLike, "Q M"],
    kinds: Int[ArrayLike, "Q M"] | None = None,
    num_kinds: int = 1,
    level: float = 0.95,
    resamples: int = 1000,
) -> tuple[Decomposition, Decomposition]:
    """Lower and upper limits of `decompose`: percentiles over base queries drawn anew.

    Whole queries are drawn with replacement, with all their variants. Asymptotic in their number:
    with few queries the limits are too near to each other, that of `queries` most.

    Edges: NaN with fewer than 2 queries. Resamples that tell nothing of a component are left out.
    Source: Davison & Hinkley 1997, Bootstrap Methods, 3.8.
    """
    y, s, kept = jnp.asarray(estimates, float), jnp.asarray(stderr, float), jnp.asarray(mask, bool)
    labels = jnp.zeros(y.shape, int) if kinds is None else jnp.asarray(kinds)

    def again(one: Key[Array, ""]) -> Decomposition:
        rows = jax.random.randint(one, (len(y),), 0, len(y))
        return _decompose(y[rows], s[rows], kept[rows], labels[rows], num_kinds)

    drawn = jax.lax.map(again, jax.random.split(key, resamples))
    few = jnp.sum(kept.any(axis=1)) < 2

    def limit(probability: float) -> Decomposition:
        return jax.tree.map(
            lambda x: jnp.where(few, jnp.nan, jnp.nanquantile(x, probability)), drawn
        )

    return limit((1 - level) / 2), limit((1 + level) / 2)


def _decompose(y: Array, s: Array, kept: Array, labels: Array, num_kinds: int) -> Decomposition:
    real = y.dtype
    y, variances = jnp.where(kept, y, 0.0), jnp.where(kept, s, 0.0) ** 2
    per_query = kept.sum(axis=1).astype(real)
    n, num_queries = per_query.sum(), jnp.sum(per_query > 0)
    of_kind = (jax.nn.one_hot(labels, num_kinds, dtype=real)) * kept[..., None]  # [Q, M, K]

    def centred(x: Array) -> Array:  # about each query's mean
        mean = x.sum(axis=1) / jnp.maximum(per_query, 1).reshape(-1, *[1] * (x.ndim - 2))
        return jnp.where(kept.reshape(*kept.shape, *[1] * (x.ndim - 2)), x - mean[:, None], 0.0)

    about_queries = centred(y)
    indicators = centred(of_kind)
    gram = jnp.einsum("qmk,qml->kl", indicators, indicators)
    values, vectors = jnp.linalg.eigh(gram)
    apart = values > _RANK * n
    inverse = (vectors * jnp.where(apart, 1 / jnp.where(apart, values, 1.0), 0.0)) @ vectors.T
    rank = apart.sum()
    moments = jnp.einsum("qmk,qm->k", indicators, about_queries)
    by_kinds = moments @ inverse @ moments
    leverage = jnp.einsum("qmk,kl,qml->qm", indicators, inverse, indicators)

    own = jnp.where(kept, 1 / jnp.maximum(per_query, 1)[:, None], 0.0)
    left = jnp.sum(about_queries**2) - by_kinds
    left_error = jnp.sum((kept - own - leverage) * variances)
    variants = _ratio(left - left_error, n - num_queries - rank)

    kind_excess = by_kinds - variants * rank - jnp.sum(leverage * variances)
    kind = jnp.where(rank > 0, kind_excess / jnp.where(rank > 0, jnp.trace(gram), 1.0), 0.0)

    per_kind = of_kind.sum(axis=(0, 1))
    sums = jnp.einsum("qmk,qm->k", of_kind, y)
    size = jnp.maximum(per_kind, 1)
    about_kinds = jnp.where(kept, y - (of_kind @ (sums / size)), 0.0)
    of_queries = jnp.sum(about_kinds**2) - left
    num_kept_kinds = jnp.sum(per_kind > 0)
    within_kind = jnp.where(kept, of_kind @ (1 / size), 0.0)
    query_error = jnp.sum((own + leverage - within_kind) * variances)
    query_excess = of_queries - variants * (num_queries + rank - num_kept_kinds) - query_error
    crossed = jnp.sum(of_kind.sum(axis=1) ** 2 / size)
    return Decomposition(
        queries=_ratio(query_excess, jnp.where(num_queries > 1, n - crossed, 0.0)),
        kinds=kind,
        variants=variants,
        error=variances.sum() / n,
    )


def _ratio(above: Array, below: Array) -> Array:
    """NaN where there is nothing below; float noise counts as nothing."""
    return jnp.where(below > 1e-6, above / jnp.where(below > 1e-6, below, 1.0), jnp.nan)
