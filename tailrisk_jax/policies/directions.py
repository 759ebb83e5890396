"""Directions in the residual stream, by difference in means.

After Arditi et al. 2024, arXiv 2406.11717.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import Decoder, Model, ModelConfig, Steering, prompt_positions
from tailrisk_jax.models.sharding import fetch
from tailrisk_jax.policies.context import Query
from tailrisk_jax.policies.policy import Policy
from tailrisk_jax.policies.prompts import Prompts, encode


def residual_stream(policy: Policy, prompts: Prompts) -> Float[Array, "L Q D"]:
    """The input of every layer at each prompt's last token, float32."""
    return _residuals(policy, prompts, 1)[:, :, 0]


def mean_residuals(
    policy: Policy, prompts: Prompts, *, positions: int = 1, batch_size: int = 32
) -> Float[np.ndarray, "positions L D"]:
    """The mean over prompts of every layer's input at each of their last tokens.

    Row i is of the token at -positions + i, counted from the end. Activations are taken in
    float32, a batch at a time, and summed in float64.

    Raises:
      InputError: a prompt with fewer tokens than `positions`.
    """
    shortest = int(np.asarray(prompts.mask).sum(axis=1).min())
    if not 1 <= positions <= shortest:
        raise InputError(
            f"positions={positions} must lie between 1 and {shortest}, the tokens of the shortest "
            "prompt"
        )
    total: Any = 0.0
    for queries, kept in batches(len(prompts), batch_size):
        rows = fetch(_residuals(policy, prompts[queries], positions)).astype(np.float64)
        total = total + rows[:, :kept].sum(axis=1)
    return np.swapaxes(total, 0, 1) / len(prompts)


def mean_differences(
    policy: Policy,
    harmful: Prompts,
    harmless: Prompts,
    *,
    positions: int = 1,
    batch_size: int = 32,
) -> Float[np.ndarray, "positions L D"]:
    """mean over harmful prompts - mean over harmless ones, of every layer's input.

    Each [D] is a candidate for `ablate`: a direction that tells refused prompts from answered
    ones. Row i is of the token at -positions + i, counted from the end.

    Raises:
      InputError: an empty set of prompts, or a prompt with fewer tokens than `positions`.
    """
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if len(prompts) == 0:
            raise InputError(f"the {name} set is empty; give at least one prompt")
    means = [
        mean_residuals(policy, prompts, positions=positions, batch_size=batch_size)
        for prompts in (harmful, harmless)
    ]
    return means[0] - means[1]


def difference_in_means(policy: Policy, harmful: Prompts, harmless: Prompts) -> Float[Array, "L D"]:
    """`mean_differences` at the last token, where the response begins, float32.

    Raises:
      InputError: an empty set of prompts.
    """
    return jnp.asarray(mean_differences(policy, harmful, harmless)[0], jnp.float32)


def post_instruction_tokens(model: Model, queries: Sequence[Query]) -> int:
    """How many tokens the chat template writes after the user's text, the same for all queries.

    As many as the template's ending has by itself, and no more than the prompts have in common
    at their end: tokenizers may merge the first with the text. 1, the text's last token, where
    there is no template or it writes nothing.
    """
    tokenizer = model.tokenizer
    prompts = encode(model, queries)
    if tokenizer.chat_template is None:
        return 1
    same = np.all(prompts.mask & (prompts.tokens == prompts.tokens[:1]), axis=0)
    common = int(np.argmin(np.append(same[::-1], False)))
    chats = [[{"role": "user", "content": q}] if isinstance(q, str) else list(q) for q in queries]
    chat = max(chats, key=lambda messages: len(messages[-1]["content"]))  # not in the ending too
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    _, _, ending = text.rpartition(chat[-1]["content"].strip())
    written = len(tokenizer(ending, add_special_tokens=False)["input_ids"])
    return max(1, min(common, written))


def intensity_for(total: float, num_layers: int) -> float:
    """The intensity of `ablate` at which the share `total` of a component is gone after L layers.

    What stands along the direction in the residual stream is cut by (1 - a) at the input of every
    layer, so that (1 - a)^L of it is left: a = 1 - (1 - total)^(1/L). What a layer writes is cut
    where it is written too, and then by the layers above alone.

    Raises:
      InputError: a total outside [0, 1], or no layers.
    """
    if not 0 <= total <= 1:
        raise InputError(f"total={total} is no share of the direction; give 0 to 1, e.g. 0.9")
    if num_layers < 1:
        raise InputError(f"num_layers={num_layers} must be at least 1")
    return 1.0 - (1.0 - total) ** (1.0 / num_layers)


def batches(count: int, size: int) -> Iterator[tuple[Int[np.ndarray, " size"], int]]:
    """Indices of batches of one size, and how many of each count; beyond these they wrap around."""
    size = min(size, max(count, 1))
    for start in range(0, count, size):
        yield np.arange(start, start + size) % count, min(size, count - start)


def residuals(
    config: ModelConfig,
    params: Any,
    adapter: Any,
    steering: Steering,
    tokens: Int[Array, "Q S"],
    mask: Bool[Array, "Q S"],
    response: Bool[Array, "Q S"],
) -> tuple[Float[Array, "L Q S D"], Float[Array, "L Q S D"]]:
    """The input and the output of every layer, at every token.

    An output is the next layer's input, before that layer ablates it; the last one is what the
    final norm gets.
    """
    collected: Any
    variables = {"params": params} if adapter is None else {"params": params, "lora": adapter}
    _, collected = Decoder(config).apply(
        variables,
        tokens[:, None],
        prompt_positions(mask)[:, None],
        steering,
        response=response[:, None],
        valid=mask,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "layers",
    )
    layers = collected["intermediates"]["layers"]
    return layers["residual"][0][:, :, 0], layers["__call__"][0][0][:, :, 0]


def _residuals(policy: Policy, prompts: Prompts, positions: int) -> Float[Array, "L Q positions D"]:
    """The input of every layer at each prompt's last tokens."""
    model = policy.model
    return _last_residuals(
        model.config, positions, model.params, policy.adapter, policy.steering_or_zero,
        jnp.asarray(prompts.tokens), jnp.asarray(prompts.mask),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _last_residuals(config, positions, params, adapter, steering, tokens, mask):
    inputs, _ = residuals(config, params, adapter, steering, tokens, mask, jnp.zeros_like(mask))
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[-1]), 0), axis=-1)
    where = last[:, None] + jnp.arange(1 - positions, 1)
    return jnp.take_along_axis(inputs, where[None, :, :, None], axis=2).astype(jnp.float32)
