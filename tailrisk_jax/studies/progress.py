"""How far a run is."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from tailrisk_jax.studies.rounds import Chunk


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is; counts include what was kept from earlier sessions.

    Attributes:
      total: responses of the rounds decided so far, which are so many `rounds`.
      drawn, judged: responses so far.
      fresh: responses drawn in this session, of `tokens` tokens.
      hits: responses with a score above 0.
      unscored: responses that the judge gave no score.
      risk: mean over queries of the running estimate; NaN before the first.
      scored, scoring: of a pilot, responses whose log-probabilities are known, of so many that they
        are needed for.
    """

    total: int = 0
    rounds: int = 0
    drawn: int = 0
    judged: int = 0
    fresh: int = 0
    tokens: int = 0
    hits: int = 0
    unscored: int = 0
    risk: float = np.nan
    scored: int = 0
    scoring: int = 0


class Tally:
    """Keeps count, for progress alone; tells it from more than one thread, one at a time."""

    def __init__(self, queries: int, tell: Callable[[Progress], Any]):
        self._tell, self._lock, self._now = tell, threading.Lock(), Progress()
        self._sums, self._counts = np.zeros(queries), np.zeros(queries, int)

    def plan(self, responses: int) -> None:
        self._add(total=responses, rounds=1)

    def drew(self, samples: pa.Table, fresh: bool) -> None:
        tokens = len(samples["tokens"].combine_chunks().flatten()) if fresh else 0
        self._add(drawn=samples.num_rows, fresh=samples.num_rows if fresh else 0, tokens=tokens)

    def judged(self, chunk: Chunk, samples: pa.Table, judgements: pa.Table) -> None:
        scores = judgements["score"].to_numpy()
        log_weights = samples["log_p"].to_numpy() - samples["log_q"].to_numpy()
        rows = np.repeat(chunk.queries, chunk.count)
        known = scores > 0
        np.add.at(self._sums, rows[known], np.exp(log_weights[known]) * scores[known])
        np.add.at(self._counts, rows, ~np.isnan(scores))
        seen = self._counts > 0
        risk = float(np.mean(self._sums[seen] / self._counts[seen])) if seen.any() else np.nan
        unscored = int(np.isnan(scores).sum())
        self._add(judged=len(scores), hits=int(known.sum()), unscored=unscored, risk=risk)

    def _add(self, *, risk: float | None = None, **counts: int) -> None:
        with self._lock:
            changes: dict[str, Any] = {
                name: getattr(self._now, name) + n for name, n in counts.items()
            }
            if risk is not None:
                changes["risk"] = risk
            self._now = dataclasses.replace(self._now, **changes)
            self._tell(self._now)
