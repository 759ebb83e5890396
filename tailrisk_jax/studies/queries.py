"""Readers of query files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import question
from tailrisk_jax.policies import Query


@dataclasses.dataclass(frozen=True)
class StudyQuery:
    """One query of a study: a name for the tables, and what is asked."""

    id: str
    content: Query

    @property
    def text(self) -> str:
        """What is asked, for people to read: the last user message."""
        return question(self.content)


def read_queries(path: str | Path) -> list[StudyQuery]:
    """Reads JSON lines, each {"prompt": text} or {"messages": [...]}, with an optional "id".

    Raises:
      InputError: no such file, no queries, a repeated id, or a line, named by its number, that
        is neither; blank lines are passed over.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"queries file {path} can't be read ({error}); check the path") from error
    queries: list[StudyQuery] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not valid JSON ({error}); mend the line") from error
        query = StudyQuery(*_parse(record, f"q{len(queries)}", where))
        if query.id in seen:
            raise InputError(f"{where} repeats the id {query.id!r}; give each query its own")
        seen.add(query.id)
        queries.append(query)
    if not queries:
        raise InputError(f"queries file {path} holds no queries; give one JSON object per line")
    return queries


def _parse(record: Any, default_id: str, where: str) -> tuple[str, Query]:
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise InputError(f'{where} must be an object with either "prompt" or "messages"')
    content: Any = record.get("prompt", record.get("messages"))
    if "messages" in record:
        valid = (
            isinstance(content, list)
            and content
            and all(
                isinstance(m, dict) and {"role", "content"} <= set(m)
                and isinstance(m["content"], str)
                for m in content
            )
        )  # fmt: skip
        if not valid:
            raise InputError(f'{where}: "messages" must list objects with "role" and "content"')
    elif not isinstance(content, str) or not content.strip():
        raise InputError(f'{where}: "prompt" is {content!r}; it must be non-empty text')
    return str(record.get("id", default_id)), content
