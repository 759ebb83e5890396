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
from tailrisk_jax.policies.context import Context


@struct.dataclass
class Policy:
    """A model, changed or not, at a temperature. The target is one, and most proposals.

    Attributes:
      model: config, parameters and tokenizer; policies may share it.
      steering: per-layer ablation and addition; None is the model as it is.
      temperature: the next token is drawn from softmax(logits / temperature); above 0.
      adapter: a tree of `LowRank` beside the parameters; None is the model as it is.
      context: how queries are put to it (static); None is the query as it is.
    """

    model: Model
    steering: Steering | None = None
    temperature: Any = 1.0
    adapter: Any = None
    context: Context | None = struct.field(pytree_node=False, default=None)

    @property
    def experts(self) -> "tuple[Policy, ...]":
        """The policies that it is made of: itself."""
        return (self,)

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


def check_comparable(components: Sequence[Any]) -> None:
    """Raises InputError unless all components are distributions over the same responses."""
    policies = [policy for component in components for policy in component.experts]
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

    A context isn't applied: the tokens are taken as they are.
    """
    mask = jnp.asarray(mask, bool)
    if response is None:
        response = jnp.zeros_like(mask)
    model = policy.model
    return _logits(
        model.config, model.params, policy.steering_or_zero, policy.adapter, jnp.asarray(tokens),
        mask, response,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, steering, adapter, tokens, mask, response):
    hidden, _ = forward(
        config,
        params,
        tokens[:, None],
        prompt_positions(mask)[:, None],
        steering,
        response=response[:, None],
        valid=mask,
        adapter=adapter,
    )
    return next_logits(config, params, hidden[:, 0])
