"""Exact efficiencies: sum over harmful responses of p^2 / q, with what is not enumerated bounded.

Three figures for each query. The enumerated responses alone give an upper one; counting everything
omitted at the largest weight a mixture with a target share can have gives a lower one; and the
middle one adds an unbiased estimate of what was omitted, from harmful draws of the uniform
dictionary that are not among the enumerated. Such a draw y adds p(y)^2 / (N m(y) q(y)), m its
mixture.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from rows import Rows, saved, score, stack
from setting import TARGET_SHARE, Setting

from tailrisk_jax.adaptation import window_log_probs
from tailrisk_jax.organisms.efficiency import HarmfulResponses, efficiency

CAP = 512  # enumerated responses per query, of up to 2,592: those beyond hold at most 1.2%


@dataclasses.dataclass(frozen=True, eq=False)
class Harm:
    """Harmful responses to all queries, enumerated ones first, scored under every policy.

    Attributes:
      setting: what they were scored under.
      found: the enumerated ones, by query.
      rows: all of them, M.
      token_log_probs: by policy, [M, T].
      log_p: under the target; the stored float64 one where enumerated, [M].
      log_mass: log_p where enumerated, and log(p / (N m)) of a checking draw, [M].
      enumerated: [M].
      windows: log q_k of the dictionary, [K, M].
    """

    setting: Setting
    found: list[HarmfulResponses]
    rows: Rows
    token_log_probs: dict[str, np.ndarray]
    log_p: np.ndarray
    log_mass: np.ndarray
    enumerated: np.ndarray
    windows: np.ndarray

    def log_q(self, name: str) -> np.ndarray:
        """Of a policy."""
        return self.token_log_probs[name].sum(axis=-1, dtype=np.float64)

    def sum_by_query(self, values: np.ndarray) -> np.ndarray:
        """[Q]."""
        return np.bincount(self.rows.query, values, minlength=len(self.found))

    def omitted_estimate(self) -> np.ndarray:
        """Estimated mass of the harm that is not enumerated, [Q]."""
        return self.sum_by_query(np.where(self.enumerated, 0.0, np.exp(self.log_mass)))


def gather(
    setting: Setting,
    responses: dict[str, HarmfulResponses],
    check: Rows,
    check_weights: np.ndarray,
    check_count: int,
    path: Path,
) -> Harm:
    """Scores the enumerated responses, and the checking draws that are not among them.

    Args:
      check: harmful draws of the dictionary with `check_weights`, of N = `check_count` per query.
      path: where scores are kept.
    """
    found = [most_probable(responses[query.id]) for query in setting.organism.forbidden]
    known = Rows(
        np.repeat(np.arange(len(found)), [len(one.lengths) for one in found]),
        np.concatenate([one.tokens for one in found]).astype(np.int32),
        np.concatenate([one.lengths for one in found]).astype(np.int32),
    )
    seen = set(known.identities())
    new = np.array([key not in seen for key in check.identities()], bool)
    extra = Rows(check.query[new], check.tokens[new], check.lengths[new])
    rows = stack([known, extra])
    scored = score_once(setting, rows, path)
    by_name = dict(zip(setting.policies, scored, strict=True))
    windows = dictionary_log_probs(setting, by_name)
    enumerated = np.arange(len(rows)) < len(known)
    own = by_name["target"].sum(axis=-1, dtype=np.float64)
    log_p = np.where(enumerated, np.pad(np.concatenate([f.log_p for f in found]),
                                        (0, len(extra))), own)  # fmt: skip
    log_m = mixed(windows, check_weights)
    log_mass = np.where(enumerated, log_p, log_p - log_m - np.log(check_count))
    return Harm(setting, found, rows, by_name, log_p, log_mass, enumerated, windows)


def most_probable(responses: HarmfulResponses) -> HarmfulResponses:
    """At most `CAP` of them; the others are counted as omitted."""
    log_p = responses.log_p
    return HarmfulResponses(
        responses.tokens[:CAP],
        responses.lengths[:CAP],
        log_p[:CAP],
        responses.omitted + float(np.exp(log_p[CAP:]).sum()),
    )


def score_once(setting: Setting, rows: Rows, path: Path) -> np.ndarray:
    """Under every policy, [E, M, T]; kept in a file."""
    policies = list(setting.policies.values())
    end_ids = setting.organism.target.model.config.end_ids
    return saved(path, lambda: {"all": score(policies, setting.prompts, end_ids, rows)})["all"]


def dictionary_log_probs(setting: Setting, token_log_probs: dict[str, np.ndarray]) -> np.ndarray:
    """log q_k of the windows, [K, M]."""
    experts = np.stack([token_log_probs[name] for name in ("target", *setting.parts)])
    return np.asarray(window_log_probs(experts, setting.dictionary), np.float32)


def mixed(log_q: np.ndarray, weights: np.ndarray, query: np.ndarray | None = None) -> np.ndarray:
    """log sum_k alpha_k q_k of each row; the weights [K], or [Q, K] with each row's query."""
    top = log_q.max(axis=0)
    ratios = np.exp(log_q - top)
    if query is None:
        total = np.einsum("km,k->m", ratios, weights)
    else:
        total = np.empty(len(top))
        for q in np.unique(query):
            total[query == q] = weights[q] @ ratios[:, query == q]
    return top.astype(np.float64) + np.log(total)


def with_target(harm: Harm, log_q: np.ndarray) -> np.ndarray:
    """A proposal with 10% target beside it."""
    return np.logaddexp(np.log(TARGET_SHARE) + harm.log_p, np.log1p(-TARGET_SHARE) + log_q)


@dataclasses.dataclass(frozen=True, eq=False)
class Ratios:
    """Equal-error ratios against Monte Carlo, per query: `lower` <= truth <= `upper`, `middle`
    with what was omitted estimated, and `cautious` with two standard errors more of it."""

    lower: np.ndarray
    cautious: np.ndarray
    middle: np.ndarray
    upper: np.ndarray


def ratios(harm: Harm, log_q: np.ndarray, *, max_weight: float = 1 / TARGET_SHARE) -> Ratios:
    """Of a proposal whose log-density is given, the whole mixture's.

    The two between never leave [lower, upper].
    """
    terms = np.exp(harm.log_mass + harm.log_p - log_q)
    second = harm.sum_by_query(terms)
    mass = harm.sum_by_query(np.exp(harm.log_mass))
    error = np.sqrt(harm.sum_by_query(np.where(harm.enumerated, 0.0, terms**2)))
    bounds, between = [], []
    for q, query in enumerate(harm.setting.organism.forbidden):
        own = harm.enumerated & (harm.rows.query == q)
        low, high = efficiency(
            (query.lower, query.upper), harm.found[q], log_q[own], max_weight=max_weight
        )
        p = np.clip(mass[q], query.lower, query.upper)
        bounds.append((low, high))
        moments = np.array([second[q] + 2 * error[q], second[q]])
        between.append(np.clip((p - p**2) / np.maximum(moments - p**2, 1e-300), low, high))
    return Ratios(*np.array(bounds).T[:1], *np.array(between).T, *np.array(bounds).T[1:])


def switched(harm: Harm, name: str, step: int, bias: float = 1.0) -> np.ndarray:
    """log q of bias u + (1 - bias) p for `step` tokens, then the target."""
    unsafe, target = harm.token_log_probs[name], harm.token_log_probs["target"]
    with np.errstate(divide="ignore"):
        both = np.logaddexp(np.log(bias) + unsafe[:, :step], np.log1p(-bias) + target[:, :step])
    both = np.where(np.arange(step) < harm.rows.lengths[:, None], both, 0.0)
    return both.sum(axis=-1, dtype=np.float64) + target[:, step:].sum(axis=-1, dtype=np.float64)
