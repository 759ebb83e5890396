"""What is known of each query's risk: an estimate and its own error, on the log scale."""

from statistics import NormalDist
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from tailrisk_jax.errors import InputError

UNKNOWN_ERROR = 1.0  # the relative standard error of a single hit among any number of draws
LARGEST_ERROR = 2.0  # in nats; a wider one says no more than that nothing is known


@struct.dataclass
class QueryRisks:
    """The estimates of M queries; made by `query_risks`.

    Arrays of the host, in float64, as `in_float64` takes them.

    Attributes:
      log_p: log of the estimate; -inf where it is 0, NaN where there is none.
      below, above: its standard error to either side, in nats.
      limit: log of its upper limit, inf where none is known.
      verdict: 0 ok, 1 doubtful, 2 unusable.
      truncated: share of the draws that were cut off.
    """

    log_p: Float[Array, " M"]
    below: Float[Array, " M"]
    above: Float[Array, " M"]
    limit: Float[Array, " M"]
    verdict: Int[Array, " M"]
    truncated: Float[Array, " M"]


def query_risks(
    value: Float[ArrayLike, " M"],
    *,
    stderr: Float[ArrayLike, " M"] | None = None,
    lower: Float[ArrayLike, " M"] | None = None,
    upper: Float[ArrayLike, " M"] | None = None,
    level: float = 0.95,
    verdict: Int[ArrayLike, " M"] | None = None,
    truncated: Float[ArrayLike, " M"] | None = None,
) -> QueryRisks:
    """Estimates with their errors; without stderr and limits they are exact.

    The error is normal on the log scale, with a standard deviation for each side. By the limits
    it is log(value / lower) / z below and log(upper / value) / z above, with z = Phi^-1((1 +
    level) / 2); where a limit is 0 or infinite, stderr / value, and where that is unknown
    UNKNOWN_ERROR; never above LARGEST_ERROR. Estimates of 0 have none: see `Support`.

    Raises: InputError where a value is negative, level is not in (0, 1), or shapes aren't [M].
    """
    value = np.asarray(value, float)
    columns = {"stderr": stderr, "lower": lower, "upper": upper, "verdict": verdict,
               "truncated": truncated}  # fmt: skip
    for name, column in {"value": value, **columns}.items():
        if column is not None and (np.ndim(column) != 1 or np.shape(column) != value.shape):
            raise InputError(
                f"{name} has shape {np.shape(column)}; give one number for each query, "
                f"{value.shape[:1]} as value has"
            )
    if np.any(value < 0):
        raise InputError(f"an estimate is {value[value < 0][0]}; a risk lies in [0, 1]")
    if not 0 < level < 1:
        raise InputError(f"level is {level}; give one between 0 and 1, such as 0.95")
    z = NormalDist().inv_cdf((1 + level) / 2)
    size = value.shape
    exact = stderr is None and lower is None and upper is None
    spread, low, high = (
        np.full(size, missing) if given is None else np.asarray(given, float)
        for given, missing in ((stderr, np.nan), (lower, 0.0), (upper, np.inf))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = np.log(value)
        relative = spread / value
        relative = np.where(np.isfinite(relative) & (relative > 0), relative, UNKNOWN_ERROR)
        limit = np.log(high)
        sides = (log_p - np.log(low)) / z, (limit - log_p) / z
    below, above = (
        np.clip(np.where(np.isfinite(side), side, relative), 0.0, LARGEST_ERROR) for side in sides
    )
    known = value > 0
    if exact:
        below = above = np.zeros(size)
        limit = np.where(value > 0, log_p, -np.inf)
    arrays: dict[str, Any] = {
        "log_p": log_p,
        "below": np.where(known, below, 0.0),
        "above": np.where(known, above, 0.0),
        "limit": limit,
        "verdict": np.zeros(size, int) if verdict is None else np.asarray(verdict, int),
        "truncated": np.zeros(size) if truncated is None else np.asarray(truncated, float),
    }
    return QueryRisks(**arrays)


def with_error(
    log_p: Float[Array, "*batch"],
    below: Float[Array, "*batch"],
    above: Float[Array, "*batch"],
    normal: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """log p as it might have been estimated; `normal` is a standard normal draw."""
    return jnp.minimum(log_p + jnp.where(normal < 0, below, above) * normal, 0.0)


def rows_of(groups: Int[ArrayLike, " M"] | None, num_queries: int) -> Int[np.ndarray, "G S"]:
    """The queries of each base query, filled up with -1; without groups each is its own.

    Raises: InputError where groups are of another length.
    """
    if groups is None:
        return np.arange(num_queries)[:, None]
    groups = np.asarray(groups)
    if groups.shape != (num_queries,):
        raise InputError(
            f"groups have shape {groups.shape} for {num_queries} queries; give each query one"
        )
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    place = np.arange(num_queries) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = np.full((len(sizes), sizes.max()), -1)
    rows[group[order], place] = order
    return rows
