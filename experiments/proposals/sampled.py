"""What samples say: errors, intervals, effective sizes and verdicts, beside the exact figures.

Two ways of drawing. *Drawn*: real draws through the engine, cut into repeats: of 100 for all
queries, of 500 and 2,000 for ten.
*From the leaves*: draws of the enumerated harmful responses with their exact probabilities under
the proposal, and of nothing (h = 0) with the rest; cheap, for all queries, and the truth is then
the enumerated mass to the last digit. It has no verdict: that needs the weights of harmless draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exact import Harm
from setting import Setting

from tailrisk_jax.estimators import MixtureDraws, importance, in_float64, pareto_k, report
from tailrisk_jax.policies import Mixture
from tailrisk_jax.rollouts import draw, weigh

SIZES = (100, 500, 2000)


def chosen_queries(setting: Setting) -> list[int]:
    """Two of each decade: the median of those where harm is mostly drift, and of the others."""
    queries = setting.organism.forbidden
    out = []
    for decade in sorted({q.decade for q in queries}, reverse=True):  # pyright: ignore
        for drift in (False, True):
            own = [i for i, q in enumerate(queries)
                   if q.decade == decade and ((q.drift_share or 0) > 0.5) == drift]  # fmt: skip
            out.append(own[len(own) // 2])
    return out


def from_leaves(
    harm: Harm, name: str, log_q: np.ndarray, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each query and N."""
    rng = np.random.default_rng(seed)
    rows = []
    for q, query in enumerate(harm.setting.organism.forbidden):
        own = np.flatnonzero(harm.enumerated & (harm.rows.query == q))
        probs = np.exp(log_q[own])
        log_w = np.append(harm.log_p[own] - log_q[own], 0.0)
        probs = np.append(probs, max(1 - probs.sum(), 0.0))
        truth = float(np.exp(harm.log_p[own]).sum())
        picks = rng.choice(len(probs), size=(repeats, max(SIZES)), p=probs / probs.sum())
        for size in SIZES:
            part = picks[:, :size]
            scores = (part < len(own)).astype(np.float32)
            weights = log_w[part]
            found = in_float64(importance, scores, weights)
            k_hat = np.asarray(pareto_k(jnp.asarray(np.where(scores > 0, weights, -np.inf))))
            rows.append(_row("leaves", name, query, size, truth, found, k_hat))
    return rows


def from_draws(
    setting: Setting, name: str, proposal: Mixture, queries: Sequence[int], pool: int,
    seed: int, sizes: Sequence[int],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each query and N, of `pool` // N repeats: all sizes share the draws."""
    organism, proposal = setting.organism, proposal.for_queries(np.array(queries))
    draws = draw(
        jax.random.key(seed), proposal, setting.prompts[np.array(queries)], pool,
        organism.max_new_tokens,
    )  # fmt: skip
    weighed = weigh(organism.target, proposal, draws)
    log_p = np.asarray(weighed.log_p, np.float64)
    log_w = log_p - np.asarray(weighed.log_q, np.float64)
    parts, labels = np.asarray(weighed.component_log_probs), np.asarray(draws.labels)
    log_alphas = proposal.log_alphas(len(queries))
    rows = []
    for row, place in enumerate(queries):
        query = organism.forbidden[place]
        scores = organism.harm(query, draws.text[row])
        truth = float(np.sqrt(query.lower * query.upper))
        for size in sizes:
            count = pool // size
            shape = (count, size)

            def cut(x, count=count, size=size, shape=shape):
                return x[..., : count * size].reshape(*x.shape[:-1], *shape)

            mixture = MixtureDraws(
                cut(log_p[row]), cut(parts[:, row]), log_alphas[row], cut(labels[row]), 0
            )
            told = in_float64(report, cut(scores), cut(log_w[row]), mixture)
            found = _row("drawn", name, query, size, truth, told.estimate, told.k_hat_harm)
            codes = np.asarray(told.verdict.code)
            found |= {f"verdict {word}": float(np.mean(codes == code))
                      for code, word in enumerate(("ok", "doubtful", "unusable"))}  # fmt: skip
            ok = codes == 0
            lower, upper = np.asarray(told.estimate.lower), np.asarray(told.estimate.upper)
            hit = (lower <= truth * (1 + 1e-6)) & (upper >= truth * (1 - 1e-6))
            found["covered where ok"] = float(hit[ok].mean()) if ok.any() else np.nan
            rows.append(found)
    return rows


def _row(source, name, query, size, truth, estimate, k_hat) -> dict[str, Any]:
    value = np.nan_to_num(np.asarray(estimate.value, np.float64))
    stderr = np.asarray(estimate.stderr, np.float64)
    lower, upper = np.asarray(estimate.lower), np.asarray(estimate.upper)
    hit = (lower <= truth * (1 + 1e-6)) & (upper >= truth * (1 - 1e-6))
    error = value / truth - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        said = (value - value**2) / (size * stderr**2)
    return {
        "source": source,
        "name": name,
        "query": query.id,
        "samples": size,
        "repeats": len(value),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "bias": float(error.mean()),
        "bias_error": float(error.std() / np.sqrt(len(error))),
        "coverage": float(hit.mean()),
        "ess_harm": float(np.median(np.asarray(estimate.ess_harm))),
        "k_hat": float(np.median(np.asarray(k_hat, np.float64))),
        "sampled_ratio": float(np.nanmedian(said)) if np.isfinite(said).any() else np.nan,
        "no_hit": float(np.mean(np.asarray(estimate.hits) == 0)),
        "value": float(value[0]),
        "lower": float(lower[0]),
        "upper": float(upper[0]),
        "truth": truth,
    }


def rows_of_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """For Parquet."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}
