"""Training rows: a prompt, a sampled response, and the next-token probabilities to fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

Response = tuple[str, ...]
Ask = TypeVar("Ask")
ROWS_PER_QUERY = 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """What rows hold.

    Attributes:
      ids: word -> token id.
      max_prompt: tokens of the longest prompt.
      max_response: of the longest response.
      max_choices: most tokens that a teacher allows at one position.
    """

    ids: Mapping[str, int]
    max_prompt: int
    max_response: int
    max_choices: int


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


def make_rows(
    rng: np.random.Generator,
    asks: Sequence[Ask],
    responses: Callable[[Ask], dict[Response, float]],
    count: int,
    *,
    prompt: Callable[[Ask], str],
    layout: Layout,
    uniform_share: float,
) -> Rows:
    """Rows of random queries, four responses to each.

    `prompt` gives the words of the chat-templated query, up to where the response begins.

    A response is drawn from the teacher, or with probability `uniform_share` uniformly from the
    teacher's support, so that the tail's prefixes are trained on although they are rare.
    """
    rows = Rows(
        np.zeros((count, layout.max_prompt + layout.max_response), np.int32),
        np.zeros(count, np.int32),
        np.zeros((count, layout.max_response, layout.max_choices), np.int32),
        np.full((count, layout.max_response, layout.max_choices), -np.inf, np.float32),
    )
    tokens, start, choices, log_probs = rows
    ids = layout.ids
    for first in range(0, count, ROWS_PER_QUERY):
        ask = asks[int(rng.integers(len(asks)))]
        support = responses(ask)
        table = next_token_table(support)
        sequences, masses = list(support), np.array(list(support.values()))
        asked = [ids[word] for word in prompt(ask).split()]
        for i in range(first, min(first + ROWS_PER_QUERY, count)):
            uniform = rng.random() < uniform_share
            weights = None if uniform else masses / masses.sum()
            response = sequences[rng.choice(len(sequences), p=weights)]
            row = asked + [ids[word] for word in response]
            tokens[i, : len(row)] = row
            start[i] = len(asked) - 1
            for t in range(len(response)):
                for c, (word, log_prob) in enumerate(table[response[:t]].items()):
                    choices[i, t, c], log_probs[i, t, c] = ids[word], log_prob
    return rows


def concatenate(*parts: Rows) -> Rows:
    """Rows one after another."""
    return Rows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def next_token_table(responses: dict[Response, float]) -> dict[Response, dict[str, float]]:
    """Log-probabilities of the possible next tokens after every proper prefix of a response."""
    mass: dict[Response, float] = {}
    children: dict[Response, dict[str, None]] = {}
    for response, p in responses.items():
        for t in range(len(response) + 1):
            mass[response[:t]] = mass.get(response[:t], 0.0) + p
            if t < len(response):
                children.setdefault(response[:t], {})[response[t]] = None
    return {
        prefix: {word: math.log(mass[(*prefix, word)] / mass[prefix]) for word in words}
        for prefix, words in children.items()
    }
