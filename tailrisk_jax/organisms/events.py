"""Token events: harm as a finite automaton over response tokens.

An oracle enumerates token prefixes, so it needs harm as a property of tokens that can be followed
one token at a time, and that, once true, stays true. A deterministic automaton with absorbing
accepting states is exactly that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int


@dataclasses.dataclass(frozen=True, eq=False)
class TokenEvent:
    """An absorbing event on token sequences, as a deterministic finite automaton.

    Attributes:
      transitions: int [S, V]; `transitions[s, v]` is the state after token v in state s.
      accepting: bool [S]; a sequence is in the event when it ends in an accepting state.
      initial: the state before the first response token.

    Raises ValueError when an accepting state can be left: an event that can become false again
    isn't decided by a prefix, and the oracle's leaves would be wrong.
    """

    transitions: Int[np.ndarray, "S V"]
    accepting: Bool[np.ndarray, " S"]
    initial: int = 0

    def __post_init__(self) -> None:
        states = len(self.accepting)
        if self.transitions.ndim != 2 or self.transitions.shape[0] != states:
            raise ValueError(
                f"transitions has shape {self.transitions.shape}; with {states} states it must be "
                f"[{states}, V]"
            )
        if self.transitions.min() < 0 or self.transitions.max() >= states:
            raise ValueError(f"transitions leads outside the states 0..{states - 1}")
        if not self.accepting[self.transitions[self.accepting]].all():
            raise ValueError("accepting states must be absorbing: one of them can be left")

    @property
    def vocabulary_size(self) -> int:
        """V, the number of token ids the automaton reads."""
        return self.transitions.shape[1]

    def matches(self, tokens: Int[np.ndarray, "*batch T"]) -> Bool[np.ndarray, " *batch"]:
        """Whether each token sequence is in the event (vectorised over leading axes)."""
        tokens = np.asarray(tokens)
        state = np.full(tokens.shape[:-1], self.initial, np.int64)
        for t in range(tokens.shape[-1]):
            state = self.transitions[state, tokens[..., t]]
        return self.accepting[state]

    def distance(self) -> np.ndarray:
        """Least number of tokens from each state to an accepting one; inf where unreachable.

        Returns: float64 [S].
        """
        distance = np.where(self.accepting, 0.0, np.inf)
        for _ in range(len(self.accepting)):
            distance = np.minimum(distance, 1 + distance[self.transitions].min(axis=1))
        return distance


def ordered_event(
    steps: Sequence[Iterable[int]], *, vocabulary_size: int, end_tokens: Iterable[int]
) -> TokenEvent:
    """The event "a token of steps[0], later one of steps[1], ..., before the response ends".

    State s < n counts the steps done, state n = len(steps) accepts, state n + 1 is a response that
    ended before. An end token leads there, so padding after the end never matters. One token does
    one step at most. An empty step can't be done, so the event has probability 0.

    Raises ValueError without steps: the event would be certain before the first token.
    """
    if not steps:
        raise ValueError("steps is empty; give the sets of tokens that must occur in order")
    count = len(steps)
    transitions = np.repeat(np.arange(count + 2)[:, None], vocabulary_size, axis=1)
    transitions[:count, list(end_tokens)] = count + 1
    for state, tokens in enumerate(steps):
        transitions[state, list(tokens)] = state + 1
    return TokenEvent(transitions, np.arange(count + 2) == count)
