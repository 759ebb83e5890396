"""What was drawn and how it was judged: tables on disk, arrays for the estimators.

Samples are one row per response, in any order; judgements too. An `Observations` has them as
[Q, N] arrays, with `present` False where a query has fewer samples than another.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from tailrisk_jax.judges import Judgements, Response
from tailrisk_jax.rollouts import Draws, Weighed
from tailrisk_jax.studies.queries import StudyQuery
from tailrisk_jax.studies.rounds import Chunk

SAMPLES = pa.schema(
    [
        ("query_id", pa.string()),
        ("sample", pa.int32()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("ended", pa.bool_()),
        ("component", pa.int32()),
        ("drawn_log_prob", pa.float32()),
        ("log_p", pa.float32()),
        ("log_q", pa.float32()),
        ("component_log_q", pa.list_(pa.float32())),
    ]
)
JUDGEMENTS = pa.schema(
    [
        ("query_id", pa.string()),
        ("sample", pa.int32()),
        ("score", pa.float64()),
        ("raw", pa.string()),
        ("error", pa.string()),
    ]
)

EMPTY = pa.unify_schemas([SAMPLES, JUDGEMENTS]).empty_table()


@dataclasses.dataclass(frozen=True)
class Observations:
    """All that the estimators are given, and what it rests on.

    Attributes:
      queries: Q of them.
      scores: NaN where unscored or not present.
      log_p, log_q: log-probabilities under the target and the proposal.
      component_log_q: under each component of the proposal.
      components: which component drew each response.
      lengths: tokens, the end token included.
      ended: False where the response was cut.
      rescore_noise: |log q_k decoded - log q_k scored| for the component that drew.
      present: False where a query has no such sample.
    """

    queries: Sequence[StudyQuery]
    scores: Float[np.ndarray, "Q N"]
    log_p: Float[np.ndarray, "Q N"]
    log_q: Float[np.ndarray, "Q N"]
    component_log_q: Float[np.ndarray, "K Q N"]
    components: Int[np.ndarray, "Q N"]
    lengths: Int[np.ndarray, "Q N"]
    ended: Bool[np.ndarray, "Q N"]
    rescore_noise: Float[np.ndarray, "Q N"]
    present: Bool[np.ndarray, "Q N"]

    @property
    def log_weights(self) -> Float[np.ndarray, "Q N"]:
        """log w = log p - log q."""
        return self.log_p - self.log_q


def samples_of(
    chunk: Chunk, queries: Sequence[StudyQuery], draws: Draws, weighed: Weighed
) -> pa.Table:
    """The rows of one chunk, query by query; what was drawn beyond its queries is left out."""
    present = np.arange(draws.tokens.shape[1]) < chunk.count[:, None]
    kept = lambda array: np.asarray(array)[: len(present)][present]  # noqa: E731
    lengths = kept(draws.mask).sum(axis=-1)
    numbers = chunk.first[:, None] + np.arange(present.shape[1])
    names = np.asarray([queries[q].id for q in chunk.queries], object)
    text = (text for texts, n in zip(draws.text, chunk.count, strict=False) for text in texts[:n])
    columns: dict[str, Any] = {
        "query_id": np.repeat(names, chunk.count),
        "sample": kept(numbers),
        "text": list(text),
        "tokens": [row[:n] for row, n in zip(kept(draws.tokens), lengths, strict=True)],
        "ended": kept(draws.ended),
        "component": kept(draws.labels),
        "drawn_log_prob": kept(draws.drawn_log_probs).sum(axis=-1, dtype=np.float64),
        "log_p": kept(weighed.log_p),
        "log_q": kept(weighed.log_q),
        "component_log_q": np.stack([kept(one) for one in weighed.component_log_probs], 1).tolist(),
    }
    return pa.table({name: pa.array(columns[name], SAMPLES.field(name).type) for name in columns})


def responses(samples: pa.Table, queries: Sequence[StudyQuery]) -> list[Response]:
    """What a judge is given."""
    by_id = {query.id: query for query in queries}
    columns = (samples[name].to_pylist() for name in ("query_id", "text", "tokens", "ended"))
    return [
        Response(name, by_id[name].content, text, tuple(tokens), ended, by_id[name].metadata)
        for name, text, tokens, ended in zip(*columns, strict=True)
    ]


def judgements_of(samples: pa.Table, judged: Judgements) -> pa.Table:
    """A judge's rows for these samples."""
    scores = np.asarray(judged.scores, np.float64)
    columns = {
        "query_id": samples["query_id"],
        "sample": samples["sample"],
        "score": pa.array(scores, from_pandas=False),
        "raw": list(judged.raw),
        "error": list(judged.errors),
    }
    return pa.table(columns, schema=JUDGEMENTS)


def joined(queries: Sequence[StudyQuery], parts: Iterable[tuple[pa.Table, pa.Table]]) -> pa.Table:
    """Chunks' samples with their judgements, as one table in the order of queries and samples."""
    tables = [
        pa.table(
            {name: samples[name] for name in samples.column_names}
            | {name: judged[name] for name in ("score", "raw", "error")}
        )
        for samples, judged in parts
    ]
    whole = pa.concat_tables(tables) if tables else EMPTY
    rows, numbers = _where(queries, whole)
    return whole.take(np.lexsort((numbers, rows)))


def observations(queries: Sequence[StudyQuery], samples: pa.Table) -> Observations:
    """The arrays of samples with their scores, in any order."""
    rows, numbers = _where(queries, samples)
    shape = len(queries), int(numbers.max(initial=-1)) + 1

    def place(values: np.ndarray, fill: Any = 0) -> np.ndarray:
        whole = np.full(shape + values.shape[1:], fill, values.dtype)
        whole[rows, numbers] = values
        return whole

    column = lambda name: samples[name].to_numpy()  # noqa: E731
    offsets = samples["tokens"].combine_chunks().offsets.to_numpy()
    own = column("component")
    component_log_q = np.stack(column("component_log_q"))
    drawn = np.take_along_axis(component_log_q, own[:, None], 1)[:, 0]
    return Observations(
        queries=queries,
        scores=place(column("score"), np.nan),
        log_p=place(column("log_p")),
        log_q=place(column("log_q")),
        component_log_q=np.moveaxis(place(component_log_q), -1, 0),
        components=place(own),
        lengths=place(np.diff(offsets)),
        ended=place(column("ended")),
        rescore_noise=place(np.abs(column("drawn_log_prob") - drawn)),
        present=place(np.ones(len(rows), bool)),
    )


def _where(queries: Sequence[StudyQuery], table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The [Q, N] index of each row."""
    index = {query.id: q for q, query in enumerate(queries)}
    rows = np.asarray([index[name] for name in table["query_id"].to_pylist()], int)
    return rows, table["sample"].to_numpy().astype(int)
