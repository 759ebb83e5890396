"""A Markov chain is a policy over paths whose tail is a product of small matrices.

The event is reaching the last state, which absorbs, within T steps from state 0. In float64 its
probability, the second moment of its importance weights and the perfect proposal are exact, at 1e-8
as well as at 1e-1.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MarkovPolicy:
    """Transition matrices [T, S, S], one per step; paths [N, T + 1] start in state 0."""

    transitions: np.ndarray

    @property
    def num_steps(self) -> int:
        return self.transitions.shape[0]

    def sample(self, rng: np.random.Generator, num: int) -> np.ndarray:
        paths = np.zeros((num, self.num_steps + 1), int)
        for t, matrix in enumerate(self.transitions):
            u = rng.random((num, 1))
            cumulative = np.cumsum(matrix, axis=1)[paths[:, t]]
            paths[:, t + 1] = np.minimum((u > cumulative).sum(1), matrix.shape[0] - 1)
        return paths

    def log_prob(self, paths: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            logs = np.log(self.transitions)
        return logs[np.arange(self.num_steps), paths[:, :-1], paths[:, 1:]].sum(1)

    def event(self, paths: np.ndarray) -> np.ndarray:
        """1.0 for paths that end in the last state."""
        return (paths[:, -1] == self.transitions.shape[1] - 1).astype(float)

    def event_prob(self) -> float:
        """Exact P(the path ends in the last state)."""
        return _first_to_last(self.transitions)

    def conditioned(self) -> "MarkovPolicy":
        """The chain given the event (Doob's transform): every event weight is event_prob()."""
        reach = np.eye(self.transitions.shape[1])[-1]
        steps = []
        for matrix in self.transitions[::-1]:
            before = matrix @ reach
            joint = matrix * reach
            dead = before == 0
            steps.append(
                np.where(dead[:, None], matrix, joint / np.where(dead, 1, before)[:, None])
            )
            reach = before
        return MarkovPolicy(np.stack(steps[::-1]))


def second_moment(target: MarkovPolicy, proposal: MarkovPolicy) -> float:
    """Exact E_q[(w h)^2] = sum over event paths of p^2 / q."""
    p, q = target.transitions, proposal.transitions
    return _first_to_last(np.where(p > 0, p**2 / np.where(p > 0, q, 1), 0))


def ladder(up: float, height: int, num_steps: int) -> MarkovPolicy:
    """A walk on 0..height: up with probability `up`, else down (0 stays), the top absorbs."""
    matrix = np.zeros((height + 1, height + 1))
    for state in range(height):
        matrix[state, state + 1] = up
        matrix[state, max(state - 1, 0)] += 1 - up
    matrix[height, height] = 1
    return MarkovPolicy(np.broadcast_to(matrix, (num_steps, height + 1, height + 1)))


def _first_to_last(matrices: np.ndarray) -> float:
    row = np.eye(matrices.shape[1])[0]
    for matrix in matrices:
        row = row @ matrix
    return float(row[-1])
