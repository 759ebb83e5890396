"""Several runs of one study as one."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from tailrisk_jax.errors import InputError
from tailrisk_jax.studies.analysis import Weighting
from tailrisk_jax.studies.folder import Study, check_same, open_store, read_study
from tailrisk_jax.studies.queries import StudyQuery
from tailrisk_jax.studies.rounds import Chunk, Round
from tailrisk_jax.studies.run import check_finished, run_kept, stored_samples
from tailrisk_jax.studies.store import Store


@dataclasses.dataclass(frozen=True)
class Merged:
    """What `merge` makes of runs.

    Attributes:
      study: of all of them; the settings are the first one's, with the samples of all.
      samples: with their scores, renumbered so that a later run's follow an earlier one's.
      sizes: of the one round that they make.
    """

    study: Study
    samples: pa.Table
    sizes: Round


def merge(folders: Sequence[Path]) -> Merged:
    """Runs of one estimand and proposal, over other queries or under other seeds.

    Raises:
      InputError: fewer than two runs, ones that differ in more than that, an unfinished one, ones
        that were stopped by `until` (joined, their intervals would no longer hold), two queries of
        one id, or the same seed twice for one query.
    """
    if len(folders) < 2:
        raise InputError(f"{len(folders)} run is nothing to merge; give two or more")
    studies = [read_study(folder) for folder in folders]
    first = studies[0]
    drawn: dict[str, int] = {}
    seeds: dict[str, list[int]] = {}
    queries: dict[str, StudyQuery] = {}
    parts = []
    for folder, study in zip(folders, studies, strict=True):
        if study.settings.until is not None:
            raise InputError(f"run {folder} was stopped by --until; such runs can't be merged")
        check_same(folder, _of_all(first), _of_all(study), "Merge runs of one study")
        store = open_store(folder)
        check_finished(store, study.queries, study.settings)
        samples, _ = stored_samples(study.queries, study.settings, store)
        for query in study.queries:
            if queries.setdefault(query.id, query).content != query.content:
                raise InputError(
                    f"run {folder} has another query named {query.id!r} than one before it; "
                    "give the queries ids of their own"
                )
            own, known = _seeds(study, query.id), seeds.setdefault(query.id, [])
            if set(own) & set(known):
                raise InputError(
                    f"run {folder} has the same draws of query {query.id!r} as one before it "
                    f"(seed {min(set(own) & set(known))}); merge runs of different seeds"
                )
            known += own
        names = samples["query_id"].to_pylist()
        offsets = np.asarray([drawn.get(name, 0) for name in names], np.int32)
        numbers = samples["sample"].to_numpy() + offsets
        place = samples.schema.get_field_index("sample")
        parts.append(samples.set_column(place, "sample", pa.array(numbers, pa.int32())))
        for name, count in zip(*np.unique(names, return_counts=True), strict=True):
            drawn[str(name)] = drawn.get(str(name), 0) + int(count)
    counts = np.asarray([drawn[name] for name in queries])
    whole = pa.concat_tables(parts)
    index = {name: q for q, name in enumerate(queries)}
    rows = np.asarray([index[name] for name in whole["query_id"].to_pylist()])
    study = dataclasses.replace(
        first,
        weighting=_weighting(studies, list(queries)),
        queries=list(queries.values()),
        settings=dataclasses.replace(first.settings, num_samples=int(counts.max()), replicates=1),
        origin={
            "command": "merge",
            "seeds": seeds,
            "samples": [part.num_rows for part in parts],
        },
    )
    order = np.lexsort((whole["sample"].to_numpy(), rows))
    return Merged(study, whole.take(order), Round(np.zeros_like(counts), counts))


def keep_merged(merged: Merged, store: Store) -> pa.Table:
    """Writes the shards of a merged run."""
    counts = merged.sizes.count
    starts = np.cumsum(counts) - counts

    def rows(chunk: Chunk) -> pa.Table:
        ranges = [
            np.arange(starts[q] + first, starts[q] + first + count)
            for q, first, count in zip(chunk.queries, chunk.first, chunk.count, strict=True)
        ]
        return merged.samples.take(np.concatenate(ranges))

    queries, settings = merged.study.queries, merged.study.settings
    return run_kept(queries, settings, store, [merged.sizes], rows)


def _seeds(study: Study, query: str) -> list[int]:
    """Of all draws of a query in a run, which may be made from other runs."""
    origin = study.origin
    while origin is not None:
        if "seeds" in origin:
            return origin["seeds"][query]
        origin = origin["origin"]
    return [study.settings.seed]


def _weighting(studies: Sequence[Study], names: Sequence[str]) -> Weighting:
    """Of the queries of all studies, which have one proposal."""
    first = studies[0].weighting
    if first.per_query is None:
        return first
    rows = {
        query.id: row
        for study in studies
        for query, row in zip(study.queries, study.weighting.per_query or (), strict=True)
    }
    per_query = [rows[name] for name in names]
    mean = np.mean(per_query, axis=0).tolist()
    return dataclasses.replace(first, weights=mean, per_query=per_query)


def _of_all(study: Study) -> Study:
    """The study without what runs that are merged may differ in."""
    settings = dataclasses.replace(study.settings, seed=0, num_samples=1, replicates=1)
    return dataclasses.replace(study, settings=settings, queries=[], origin=None)
