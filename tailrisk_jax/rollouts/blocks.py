"""How a call on [Q, N] responses is cut into blocks of rows that run on the device at once.

Nothing here changes a draw or, beyond float rounding, a log-probability.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from tailrisk_jax.models import ModelConfig
from tailrisk_jax.models.sharding import sample_shards

TURNS = 32  # samples that a decoding row draws one after another, at most
MEMORY_BYTES = 1 << 30  # what a block's caches and activations may take of a device by default
CPU_ROWS = 64  # more take no less time each, and a small model's activations leave the cache


def rows_that_fit(row_bytes: int) -> int:
    """How many responses run at once by default; those that a mesh shares out, on each device."""
    rows = max(1, MEMORY_BYTES // row_bytes) * sample_shards()
    return min(rows, CPU_ROWS) if jax.default_backend() == "cpu" else rows


def decode_row_bytes(config: ModelConfig, length: int, itemsize: int) -> int:
    """Memory of one decoding row: its keys and values, a few rows of logits, what it draws."""
    cache = 2 * config.num_layers * length * config.num_kv_heads * config.head_dim * itemsize
    return cache + 3 * 4 * config.vocab_size + 2 * 4 * TURNS * length


def score_row_bytes(config: ModelConfig, prompt: int, length: int, itemsize: int) -> int:
    """Memory of one row in a scoring pass: attention scores, activations, a few rows of logits."""
    scores = 2 * 4 * config.num_heads * length * (prompt + length)
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    activations = length * itemsize * (kv + 3 * config.mlp_width + 6 * config.width)
    return scores + activations + 3 * 4 * config.vocab_size


class Block(NamedTuple):
    """The query and sample indices of one block; beyond those that count they wrap around.

    Attributes:
      queries: [q].
      samples: [slots * turns]; turn k of slot j is entry k * slots + j.
      kept: how many of each count.
      slots: rows of each query on the device at once; one runs `turns` samples after another.
    """

    queries: np.ndarray
    samples: np.ndarray
    kept: tuple[int, int]
    slots: int


class Cut(NamedTuple):
    """The shape of blocks: `group` queries by `span` samples, in `slots` rows of each query, which
    run up to `turns` samples each."""

    group: int
    span: int
    slots: int
    turns: int


def cut(queries: int, samples: int, rows: int, *, turns: int = 1) -> Cut:
    """The shape of blocks of at most `rows` rows that cover [Q, N].

    The number of slots is a power of two, so that calls with slightly different N, such as the
    components of a mixture, share compiled code. Where slots take several turns, the samples are
    spread over enough blocks for all workers.
    """
    per_query = max(rows // queries, min(CPU_ROWS, rows))
    slots = min(1 << math.floor(math.log2(per_query)), 1 << math.ceil(math.log2(samples)))
    turns = 1 if queries * samples <= rows else turns
    groups = math.ceil(queries / max(rows // slots, 1))
    group = math.ceil(queries / groups)
    pieces = math.ceil(samples / (slots * turns))
    if turns > 1:
        pieces = max(pieces, min(math.ceil(_workers() / groups), math.ceil(samples / slots)))
    return Cut(group, math.ceil(samples / pieces), slots, turns)


def blocks(queries: int, samples: int, rows: int, *, turns: int = 1) -> list[Block]:
    """The blocks of `cut`, queries outermost."""
    group, span, slots, turns = cut(queries, samples, rows, turns=turns)
    return [
        Block(
            queries=np.arange(q, q + group) % queries,
            samples=np.arange(n, n + slots * turns) % samples,
            kept=(min(group, queries - q), min(span, samples - n)),
            slots=slots,
        )
        for q in range(0, queries, group)
        for n in range(0, samples, span)
    ]


def run_blocks(
    blocks: Sequence[Block], start: Callable[[np.ndarray], Callable[[Block], Any]]
) -> Iterator[tuple[Block, Any]]:
    """Runs every block and yields it with what came out.

    A CPU runs as many blocks at a time as it has cores, since the operations of a small model use
    one core each. Elsewhere, and on a mesh, blocks are dispatched one after the other.

    Args:
      start: given the query indices that a run of blocks shares, prefills them and returns the
        function that runs one of these blocks.
    """
    workers = _workers()
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Block, Callable[[], Any]]] = deque()

        def submit(run, block):
            if workers == 1:
                out = run(block)  # dispatched, not waited for
                return lambda: out
            return pool.submit(lambda: jax.block_until_ready(run(block))).result

        for _, group in itertools.groupby(blocks, key=lambda block: block.queries[0]):
            shared = list(group)
            run = start(shared[0].queries)
            for block in shared:
                pending.append((block, submit(run, block)))
                if len(pending) > 2 * workers:
                    first, result = pending.popleft()
                    yield first, result()
        yield from ((block, result()) for block, result in pending)


def _workers() -> int:
    parallel = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty
    return (os.cpu_count() or 1) if parallel else 1
