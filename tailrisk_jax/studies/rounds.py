"""Rounds of sampling, and the chunks that a round is drawn in."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from tailrisk_jax.studies.settings import Settings

LEAST_SHARE = 0.1  # of an equal share, which every unfinished query gets: variances may be wrong


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
      width: queries in the largest chunk of the round, whose shape all share.
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


def chunks(number: int, sizes: Round, chunk_size: int) -> Iterator[Chunk]:
    """Cuts a round into chunks of about `chunk_size` responses.

    Depends on the round alone, never on devices or batches, so that a run can be taken up
    anywhere. Queries with like counts stand together, and their chunks have one shape.
    """
    order = np.argsort(-sizes.count, kind="stable")
    order = order[sizes.count[order] > 0]
    if not len(order):
        return
    largest = int(sizes.count[order[0]])
    width = min(max(1, chunk_size // largest), len(order))
    width = math.ceil(len(order) / math.ceil(len(order) / width))
    index = 0
    for row in range(0, len(order), width):
        picked = order[row : row + width]
        count = sizes.count[picked]
        span = math.ceil(count.max() / math.ceil(count.max() / chunk_size))
        for start in range(0, count.max(), span):
            part = np.clip(count - start, 0, span)
            yield Chunk(
                f"{number:03d}-{index:05d}", picked, sizes.first[picked] + start, part, width
            )
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

    A round has N samples for each unfinished query. "equal" gives each N. "variance" shares the
    same sum in proportion to what each still needs, as a width falls with one over the root of
    the samples: need = drawn ((width / until)^2 - 1), no more than are left to `max_samples`. Both
    look at earlier rounds alone, so an interval that may be watched keeps its coverage.

    Args:
      widths: of the watched intervals, as a share of the estimate; inf where it is unknown.
    """
    assert settings.until is not None
    left = settings.max_samples - drawn
    unfinished = ~(widths <= settings.until) & (left > 0)
    if not unfinished.any():
        return None
    share = np.where(unfinished, float(settings.num_samples), 0.0)
    if settings.allocation == "variance":
        with np.errstate(invalid="ignore"):
            need = drawn * ((widths / settings.until) ** 2 - 1)
        need = np.where(unfinished, np.fmin(need, left), 0.0)
        least = np.where(unfinished, LEAST_SHARE * settings.num_samples, 0.0)
        share = np.fmax(share.sum() * need / need.sum(), least)
    count = np.minimum(np.ceil(share).astype(int), np.maximum(left, 0))
    return Round(drawn.copy(), count)


def drawn_by(rounds: Sequence[Round], queries: int) -> Int[np.ndarray, " Q"]:
    """Samples of each query in all rounds."""
    return sum((sizes.count for sizes in rounds), np.zeros(queries, int))
