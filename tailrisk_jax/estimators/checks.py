"""Argument checks. Shapes are always checked; values only where they are known.

Under jit and vmap an argument is a tracer without a value, and an array spread over several hosts
cannot be fetched: there the value checks are skipped and the numerical edge cases documented in
each function apply. Every error is one ValueError line: what, which value, and the way out.

Values come back as floats of the default precision: float32, or float64 where x64 is on.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


def _known(x: Any) -> np.ndarray | None:
    """The value of `x` on the host, or None where it has none."""
    if isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def _first(bad: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(bad)[0])


def same_shape(**arrays: Any) -> tuple[int, ...]:
    """Refuse arrays of different shapes, scalars, and an empty last axis; return the shape."""
    shapes = {name: jnp.shape(x) for name, x in arrays.items()}
    first, *rest = shapes.values()
    if any(shape != first for shape in rest):
        named = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ: {named}; give every draw one entry in each array")
    if not first or first[-1] == 0:
        name = next(iter(shapes))
        raise ValueError(f"{name} has shape {first}; its last axis must hold at least one draw")
    return first


def real(values: ArrayLike) -> Array:
    """The values as floats of the default precision."""
    return jnp.asarray(values, float)


def mask(values: ArrayLike | None, scores: ArrayLike) -> Bool[Array, "*batch N"]:
    """Refuse a mask that isn't boolean, or of another shape; return it, all True for None."""
    if values is None:
        return jnp.ones(jnp.shape(scores), bool)
    array = jnp.asarray(values)
    if array.dtype != bool:
        raise ValueError(f"mask has dtype {array.dtype}; give booleans, True where there is a draw")
    same_shape(scores=scores, mask=array)
    return array


def scores(values: ArrayLike, mask: ArrayLike | None = None) -> Float[Array, "*batch N"]:
    """Refuse scores outside [0, 1] (NaN is allowed: unscored); return them as floats."""
    known, known_mask = _known(values), _known(True if mask is None else mask)
    if known is not None and known_mask is not None:
        bad = ((known < 0) | (known > 1)) & known_mask
        if bad.any():
            where = _first(bad)
            raise ValueError(
                f"scores holds {known[where]} at {where}, outside [0, 1]; rescale the judge's "
                "scores, or give NaN for a response it could not score"
            )
    return real(values)


def log_weights(
    values: ArrayLike, scored_by: ArrayLike, mask: ArrayLike | None = None
) -> Float[Array, "*batch N"]:
    """Refuse NaN log-weights on draws that have a score; return log-weights as floats."""
    known, known_scores = _known(values), _known(scored_by)
    known_mask = _known(True if mask is None else mask)
    if known is not None and known_scores is not None and known_mask is not None:
        bad = np.isnan(known) & ~np.isnan(known_scores) & known_mask
        if bad.any():
            raise ValueError(
                f"log_weights holds NaN at {_first(bad)}, a draw that has a score; a draw has "
                "log q > -inf under what drew it, so check log p and log q there"
            )
    return real(values)


def draws(
    h: ArrayLike, log_w: ArrayLike, kept: ArrayLike | None
) -> tuple[Array, Array, Bool[Array, "*batch N"]]:
    """Scores, log-weights and mask of one set of draws, each checked."""
    same_shape(scores=h, log_weights=log_w)
    kept = mask(kept, h)
    log_w = log_weights(log_w, h, kept)
    return scores(h, kept), log_w, kept


def labels(values: ArrayLike, num_components: int | None) -> Array:
    """Refuse labels that aren't integers in [0, num_components); return them."""
    array = jnp.asarray(values)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"labels has dtype {array.dtype}; give the integer index of a component")
    known = _known(values)
    if known is not None and num_components is not None:
        bad = (known < 0) | (known >= num_components)
        if bad.any():
            where = _first(bad)
            raise ValueError(
                f"labels holds {known[where]} at {where}; components are numbered 0 to "
                f"{num_components - 1}"
            )
    return array


def log_alphas(
    values: ArrayLike, num_components: int, batch: tuple[int, ...] = ()
) -> Float[Array, "*batch K"]:
    """Refuse mixture weights of another shape, or that do not sum to 1; return [*batch, K]."""
    shape = (*batch, num_components)
    if jnp.shape(values) not in ((num_components,), shape):
        own = f", or {shape} for weights of their own" if batch else ""
        raise ValueError(
            f"log_alphas has shape {jnp.shape(values)}; {num_components} components need "
            f"shape ({num_components},){own}"
        )
    known = _known(values)
    if known is not None:
        total = np.exp(known.astype(np.float64)).sum(axis=-1)
        bad = ~(abs(total - 1) < 1e-3)
        if bad.any():
            raise ValueError(
                f"log_alphas: the mixture weights sum to {total[bad][0]:.6g}, not 1; "
                "subtract logsumexp(log_alphas)"
            )
    return jnp.broadcast_to(real(values), shape)


def level(value: float) -> float:
    """Refuse a confidence level outside (0, 1); return it as a Python float (static under jit)."""
    if not 0 < value < 1:
        raise ValueError(f"level is {value}; give one number between 0 and 1, such as 0.95")
    return float(value)


def counts(hits: ArrayLike, num_samples: ArrayLike) -> None:
    """Refuse hits outside [0, num_samples]."""
    known_hits, known_num = _known(hits), _known(num_samples)
    if known_hits is not None and known_num is not None:
        pairs = np.broadcast_arrays(known_hits, known_num)
        bad = (pairs[0] < 0) | (pairs[0] > pairs[1])
        if bad.any():
            where = _first(bad)
            raise ValueError(
                f"hits is {pairs[0][where]} of num_samples {pairs[1][where]}; "
                "hits must lie between 0 and num_samples"
            )


def bound(log_bound: ArrayLike, log_x: ArrayLike) -> Float[Array, "*batch"]:
    """Refuse a bound of another shape, or that some log(w h) exceeds; return [*batch]."""
    batch = jnp.shape(log_x)[:-1]
    if jnp.shape(log_bound) not in ((), batch):
        own = f", or {batch}" if batch else ""
        raise ValueError(f"log_bound has shape {jnp.shape(log_bound)}; give one number{own}")
    known, known_x = _known(log_bound), _known(log_x)
    if known is not None and known_x is not None:
        known = np.broadcast_to(known[..., None], known_x.shape)
        bad = known_x > known + 1e-3
        if bad.any():
            where = _first(bad)
            raise ValueError(
                f"log(w h) is {known_x[where]:.6g} at {where}, above log_bound {known[where]:.6g}; "
                "give the log of a bound that no weight can exceed"
            )
    return jnp.broadcast_to(real(log_bound), batch)


def not_negative(name: str, values: ArrayLike) -> None:
    """Refuse negative values and NaN."""
    known = _known(values)
    if known is not None:
        bad = ~(known >= 0)
        if bad.any():
            where = _first(bad)
            raise ValueError(f"{name} holds {known[where]} at {where}; give numbers of 0 or more")
