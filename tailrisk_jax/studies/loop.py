"""The loop of every run: round by round, chunk by chunk, make, keep, score, keep.

Several processes share it in one of two ways. Where each has devices of its own, each makes chunks
of its own. On a mesh over the devices of all, all make every chunk together, and the first reads,
decides, keeps and scores.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jax.experimental import multihost_utils

from tailrisk_jax.errors import InputError
from tailrisk_jax.models.sharding import current_mesh, off_mesh
from tailrisk_jax.studies.observations import joined
from tailrisk_jax.studies.progress import Progress, Tally
from tailrisk_jax.studies.queries import StudyQuery
from tailrisk_jax.studies.rounds import Chunk, Round, chunks
from tailrisk_jax.studies.settings import Settings
from tailrisk_jax.studies.store import Store


def run_chunks(
    queries: Sequence[StudyQuery],
    settings: Settings,
    store: Store,
    decide: Callable[[Sequence[Round], pa.Table], Round | None],
    make: Callable[[Chunk], pa.Table],
    score: Callable[[Chunk, pa.Table], pa.Table],
    on_progress: Callable[[Progress], Any] = lambda progress: None,
    *,
    beside: bool = True,
) -> pa.Table:
    """Samples with their scores, of all rounds, in every process.

    Args:
      decide: given the rounds so far and their samples, the next round; None after the last.
      make: the samples of a chunk.
      score: the judgements of a chunk's samples; keeps them.
      beside: score in a thread beside the one that makes the next chunk.

    Raises:
      InputError: what `make` and `score` raise, a folder that can't be written, several processes
        without one.
    """
    if store.folder is None and jax.process_count() > 1:
        raise InputError(
            f"{jax.process_count()} processes share a run through a folder that all see; give the "
            "study a Store in one"
        )
    tally = Tally(len(queries), on_progress)
    mesh, process = current_mesh(), jax.process_index()
    together = mesh is not None and mesh.is_multi_process

    def drawn(chunk: Chunk) -> pa.Table | None:
        """The samples, kept or made; None where the first process sees to them alone."""
        first = process == 0 or not together
        kept = kept_chunk(store, "samples", chunk, queries) if first else None
        if together and _first_says(kept is not None):
            return kept
        samples = make(chunk) if kept is None else kept
        if not first:
            return None
        if kept is None:
            store.write("samples", chunk.name, samples)
        tally.drew(samples, kept is None)
        return samples

    def judged(chunk: Chunk, samples: pa.Table) -> None:
        with off_mesh():
            kept_chunk(store, "judgements", chunk, queries)  # or else they are set aside
            tally.judged(chunk, samples, score(chunk, samples))

    if process == 0:
        store.clean()
    rounds, done = store.rounds, list[Chunk]()
    _meet("begin")  # when all have read the rounds, and before the first decides another
    whole = joined(queries, [])
    for number in itertools.count():
        if number == len(rounds):
            if process == 0:
                with off_mesh():
                    sizes = decide(rounds, whole)
                if sizes is not None:
                    store.add_round(sizes)
            _meet(f"decided {number}")
            rounds = store.rounds
        if number == len(rounds):
            return whole
        pieces = list(chunks(number, rounds[number], settings.chunk_size))
        tally.plan(sum(chunk.size for chunk in pieces))
        own = pieces if together else pieces[process :: jax.process_count()]
        with _beside() if beside else _at_once() as submit:
            for chunk in own:
                samples = drawn(chunk)
                if samples is not None:
                    submit(judged, chunk, samples)
        _meet(f"drawn {number}")
        store.refresh()
        done += pieces
        whole = joined(
            queries,
            ((store.need("samples", c.name), store.need("judgements", c.name)) for c in done),
        )
    raise AssertionError("unreachable")


def kept_chunk(
    store: Store, kind: str, chunk: Chunk, queries: Sequence[StudyQuery]
) -> pa.Table | None:
    """A shard of the responses that the chunk has now, or None."""
    table = store.read(kind, chunk.name)
    if table is None or chunk.holds(table, [query.id for query in queries]):
        return table
    store.set_aside(kind, chunk.name, "holds other responses than rounds.json has it")
    return None


def planned(rounds: Sequence[Round]) -> Callable[[Sequence[Round], pa.Table], Round | None]:
    """Decides for rounds that are known beforehand."""
    return lambda so_far, _: rounds[len(so_far)] if len(so_far) < len(rounds) else None


@contextmanager
def _beside() -> Iterator[Callable[..., None]]:
    """Runs what is submitted, in order, in one thread beside this one; waits for it at the end.

    The first error there is raised here, at the next submission or the end.
    """
    pool, pending = ThreadPoolExecutor(1), list[Future]()

    def submit(function, *arguments):
        while pending and pending[0].done():
            pending.pop(0).result()
        pending.append(pool.submit(function, *arguments))

    wait = True
    try:
        yield submit
        for future in pending:
            future.result()
    except KeyboardInterrupt:
        wait = False  # a judge may itself be waiting for its server
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)


@contextmanager
def _at_once() -> Iterator[Callable[..., None]]:
    yield lambda function, *arguments: function(*arguments)


def _first_says(said: bool) -> bool:
    """What the first process says, in all."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(said)))


def _meet(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
