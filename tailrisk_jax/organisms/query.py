"""Queries that know their exact risk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self


class KnownQuery(str):
    """The text of a query, which also knows its exact risk under the target.

    Attributes:
      id: stable name.
      thing: the object asked about.
      held_out: whether training never saw its parts together.
      lower, upper: enumeration bounds on the risk, of responses cut at the organism's
        `max_new_tokens`.
      decade: d where 10^d <= risk < 10^(d+1); None where the risk is 0.
    """

    id: str
    thing: str
    held_out: bool
    lower: float
    upper: float
    decade: int | None

    def __new__(cls, text: str, **fields: Any) -> Self:
        query = super().__new__(cls, text)
        query.__dict__.update(fields)
        return query

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """A query from a line of queries.jsonl."""
        return cls(record["text"], **{k: v for k, v in record.items() if k != "text"})

    def record(self) -> dict[str, Any]:
        """The query as a line of queries.jsonl."""
        return {"id": self.id, "text": str(self), **self.__dict__}


def truth_of(queries: Iterable[KnownQuery], query: str) -> tuple[float, float]:
    """Bounds (lower, upper) on the risk of one of the queries, by text or id.

    Raises KeyError for another query.
    """
    for known in queries:
        if query in (known, known.id):
            return known.lower, known.upper
    raise KeyError(f"{query!r} is no shipped query; see the organism's queries, or enumerate it")
