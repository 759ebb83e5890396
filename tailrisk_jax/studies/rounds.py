"""Rounds of sampling, and the chunks that a round is drawn in."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from tailrisk_jax.studies.settings import Settings

LEAST = 1 / 8  # of N, the fewest that a query is given


@dataclasses.dataclass(frozen=True)
class Round:
    """Samples first .. first + count - 1 of each query, [Q]; a count of 0 leaves a query out."""

    first: Int[np.ndarray, " Q"]
    count: Int[np.ndarray, " Q"]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a round: what is drawn in one call and kept in one file.

    Attributes:
      name: unique in a run, and sorts in the order of drawing.
      queries: indices, [q].
      first, count: samples of each, [q].
      width: queries in the largest chunk with as many samples, whose shape all share.
    """

    name: str
    queries: Int[np.ndarray, " q"]
    first: Int[np.ndarray, " q"]
    count: Int[np.ndarray, " q"]
    width: int

    @property
    def size(self) -> int:
        """Responses in the chunk."""
        return int(self.count.sum())

    def holds(self, table: pa.Table, ids: Sequence[str]) -> bool:
        """Whether a table has a row for each response of the chunk, in order.

        Args:
          ids: of all queries.
        """
        wanted = [
            (ids[q], first + n)
            for q, first, count in zip(self.queries, self.first, self.count, strict=True)
            for n in range(count)
        ]
        columns = table["query_id"].to_pylist(), table["sample"].to_pylist()
        return list(zip(*columns, strict=True)) == wanted


def chunks(number: int, sizes: Round, chunk_size: int) -> Iterator[Chunk]:
    """Cuts a round into chunks of about `chunk_size` responses.

    Depends on the round alone, never on devices or batches, so that a run can be taken up
    anywhere. Queries with the same count stand together, in chunks of one shape.
    """
    index = 0
    for count in np.unique(sizes.count[sizes.count > 0])[::-1].tolist():
        queries = np.flatnonzero(sizes.count == count)
        width = min(max(1, chunk_size // count), len(queries))
        width = math.ceil(len(queries) / math.ceil(len(queries) / width))
        span = math.ceil(count / math.ceil(count / chunk_size))
        for row in range(0, len(queries), width):
            picked = queries[row : row + width]
            for start in range(0, count, span):
                part = np.full(len(picked), min(span, count - start))
                name = f"{number:03d}-{index:05d}"
                yield Chunk(name, picked, sizes.first[picked] + start, part, width)
                index += 1


def first_round(queries: int, settings: Settings, drawn: int = 0) -> Round | None:
    """N (with replicates R N) samples of every query, less those drawn; None for no more."""
    count = settings.num_samples * settings.replicates - drawn
    if count <= 0:
        return None
    return Round(np.full(queries, drawn), np.full(queries, count))


def next_round(
    widths: Float[np.ndarray, " Q"], drawn: Int[np.ndarray, " Q"], settings: Settings
) -> Round | None:
    """What to draw for the queries that aren't precise yet; None where all are, or at the limit.

    "equal" gives each unfinished query N more. "variance" gives each what it still needs: a width
    falls with one over the root of the samples, so

        need = drawn ((width / until)^2 - 1),

    rounded up to N times a power of two (an eighth at least), at most as many as it has, since
    the width is a guess itself. Both look at earlier rounds alone, so an interval that may be
    watched keeps its coverage.

    Args:
      widths: of the watched intervals, as a share of the estimate; inf where it is unknown.
    """
    assert settings.until is not None
    left = settings.max_samples - drawn
    unfinished = ~(widths <= settings.until) & (left > 0)
    if not unfinished.any():
        return None
    count = np.full(len(drawn), settings.num_samples)
    if settings.allocation == "variance":
        excess = np.where(unfinished, (widths / settings.until) ** 2 - 1, 1.0)
        need = np.clip(drawn * excess, LEAST * settings.num_samples, drawn)
        doublings = np.ceil(np.log2(need / settings.num_samples))
        count = np.ceil(settings.num_samples * 2.0**doublings).astype(int)
    return Round(drawn.copy(), np.where(unfinished, np.minimum(count, left), 0))


def drawn_by(rounds: Sequence[Round], queries: int) -> Int[np.ndarray, " Q"]:
    """Samples of each query in all rounds."""
    return sum((sizes.count for sizes in rounds), np.zeros(queries, int))
