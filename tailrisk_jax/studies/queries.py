"""What a study asks, and how it was chosen from what was read."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import question
from tailrisk_jax.models import Model
from tailrisk_jax.policies import Query, encode
from tailrisk_jax.studies.formats import read_text


@dataclasses.dataclass(frozen=True)
class StudyQuery:
    """One query of a study.

    Attributes:
      id: a name for the tables.
      content: what is asked.
      metadata: what else its file says of it, by column, in lower case.
    """

    id: str
    content: Query
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """What is asked, for people to read: the last user message."""
        return question(self.content)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The queries of a study, with an account of all that were read.

    The steps, `exclude`, `where`, `within` and `first`, each at most once, give a new selection
    each, and are an error where they leave nothing. The counts add up: read = blank + repeated +
    excluded + those dropped by `where` + too long + beyond the first + kept.

    Attributes:
      queries: the ones that are kept.
      everything: the ones that there were.
      file: where they are from.
      format: of the file.
      sha256: of its bytes; "" without a file.
      read: rows of the file.
      blank: of these, ones without a prompt.
      repeated: rows with the very prompt of an earlier one and no id of their own.
      excluded: ids left out by name.
      conditions: by column, the values that were asked for, and how many queries had others.
      max_prompt_tokens: None for any length.
      too_long: ids of longer prompts.
      beyond_first: queries after the first so many.
    """

    queries: list[StudyQuery]
    everything: list[StudyQuery]
    file: str
    format: str
    sha256: str
    read: int
    blank: int = 0
    repeated: int = 0
    excluded: list[str] = dataclasses.field(default_factory=list)
    conditions: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    max_prompt_tokens: int | None = None
    too_long: list[str] = dataclasses.field(default_factory=list)
    beyond_first: int = 0

    def exclude(self, words: Sequence[str]) -> "Selection":
        """Without the queries of these ids; a word that is no id is a file of ids, one a line.

        Raises:
          InputError: a word that is neither, or a file with an id that no query has.
        """
        ids = {query.id for query in self.everything}
        unwanted: set[str] = set()
        for word in words:
            unwanted |= {word} if word in ids else self._listed(word, ids)
        kept, gone = self._split([q.id not in unwanted for q in self.queries], "--exclude")
        return dataclasses.replace(self, queries=kept, excluded=[query.id for query in gone])

    def where(self, conditions: Sequence[str]) -> "Selection":
        """Those that meet every COLUMN=VALUE; several values of one column are alternatives.

        Case counts in values but not in columns; a query without the column has the value "".

        Raises:
          InputError: another text, or a column or value that no query has.
        """
        wanted: dict[str, list[str]] = {}
        for condition in conditions:
            column, equals, value = condition.partition("=")
            if not equals:
                raise InputError(f"--where {condition!r} is not COLUMN=VALUE; mend it")
            wanted.setdefault(column.strip().lower(), []).append(value)
        for column, values in wanted.items():
            self._check_known(column, values)
        chosen = self
        for column, values in wanted.items():
            keep = [_value(query, column) in values for query in chosen.queries]
            kept, gone = chosen._split(keep, f"--where {column}")
            account = {**chosen.conditions, column: {"values": values, "dropped": len(gone)}}
            chosen = dataclasses.replace(chosen, queries=kept, conditions=account)
        return chosen

    def within(self, max_prompt_tokens: int | None, model: Model) -> "Selection":
        """Those whose prompt, chat template included, has at most so many tokens; None for all."""
        if max_prompt_tokens is None:
            return self
        prompts = encode(model, [query.content for query in self.queries])
        lengths = np.asarray(prompts.mask).sum(axis=1)
        step = f"--max-prompt-tokens {max_prompt_tokens} (the shortest prompt has {lengths.min()})"
        kept, gone = self._split(lengths <= max_prompt_tokens, step)
        return dataclasses.replace(
            self,
            queries=kept,
            max_prompt_tokens=max_prompt_tokens,
            too_long=[query.id for query in gone],
        )

    def first(self, number: int | None) -> "Selection":
        """The first so many, or as many as there are; None for all."""
        if number is None:
            return self
        kept, gone = self._split(np.arange(len(self.queries)) < number, f"--first {number}")
        return dataclasses.replace(self, queries=kept, beyond_first=len(gone))

    def record(self) -> dict[str, Any]:
        """The account, as JSON."""
        fields = (field.name for field in dataclasses.fields(self))
        account = {
            name: getattr(self, name) for name in fields if name not in ("queries", "everything")
        }
        return {**account, "kept": len(self.queries)}

    def __str__(self) -> str:
        """The account, in a line."""
        dropped = {
            "blank": self.blank,
            "repeated": self.repeated,
            "excluded": len(self.excluded),
            **{f"with another {name}": of["dropped"] for name, of in self.conditions.items()},
            "too long": len(self.too_long),
            "after the first": self.beyond_first,
        }
        parts = [f"{number:,} {why}" for why, number in dropped.items() if number]
        parts = [f"{self.read:,} read", *parts, f"{len(self.queries):,} kept"]
        return f"{self.file}: {', '.join(parts)}"

    def _check_known(self, column: str, values: list[str]) -> None:
        columns = sorted({name for query in self.everything for name in query.metadata})
        if column not in columns:
            raise InputError(
                f"--where {column}=..: no query of {self.file} has that column; "
                f"they have {', '.join(columns) or 'none'}"
            )
        found = sorted({_value(query, column) for query in self.everything})
        absent = sorted(set(values) - set(found))
        if absent:
            raise InputError(
                f"--where {column}={absent[0]}: no query of {self.file} has that value; "
                f"they have {', '.join(map(repr, found[:12]))}{', ..' * (len(found) > 12)}"
            )

    def _listed(self, word: str, ids: set[str]) -> set[str]:
        """The ids in a file."""
        if not Path(word).is_file():
            raise InputError(
                f"--exclude {word!r} is neither a query of {self.file} nor a file of ids; "
                f"its ids are like {self.everything[0].id!r}"
            )
        text, _ = read_text(word)
        listed = {line.strip() for line in text.split("\n")} - {""}
        if not listed <= ids:
            raise InputError(
                f"--exclude {word} lists {min(listed - ids)!r}, and no query of {self.file} has "
                f"that id; its ids are like {self.everything[0].id!r}"
            )
        return listed

    def _split(
        self, keep: Sequence[bool] | np.ndarray, step: str
    ) -> tuple[list[StudyQuery], list[StudyQuery]]:
        """What a step keeps, and what it doesn't."""
        kept = [query for query, wanted in zip(self.queries, keep, strict=True) if wanted]
        gone = [query for query, wanted in zip(self.queries, keep, strict=True) if not wanted]
        if not kept:
            raise InputError(f"{step} leaves none of {len(gone)} queries of {self.file}; relax it")
        return kept, gone


def _value(query: StudyQuery, column: str) -> str:
    value = query.metadata.get(column, "")
    return value if isinstance(value, str) else json.dumps(value)
