"""What sampling returns."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.policies import Prompts


@struct.dataclass
class Draws:
    """N responses to each of Q queries, as they were drawn.

    Attributes:
      tokens: [Q, N, T]; 0 after a response's end.
      mask: True for the tokens of the response, its end token included, [Q, N, T].
      ended: False where the response was cut at T tokens, [Q, N].
      labels: the mixture component that drew each response (0 for a single policy), [Q, N].
      drawn_log_probs: log-probability of each token under the policy that drew it, recorded
        while decoding; 0 where masked, [Q, N, T].
      prompts: what was answered.
      tokenizer, end_ids: for `text`.
    """

    tokens: Int[Array, "Q N T"]
    mask: Bool[Array, "Q N T"]
    ended: Bool[Array, "Q N"]
    labels: Int[Array, "Q N"]
    drawn_log_probs: Float[Array, "Q N T"]
    prompts: Prompts
    tokenizer: Any = struct.field(pytree_node=False, default=None)
    end_ids: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @functools.cached_property
    def text(self) -> list[list[str]]:
        """Q lists of N strings, end tokens left out; token ids where there is no tokenizer."""
        tokens, mask = np.asarray(self.tokens), np.asarray(self.mask)
        mask = mask & ~np.isin(tokens, self.end_ids)
        rows = [
            [row[kept].tolist() for row, kept in zip(*query, strict=True)]
            for query in zip(tokens, mask, strict=True)
        ]
        if self.tokenizer is None:
            return [[" ".join(map(str, row)) for row in query] for query in rows]
        return [self.tokenizer.batch_decode(query, skip_special_tokens=True) for query in rows]


@struct.dataclass
class Rollouts(Draws):
    """Draws with their log-probability under the policy or mixture that they were sampled from.

    Attributes:
      token_log_probs: log q(y_t | x, y_<t), 0 where masked, [Q, N, T].
    """

    token_log_probs: Float[Array, "Q N T"] = None  # type: ignore[assignment]  # always given

    @property
    def log_prob(self) -> Float[Array, "Q N"]:
        """log q(y | x), the sum over the response's tokens."""
        return jnp.sum(self.token_log_probs, axis=-1)
