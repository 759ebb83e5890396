"""Token mixtures by arithmetic: their log-probabilities from those of their experts.

A mixture's weights are constant over stretches of tokens, and mixtures of a dictionary share what
they mix. So each distinct combination of experts and weights is computed once, summed along the
tokens once, and every mixture that uses it somewhere takes differences of these sums.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from tailrisk_jax.policies import Component, LogitPath, TokenMixture

Experts = Mapping[int, Float[np.ndarray, "Q N T"]]  # token log-probs by the identity of the scored


def schedule(component: TokenMixture | LogitPath, length: int) -> Float[np.ndarray, "T K"]:
    """Its weights or coefficients for T tokens; the last row goes on."""
    rows = component.coefficients if isinstance(component, LogitPath) else component.weights
    return np.asarray(rows)[np.minimum(np.arange(length), len(rows) - 1)]


def token_totals(components: Sequence[Component], experts: Experts) -> Float[np.ndarray, "K Q N T"]:
    """log q_k(y_t | x, y_<t) of every token, float32."""
    shape = next(iter(experts.values())).shape
    out = np.empty((len(components), *shape), np.float32)
    for log_probs, places in _stretches(components, experts):
        for k, start, stop in places:
            out[k, ..., start:stop] = log_probs[..., start:stop]
    return out


def sequence_totals(
    components: Sequence[Component], experts: Experts
) -> Float[np.ndarray, "K Q N"]:
    """log q_k(y | x) of every response, summed in float64, as float32."""
    *shape, length = next(iter(experts.values())).shape
    out = np.zeros((len(components), *shape))
    for log_probs, places in _stretches(components, experts):
        sums = None
        for k, start, stop in places:
            if (start, stop) == (0, length):
                out[k] = log_probs.sum(axis=-1, dtype=np.float64)
                continue
            if sums is None:  # [T + 1, Q, N]: before each token, and at the end
                sums = np.zeros((length + 1, *shape))
                np.cumsum(np.moveaxis(log_probs, -1, 0), axis=0, out=sums[1:])
            out[k] += sums[stop] - sums[start]
    return out.astype(np.float32)


def _stretches(
    components: Sequence[Component], experts: Experts
) -> Iterator[tuple[np.ndarray, list[tuple[int, int, int]]]]:
    """Token log-probs of each distinct combination, and (component, start, stop) of its uses."""
    length = next(iter(experts.values())).shape[-1]
    uses: dict[tuple[tuple[int, float], ...], list[tuple[int, int, int]]] = {}
    for k, component in enumerate(components):
        if not isinstance(component, TokenMixture):
            uses.setdefault(((id(component), 1.0),), []).append((k, 0, length))
            continue
        rows = schedule(component, length)
        changes = (np.flatnonzero(np.any(rows[1:] != rows[:-1], axis=1)) + 1).tolist()
        for start, stop in zip([0, *changes], [*changes, length], strict=True):
            pairs = zip(component.experts, rows[start].tolist(), strict=True)
            combination = tuple((id(expert), weight) for expert, weight in pairs if weight > 0)
            uses.setdefault(combination, []).append((k, start, stop))
    for combination, places in uses.items():
        yield _mixed(combination, experts), places


def _mixed(combination: tuple[tuple[int, float], ...], experts: Experts) -> np.ndarray:
    """log sum_k w_k q_k of every token; 0 where all experts have 0 (after the end)."""
    if len(combination) == 1:
        return experts[combination[0][0]]
    total = np.full(experts[combination[0][0]].shape, -np.inf)
    for expert, weight in combination:
        np.logaddexp(total, np.log(weight) + experts[expert], out=total)
    return total.astype(np.float32)
