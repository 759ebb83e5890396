"""The formats of query files: which columns tell them apart, and how their rows become prompts.

| format | told by its columns | prompt | own id |
|---|---|---|---|
| StrongREJECT (Souly 2024, 2402.10260) | forbidden_prompt | the same | |
| HarmBench (Mazeika 2024, 2402.04249) | Behavior, ContextString, BehaviorID | * | BehaviorID |
| JailbreakBench (Chao 2024, 2404.01318) | Goal, Target, Behavior | Goal | Index |
| XSTest (Roettger 2023, 2308.01263) | prompt, type, focus | prompt | id |
| AdvBench (Zou 2023, 2307.15043) | goal, target | goal | |
| persona trait JSON (Chen 2025, 2507.21509) | questions | each | |
| JSON lines, or a JSON list | | prompt or messages | id |

Numbers are of arXiv. Case and order of columns don't matter, and others may stand beside them.
* A HarmBench behaviour with a context is asked as HarmBench's own direct request asks it: the
context, a line of three dashes between blank lines, the behaviour. Its multimodal file is refused.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import Query


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of a query file.

    Attributes:
      content: what is asked; None where it is blank.
      id: the row's own; None without one.
      metadata: its other columns that aren't blank, by their names in lower case.
      where: the row, for messages.
    """

    content: Query | None
    id: str | None
    metadata: Mapping[str, Any]
    where: str


@dataclasses.dataclass(frozen=True)
class Format:
    """A published table; column names in lower case.

    Attributes:
      name: the benchmark's.
      columns: that tell it from the others.
      prompt: the column that is asked.
      context: a column that goes before the prompt where it isn't blank.
    """

    name: str
    columns: tuple[str, ...]
    prompt: str
    context: str | None = None


FORMATS = (  # the first whose columns are all there
    Format("StrongREJECT", ("forbidden_prompt",), "forbidden_prompt"),
    Format("HarmBench", ("behavior", "contextstring", "behaviorid"), "behavior", "contextstring"),
    Format("JailbreakBench", ("goal", "target", "behavior"), "goal"),
    Format("XSTest", ("prompt", "type", "focus"), "prompt"),
    Format("AdvBench", ("goal", "target"), "goal"),
)
_IDS = ("behaviorid", "id", "index")


@dataclasses.dataclass(frozen=True)
class Trait:
    """A persona trait: how it is brought out, asked about and judged.

    Attributes:
      name: the file's, without its ending.
      questions: that give it room to show.
      instructions: pairs of system prompts, for the trait and against it.
      eval_prompt: for the judge, with {question} and {answer}; "" without one.
    """

    name: str
    questions: tuple[str, ...]
    instructions: tuple[tuple[str, str], ...] = ()
    eval_prompt: str = ""


def read_text(path: str | Path) -> tuple[str, bytes]:
    """A file's text, without a byte order mark, and its bytes.

    Raises:
      InputError: no such file, or not UTF-8.
    """
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig"), content
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} can't be read ({error}); check the path") from error


def read_trait(path: str | Path) -> Trait:
    """A persona trait, {"instruction": [{"pos", "neg"}], "questions": [..], "eval_prompt": ".."}.

    Raises:
      InputError: no such file, or another content.
    """
    text, _ = read_text(path)
    return _trait(_json(text, str(path)), Path(path))


def parse(text: str, path: Path, column: str | None = None) -> tuple[str, list[Record]]:
    """The format of a file's text, and its records.

    Text that begins with a bracket or brace, or whose file is named .json or .jsonl, is JSON;
    other text is CSV.

    Args:
      column: the prompt's, in place of what the format says.

    Raises:
      InputError: an unknown format, or a row that can't be read, named.
    """
    start = text.lstrip()[:1]
    if start == "[":
        return "JSON list", [
            _json_record(record, f"{path} record {number}", column)
            for number, record in enumerate(_json(text, str(path)), 1)
        ]
    if start == "{" or path.suffix in (".json", ".jsonl"):
        return _json_lines(text, path, column)
    return _csv(text, path, column)


def table_records(
    columns: Sequence[str],
    rows: Iterable[tuple[str, Sequence[Any]]],
    file: str,
    column: str | None = None,
) -> tuple[str, list[Record]]:
    """The format of a table, and the records of its (name, cells) rows.

    Raises:
      InputError: columns of no known format and none named, or a prompt that isn't one.
    """
    names = [name.strip().lower() for name in columns]
    shown = ", ".join(columns)
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise InputError(f"{file} has the column {min(twice)!r} twice; rename one")
    if column is None:
        format = next((one for one in FORMATS if set(one.columns) <= set(names)), None)
        if format is None:
            known = "; ".join(f"{one.name} ({', '.join(one.columns)})" for one in FORMATS)
            raise InputError(
                f"{file} has the columns {shown}, which are of no known format: {known}; "
                "name the prompt's column with --query-column"
            )
        if format.name == "HarmBench" and "imagefilename" in names:
            raise InputError(
                f"{file} is HarmBench's multimodal file, and images can't be asked; "
                "give its text file"
            )
    else:
        format = Format("table", (), column.strip().lower())
        if format.prompt not in names:
            raise InputError(f"{file} has no column {column!r}; it has {shown}")
    own = next((name for name in _IDS if name in names and name != format.prompt), None)
    records = []
    for where, cells in rows:
        row = {n: c for n, c in zip(names, cells, strict=True) if n and not _blank(c)}
        content = prompt(row.pop(format.prompt, None), f"{where}: {format.prompt!r}")
        id = row.pop(own, None) if own else None
        if content is not None and format.context in row:
            row[format.prompt] = content
            content = f"{row[format.context]}\n\n---\n\n{content}"
        records.append(Record(content, None if id is None else str(id), row, where))
    return format.name, records


def prompt(content: Any, where: str) -> Query | None:
    """What is asked: a text, or messages; None where it is blank.

    Raises:
      InputError: something else.
    """
    if _blank(content):
        return None
    if isinstance(content, str):
        return content
    if (
        isinstance(content, list)
        and content
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in content
        )
    ):
        return content
    if isinstance(content, list):
        raise InputError(f'{where} must list objects with "role" and "content", both texts')
    raise InputError(f"{where} is {content!r}; it must be a text, or a list of messages")


def _csv(text: str, path: Path, column: str | None) -> tuple[str, list[Record]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[str, list[str]]] = []
    try:
        header = next(reader, [])
        for cells in reader:
            where = f"{path} line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise InputError(
                    f"{where} has {len(cells)} cells, the header {len(header)}; "
                    "quote cells that hold commas"
                )
            if cells:
                rows.append((where, cells))
    except csv.Error as error:
        raise InputError(
            f"{path} line {reader.line_num} is not valid CSV ({error}); mend the quotes"
        ) from error
    if not header:
        return "CSV", []
    return table_records(header, rows, str(path), column)


def _json_lines(text: str, path: Path, column: str | None) -> tuple[str, list[Record]]:
    try:
        whole = _json(text, str(path))
    except InputError:
        whole = None  # several lines
    if column is None and isinstance(whole, dict) and not {"prompt", "messages"} & set(whole):
        trait = _trait(whole, path)
        return "persona trait", [
            Record(question, None, {"trait": trait.name}, f"{path} question {number}")
            for number, question in enumerate(trait.questions, 1)
        ]
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            records.append(_json_record(_json(line, where), where, column))
    return "JSON lines", records


def _json(text: str, where: str) -> Any:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}); mend it") from error
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half a surrogate pair, which is no text") from error
    return content


def _json_record(record: Any, where: str, column: str | None) -> Record:
    names = ("prompt", "messages") if column is None else (column,)
    given = [name for name in names if isinstance(record, dict) and name in record]
    if len(given) != 1:
        wanted = " or ".join(f'"{name}"' for name in names)
        raise InputError(f"{where} must be an object with {'either ' * (not column)}{wanted}")
    metadata = {
        name.lower(): value
        for name, value in record.items()
        if name not in (given[0], "id") and not _blank(value)
    }
    content = prompt(record[given[0]], f'{where}: "{given[0]}"')
    own = record.get("id")
    return Record(content, None if _blank(own) else str(own), metadata, where)


def _trait(content: Any, path: Path) -> Trait:
    if not isinstance(content, dict) or "questions" not in content:
        raise InputError(
            f'{path} is neither a query ("prompt" or "messages") nor a persona trait ("questions")'
        )
    questions, pairs = content["questions"], content.get("instruction", [])
    if not _texts(questions) or not questions:
        raise InputError(f'{path}: "questions" must be a list of texts')
    if not isinstance(pairs, list) or not all(
        isinstance(pair, dict) and _texts([pair.get("pos"), pair.get("neg")]) for pair in pairs
    ):
        raise InputError(f'{path}: "instruction" must list objects with "pos" and "neg"')
    if not isinstance(content.get("eval_prompt", ""), str):
        raise InputError(f'{path}: "eval_prompt" must be a text')
    return Trait(
        path.stem,
        tuple(questions),
        tuple((pair["pos"], pair["neg"]) for pair in pairs),
        content.get("eval_prompt", ""),
    )


def _texts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(one, str) and one.strip() for one in content
    )


def _blank(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())
