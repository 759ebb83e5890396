"""From a query file, or a data set of the hub, to the queries of a study."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import hub
from tailrisk_jax.studies.formats import Record, parse, read_text, table_records
from tailrisk_jax.studies.provenance import content_hash
from tailrisk_jax.studies.queries import Selection, StudyQuery


def read_queries(source: str | Path, column: str | None = None) -> Selection:
    """Reads a query file of any format in formats.py, or `hf:OWNER/NAME[:CONFIG][:SPLIT][:COLUMN]`.

    A row's id is its own where the file has ids. Else it is a hash of the prompt, which other rows
    and their order don't change; in JSON lines and lists it is the row's number: q0, q1, ...
    A row without an id of its own whose prompt was there before is left out, and counted; rows
    without a prompt too.

    Args:
      column: the prompt's name, for a table of no known format; JSON keys can be named too.

    Raises:
      InputError: no such file or data set, an unknown format, no queries, a repeated id, or a row,
        named by its line, that can't be used.
    """
    if str(source).startswith(hub.PREFIX):
        file, format, records, contents = _from_hub(str(source), column)
    else:
        text, content = read_text(source)
        format, records = parse(text, Path(source), column)
        file, contents = str(source), [content]
    queries: list[StudyQuery] = []
    ids: set[str] = set()
    prompts: set[str] = set()
    blank = repeated = 0
    for number, record in enumerate(records):
        if record.content is None:
            blank += 1
            continue
        prompt = json.dumps(record.content, sort_keys=True)
        if record.id is None and prompt in prompts:
            repeated += 1
            continue
        id = record.id or (
            f"q{number}" if format.startswith("JSON") else content_hash(record.content)
        )
        if id in ids:
            raise InputError(f"{record.where} repeats the id {id!r}; give each query its own")
        ids.add(id)
        prompts.add(prompt)
        queries.append(StudyQuery(id, record.content, record.metadata))
    if not queries:
        raise InputError(
            f"queries file {file} holds no queries ({len(records)} rows, {blank} of them blank)"
        )
    digest = hashlib.sha256(b"".join(contents)).hexdigest()
    return Selection(
        queries, queries, file, format, digest, read=len(records), blank=blank, repeated=repeated
    )


def _from_hub(source: str, column: str | None) -> tuple[str, str, list[Record], list[bytes]]:
    """A data set's name with its revision, its format, its records, and its files' bytes.

    Of the columns beside the prompt, those of texts, numbers and truth values are kept.
    """
    dataset = hub.parse_dataset_name(source)
    paths = hub.fetch(dataset)
    revision, config, split = paths[0].parts[-4:-1]
    file = f"{hub.PREFIX}{dataset.name}:{config}:{split}@{revision[:12]}"
    try:
        contents = [path.read_bytes() for path in paths]
        table = pa.concat_tables([pq.read_table(pa.BufferReader(one)) for one in contents])
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"data set {file} can't be read ({error}); fetch it again") from error
    cells = zip(*(one.to_pylist() for one in table.columns), strict=True)
    rows = ((f"{file} row {number}", row) for number, row in enumerate(cells, 1))
    format, records = table_records(table.column_names, rows, file, column or dataset.column)
    plain = (str, bool, int, float)
    records = [
        dataclasses.replace(
            record,
            metadata={n: value for n, value in record.metadata.items() if isinstance(value, plain)},
        )
        for record in records
    ]
    return file, format, records, contents
