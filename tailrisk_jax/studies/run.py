"""The run of a study: draw, weigh, keep, judge, keep, estimate; chunk by chunk.

What is kept is never drawn or judged again: a run that was killed goes on where it stopped, and
ends with the same figures.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge
from tailrisk_jax.models.sharding import current_mesh, off_mesh
from tailrisk_jax.policies import (
    Component,
    Mixture,
    Policy,
    Prompts,
    check_comparable,
    encode,
    is_diluted,
    own_prompts,
)
from tailrisk_jax.rollouts import Draws, Weighed, draw, weigh
from tailrisk_jax.rollouts.score import sequence_log_probs
from tailrisk_jax.studies.analysis import Results, Weighting, analyse, watched_widths
from tailrisk_jax.studies.loop import kept_chunk, planned, run_chunks
from tailrisk_jax.studies.observations import (
    JUDGEMENTS,
    SAMPLES,
    joined,
    judgements_of,
    observations,
    responses,
    samples_of,
)
from tailrisk_jax.studies.progress import Progress
from tailrisk_jax.studies.queries import StudyQuery
from tailrisk_jax.studies.rounds import Chunk, Round, chunks, drawn_by, first_round, next_round
from tailrisk_jax.studies.settings import Settings
from tailrisk_jax.studies.store import KINDS, Store


def run_study(
    target: Policy,
    proposal: Component | Mixture,
    queries: Sequence[StudyQuery],
    judge: Judge,
    settings: Settings,
    *,
    names: Sequence[str] | None = None,
    store: Store | None = None,
    on_progress: Callable[[Progress], Any] = lambda progress: None,
) -> Results:
    """Estimates E_p[score] for every query from draws of the proposal.

    Args:
      proposal: what is drawn from; a mixture has weights for all queries, or a row for each.
      names: of the proposal's components.
      store: where samples and judgements are kept, and found; by default in memory.
      on_progress: called as chunks are drawn and judged, from more than one thread.

    Raises:
      InputError: as `draw_study`.
    """
    samples = draw_study(
        target, proposal, queries, judge, settings, store or Store(), on_progress
    )  # fmt: skip
    weighting = weighting_of(target, proposal, names)
    with off_mesh():
        return analyse(observations(queries, samples), samples, weighting, settings)


def draw_study(
    target: Policy,
    proposal: Component | Mixture,
    queries: Sequence[StudyQuery],
    judge: Judge,
    settings: Settings,
    store: Store,
    on_progress: Callable[[Progress], Any] = lambda progress: None,
) -> pa.Table:
    """All samples of a study with their scores.

    With several processes (`jax.distributed`) each draws chunks of its own, on its own devices,
    into one folder that all see; on a mesh over the devices of all they draw together.

    Raises:
      InputError: as `check_study`, a judge that fails for good, a folder that can't be written.
    """
    prompts = check_study(target, proposal, queries, settings)

    def make(chunk: Chunk) -> pa.Table:
        return samples_of(chunk, queries, *_draw(target, proposal, prompts, chunk, settings))

    def decide(rounds: Sequence[Round], samples: pa.Table) -> Round | None:
        drawn = drawn_by(rounds, len(queries))
        if settings.until is None or not rounds:
            return first_round(len(queries), settings, int(drawn.max(initial=0)))
        widths = watched_widths(observations(queries, samples), settings)
        return next_round(widths, drawn, settings)

    def score(chunk: Chunk, samples: pa.Table) -> pa.Table:
        return judge_chunk(judge, queries, chunk.name, samples, store)

    return run_chunks(
        queries, settings, store, decide, make, score, on_progress, beside=_beside(judge)
    )


def rejudge(
    source: Store,
    queries: Sequence[StudyQuery],
    judge: Judge,
    settings: Settings,
    store: Store,
    on_progress: Callable[[Progress], Any] = lambda progress: None,
) -> pa.Table:
    """The samples of one run, judged anew in another.

    Raises:
      InputError: as `run_study`, or a shard of the source that is missing or damaged.
    """

    def score(chunk: Chunk, samples: pa.Table) -> pa.Table:
        return judge_chunk(judge, queries, chunk.name, samples, store)

    make = lambda chunk: source.need("samples", chunk.name)  # noqa: E731
    return run_chunks(
        queries, settings, store, planned(source.rounds), make, score, on_progress,
        beside=_beside(judge),
    )  # fmt: skip


def rescore(
    source: Store,
    queries: Sequence[StudyQuery],
    target: Policy,
    settings: Settings,
    store: Store,
    on_progress: Callable[[Progress], Any] = lambda progress: None,
) -> pa.Table:
    """The samples and scores of one run, weighed for another target in another.

    Raises:
      InputError: as `rejudge`; token ids that the target doesn't have.
    """
    prompts = check_study(target, target, queries, settings)

    def make(chunk: Chunk) -> pa.Table:
        samples = source.need("samples", chunk.name)
        log_p = _rescored(samples, target, prompts, queries, settings)
        place = samples.schema.get_field_index("log_p")
        return samples.set_column(place, SAMPLES.field("log_p"), pa.array(log_p, pa.float32()))

    def score(chunk: Chunk, samples: pa.Table) -> pa.Table:
        judged = store.read("judgements", chunk.name)
        if judged is None:
            judged = source.need("judgements", chunk.name)
            store.write("judgements", chunk.name, judged)
        return judged

    return run_chunks(queries, settings, store, planned(source.rounds), make, score, on_progress)


def run_kept(
    queries: Sequence[StudyQuery],
    settings: Settings,
    store: Store,
    rounds: Sequence[Round],
    rows: Callable[[Chunk], pa.Table],
) -> pa.Table:
    """Keeps samples and scores that are known already, as a run of its own."""

    def score(chunk: Chunk, samples: pa.Table) -> pa.Table:
        if store.read("judgements", chunk.name) is None:
            store.write("judgements", chunk.name, rows(chunk).select(JUDGEMENTS.names))
        return store.need("judgements", chunk.name)

    def make(chunk: Chunk) -> pa.Table:
        return rows(chunk).select(SAMPLES.names)

    return run_chunks(queries, settings, store, planned(rounds), make, score)


def stored_samples(
    queries: Sequence[StudyQuery], settings: Settings, store: Store
) -> tuple[pa.Table, int]:
    """What a run holds that is drawn and judged, and how many responses are still missing.

    Those of a round of `until` that isn't decided yet can't be known, and don't count.
    """
    parts, missing = _parts(queries, settings, store, KINDS)
    return joined(queries, ((samples, judged) for samples, judged in parts)), missing


def check_finished(
    store: Store,
    queries: Sequence[StudyQuery],
    settings: Settings,
    kinds: Sequence[str] = KINDS,
) -> None:
    """Refuses a run that misses responses, or with them their judgements.

    Raises:
      InputError: it does.
    """
    _, missing = _parts(queries, settings, store, kinds)
    if missing:
        raise InputError(
            f"run {store.folder} misses {missing:,} responses; finish it first with: "
            f"tailrisk resume {store.folder}"
        )


def _parts(
    queries: Sequence[StudyQuery], settings: Settings, store: Store, kinds: Sequence[str]
) -> tuple[list[list[pa.Table]], int]:
    """The shards of each whole chunk, and how many responses others miss."""
    rounds, parts, missing = store.rounds, [], 0
    if settings.until is None or not rounds:
        drawn = drawn_by(rounds, len(queries)).max()
        undecided = first_round(len(queries), settings, int(drawn))
        missing = 0 if undecided is None else int(undecided.count.sum())
    for number, sizes in enumerate(rounds):
        for chunk in chunks(number, sizes, settings.chunk_size):
            part = [kept_chunk(store, kind, chunk, queries) for kind in kinds]
            if all(table is not None for table in part):
                parts.append(part)
            else:
                missing += chunk.size
    return parts, missing


def weighting_of(
    target: Policy, proposal: Component | Mixture, names: Sequence[str] | None = None
) -> Weighting:
    """What the estimators need to know of a proposal."""
    components, weights, per_query = _components(proposal), None, None
    if isinstance(proposal, Mixture):
        weights = np.asarray(proposal.weights)
        if proposal.per_query:
            per_query, weights = weights.tolist(), weights.mean(axis=0)
        weights = weights.tolist()
    return Weighting(
        names=names or [f"component {k}" for k in range(len(components))],
        weights=weights,
        target_index=next((k for k, one in enumerate(components) if one is target), None),
        per_query=per_query,
        diluted=[k for k, one in enumerate(components) if is_diluted(one, target)],
    )


def check_study(
    target: Policy,
    proposal: Component | Mixture,
    queries: Sequence[StudyQuery],
    settings: Settings,
) -> Prompts:
    """The prompts of a study that can be run.

    Raises:
      InputError: policies over different tokens, a prompt that leaves no room for the answer,
        weights for another number of queries.
    """
    check_comparable([target, *_components(proposal)])
    if isinstance(proposal, Mixture):
        proposal.log_alphas(len(queries))
    prompts = encode(target.model, [query.content for query in queries])
    lengths = np.asarray(prompts.mask).sum(axis=1)
    positions = target.model.config.max_positions
    long = np.flatnonzero(lengths + settings.max_new_tokens > positions)
    if len(long):
        raise InputError(
            f"query {queries[long[0]].id!r} has {lengths[long[0]]} tokens, max_new_tokens is "
            f"{settings.max_new_tokens}, and the model has {positions} positions "
            f"({len(long)} such queries); leave them out with --max-prompt-tokens "
            f"{max(positions - settings.max_new_tokens, 0)}, or ask for fewer new tokens"
        )
    for component in _components(proposal):
        for expert in component.experts:
            own_prompts(expert, prompts, settings.max_new_tokens)
    return prompts


def judge_chunk(
    judge: Judge, queries: Sequence[StudyQuery], name: str, samples: pa.Table, store: Store
) -> pa.Table:
    """The judgements of a chunk: those kept, and new ones where there is no score yet."""
    kept = store.read("judgements", name)
    if kept is None:
        again = np.ones(samples.num_rows, bool)
    else:
        again = np.isnan(kept["score"].to_numpy())
        if not again.any():
            return kept
    chosen = samples.filter(pa.array(again))
    new = judgements_of(chosen, judge(responses(chosen, queries)))
    if kept is not None:
        order = np.where(again, len(again) + np.cumsum(again) - 1, np.arange(len(again)))
        new = pa.concat_tables([kept.cast(JUDGEMENTS), new]).take(order)
    store.write("judgements", name, new)
    return new


def _beside(judge: Judge) -> bool:
    """Whether a judge may run in a thread of its own.

    Two threads must not start programs on the same devices of a mesh: these would wait for each
    other in different orders.
    """
    return current_mesh() is None or not getattr(judge, "on_devices", False)


def _components(proposal: Component | Mixture) -> Sequence[Component]:
    return proposal.components if isinstance(proposal, Mixture) else (proposal,)


def _draw(
    target: Policy,
    proposal: Component | Mixture,
    prompts: Prompts,
    chunk: Chunk,
    settings: Settings,
) -> tuple[Draws, Weighed]:
    """Draws a chunk; queries without samples fill it up to the shape of the round's others."""
    padding = chunk.width - len(chunk.queries)
    picked = np.pad(chunk.queries, (0, padding), mode="wrap")
    first, count = (np.pad(array, (0, padding)) for array in (chunk.first, chunk.count))
    if isinstance(proposal, Mixture):
        proposal = proposal.for_queries(picked)
    draws = draw(
        jax.random.key(settings.seed), proposal, prompts[picked], count, settings.max_new_tokens,
        first=first, batch_size=settings.batch_size,
    )  # fmt: skip
    rows = settings.score_batch_size or settings.batch_size
    return draws, weigh(target, proposal, draws, batch_size=rows)


def _rescored(
    samples: pa.Table,
    target: Policy,
    prompts: Prompts,
    queries: Sequence[StudyQuery],
    settings: Settings,
) -> np.ndarray:
    """log p of kept samples under a policy, row by row."""
    index = {query.id: q for q, query in enumerate(queries)}
    rows = np.asarray([index[name] for name in samples["query_id"].to_pylist()])
    picked, own, counts = np.unique(rows, return_inverse=True, return_counts=True)
    order = np.argsort(own, kind="stable")
    place = np.empty_like(own)
    place[order] = np.arange(len(own)) - np.repeat(np.cumsum(counts) - counts, counts)
    tokens = np.zeros((len(picked), counts.max(), settings.max_new_tokens), np.int32)
    mask, ended = np.zeros(tokens.shape, bool), np.zeros(tokens.shape[:2], bool)
    for q, n, response in zip(own, place, samples["tokens"].to_pylist(), strict=True):
        tokens[q, n, : len(response)], mask[q, n, : len(response)] = response, True
    ended[own, place] = samples["ended"].to_numpy()
    draws = Draws(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        ended=jnp.asarray(ended),
        labels=jnp.zeros(tokens.shape[:2], jnp.int32),
        drawn_log_probs=jnp.zeros(tokens.shape, jnp.float32),
        prompts=prompts[picked],
        end_ids=target.model.config.end_ids,
    )
    scored = sequence_log_probs([target], draws, batch_size=settings.batch_size)[0]
    return scored[own, place]
