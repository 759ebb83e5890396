"""Exact efficiency of a proposal on an organism, from enumerated harmful responses.

For a response-level weight w = p/q the variance of one draw's w h is M - P^2 with the second moment
M = sum over harmful responses of p^2 / q: a sum, not an estimate. Sampled figures overstate
efficiency most where a proposal misses harm, which is where it matters.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from tailrisk_jax.estimators import mixture_log_prob
from tailrisk_jax.organisms.organism import DATA, Organism
from tailrisk_jax.organisms.persona import PersonaOrganism
from tailrisk_jax.organisms.query import KnownQuery
from tailrisk_jax.policies import Component, Mixture, encode
from tailrisk_jax.rollouts import Draws
from tailrisk_jax.rollouts.score import sequence_log_probs

RESPONSES = DATA / "responses.npz"
"""Of the organism; the persona organism's lie in its own folder, and there harm is the trait."""


@dataclasses.dataclass(frozen=True, eq=False)
class HarmfulResponses:
    """The most probable complete harmful responses to one query.

    Attributes:
      tokens: [M, T], 0 beyond `lengths`; end token included.
      lengths: [M].
      log_p: log-probability under the target, float64 [M].
      omitted: bound on the mass of all other harmful responses.
    """

    tokens: Int[np.ndarray, "M T"]
    lengths: Int[np.ndarray, " M"]
    log_p: Float[np.ndarray, " M"]
    omitted: float


def load_responses(path: Path = RESPONSES) -> dict[str, HarmfulResponses]:
    """The shipped harmful responses by query id; experiments/organism makes them."""
    with np.load(path) as arrays:
        starts = np.cumsum(arrays["counts"])[:-1]
        parts = [np.split(arrays[name], starts) for name in ("tokens", "lengths", "log_p")]
        rows = zip(arrays["ids"], *parts, arrays["omitted"], strict=True)
        return {
            str(name): HarmfulResponses(tokens.astype(np.int32), lengths, log_p, float(omitted))
            for name, tokens, lengths, log_p, omitted in rows
        }


def save_responses(responses: dict[str, HarmfulResponses], path: Path) -> None:
    """Writes what `load_responses` reads; token ids must be below 256."""
    values = list(responses.values())
    np.savez_compressed(
        path,
        ids=np.asarray(list(responses)),
        counts=np.asarray([len(v.lengths) for v in values]),
        omitted=np.asarray([v.omitted for v in values]),
        tokens=np.concatenate([v.tokens for v in values]).astype(np.uint8),
        lengths=np.concatenate([v.lengths for v in values]).astype(np.uint8),
        log_p=np.concatenate([v.log_p for v in values]),
    )


def log_prob_of_responses(
    policy: Component | Mixture,
    organism: Organism | PersonaOrganism,
    queries: Sequence[KnownQuery],
    responses: Sequence[HarmfulResponses],
) -> list[Float[np.ndarray, " M"]]:
    """log q(y) of each query's harmful responses."""
    counts = [len(response.lengths) for response in responses]
    length = organism.max_new_tokens
    tokens = np.zeros((len(queries), max(counts), length), np.int32)
    lengths = np.zeros(tokens.shape[:2], np.int32)  # 0 beyond a query's own: not scored
    for row, (count, response) in enumerate(zip(counts, responses, strict=True)):
        tokens[row, :count], lengths[row, :count] = response.tokens, response.lengths
    mask = np.arange(length) < lengths[..., None]
    draws = Draws(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        ended=jnp.asarray(lengths < length),
        labels=jnp.asarray(np.zeros_like(lengths)),
        drawn_log_probs=jnp.asarray(np.zeros(mask.shape, np.float32)),
        prompts=encode(organism.target.model, queries),
        end_ids=organism.target.model.config.end_ids,
    )
    log_p = np.full(lengths.shape, -np.inf)
    for row, (count, response) in enumerate(zip(counts, responses, strict=True)):
        log_p[row, :count] = response.log_p
    if isinstance(policy, Mixture):
        components, log_alphas = policy.components, policy.log_alphas(len(queries))
    else:
        components, log_alphas = (policy,), np.zeros(1, np.float32)
    # The target's own are known.
    others = [component for component in components if component is not organism.target]
    scored = iter(sequence_log_probs(others, draws) if others else ())
    log_probs = [log_p if own is organism.target else next(scored) for own in components]
    log_q = np.asarray(mixture_log_prob(np.stack(log_probs), log_alphas), np.float64)
    return [row[:count] for row, count in zip(log_q, counts, strict=True)]


def efficiency(
    truth: tuple[float, float],
    responses: HarmfulResponses,
    log_q: Float[np.ndarray, " M"],
    *,
    max_weight: float = np.inf,
) -> tuple[float, float]:
    """Bounds on the equal-error ratio: how many Monte Carlo draws one draw of q is worth.

        (P - P^2) / (M - P^2),   M = sum_harmful p^2 / q

    Args:
      truth: bounds on P.
      responses: the harmful responses; those omitted, of mass m, add between 0 and
        m * max_weight to M.
      log_q: log q of the responses; the proposal's density, for a mixture that of the mixture.
      max_weight: a bound on p/q, 1 / alpha of the target in a defensive mixture.

    Returns: (lower, upper); the lower is 0 without a bound on the weights.
    """
    found = float(np.exp(2 * responses.log_p - log_q).sum())
    omitted = responses.omitted * max_weight if responses.omitted > 0 else 0.0
    lower, upper = truth
    least = (lower - lower**2) / max(found + omitted - lower**2, np.finfo(float).tiny)
    most = (upper - upper**2) / max(found - upper**2, np.finfo(float).tiny)
    return least, most
