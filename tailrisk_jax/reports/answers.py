"""The answers that an estimate rests on most."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response that counts; `share` is its part of its query's estimate."""

    text: str
    sample: int
    log_weight: float
    score: float
    component: str
    share: float


def weightiest(
    samples: pa.Table, query_ids: Sequence[str], components: Sequence[str], count: int
) -> Mapping[str, list[Answer]]:
    """At most `count` answers for each of these queries, the largest w h first.

    Answers that are unscored, harmless or of weight zero count for nothing and are left out.
    """
    score, log_weight = samples["score"].to_numpy(), log_weights(samples)
    counts = (score > 0) & np.isfinite(log_weight)
    wanted = {name: [] for name in query_ids}
    for row, name in enumerate(samples["query_id"].to_pylist()):
        if name in wanted and counts[row]:
            wanted[name].append(row)
    found = {}
    for name, own in wanted.items():
        rows = np.asarray(own, int)
        size = log_weight[rows] + np.log(score[rows])
        share = np.exp(size - np.logaddexp.reduce(size))
        best = np.argsort(-share, kind="stable")[:count]
        found[name] = [
            Answer(
                text=row["text"],
                sample=row["sample"],
                log_weight=row["log_p"] - row["log_q"],
                score=row["score"],
                component=_component(components, row["component"]),
                share=float(part),
            )
            for row, part in zip(samples.take(rows[best]).to_pylist(), share[best], strict=True)
        ]
    return found


def log_weights(samples: pa.Table) -> np.ndarray:
    """log w = log p - log q, in float64; NaN where that is unknown."""
    log_p, log_q = (samples[name].to_numpy().astype(np.float64) for name in ("log_p", "log_q"))
    with np.errstate(invalid="ignore"):
        return log_p - log_q


def _component(names: Sequence[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else str(number)
