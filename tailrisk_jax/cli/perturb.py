"""`tailrisk perturb`: harmless variants of queries, as a query file in groups."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from tailrisk_jax.cli.embedded import load_embedded
from tailrisk_jax.cli.inputs import QueryOptions, own_queries
from tailrisk_jax.cli.judges import KEY_VARIABLE, api_key, request_fields
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Server, default_cache
from tailrisk_jax.judges.server import Wording
from tailrisk_jax.organisms import world
from tailrisk_jax.studies import (
    Made,
    Selection,
    StudyQuery,
    Variant,
    base_queries,
    make_variants,
    read_variants,
    store,
    variants_file,
)
from tailrisk_jax.studies.paraphrases import REQUEST, Paraphrases, ask_paraphrases

ORGANISM = "organism"
_DEFAULT = ("case", "whitespace", "punctuation", "paraphrase")


@dataclasses.dataclass(frozen=True)
class Perturb(QueryOptions):
    """Make harmless variants of queries: other capitals, blanks, marks and phrasings.

    The file that is written is a query file: `tailrisk estimate --queries FILE`, then
    `tailrisk sensitivity RUN` says how far the variants of a query move its risk. --queries
    organism stands for the embedded organism's own queries; of their variants only those are kept
    whose words it knows.
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON lines {"id", "base", "kind", "prompt"}; the queries themselves are in it, of the kind
    original."""
    kinds: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KIND [..]")] = ()
    """case, whitespace, punctuation, paraphrase (templates in English), organism (its own
    templates). By default all but the last, or that alone for the organism's queries; none with
    --from or --served."""
    variants: Annotated[int, tyro.conf.arg(metavar="N")] = 25
    """Of each query, shared equally by the kinds; where one has no more, the others go on."""
    seed: int = 0
    """A query's variants depend on it and on the query alone."""
    given: Annotated[Path | None, tyro.conf.arg(name="from", metavar="FILE")] = None
    """Variants made elsewhere, all of which are kept: JSON lines as above, or {"prompt": ..,
    "variants": [..]}. Without --queries, their originals are the queries."""
    served: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """A served model that is asked for as many paraphrases; they are the kind served, and take
    turns with --kinds, of which there are none by default then."""
    base_url: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """An OpenAI-compatible server, such as http://localhost:8000/v1; by default OpenAI's."""
    key_env: Annotated[str, tyro.conf.arg(metavar="VARIABLE")] = KEY_VARIABLE
    """Environment variable that holds the API key; the key itself is stored nowhere."""
    request: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE [..]")] = ()
    """Further fields of each request, on top of temperature=1 max_tokens=4096; FIELD= leaves one
    out."""
    concurrency: Annotated[int, tyro.conf.arg(metavar="REQUESTS")] = 16
    """Requests at once."""
    timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 120.0
    """How long one answer may take."""
    cache: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Where answers are kept, so that none is paid for twice; by default with those of judges."""


def perturb(options: Perturb) -> None:
    """Runs the command."""
    if options.out is None:
        raise InputError("--out is needed; name the file to write, such as variants.jsonl")
    for name in ("base_url", "request", "cache"):
        if options.served is None and getattr(options, name):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} is for --served MODEL; give that, or leave it out")
    if options.queries is None and options.given is None:
        raise InputError("--queries is needed, or --from with variants made elsewhere; give a file")
    selection, given = _sources(options)
    own = options.queries == ORGANISM
    elsewhere = options.given is not None or options.served is not None
    usual = () if elsewhere else (ORGANISM,) if own else _DEFAULT
    asked = None if options.served is None else _ask(options, selection.queries)
    made = make_variants(
        selection.queries,
        kinds=options.kinds or usual,
        number=options.variants,
        seed=options.seed,
        given=given,
        served=None if asked is None else asked.texts,
        usable=world.is_known if own else lambda text: True,
    )
    store.write_atomically(options.out, variants_file(made.variants))
    print(f"Queries of {selection}")
    for line in [*_account(made, options), *([] if asked is None else _silent(asked))]:
        print(line)


def _sources(options: Perturb) -> tuple[Selection, list[Variant]]:
    """The base queries, and the variants that there are of them."""
    given = [] if options.given is None else read_variants(options.given, options.query_column)
    if options.queries == ORGANISM:
        embedded = load_embedded(ORGANISM)
        assert embedded is not None
        selection = options.chosen(own_queries(ORGANISM, embedded))
    elif options.queries is not None:
        selection = options.read()
    else:
        own = base_queries(given)
        read = Selection(own, own, str(options.given), "variants", "", read=len(own))
        selection = options.chosen(read)
    ids = {query.id for query in selection.everything}
    lost = next((one for one in given if one.base not in ids), None)
    if lost is not None:
        raise InputError(
            f"--from {options.given}: variant {lost.id!r} is of query {lost.base!r}, which "
            f"--queries {options.queries} doesn't have; give the file that it is of"
        )
    return selection.first(options.first), given


def _ask(options: Perturb, queries: Sequence[StudyQuery]) -> Paraphrases:
    """Paraphrases by the served model."""
    wording = Wording("paraphrase", "--served", "--base-url", "--key-env", "--request")
    url = options.base_url or os.environ.get("OPENAI_BASE_URL")
    assert options.served is not None
    server = Server(
        options.served,
        url,
        api_key(options.key_env, url, wording),
        concurrency=options.concurrency,
        timeout=options.timeout,
        wording=wording,
    )
    return ask_paraphrases(
        server,
        queries,
        options.variants,
        cache=options.cache or default_cache(),
        request=request_fields(options.request, REQUEST, wording.request),
    )


def _silent(asked: Paraphrases) -> list[str]:
    """The queries that the server gave nothing for, by reason."""
    return [
        f"Without a served paraphrase: {len(ids):,} ({', '.join(ids[:5])}"
        f"{', ..' * (len(ids) > 5)}): {why}; the same command asks again"
        for why in dict.fromkeys(asked.errors.values())
        if (ids := [id for id, error in asked.errors.items() if error == why])
    ]


def _account(made: Made, options: Perturb) -> list[str]:
    """What was made, and what could not be."""
    counts = ", ".join(f"{number:,} {kind}" for kind, number in made.counts.items())
    lines = [f"{len(made.variants):,} prompts ({counts}) written to {options.out}"]
    if made.short:
        lacking = sum(made.short.values())
        few = list(made.short.items())[:5]
        named = ", ".join(f"{query} by {number}" for query, number in few)
        lines.append(
            f"With fewer than {options.variants} variants: {len(made.short):,} queries, "
            f"by {lacking:,} in all: {named}{', ..' * (len(made.short) > 5)}"
        )
    lines += [
        f"Left out: {number:,} of kind {kind}, whose words the organism doesn't know"
        for kind, number in made.unusable.items()
    ]
    return lines
