"""A proposal learned by iterated cross-entropy: the arithmetic of a round.

Each round draws from a mixture m of the target, the proposal that learning starts from and the
latest adapter, and moves the adapter towards p h / P by the responses with h > 0, of this round
and of those before (De Boer et al. 2005, doi 10.1007/s10479-005-5724-z). Their weight is p / m with
m the balance heuristic over all rounds (Cornuet et al. 2012, arXiv 0907.1254): biased, since later
rounds depend on earlier ones, which is no matter for training. What an adapter is worth is
estimated on draws of the next round, which it has not seen.

What is learned can't be better than the draws: harm that they never reach stays out of reach, and
is left to the target's share of the proposal.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from tailrisk_jax.adaptation.pilot import first_columns
from tailrisk_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of a round's draws, and of the proposal that is learned.

    Attributes:
      target: of the target, in every round and in the proposal in the end.
      start: of the proposal that learning starts from, once there is an adapter; until then it has
        all but the target's.
    """

    target: float = 0.1
    start: float = 0.3

    def __post_init__(self):
        if not (self.target > 0 and self.start >= 0 and self.target + self.start < 1):
            raise InputError(
                f"target share {self.target} must be above 0, start share {self.start} 0 or more, "
                "and both together leave some for the adapter; give e.g. 0.1 and 0.3"
            )

    def of_round(
        self, number: int, start_weights: Float[ArrayLike, " K"]
    ) -> Float[np.ndarray, " C"]:
        """Of the target, the K components of the start, and the adapters learned before a round.

        There is one adapter for each earlier round, and only the last has a share.
        """
        weights = np.asarray(start_weights, np.float64)
        if number == 0:
            return np.array([self.target, *(1 - self.target) * weights])
        adapters = np.zeros(number)
        adapters[-1] = 1 - self.target - self.start
        return np.array([self.target, *self.start * weights, *adapters])


@dataclasses.dataclass(frozen=True, eq=False)
class Harmful:
    """The responses with h > 0, H per query, filled up with empty ones of score 0.

    Attributes:
      tokens, mask: [Q, H, T].
      scores: h, [Q, H].
      drawn: how many responses were drawn and scored, [Q].
    """

    tokens: Int[np.ndarray, "Q H T"]
    mask: Bool[np.ndarray, "Q H T"]
    scores: Float[np.ndarray, "Q H"]
    drawn: Int[np.ndarray, " Q"]


def harmful_responses(
    tokens: Int[ArrayLike, "Q N T"], mask: Bool[ArrayLike, "Q N T"], scores: Float[ArrayLike, "Q N"]
) -> Harmful:
    """Those with a score above 0; NaN is unscored, and not counted as drawn."""
    scores = np.asarray(scores, np.float64)
    chosen, real = first_columns(scores > 0)
    rows = np.arange(len(scores))[:, None]
    mask = np.asarray(mask)[rows, chosen] & real[..., None]
    return Harmful(
        np.where(mask, np.asarray(tokens)[rows, chosen], 0).astype(np.int32),
        mask,
        np.where(real, scores[rows, chosen], 0.0).astype(np.float32),
        np.sum(~np.isnan(scores), axis=1).astype(np.int32),
    )


def joined(rounds: Sequence[Harmful]) -> Harmful:
    """Those of several rounds, side by side."""
    tokens, mask, scores = (
        np.concatenate([getattr(one, name) for one in rounds], axis=1)
        for name in ("tokens", "mask", "scores")
    )
    return Harmful(tokens, mask, scores, np.sum([one.drawn for one in rounds], axis=0))


def log_mixture(
    log_q: Float[np.ndarray, "K Q H"], shares: Float[np.ndarray, " K"]
) -> Float[np.ndarray, "Q H"]:
    """log sum_k share_k q_k, in float64; shares may be 0."""
    used = shares > 0
    log_shares = np.log(shares[used])[:, None, None]
    return np.logaddexp.reduce(np.asarray(log_q, np.float64)[used] + log_shares, axis=0)


def log_balance(
    log_q: Float[np.ndarray, "K Q H"],
    rounds: Sequence[Float[np.ndarray, " K"]],
    drawn: Int[np.ndarray, "R Q"],
) -> Float[np.ndarray, "Q H"]:
    """log sum_r (n_r / n) m_r: the density of the draws of all rounds taken together.

    Args:
      rounds: the shares of each round; those of later adapters may be left out.
      drawn: n_r.
    """
    parts = []
    for shares, count in zip(rounds, drawn, strict=True):
        with np.errstate(divide="ignore"):
            share = np.log(count / np.maximum(drawn.sum(axis=0), 1))[:, None]
        parts.append(log_mixture(log_q[: len(shares)], shares) + share)
    return np.logaddexp.reduce(parts, axis=0)


def log_contributions(
    log_p: Float[np.ndarray, "Q H"], log_m: Float[np.ndarray, "Q H"], scores: ArrayLike
) -> Float[np.ndarray, "Q H"]:
    """log(h p / m), -inf where h is 0."""
    hit = np.asarray(scores) > 0
    log_h = np.log(np.where(hit, scores, 1.0), dtype=np.float64)
    return np.where(hit, log_p + log_h - np.where(hit, log_m, 0.0), -np.inf)


def coefficients(log_terms: Float[np.ndarray, "Q H"]) -> Float[np.ndarray, "Q H"]:
    """exp(log_terms), so that each query with any sums to the same, and all of them to 1."""
    largest = log_terms.max(axis=1, keepdims=True)
    seen = largest > -np.inf
    terms = np.exp(log_terms - np.where(seen, largest, 0.0))
    return terms / np.where(seen, terms.sum(axis=1, keepdims=True), 1.0) / max(seen.sum(), 1)


def effective_hits(log_terms: Float[np.ndarray, "Q H"]) -> Float[np.ndarray, " Q"]:
    """(sum w h)^2 / sum (w h)^2; 0 without a hit."""
    whole = coefficients(log_terms)
    squares = np.square(whole).sum(axis=1)
    return np.divide(
        np.square(whole.sum(axis=1)), squares, out=np.zeros(len(whole)), where=squares > 0
    )


def divergences(
    log_terms: Float[np.ndarray, "Q H"],
    log_p_h: Float[np.ndarray, "Q H"],
    log_q: Float[np.ndarray, "K Q H"],
    drawn: Int[np.ndarray, " Q"],
) -> Float[np.ndarray, "K Q"]:
    """Estimates of KL(p h / P || q_k), in nats; NaN for queries without a hit.

    Consistent where the draws don't depend on q_k: self-normalised weights and the estimate of P
    are those of the same draws. Differences between two q_k don't need P, and are far less noisy.

    Args:
      log_terms: log(h p / m), -inf where h is 0.
      log_p_h: log(h p).
      log_q: of the proposals that are judged.
      drawn: responses that log_terms are the hits of.
    """
    hit = log_terms > -np.inf
    log_total = np.logaddexp.reduce(log_terms, axis=1)
    seen = hit.any(axis=1)
    own = np.where(seen, log_total, 0.0)[:, None]
    weights = np.where(hit, np.exp(log_terms - own), 0.0)
    ratios = np.where(hit, log_p_h - log_q, 0.0)
    log_risk = log_total - np.log(np.maximum(drawn, 1))
    return np.where(seen, (weights * ratios).sum(axis=-1) - log_risk, np.nan)
