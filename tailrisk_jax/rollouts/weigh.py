"""From draws to log-weights: target and proposal scored side by side."""

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from tailrisk_jax.estimators import mixture_log_prob
from tailrisk_jax.policies import Component, Mixture
from tailrisk_jax.rollouts.rollouts import Draws
from tailrisk_jax.rollouts.score import sequence_log_probs


@struct.dataclass
class Weighed:
    """Sequence log-probabilities of draws under the target and the K components of the proposal.

    Attributes:
      log_p: under the target, [Q, N].
      component_log_probs: under each component, [K, Q, N].
      log_q: under the proposal, logsumexp_k(log alpha_k + log q_k), [Q, N].
      rescore_noise: |log q_k decoded - log q_k scored| for the component k that drew, [Q, N].
    """

    log_p: Float[Array, "Q N"]
    component_log_probs: Float[Array, "K Q N"]
    log_q: Float[Array, "Q N"]
    rescore_noise: Float[Array, "Q N"]

    @property
    def log_weights(self) -> Float[Array, "Q N"]:
        """log w = log p - log q."""
        return self.log_p - self.log_q


def weigh(
    target: Component, proposal: Component | Mixture, draws: Draws, *, batch_size: int | None = None
) -> Weighed:
    """Scores draws from `proposal` under it and the target, by one numerical path.

    Both sides of the ratio come from teacher-forced scoring (decoding's own record only measures
    the noise), each distinct policy once: a target that is itself a component, or an expert of one,
    as the same object, is not scored twice.

    Raises:
      InputError: as `log_prob`.
    """
    if isinstance(proposal, Mixture):
        components, log_alphas = proposal.components, proposal.log_alphas(len(draws.prompts))
    else:
        components, log_alphas = (proposal,), np.zeros(1, np.float32)
    log_probs = sequence_log_probs([target, *components], draws, batch_size=batch_size)
    scored = log_probs[1:]
    drawn = np.asarray(draws.drawn_log_probs).sum(axis=-1)
    own = np.take_along_axis(scored, np.asarray(draws.labels)[None], axis=0)[0]
    return Weighed(
        log_p=jnp.asarray(log_probs[0]),
        component_log_probs=jnp.asarray(scored),
        log_q=mixture_log_prob(scored, log_alphas),
        rescore_noise=jnp.asarray(np.abs(drawn - own)),
    )
