"""All responses of a 4-token, 3-step model with two unsafe versions; sums are expectations.

A "draw" here is a response, and its weight in a mean is put into log_m: an expectation over y ~ m
is a sum over all y of m(y) f(y), so with log_m = -log(number of responses) the pilot's mean
over the R responses, (1 / R) sum_y c(y) / m(y), is the exact expectation.
"""

import dataclasses
import functools

import numpy as np

from tailrisk_jax.adaptation import Dictionary, Pilot, components, windows
from tailrisk_jax.policies import Policy, ablate, at_temperature, from_tokens
from tailrisk_jax.rollouts import Draws, token_log_probs
from tests.oracles import as_draws, random_model, responses, tiny_config, unit_vector

LENGTH = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
    """Token log-probabilities [E, Q, R, T] of the target and two unsafe policies, two queries."""

    target: Policy
    unsafe: tuple[Policy, ...]
    draws: Draws
    scored: np.ndarray
    harm: np.ndarray
    dictionary: Dictionary

    @functools.cached_property
    def log_q(self) -> np.ndarray:
        """log q_k(y) of the dictionary by explicit sums, [K, Q, R]."""
        rows = []
        parts = (self.dictionary.experts, self.dictionary.starts, self.dictionary.stops)
        for u, a, b in zip(*parts, strict=True):
            inside = (np.arange(LENGTH) >= a) & (np.arange(LENGTH) < b)
            rows.append(np.where(inside, self.scored[u], self.scored[0]).sum(-1))
        return np.array(rows)

    @property
    def exact_pilot(self) -> Pilot:
        """Means over its "draws" are exact expectations."""
        log_m = np.full(self.harm.shape, -np.log(self.harm.shape[1]))
        return Pilot(self.log_q, log_m, self.harm)

    def components(self):
        return components(self.dictionary, self.target, self.unsafe)


@functools.cache
def tiny() -> Tiny:
    config = tiny_config(end_ids=(3,))
    target = Policy(random_model(config, seed=3))
    unsafe = (ablate(target, unit_vector(config), 1.0), at_temperature(target, 2.5))
    rows = responses(config.vocab_size, LENGTH, config.end_ids)
    draws = as_draws(rows, from_tokens([[1, 2, 0], [2, 1, 1]]), config, LENGTH)
    scored = np.asarray(token_log_probs([target, *unsafe], draws), np.float64)
    harm = np.array([0.5 * (row.count(1) == 1) + 0.5 * (row[-1] == 2) for row in rows])
    return Tiny(
        target, unsafe, draws, scored, np.stack([harm, harm > 0.5]) * 1.0, windows(2, LENGTH)
    )
