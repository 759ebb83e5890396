"""Pilot and checking draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from rows import Rows, saved
from setting import Setting

from tailrisk_jax.policies import Component, Mixture
from tailrisk_jax.rollouts import Draws, draw


def uniform_weights(setting: Setting, target_share: float) -> np.ndarray:
    """The uniform dictionary with a share for the target."""
    count = len(setting.dictionary)
    weights = np.full(count, (1 - target_share) / (count - 1))
    weights[0] = target_share
    return weights


def drawn(
    setting: Setting, policy: Component | Mixture, count: int, seed: int
) -> tuple[Draws, np.ndarray]:
    """N draws for each query, and harm [Q, N]."""
    draws = draw(
        jax.random.key(seed), policy, setting.prompts, count, setting.organism.max_new_tokens
    )
    queries = setting.organism.forbidden
    pairs = zip(queries, draws.text, strict=True)
    harm = np.array([setting.organism.harm(query, texts) for query, texts in pairs])
    return draws, harm


def harmful_draws(
    setting: Setting, policy: Mixture, count: int, seed: int, path: Path
) -> tuple[Rows, np.ndarray]:
    """The harmful ones of N draws for each query, and harm [Q, N]; kept at `path`."""

    def make():
        draws, harm = drawn(setting, policy, count, seed)
        query, sample = np.nonzero(harm > 0)
        lengths = np.asarray(draws.mask).sum(axis=-1)[query, sample]
        tokens = np.asarray(draws.tokens)[query, sample]
        return {"query": query, "tokens": tokens, "lengths": lengths, "harm": harm}

    found = saved(path, make)
    return Rows(found["query"], found["tokens"], found["lengths"]), found["harm"]


def all_rows(draws: Draws) -> Rows:
    """All draws, query by query."""
    queries, samples, _ = draws.tokens.shape
    lengths = np.asarray(draws.mask).sum(axis=-1)
    tokens: Any = np.asarray(draws.tokens)
    return Rows(
        np.repeat(np.arange(queries), samples), tokens.reshape(queries * samples, -1),
        lengths.ravel(),
    )  # fmt: skip
