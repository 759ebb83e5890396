"""How a call on [Q, N] responses is cut into blocks of rows that run on the device at once.

Nothing here changes a draw or, beyond float rounding, a log-probability.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from tailrisk_jax.models import ModelConfig

MEMORY_BYTES = 1 << 30  # what a block's caches and activations may take by default
CPU_ROWS = 128  # beyond it a small model's activations leave a CPU's cache


def rows_that_fit(row_bytes: int) -> int:
    """How many responses run at once by default."""
    rows = max(1, MEMORY_BYTES // row_bytes)
    return min(rows, CPU_ROWS) if jax.default_backend() == "cpu" else rows


def decode_row_bytes(config: ModelConfig, length: int, itemsize: int) -> int:
    """Memory of one decoding row: keys and values of its response, and a few rows of logits."""
    cache = 2 * config.num_layers * length * config.num_kv_heads * config.head_dim * itemsize
    return cache + 3 * 4 * config.vocab_size


def score_row_bytes(config: ModelConfig, prompt: int, length: int, itemsize: int) -> int:
    """Memory of one row in a scoring pass: attention scores, activations, a few rows of logits."""
    scores = 2 * 4 * config.num_heads * length * (prompt + length)
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    activations = length * itemsize * (kv + 3 * config.mlp_width + 6 * config.width)
    return scores + activations + 3 * 4 * config.vocab_size


class Block(NamedTuple):
    """The query and sample indices of one block; beyond the end they wrap around.

    Attributes:
      queries: [q].
      samples: [n].
      kept: how many of each are not wrapped.
    """

    queries: np.ndarray
    samples: np.ndarray
    kept: tuple[int, int]


def blocks(queries: int, samples: int, rows: int) -> Iterator[Block]:
    """Blocks of one shape, of at most `rows` rows, that cover [Q, N], queries outermost.

    The number of samples in a block is a power of two, so that calls with slightly different N,
    such as the components of a mixture, share compiled code.
    """
    per_query = max(rows // queries, min(64, rows))
    size = min(1 << math.floor(math.log2(per_query)), 1 << math.ceil(math.log2(samples)))
    group = math.ceil(queries / math.ceil(queries / max(rows // size, 1)))
    for q in range(0, queries, group):
        for n in range(0, samples, size):
            yield Block(
                queries=np.arange(q, q + group) % queries,
                samples=np.arange(n, n + size) % samples,
                kept=(min(group, queries - q), min(size, samples - n)),
            )


def run_blocks(
    queries: int, samples: int, rows: int, start: Callable[[np.ndarray], Callable[[Block], Any]]
) -> Iterator[tuple[Block, Any]]:
    """Runs every block and yields it with what came out.

    A CPU runs as many blocks at a time as it has cores, since the operations of a small model use
    one core each. Elsewhere, and on a mesh, blocks are dispatched one after the other.

    Args:
      start: given the query indices that a run of blocks shares, prefills them and returns the
        function that runs one of these blocks.
    """
    serial = jax.default_backend() != "cpu" or not jax.sharding.get_abstract_mesh().empty
    everything = blocks(queries, samples, rows)
    with ThreadPoolExecutor(1 if serial else os.cpu_count()) as pool:
        for _, group in itertools.groupby(everything, key=lambda block: block.queries[0]):
            shared = list(group)
            run = start(shared[0].queries)
            if serial:
                yield from ((block, run(block)) for block in shared)
            else:
                done = pool.map(lambda block, run=run: jax.block_until_ready(run(block)), shared)
                yield from zip(shared, done, strict=True)
