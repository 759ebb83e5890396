"""Policies made of several, token by token: arithmetic mixtures, switches, windows, logit paths.

Their experts run side by side on the same response. Both kinds have a schedule [S, K]: row t
belongs to token t of the response, and the last row to all tokens after it.
"""

from collections.abc import Sequence

import numpy as np
from flax import struct
from jaxtyping import Float

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies.policy import Policy, check_comparable


@struct.dataclass
class TokenMixture:
    """q(y_t | y_<t) = sum_k w_tk q_k(y_t | y_<t).

    Attributes:
      experts: the K policies.
      weights: w, [S, K], each row summing to 1.
    """

    experts: tuple[Policy, ...]
    weights: Float[np.ndarray, "S K"]


@struct.dataclass
class LogitPath:
    """log q(y_t | y_<t) = sum_k c_tk log q_k(y_t | y_<t), normalised over the vocabulary.

    Attributes:
      experts: the K policies.
      coefficients: c, [S, K], of any sign and sum.
    """

    experts: tuple[Policy, ...]
    coefficients: Float[np.ndarray, "S K"]


Component = Policy | TokenMixture | LogitPath
"""What a mixture is made of."""


def token_mixture(
    experts: Sequence[Policy], weights: Sequence[float] | Sequence[Sequence[float]]
) -> TokenMixture:
    """Draws every token from one of K policies: q(y_t | y_<t) = sum_k w_tk q_k(y_t | y_<t).

    Drawn in lock-step; scored from the chosen tokens' log-probabilities under each expert.

    Args:
      experts: K policies.
      weights: w, [S, K], or [K] for all tokens; row t is that of token t, the last that of all
        later ones. An expert with weight 1 is that policy exactly, for these tokens.

    Raises:
      InputError: weights that are negative or don't sum to 1 (within 1e-6), another shape, no
        experts, experts over different vocabularies or end tokens or that aren't policies.
    """
    experts, rows = _schedule(experts, weights, "weights")
    if not np.all(rows >= 0) or np.any(np.abs(rows.sum(axis=1) - 1) > 1e-6):
        raise InputError(
            f"token mixture weights {rows.tolist()} must be at least 0, each row summing to 1"
        )
    return TokenMixture(experts, rows / rows.sum(axis=1, keepdims=True))


def switch(unsafe: Policy, target: Policy, step: int, bias: float = 1.0) -> TokenMixture:
    """bias unsafe + (1 - bias) target for the first `step` tokens, then the target alone.

    The proposal of Angell et al. 2026 (arXiv 2604.22167).

    Args:
      step: 0 is the target exactly; beyond the response's length the target never takes over.
      bias: in [0, 1]; 0 is the target exactly.

    Raises:
      InputError: a negative step, a bias outside [0, 1], what `token_mixture` refuses.
    """
    if not 0 <= bias <= 1:
        raise InputError(f"switch has bias={bias!r}; give a number between 0 and 1")
    if step < 0:
        raise InputError(f"switch has step={step}; give 0 or more")
    step = _within(step, unsafe)
    return token_mixture([unsafe, target], [[bias, 1 - bias]] * step + [[0.0, 1.0]])


def window(unsafe: Policy, target: Policy, start: int, stop: int) -> TokenMixture:
    """The unsafe policy draws tokens start to stop - 1, the target all others.

    Args:
      start, stop: an empty window (start = stop) is the target exactly.

    Raises:
      InputError: unless 0 <= start <= stop; what `token_mixture` refuses.
    """
    if not 0 <= start <= stop:
        raise InputError(f"window {start}-{stop} must begin at 0 or later and not end before that")
    start, stop = _within(start, unsafe), _within(stop, unsafe)
    rows = [[0.0, 1.0]] * start + [[1.0, 0.0]] * (stop - start) + [[0.0, 1.0]]
    return token_mixture([unsafe, target], rows)


def is_diluted(component: Component, target: Policy) -> bool:
    """Whether a policy mixes its tokens with the target's: at some step both may draw.

    Such a policy gives the target's answers much of their probability, whatever it reaches of the
    target's harm; a window or a whole switch does not, and no policy of one expert.
    """
    if not isinstance(component, TokenMixture):
        return False
    of_target = [expert is target for expert in component.experts]
    weights = np.asarray(component.weights)
    share = weights[:, of_target].sum(axis=1)
    return bool(np.any((share > 0) & (share < 1)))


def logit_path(
    experts: Sequence[Policy], coefficients: Sequence[float] | Sequence[Sequence[float]]
) -> LogitPath:
    """q(y_t | y_<t) proportional to prod_k q_k(y_t | y_<t)^c_tk: a geometric mixture.

    With experts (unsafe, target) and coefficients (a, 1 - a) it runs from the target (a = 0,
    exactly) to the unsafe policy (a = 1, exactly), and on beyond it. Each expert's temperature is
    applied first.

    Args:
      experts: K policies.
      coefficients: c, [S, K], or [K] for all tokens, as the weights of `token_mixture`.

    Raises:
      InputError: coefficients that aren't finite or of another shape; experts as in
        `token_mixture`.
    """
    return LogitPath(*_schedule(experts, coefficients, "coefficients"))


def _within(step: int, policy: Policy) -> int:
    """No response is longer than the model has positions, so no schedule needs to be."""
    return min(step, policy.model.config.max_positions)


def _schedule(
    experts: Sequence[Policy], values: Sequence, name: str
) -> tuple[tuple[Policy, ...], Float[np.ndarray, "S K"]]:
    for expert in experts:
        if not isinstance(expert, Policy):
            raise InputError(
                f"an expert is a {type(expert).__name__}; mix the policies that it is made of"
            )
    rows = np.atleast_2d(np.asarray(values, np.float64))
    if not experts or rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != len(experts):
        raise InputError(
            f"there are {len(experts)} experts and {name} of shape {list(np.shape(values))}; "
            "give one for each expert, [K], or for each token and expert, [S, K]"
        )
    if not np.all(np.isfinite(rows)):
        raise InputError(f"{name} {rows.tolist()} must be finite")
    check_comparable(experts)
    return tuple(experts), rows
