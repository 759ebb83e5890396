"""Any policy as the next-token callable that the oracle enumerates."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tailrisk_jax.models import Prefix, forward, next_logits, prefill
from tailrisk_jax.organisms.oracle import NextLogProbs
from tailrisk_jax.policies import Policy, Prompts, encode
from tailrisk_jax.policies.prompts import Query, own_prompts

_ROWS = (16, 128, 512)
_LENGTHS = (8, 16)


def policy_next_log_probs(policy: Policy, query: Query | Prompts) -> NextLogProbs:
    """The next-token log-probabilities of a policy after one prompt and any response prefix.

    The prompt is prefilled once; prefixes are run teacher-forced on top of it, in shapes rounded
    up to a few sizes, so that little is compiled. Logits are the model's float32 ones, as the
    sampler's are; temperature and normalisation are float64, so the masses of all tokens sum to 1
    to about 1e-15. The float32 forward pass itself is only good to about 1e-5 relative in a
    sequence's probability, and differs by that much between machines and batch shapes.

    Args:
      policy: steered, adapted and in a context or not, at any temperature.
      query: a text, a list of messages, or tokenised prompts of length 1.

    Raises:
      ValueError: not exactly one prompt.
    """
    prompts = query if isinstance(query, Prompts) else encode(policy.model, [query])
    if len(prompts) != 1:
        raise ValueError(f"the oracle follows one prompt at a time, not {len(prompts)}")
    prompts = own_prompts(policy, prompts, 0)
    config, params = policy.model.config, policy.model.params
    steering, adapter = policy.steering_or_zero, policy.adapter
    prefix = _prefill(config, params, steering, prompts.tokens, prompts.mask, adapter=adapter)
    temperature = float(policy.temperature)

    def next_log_probs(prefixes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        rows, longest = len(lengths), int(lengths.max(initial=0))
        row_count = next((n for n in _ROWS if n >= rows), rows)
        length = next((n for n in _LENGTHS if n >= longest), prefixes.shape[1])
        tokens = np.zeros((row_count, length), np.int32)
        tokens[:rows] = prefixes[:, :length]
        padded = np.zeros(row_count, np.int32)
        padded[:rows] = lengths
        logits = _next_logits(config, params, steering, adapter, prefix, tokens, padded)
        scaled = np.asarray(logits, np.float64)[:rows] / temperature
        scaled -= scaled.max(axis=-1, keepdims=True)
        return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))

    return next_log_probs


_prefill = functools.partial(jax.jit, static_argnums=0)(prefill)


@functools.partial(jax.jit, static_argnums=0)
def _next_logits(config, params, steering, adapter, prefix: Prefix, tokens, lengths):
    """Logits [M, V] after tokens[m, :lengths[m]]; an empty prefix is the prompt's own end."""
    positions = prefix.lengths[:, None, None] + jnp.arange(tokens.shape[1])
    hidden, _ = forward(
        config,
        params,
        tokens[None],
        positions,
        steering,
        response=jnp.ones((1, 1, 1), bool),
        prefix=prefix,
        adapter=adapter,
    )
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    chosen = jnp.take_along_axis(hidden[0], last, axis=1)[:, 0]
    chosen = jnp.where((lengths == 0)[:, None], prefix.last_hidden, chosen)
    return next_logits(config, params, chosen)
