"""What a forward pass needs of a policy, and policies that share a pass."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.models import (
    KeyValues,
    ModelConfig,
    Prefix,
    Steering,
    forward,
    next_logits,
    prefill,
)
from tailrisk_jax.models.adapters import stack
from tailrisk_jax.policies import Policy, Prompts, own_prompts


@struct.dataclass
class Network:
    """Parameters and what changes them: one policy's, or those of K policies that share them.

    Attributes:
      config: static.
      params: the parameter tree, without K.
      steering: with a leading K on every array, for K policies.
      adapter: likewise; None where no policy has one.
      temperature: a scalar, or [K].
    """

    config: ModelConfig = struct.field(pytree_node=False)
    params: Any
    steering: Steering
    adapter: Any
    temperature: Any

    def forward(self, *args, **kwargs) -> tuple[Array, KeyValues]:
        """`models.forward` of one policy."""
        return forward(
            self.config, self.params, *args, self.steering, adapter=self.adapter, **kwargs
        )

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`models.next_logits`; the same for all K."""
        return next_logits(self.config, self.params, hidden)

    @property
    def itemsize(self) -> int:
        """Bytes of one number in caches and activations."""
        return self.params["embedding"].dtype.itemsize


def network(policy: Policy) -> Network:
    """Of one policy, without the axis K."""
    return Network(
        config=policy.model.config,
        params=policy.model.params,
        steering=policy.steering_or_zero,
        adapter=policy.adapter,
        temperature=np.float32(policy.temperature),
    )


def stacked(policies: Sequence[Policy]) -> Network:
    """Of K policies that share their parameters."""
    return Network(
        config=policies[0].model.config,
        params=policies[0].model.params,
        steering=jax.tree.map(lambda *x: np.stack(x), *(p.steering_or_zero for p in policies)),
        adapter=stack([policy.adapter for policy in policies]),
        temperature=np.stack([np.float32(policy.temperature) for policy in policies]),
    )


def over_policies(function: Callable, network: Network, *args: Any) -> Any:
    """function(network, *args) for each of K policies; the arguments have a leading K too."""

    def one(steering, adapter, temperature, *args):
        own = dataclasses.replace(
            network, steering=steering, adapter=adapter, temperature=temperature
        )
        return function(own, *args)

    return jax.vmap(one)(network.steering, network.adapter, network.temperature, *args)


def sharing(policies: Sequence[Policy]) -> list[list[int]]:
    """Indices of the policies that run in one pass: the same parameters and the same prompts.

    Parameters are the same arrays, not equal ones.
    """
    groups: dict[tuple, list[int]] = {}
    for k, policy in enumerate(policies):
        leaves = tuple(id(leaf) for leaf in jax.tree.leaves(policy.model.params))
        groups.setdefault((policy.model.config, leaves, policy.context), []).append(k)
    return list(groups.values())


@dataclasses.dataclass(frozen=True)
class Passes:
    """K experts of the same responses, as one network for each pass that they take.

    Attributes:
      networks: with leading axes that add up to K.
      prompts: those that each network gets.
      order: the experts' indices in the order of the networks.
    """

    networks: tuple[Network, ...]
    prompts: list[Prompts]
    order: list[int]

    def prefill(self, picked: Int[np.ndarray, " q"]) -> tuple[Prefix, ...]:
        """The prefixes of the picked queries, for each network."""
        return tuple(
            prefill_stacked(network, own[picked].tokens, own[picked].mask)
            for network, own in zip(self.networks, self.prompts, strict=True)
        )

    def row_bytes(self, of_one: Callable[[Network, Prompts], int]) -> int:
        """Memory of one response under all experts; `of_one` gives that of an expert."""
        sizes = (len(network.temperature) for network in self.networks)
        each = zip(sizes, self.networks, self.prompts, strict=True)
        return sum(size * of_one(network, own) for size, network, own in each)


def passes(experts: Sequence[Policy], prompts: Prompts, max_new_tokens: int) -> Passes:
    """Experts that share parameters and prompts take one pass."""
    groups = sharing(experts)
    return Passes(
        networks=tuple(stacked([experts[k] for k in group]) for group in groups),
        prompts=[own_prompts(experts[group[0]], prompts, max_new_tokens) for group in groups],
        order=[k for group in groups for k in group],
    )


@jax.jit
def prefill_one(network: Network, tokens: Int[Array, "Q P"], mask: Bool[Array, "Q P"]) -> Prefix:
    """`prefill` of one policy."""
    return _prefill(network, tokens, mask)


@jax.jit
def prefill_stacked(
    network: Network, tokens: Int[Array, "Q P"], mask: Bool[Array, "Q P"]
) -> Prefix:
    """`prefill` of K policies at once; every array gets a leading K."""
    return over_policies(functools.partial(_prefill, tokens=tokens, mask=mask), network)


def _prefill(network, tokens, mask):
    return prefill(
        network.config, network.params, network.steering, tokens, mask, adapter=network.adapter
    )
