"""A dictionary of windowed proposals: an unsafe policy inside a window of steps, else the target.

Component (u, [a, b)) draws y_t from the target before step a, from the unsafe policy u in the
window and from the target again after it, each given all tokens before, so that

    log q(y) = sum_{t < a} log p_t + sum_{a <= t < b} log u_t + sum_{t >= b} log p_t.

All windows of all unsafe policies follow by cumulative sums from one scoring pass over the
policies themselves. The paper's switch (Angell et al. 2026, arXiv 2604.22167) is a = 0.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from tailrisk_jax.adaptation.segments import prefixes
from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import Component, Policy, window

NUM_STARTS = 11  # of the default grid
LENGTHS = (1, 2, 4, 8)  # of the default grid, in units of its step; and to the end


@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """K windowed proposals; component 0 is the target.

    Attributes:
      experts: the policy in the window, 0 for the target, u for the u-th unsafe policy, [K].
      starts, stops: the window [start, stop) in response steps, [K].
    """

    experts: Int[np.ndarray, " K"]
    starts: Int[np.ndarray, " K"]
    stops: Int[np.ndarray, " K"]

    def __len__(self) -> int:
        return len(self.experts)


def windows(
    num_unsafe: int,
    max_new_tokens: int,
    *,
    starts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> Dictionary:
    """The target, and every unsafe policy in every window of a grid.

    Windows are cut at `max_new_tokens`; those that begin there or later, and those that are the
    same after the cut, are left out.

    Args:
      num_unsafe: U, the number of unsafe policies.
      max_new_tokens: T, where responses are cut.
      starts: first steps; by default 11 from 0 on, ceil(T / 24) apart.
      lengths: window lengths; by default 1, 2, 4 and 8 times that distance, and T.

    Raises:
      InputError: no unsafe policy, no step, a negative start or a length below 1.
    """
    if num_unsafe < 1 or max_new_tokens < 1:
        raise InputError(
            f"windows needs an unsafe policy and a step; it got num_unsafe={num_unsafe} and "
            f"max_new_tokens={max_new_tokens}"
        )
    step = math.ceil(max_new_tokens / 24)
    starts = [step * i for i in range(NUM_STARTS)] if starts is None else list(starts)
    lengths = [*(step * i for i in LENGTHS), max_new_tokens] if lengths is None else list(lengths)
    if min(starts, default=0) < 0 or min(lengths, default=1) < 1:
        raise InputError(f"starts {starts} must be 0 or more, lengths {lengths} 1 or more")
    cut = {
        (a, min(a + length, max_new_tokens))
        for a in starts
        for length in lengths
        if a < max_new_tokens
    }
    rows = [(0, 0, 0)] + [(u, a, b) for u in range(1, num_unsafe + 1) for a, b in sorted(cut)]
    experts, first, last = np.array(rows, np.int32).T
    return Dictionary(experts, first, last)


def components(
    dictionary: Dictionary, target: Policy, unsafe: Sequence[Policy]
) -> tuple[Component, ...]:
    """The components as policies, to draw from and score: parts for `policies.mixture`.

    Raises ValueError unless `unsafe` holds the U policies that the dictionary was made for.
    """
    needed = int(dictionary.experts.max())
    if needed != len(unsafe):
        raise ValueError(
            f"the dictionary has windows of {needed} policies, {len(unsafe)} are given"
        )
    rows = zip(
        dictionary.experts.tolist(),
        dictionary.starts.tolist(),
        dictionary.stops.tolist(),
        strict=True,
    )
    return tuple(
        target if u == 0 else window(unsafe[u - 1], target, start, stop) for u, start, stop in rows
    )


def window_log_probs(
    token_log_probs: Float[ArrayLike, "E *batch N T"], dictionary: Dictionary
) -> Float[Array, "K *batch N"]:
    """log q_k(y) of every component of a dictionary.

    One component is computed at a time, so that beside the result only arrays of the input's size
    exist.

    Args:
      token_log_probs: of the chosen tokens under the target and the E - 1 unsafe policies, 0 where
        masked (`rollouts.token_log_probs` gives this).
      dictionary: the windows. Those beyond a response's end change nothing.

    Edges: -inf where the policy in charge of some step gives its token probability 0.
    Raises: ValueError where the dictionary's experts or steps are not in the array.
    """
    shape = jnp.shape(token_log_probs)
    experts, last = int(dictionary.experts.max()), int(dictionary.stops.max())
    if len(shape) < 3 or shape[0] <= experts or shape[-1] < last:
        raise ValueError(
            f"token_log_probs has shape {shape}; a dictionary with experts up to {experts} and "
            f"windows up to step {last} needs [{experts + 1} or more, ..., N, {last} or more]"
        )
    return _window_log_probs(
        jnp.asarray(token_log_probs, float),
        *map(jnp.asarray, (dictionary.experts, dictionary.starts, dictionary.stops)),
    )


@jax.jit
def _window_log_probs(
    values: Float[Array, "E *batch N T"],
    experts: Int[Array, " K"],
    starts: Int[Array, " K"],
    stops: Int[Array, " K"],
) -> Float[Array, "K *batch N"]:
    steps = prefixes(values)  # [T + 1, E, ..., N]
    target = steps[:, 0]

    def one(component):
        expert, start, stop = component
        inside = steps[stop, expert] - steps[start, expert]
        return (target[start] + inside + target[-1] - target[stop]).log_prob

    return jax.lax.map(one, (experts, starts, stops))
