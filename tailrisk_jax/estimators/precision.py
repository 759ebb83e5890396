"""Float64 on the host, for the last sums of a study."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def in_float64(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """function(*args, **options) in float64 on the CPU, its arrays returned as numpy arrays.

    Every function of this package computes in the default precision, float32 unless x64 is on.
    This turns x64 on for one call, on whatever device the arrays are:

        in_float64(importance, scores, log_weights, level=0.9)

    Random keys pass as they are. Functions compile once for each precision.
    """

    def host(leaf: Any) -> Any:
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf if is_key or not hasattr(leaf, "dtype") else np.asarray(leaf)

    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        out = function(*jax.tree.map(host, args), **jax.tree.map(host, options))
        return jax.tree.map(host, out)
