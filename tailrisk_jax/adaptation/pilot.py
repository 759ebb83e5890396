"""Pilot draws: what the fits of this room learn from."""

import dataclasses

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from tailrisk_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Pilot:
    """Scored draws, with their log-probability under every component that may be chosen.

    For draws from a mixture of just these components, target first, `rollouts.weigh` gives both:
    Pilot(weighed.component_log_probs, weighed.log_q, scores).

    Attributes:
      component_log_probs: log q_k(y), the target as component 0, [K, Q, N].
      log_m: log-density of the whole mixture that the draws come from, not of the one component
        that drew each of them, [Q, N].
      scores: h in [0, 1], NaN where a draw has none or there is no draw, [Q, N].
      scored: how many draws of each query have a score, where not all of them are here; those with
        h > 0 are enough for all fits but `choose`. By default they are counted, [Q].
    """

    component_log_probs: Float[ArrayLike, "K Q N"]
    log_m: Float[ArrayLike, "Q N"]
    scores: Float[ArrayLike, "Q N"]
    scored: Int[ArrayLike, " Q"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Hits:
    """The draws of a pilot with h > 0 and p > 0, padded to H per query; nothing else matters.

    Attributes:
      ratios: q_k / max_k q_k, [Q, H, K].
      log_max: log max_k q_k, [Q, H].
      log_w_h: log(h p / m), -inf where padded, [Q, H].
      log_p_h: log(h p), -inf where padded, [Q, H].
      counts: draws with h > 0 and p > 0, [Q].
      scored: draws with a score, [Q].
    """

    ratios: Float[np.ndarray, "Q H K"]
    log_max: Float[np.ndarray, "Q H"]
    log_w_h: Float[np.ndarray, "Q H"]
    log_p_h: Float[np.ndarray, "Q H"]
    counts: Int[np.ndarray, " Q"]
    scored: Int[np.ndarray, " Q"]


def harmful(pilot: Pilot) -> Hits:
    """The harmful draws of a pilot. H is a power of two, so that few shapes are compiled for.

    Raises:
      InputError: no draw has a score.
      ValueError: shapes that differ, scores outside [0, 1], NaN log-probabilities or infinite
        log_m on a harmful draw.
    """
    log_q = np.asarray(pilot.component_log_probs)
    log_m = np.asarray(pilot.log_m, np.float64)
    scores = np.asarray(pilot.scores, np.float64)
    if log_q.ndim != 3 or not log_q.shape[1:] == log_m.shape == scores.shape:
        raise ValueError(
            f"component_log_probs {log_q.shape}, log_m {log_m.shape} and scores {scores.shape} "
            "must be [K, Q, N], [Q, N] and [Q, N]"
        )
    scored = np.sum(~np.isnan(scores), axis=1) if pilot.scored is None else np.asarray(pilot.scored)
    if not scored.any():
        raise InputError(
            f"none of the {scores.size} pilot draws has a score; check the judge on a few of them"
        )
    if np.any((scores < 0) | (scores > 1)):
        raise ValueError("scores must lie in [0, 1], or be NaN for a draw without one")
    hit = (scores > 0) & (log_q[0] != -np.inf)
    if np.isnan(log_q[:, hit]).any() or not np.isfinite(log_m[hit]).all():
        raise ValueError(
            "a harmful draw has NaN component_log_probs or a log_m that isn't finite; a draw has "
            "positive density under the mixture that drew it"
        )
    chosen, real = first_columns(hit)
    rows = np.arange(len(hit))[:, None]
    log_ratios = np.where(real, log_q[:, rows, chosen], 0.0)
    log_max = log_ratios.max(axis=0)
    log_h = np.log(np.where(real, scores[rows, chosen], 1.0))
    log_p_h = np.where(real, log_ratios[0] + log_h, -np.inf)
    return Hits(
        ratios=np.moveaxis(np.exp(log_ratios - log_max), 0, -1).astype(np.float32),
        log_max=log_max,
        log_w_h=log_p_h - np.where(real, log_m[rows, chosen], 0.0),
        log_p_h=log_p_h,
        counts=hit.sum(axis=1),
        scored=scored,
    )


def first_columns(
    wanted: Bool[np.ndarray, "Q N"],
) -> tuple[Int[np.ndarray, "Q H"], Bool[np.ndarray, "Q H"]]:
    """Columns of the wanted entries of each row, padded with others, and which are not padding."""
    counts = wanted.sum(axis=1)
    size = 1 << int(max(counts.max(), 1) - 1).bit_length()
    order = np.argsort(~wanted, axis=1, kind="stable")[:, :size]
    columns = np.pad(order, [(0, 0), (0, size - order.shape[1])])
    return columns, np.arange(size) < counts[:, None]
