"""Policy: a distribution over responses, given a prompt."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import Model, Steering, forward, next_logits, no_steering, prompt_positions


@struct.dataclass
class Policy:
    """A model, steered or not, at a temperature. The target and every proposal is one.

    Attributes:
      model: config, parameters and tokenizer; policies may share it.
      steering: per-layer ablation and addition; None is the model as it is.
      temperature: the next token is drawn from softmax(logits / temperature); above 0.
    """

    model: Model
    steering: Steering | None = None
    temperature: Any = 1.0

    @property
    def steering_or_zero(self) -> Steering:
        """The steering, with zero coefficients where there is none."""
        return no_steering(self.model.config) if self.steering is None else self.steering


def at_temperature(policy: Policy, temperature: float) -> Policy:
    """The policy that draws from softmax(logits / temperature).

    Raises:
      InputError: a temperature that isn't above 0 (greedy decoding is no distribution to weigh).
    """
    policy = dataclasses.replace(policy, temperature=temperature)
    check_comparable([policy])
    return policy


def check_comparable(policies: Sequence[Policy]) -> None:
    """Raises InputError unless all policies are distributions over the same responses."""
    first = policies[0].model.config
    for policy in policies:
        config, temperature = policy.model.config, policy.temperature
        if not isinstance(temperature, Tracer) and not temperature > 0:
            raise InputError(f"temperature={temperature!r} must be above 0; give e.g. 1.0")
        for name in ("vocab_size", "end_ids"):
            ours, theirs = getattr(first, name), getattr(config, name)
            if ours != theirs:
                raise InputError(
                    f"policies differ in {name} ({ours} and {theirs}), so a response of one is "
                    "not a response of the other; use checkpoints with one vocabulary"
                )


def logits(
    policy: Policy,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    response: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Next-token logits (float32, before the temperature) at every position.

    The whole [B, T, V] array is made: for tests and small inputs. Rows where `mask` is False are
    padding, on either side; their logits mean nothing.

    Args:
      response: True where a token belongs to the response, for steering with coefficients of
        its own there; by default all are prompt positions.
    """
    mask = jnp.asarray(mask, bool)
    if response is None:
        response = jnp.zeros_like(mask)
    model = policy.model
    return _logits(
        model.config, model.params, policy.steering_or_zero, jnp.asarray(tokens), mask, response
    )


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, steering, tokens, mask, response):
    hidden, _ = forward(
        config,
        params,
        tokens[:, None],
        prompt_positions(mask)[:, None],
        steering,
        response=response[:, None],
        valid=mask,
    )
    return next_logits(config, params, hidden[:, 0])
