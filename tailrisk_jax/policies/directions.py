"""Directions in the residual stream, by difference in means."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import Decoder, at_last_token, prompt_positions
from tailrisk_jax.policies.policy import Policy
from tailrisk_jax.policies.prompts import Prompts


def residual_stream(policy: Policy, prompts: Prompts) -> Float[Array, "L Q D"]:
    """The input of every layer at each prompt's last token, float32."""
    model = policy.model
    return _residual_stream(
        model.config, model.params, policy.steering_or_zero, prompts.tokens, prompts.mask
    )


@functools.partial(jax.jit, static_argnums=0)
def _residual_stream(config, params, steering, tokens, mask):
    collected: Any
    _, collected = Decoder(config).apply(
        {"params": params},
        tokens[:, None],
        prompt_positions(mask)[:, None],
        steering,
        response=jnp.zeros((1, 1, 1), bool),
        valid=mask,
        mutable=["intermediates"],
    )
    residual = collected["intermediates"]["layers"]["residual"][0][:, :, 0]
    return at_last_token(residual, mask[None]).astype(jnp.float32)


def difference_in_means(policy: Policy, harmful: Prompts, harmless: Prompts) -> Float[Array, "L D"]:
    """mean over harmful prompts - mean over harmless ones, of every layer's input.

    Row l is a candidate for `ablate` (Arditi et al. 2024, arXiv 2406.11717): the direction that
    tells refused prompts from answered ones at the position where the response begins.

    Raises:
      InputError: an empty set of prompts.
    """
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if len(prompts) == 0:
            raise InputError(f"the {name} set is empty; give at least one prompt")
    means = [jnp.mean(residual_stream(policy, prompts), axis=1) for prompts in (harmful, harmless)]
    return means[0] - means[1]
