"""Persona vectors: differences of mean activations (Chen et al. 2025, arXiv 2507.21509).

Their rows number the residual stream: row 0 is the embeddings, row l the output of block l - 1.
`steer` numbers blocks, by the one whose output is changed; `layer_of_row` translates. Row L here
is the last block's output like the others; their files have it after the final norm.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import at_last_token
from tailrisk_jax.models.sharding import fetch
from tailrisk_jax.policies.directions import batches, residuals
from tailrisk_jax.policies.policy import Policy
from tailrisk_jax.policies.prompts import Prompts

KINDS = ("prompt_avg", "prompt_last", "response_avg")


@struct.dataclass
class PersonaVectors:
    """Activations by where they are averaged, or differences of them; row l as above.

    Attributes:
      prompt_avg: over the prompt's tokens, [L + 1, D].
      prompt_last: at the prompt's last token.
      response_avg: over the response's tokens.
    """

    prompt_avg: Float[np.ndarray, "rows D"]
    prompt_last: Float[np.ndarray, "rows D"]
    response_avg: Float[np.ndarray, "rows D"]


@struct.dataclass
class Answers:
    """One response to each of Q prompts.

    Attributes:
      prompts: with the system prompt that the responses were drawn under.
      tokens: [Q, T].
      mask: True for the tokens that are averaged over, which come first, [Q, T].
    """

    prompts: Prompts
    tokens: Int[np.ndarray, "Q T"]
    mask: Bool[np.ndarray, "Q T"]


def persona_vectors(
    policy: Policy, positive: Answers, negative: Answers, *, batch_size: int = 16
) -> PersonaVectors:
    """Mean activations of answers that show a trait - those of answers that don't.

    Raises:
      InputError: no answers on one side, or an empty one.
    """
    means = [
        mean_activations(policy, answers, batch_size=batch_size) for answers in (positive, negative)
    ]
    return jax.tree.map(lambda a, b: a - b, *means)


def mean_activations(policy: Policy, answers: Answers, *, batch_size: int = 16) -> PersonaVectors:
    """Averages over each answer's tokens in float32, then over answers in float64.

    Raises:
      InputError: no answers, or an empty one.
    """
    if len(answers.prompts) == 0:
        raise InputError("there are no answers to average over; draw more or filter less")
    if not np.all(answers.mask[:, 0]):
        raise InputError("an answer has no token to average over; leave empty answers out")
    model, steering = policy.model, policy.steering_or_zero
    total: Any = 0.0
    for rows, kept in batches(len(answers.prompts), batch_size):
        prompts = answers.prompts[rows]
        means = _row_means(
            model.config, model.params, policy.adapter, steering, prompts.tokens, prompts.mask,
            answers.tokens[rows], answers.mask[rows],
        )  # fmt: skip
        total = total + fetch(means).astype(np.float64)[:, :, :kept].sum(axis=2)
    return PersonaVectors(*(total / len(answers.prompts)))


def layer_of_row(row: int, num_layers: int) -> int:
    """The block whose output row `row` of a persona vector is: what `steer` takes as its layer.

    Raises:
      InputError: a row out of range, or row 0: no block writes the embeddings.
    """
    if not 1 <= row <= num_layers:
        raise InputError(
            f"row {row} of a persona vector is no block's output; this model has rows 1 to "
            f"{num_layers}, and row l is the output of block l - 1"
        )
    return row - 1


def vector_of_layer(
    vectors: Float[np.ndarray, "rows D"], layer: int, num_layers: int
) -> Float[np.ndarray, " D"]:
    """The row that is the output of block `layer`, to be added there by `steer`.

    Raises:
      InputError: other than L + 1 rows, or a layer out of range.
    """
    if len(vectors) != num_layers + 1:
        raise InputError(
            f"the vectors have {len(vectors)} rows; those of a model of {num_layers} layers have "
            f"{num_layers + 1}, from the embeddings to the last layer's output"
        )
    if not 0 <= layer < num_layers:
        raise InputError(f"layer={layer} is out of range; this model has 0 to {num_layers - 1}")
    return vectors[layer + 1]


@functools.partial(jax.jit, static_argnums=0)
def _row_means(config, params, adapter, steering, prompt, prompt_mask, response, response_mask):
    """[3, L + 1, Q, D] in the order of `KINDS`."""
    inputs, outputs = residuals(
        config,
        params,
        adapter,
        steering,
        jnp.concatenate([prompt, response], axis=1),
        jnp.concatenate([prompt_mask, response_mask], axis=1),
        jnp.concatenate([jnp.zeros_like(prompt_mask), jnp.ones_like(response_mask)], axis=1),
    )
    stream = jnp.concatenate([inputs[:1], outputs]).astype(jnp.float32)
    of_prompt, of_response = jnp.split(stream, [prompt.shape[1]], axis=2)
    return jnp.stack(
        [
            _mean(of_prompt, prompt_mask),
            at_last_token(of_prompt, prompt_mask[None]),
            _mean(of_response, response_mask),
        ]
    )


def _mean(x: Float[Array, "rows Q S D"], mask: Bool[Array, "Q S"]) -> Float[Array, "rows Q D"]:
    weights = mask / jnp.sum(mask, axis=-1, keepdims=True)
    return jnp.sum(x * weights[..., None], axis=2)
