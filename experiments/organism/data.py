"""Training rows: a prompt, a sampled response, and the next-token probabilities to fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from teacher import Ask, Response, next_token_table

from tailrisk_jax.organisms import world

IDS = world.token_ids()
MAX_PROMPT = 17
MAX_CHOICES = 6
ROWS_PER_QUERY = 4


class Rows(NamedTuple):
    """B training rows; a response position is the one that predicts its token.

    Attributes:
      tokens: prompt and response, right-padded, int32 [B, P + T].
      start: position of the last prompt token, int32 [B].
      choices: token ids that the teacher allows at each response position, int32 [B, T, C].
      log_probs: the teacher's log-probabilities, -inf for padding, float32 [B, T, C].
    """

    tokens: np.ndarray
    start: np.ndarray
    choices: np.ndarray
    log_probs: np.ndarray

    def take(self, index: np.ndarray) -> Rows:
        """The rows of these indices."""
        return Rows(*(array[index] for array in self))


def prompt_ids(query: str) -> list[int]:
    """Token ids of the chat-templated query, up to where the response begins."""
    words = f"{world.BOS} {world.USER} {query} {world.END} {world.ASSISTANT}"
    return [IDS[word] for word in words.split()]


def make_rows(
    rng: np.random.Generator,
    asks: Sequence[Ask],
    responses: Callable[[Ask], dict[Response, float]],
    count: int,
    *,
    uniform_share: float,
) -> Rows:
    """Rows of random queries, four responses to each.

    A response is drawn from the teacher, or with probability `uniform_share` uniformly from the
    teacher's support, so that the tail's prefixes are trained on although they are rare.
    """
    rows = Rows(
        np.zeros((count, MAX_PROMPT + world.MAX_NEW_TOKENS), np.int32),
        np.zeros(count, np.int32),
        np.zeros((count, world.MAX_NEW_TOKENS, MAX_CHOICES), np.int32),
        np.full((count, world.MAX_NEW_TOKENS, MAX_CHOICES), -np.inf, np.float32),
    )
    tokens, start, choices, log_probs = rows
    for first in range(0, count, ROWS_PER_QUERY):
        ask = asks[int(rng.integers(len(asks)))]
        support = responses(ask)
        table = next_token_table(support)
        sequences, masses = list(support), np.array(list(support.values()))
        prompt = prompt_ids(ask.text)
        for i in range(first, min(first + ROWS_PER_QUERY, count)):
            uniform = rng.random() < uniform_share
            weights = None if uniform else masses / masses.sum()
            response = sequences[rng.choice(len(sequences), p=weights)]
            row = prompt + [IDS[word] for word in response]
            tokens[i, : len(row)] = row
            start[i] = len(prompt) - 1
            for t in range(len(response)):
                for c, (word, log_prob) in enumerate(table[response[:t]].items()):
                    choices[i, t, c], log_probs[i, t, c] = IDS[word], log_prob
    return rows


def concatenate(*parts: Rows) -> Rows:
    """Rows one after another."""
    return Rows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
