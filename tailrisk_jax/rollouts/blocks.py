"""How a call on [Q, N] responses is cut into blocks of rows that run on the device at once."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from tailrisk_jax.models import ModelConfig

MEMORY_BYTES = 1 << 29  # what the blocks of one call may take by default, beside the parameters


class Block(NamedTuple):
    """A slice of the queries and one of the samples; both may reach past the end."""

    queries: slice
    samples: slice


def decode_row_bytes(config: ModelConfig, length: int, itemsize: int) -> int:
    """Memory of one decoding row: keys and values of its response, and a few rows of logits."""
    cache = 2 * config.num_layers * length * config.num_kv_heads * config.head_dim * itemsize
    return cache + 3 * 4 * config.vocab_size


def score_row_bytes(config: ModelConfig, prompt: int, length: int, itemsize: int) -> int:
    """Memory of one row in a scoring pass: attention scores and one layer's activations."""
    scores = 2 * 4 * config.num_heads * length * (prompt + length)
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return scores + length * itemsize * (kv + 3 * config.mlp_width + 6 * config.width)


def block_shape(queries: int, samples: int, rows: int) -> tuple[int, int]:
    """Queries and samples per block of at most `rows` rows (one at least).

    The number of samples is a power of two, so that calls with slightly different N, such as
    the components of a mixture, share compiled code.
    """
    per_query = max(rows // queries, min(64, rows), 1)
    size = 1 << math.floor(math.log2(per_query))
    size = min(size, 1 << math.ceil(math.log2(samples)))
    count = math.ceil(queries / max(rows // size, 1))
    return math.ceil(queries / count), size


def blocks(queries: int, samples: int, shape: tuple[int, int]) -> Iterator[Block]:
    """The blocks of one shape that cover [Q, N]."""
    for q in range(0, queries, shape[0]):
        for n in range(0, samples, shape[1]):
            yield Block(slice(q, q + shape[0]), slice(n, n + shape[1]))
