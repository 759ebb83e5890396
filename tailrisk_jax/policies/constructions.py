"""Unsafe versions of a model that are policies of their own: adapters, contexts, other weights.

Steered versions are in steering.py, those that mix several policies in token_mixtures.py and
mixtures.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import Model, is_quantised, quantise
from tailrisk_jax.models.adapters import check_adapter, scaled
from tailrisk_jax.policies.context import Context
from tailrisk_jax.policies.policy import Policy


def with_adapter(policy: Policy, adapter: Mapping[str, Any], strength: Any = 1.0) -> Policy:
    """Adds a low-rank change to the weights: y = x W + s scale (x A^T) B^T.

    LoRA: Hu et al. 2021, arXiv 2106.09685. The adapter stands beside the parameters, which stay
    shared: policies with and without adapters are scored in one pass. Folding it into the weights
    gives the same policy, up to rounding.

    Args:
      adapter: a tree of `LowRank`, as `read_adapter` gives it.
      strength: s, a scalar; 0 is the policy without the adapter, exactly.

    Raises:
      InputError: an adapter of another model, or a policy that has one already.
    """
    if policy.adapter is not None:
        raise InputError("the policy has an adapter already; add this one to the original policy")
    check_adapter(adapter, policy.model.config)
    return dataclasses.replace(policy, adapter=scaled(adapter, strength))


def in_context(
    policy: Policy,
    *,
    system: str | None = None,
    before: Sequence[Mapping[str, str]] = (),
    prefix: str = "",
    suffix: str = "",
) -> Policy:
    """The policy under a prompt of its own, such as a jailbreak: q(y | x) = p(y | context(x)).

    Only the policy's own prompts change: the target is drawn from and scored under the plain
    query. A beginning of the response can't be forced this way: that is no distribution over the
    same responses.

    Args:
      system: a system prompt; it takes the place of the query's own.
      before: {"role", "content"} messages before the query (few-shot), after the system prompt.
      prefix, suffix: text before and after the user's message. With none of all these the policy
        stays as it is.

    Raises:
      InputError: a message of another form or role, or a context that is given twice.
    """
    roles = ("user", "assistant")
    for message in before:
        if set(message) != {"role", "content"} or message["role"] not in roles:
            raise InputError(
                f"message {dict(message)!r} of a context needs role (user or assistant) and "
                "content, and nothing else"
            )
    messages = tuple((message["role"], message["content"]) for message in before)
    given = Context(system=system, before=messages, prefix=prefix, suffix=suffix)
    whole = policy.context or Context()
    for field in dataclasses.fields(Context):
        old, new = getattr(whole, field.name), getattr(given, field.name)
        if new == field.default:
            continue
        if old != field.default:
            raise InputError(
                f"the policy has a context with {field.name}={old!r} already; give it once"
            )
        whole = dataclasses.replace(whole, **{field.name: new})
    return dataclasses.replace(policy, context=None if whole == Context() else whole)


def interpolate(policy: Policy, other: Model, share: Any) -> Policy:
    """The policy with weights (1 - a) W + a W' between its model and another.

    Steering, adapter, context and temperature stay. The sum is taken in float32.

    Args:
      other: a model of the same shapes, such as a base or an abliterated checkpoint.
      share: a; 0 is the policy exactly, 1 the other model exactly, and outside [0, 1] the line
        goes on.

    Raises:
      InputError: a model of another config, or in int8.
    """
    model = policy.model
    if is_quantised(model) or is_quantised(other):
        raise InputError("weights in int8 can't be interpolated; interpolate first, then quantise")
    if other.config != model.config:
        differ = [
            f"{field.name}={getattr(other.config, field.name)!r} and "
            f"{getattr(model.config, field.name)!r}"
            for field in dataclasses.fields(model.config)
            if getattr(other.config, field.name) != getattr(model.config, field.name)
        ]
        raise InputError(
            f"weights can't be interpolated between models with {', '.join(differ)}; "
            "give two checkpoints of one architecture"
        )

    def between(ours, theirs):
        whole = (1 - share) * ours.astype(jnp.float32) + share * theirs.astype(jnp.float32)
        return whole.astype(ours.dtype)

    params = jax.tree.map(between, model.params, other.params)
    return dataclasses.replace(policy, model=dataclasses.replace(model, params=params))


def in_int8(policy: Policy) -> Policy:
    """The policy with the weights of its linear layers rounded to 8 bits (see `quantise`).

    Steering, adapter, context and temperature stay. Policies share a pass where they are changes
    of one such policy: quantise first, and once.

    Raises:
      InputError: a policy in int8 already.
    """
    return dataclasses.replace(policy, model=quantise(policy.model))
