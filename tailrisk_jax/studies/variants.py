"""Groups of variants of one query: made, and kept as JSON lines that are a query file too.

    {"id": "q0", "base": "q0", "kind": "original", "prompt": ".."}
    {"id": "q0/case-1", "base": "q0", "kind": "case", "prompt": ".."}

with "messages" in place of "prompt" for queries of several messages, of which the last user
message is varied, and the base query's own columns.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import question
from tailrisk_jax.policies import Query
from tailrisk_jax.studies.perturbations import KINDS
from tailrisk_jax.studies.provenance import content_hash
from tailrisk_jax.studies.queries import StudyQuery
from tailrisk_jax.studies.readers import read_queries

ORIGINAL = "original"
GIVEN = "given"  # the kind of a variant from elsewhere that has none


@dataclasses.dataclass(frozen=True)
class Variant:
    """One wording of a base query; the base itself has the kind "original"."""

    id: str
    base: str
    kind: str
    content: Query
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Made:
    """Variants, each group with its original first, and what could not be made.

    Attributes:
      variants: of all groups.
      counts: of variants by kind, the kinds that gave none too.
      short: by base query with fewer than were asked for, how many are lacking.
      unusable: by kind, candidates left out since the model doesn't know their words.
    """

    variants: list[Variant]
    counts: Mapping[str, int]
    short: Mapping[str, int]
    unusable: Mapping[str, int]


def make_variants(
    queries: Sequence[StudyQuery],
    *,
    kinds: Sequence[str] = (),
    number: int = 25,
    seed: int = 0,
    given: Sequence[Variant] = (),
    served: Mapping[str, Sequence[str]] | None = None,
    usable: Callable[[str], bool] = lambda text: True,
) -> Made:
    """Up to `number` variants of each query, all texts of a group different.

    Kinds take turns, so that each has its equal share; where one has no more, the others go on.
    What a query's variants are depends on its id, its text, the seed and the options alone.

    Args:
      kinds: names in `KINDS`.
      given: variants from elsewhere; all that are of these queries are kept, but for repeated
        texts, and `number` is filled up from the kinds.
      served: further texts by base query, of the kind "served".
      usable: whether the model can be asked a text.

    Raises:
      InputError: an unknown kind, a number below 1.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InputError(f"kind {unknown[0]!r} is unknown; known: {', '.join(KINDS)}")
    if number < 1:
        raise InputError(f"--variants {number} must be 1 or more")
    variants: list[Variant] = []
    short: dict[str, int] = {}
    streamed = [*kinds, *([] if served is None else ["served"])]
    unusable: dict[str, int] = {kind: 0 for kind in streamed}
    for query in queries:
        own = [one for one in given if one.base == query.id and one.kind != ORIGINAL]
        streams: dict[str, Iterator[str]] = {
            kind: KINDS[kind](query.text, _generator(seed, query, kind)) for kind in kinds
        }
        if served is not None:
            streams["served"] = iter(served.get(query.id, ()))
        group = [Variant(query.id, query.id, ORIGINAL, query.content, query.metadata)]
        seen = {query.text}
        for one in own:
            if question(one.content) not in seen:
                seen.add(question(one.content))
                group.append(dataclasses.replace(one, metadata={**query.metadata, **one.metadata}))
        made: dict[str, list[str]] = {kind: [] for kind in streams}
        for kind in itertools.cycle(list(streams)):
            if not streams or len(group) - 1 + sum(map(len, made.values())) >= number:
                break
            if kind in streams:
                found = _next(streams[kind], seen, usable, unusable, kind)
                if found is None:
                    del streams[kind]
                else:
                    made[kind].append(found)
        group += [
            Variant(f"{query.id}/{kind}-{i}", query.id, kind, _asking(query.content, text),
                    query.metadata)
            for kind, texts in made.items() for i, text in enumerate(texts, 1)
        ]  # fmt: skip
        if len(group) - 1 < number and made:
            short[query.id] = number - (len(group) - 1)
        variants += group
    counts = {kind: 0 for kind in [*(one.kind for one in variants), *streamed]}
    for one in variants:
        counts[one.kind] += 1
    return Made(variants, counts, short, {kind: n for kind, n in unusable.items() if n})


def variants_file(variants: Sequence[Variant]) -> bytes:
    """What `read_variants` and `read_queries` read."""
    lines = []
    for one in variants:
        plain = {
            k: v for k, v in one.metadata.items() if k not in ("id", "base", "kind", "variants")
        }
        name = "prompt" if isinstance(one.content, str) else "messages"
        row = {**plain, "id": one.id, "base": one.base, "kind": one.kind, name: one.content}
        lines.append(json.dumps(row, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def read_variants(path: str | Path, column: str | None = None) -> list[Variant]:
    """Groups from a file: rows with "base", as above, or {"prompt": .., "variants": [..]}.

    A row's kind is "original" where it says so or where its id is its base, else what it says,
    else "given". Of rows with "variants", texts or messages, the prompt is the original.

    Raises:
      InputError: as `read_queries`; a row that is neither; a group with two originals or with a
        text twice; no variant of anything.
    """
    variants = [one for query in read_queries(path, column).queries for one in _read(query, path)]
    check_groups(variants, path)
    return variants


def check_groups(variants: Sequence[Variant], file: str | Path) -> None:
    """Refuses ids that repeat, groups with two originals, and a file without variants."""
    ids, originals = set(), set()
    for one in variants:
        if one.id in ids:
            raise InputError(f"{file} repeats the id {one.id!r}; give each variant its own")
        ids.add(one.id)
        if one.kind == ORIGINAL:
            if one.base in originals:
                raise InputError(f"{file} has two originals of {one.base!r}; name one")
            originals.add(one.base)
    if len(ids) == len(originals):
        raise InputError(f"{file} holds no variant of any query; make some: tailrisk perturb")


def base_queries(variants: Sequence[Variant]) -> list[StudyQuery]:
    """The originals, as queries.

    Raises:
      InputError: a group without one.
    """
    found = {
        one.base: StudyQuery(one.base, one.content, one.metadata)
        for one in variants
        if one.kind == ORIGINAL
    }
    lost = next((one for one in variants if one.base not in found), None)
    if lost is not None:
        raise InputError(f"variant {lost.id!r} has no original {lost.base!r}; give it in --queries")
    return list(found.values())


def group_of(query: StudyQuery) -> Variant | None:
    """A query of a run as a variant, where its file said which it is of."""
    base = query.metadata.get("base")
    if not isinstance(base, str):
        return None
    kind = query.metadata.get("kind", ORIGINAL if query.id == base else GIVEN)
    return Variant(query.id, base, str(kind), query.content, query.metadata)


def find_variants(
    queries: Sequence[StudyQuery], file: str | Path | None, run: str | Path
) -> tuple[dict[str, Variant], int]:
    """By id of a run's queries, which variant each is; how many of the file the run doesn't have.

    Args:
      file: which query is a variant of which, as `read_variants`; None for what the run's own query
        file said, which may be nothing.
      run: its folder, for messages.

    Raises:
      InputError: as `read_variants`; a file with none of the run's queries, or with other texts
        under their ids.
    """
    if file is None:
        own = ((query.id, group_of(query)) for query in queries if "kind" in query.metadata)
        return {name: one for name, one in own if one is not None}, 0
    variants = read_variants(file)
    by_id = {one.id: one for one in variants}
    by_text = {content_hash(one.content): one for one in variants}
    found = {}
    for query in queries:
        own, text = by_id.get(query.id), content_hash(query.content)
        if own is not None and content_hash(own.content) != text:
            raise InputError(
                f"query {query.id!r} of run {run} has another text than in {file}; give the "
                "file that the run's queries are from"
            )
        one = own or by_text.get(text)
        if one is not None:
            found[query.id] = one
    if not found:
        raise InputError(
            f"run {run} has none of the {len(variants):,} variants in {file}; give the file "
            "that the run's queries are from"
        )
    return found, len(by_id.keys() - {one.id for one in found.values()})


def base_groups(
    query_ids: Sequence[str], variants: Mapping[str, Variant]
) -> Int[np.ndarray, " M"] | None:
    """The number of each query's base query; one that is no variant is its own.

    None without any variant.
    """
    if not variants:
        return None
    names = [
        ("base", variants[name].base) if name in variants else ("query", name) for name in query_ids
    ]
    numbers = {name: k for k, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def _read(query: StudyQuery, path: str | Path) -> list[Variant]:
    listed = query.metadata.get("variants")
    if listed is None:
        one = group_of(query)
        if one is None:
            raise InputError(
                f'query {query.id!r} of {path} has neither "base" nor "variants", so its group is '
                "unknown; make a file of groups with: tailrisk perturb"
            )
        return [one]
    if not isinstance(listed, list) or not all(
        isinstance(text, str) and text.strip() for text in listed
    ):
        raise InputError(f'query {query.id!r} of {path}: "variants" must be a list of texts')
    plain = {name: value for name, value in query.metadata.items() if name != "variants"}
    kind = str(plain.pop("kind", GIVEN))
    texts = [text for text in dict.fromkeys(listed) if text != query.text]
    return [
        Variant(query.id, query.id, ORIGINAL, query.content, plain),
        *(
            Variant(f"{query.id}/{kind}-{i}", query.id, kind, _asking(query.content, text), plain)
            for i, text in enumerate(texts, 1)
        ),
    ]


def _next(
    stream: Iterator[str],
    seen: set[str],
    usable: Callable[[str], bool],
    unusable: dict[str, int],
    kind: str,
) -> str | None:
    """The next text of a kind that is new and can be asked."""
    for text in stream:
        if text in seen or not text.strip():
            continue
        seen.add(text)
        if usable(text):
            return text
        unusable[kind] += 1
    return None


def _asking(content: Query, text: str) -> Query:
    """The query with another text in its last user message."""
    if isinstance(content, str):
        return text
    messages = [dict(message) for message in content]
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    messages[users[-1] if users else -1]["content"] = text
    return messages


def _generator(seed: int, query: StudyQuery, kind: str) -> np.random.Generator:
    digest = hashlib.sha256(json.dumps([seed, query.id, kind]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
