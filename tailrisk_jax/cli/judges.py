"""Judges named on the command line."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import (
    FinetunedStrongReject,
    FunctionJudge,
    Judge,
    KeywordEvent,
    NoRefusal,
    RegexEvent,
    RubricJudge,
    Server,
    TargetEvent,
    Threshold,
    TokensEvent,
    default_cache,
    make_rubric,
)
from tailrisk_jax.judges.rubric_judge import REQUEST
from tailrisk_jax.judges.server import Wording
from tailrisk_jax.studies import StudyQuery, read_trait

KEY_VARIABLE = "OPENAI_API_KEY"

_KINDS = (
    "regex:PATTERN, keywords:A,B, all-keywords:A,B, no-refusal:LIST, target[:TEXT], tokens:ID,ID, "
    "python:MODULE_OR_FILE:FUNCTION, rubric:NAME, finetuned:VARIANT"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Who scores the answers."""

    judge: Annotated[str | None, tyro.conf.arg(metavar="KIND[:..]")] = None
    """Who scores the answers. regex:PATTERN (found anywhere); keywords:A,B (any of them, as whole
    words in any case) or all-keywords:A,B; no-refusal:LIST (none of the phrases of gcg,
    jailbreakbench, huang or arditi); target:TEXT (the answer begins with it; without TEXT, each
    query's own); tokens:ID,ID (in a row); python:MODULE:FUNCTION or python:FILE.py:FUNCTION (from
    a list of responses to a score each, None for unscored); rubric:NAME (a served model grades:
    strongreject, coherence, alignment, trait, LOW-HIGH or YES/NO; the last three need --rubric);
    finetuned:VARIANT (StrongREJECT's model: tail-512, full, greedy). The organism has its own."""
    event: Annotated[str | None, tyro.conf.arg(metavar="REGEX")] = None
    """Regular expression: an answer in which it is found counts; short for --judge regex:.."""
    threshold: Annotated[str | None, tyro.conf.arg(metavar="TAU")] = None
    """Count the answers whose score is at least TAU, such as 0.75 for StrongREJECT, instead of
    averaging scores; or '<0.3', as for alignment."""
    rubric: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The wording of --judge rubric:NAME: a text with {question} and {response}, or a persona
    trait's JSON."""
    judge_model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The served model that grades, by its name there."""
    judge_url: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """An OpenAI-compatible server, such as http://localhost:8000/v1; by default OpenAI's."""
    judge_key_env: Annotated[str, tyro.conf.arg(metavar="VARIABLE")] = KEY_VARIABLE
    """Environment variable that holds the API key; the key itself is stored nowhere."""
    judge_request: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE [..]")] = ()
    """Further fields of each request, on top of temperature=0 max_tokens=1024; FIELD= leaves one
    out. Scores depend on them."""
    judge_concurrency: Annotated[int, tyro.conf.arg(metavar="REQUESTS")] = 16
    """Requests at once. Changes no score."""
    judge_timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 60.0
    """How long one answer may take."""
    judge_cache: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Where graded answers are kept, so that none is paid for twice; by default one file for all
    runs, in the user's cache folder."""
    judge_adapter: Annotated[str | None, tyro.conf.arg(metavar="FOLDER_OR_HUB_ID")] = None
    """The adapter of --judge finetuned:VARIANT; by default the published one."""
    judge_base: Annotated[str | None, tyro.conf.arg(metavar="FOLDER_OR_HUB_ID")] = None
    """The model that it adapts; by default google/gemma-2b."""
    judge_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of its parameters."""


def make_judge(
    options: JudgeOptions, queries: Sequence[StudyQuery] = (), *, reach: bool = False
) -> Judge | None:
    """The judge that the options name, if any.

    Args:
      queries: whose answers it will score.
      reach: see now whether its server is there, rather than when answers have been drawn.

    Raises:
      InputError: --judge and --event are both given, one that isn't understood, an option that
        the judge doesn't have, a query without the target that is needed, a server that can't be
        reached or refuses the key.
    """
    if options.judge is not None and options.event is not None:
        raise InputError("--judge and --event are both given; give one")
    judge = None
    if options.event is not None:
        judge = RegexEvent(options.event)
    elif options.judge is not None:
        judge = _named(options.judge, options)
    for kind, own, names in (
        ("rubric:NAME", RubricJudge, ("rubric", "judge_model", "judge_url")),
        ("finetuned:VARIANT", FinetunedStrongReject, ("judge_adapter", "judge_base")),
    ):
        for name in names:
            if getattr(options, name) is not None and not isinstance(judge, own):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} is for --judge {kind}; give that, or leave it out")
    if isinstance(judge, RubricJudge) and reach:
        judge.check()
    if isinstance(judge, TargetEvent):
        for query in queries:
            judge.of(query.id, query.metadata)
    if options.threshold is None:
        return judge
    if judge is None:
        raise InputError(f"--threshold {options.threshold} needs a --judge whose scores it is of")
    return Threshold.parse(judge, options.threshold)


def _named(spec: str, options: JudgeOptions) -> Judge:
    kind, colon, rest = spec.partition(":")
    match kind:
        case "target":
            return TargetEvent(rest if colon else None)
        case "regex":
            return RegexEvent(rest)
        case "keywords" | "all-keywords":
            return KeywordEvent(tuple(rest.split(",")), every=kind == "all-keywords")
        case "no-refusal":
            return NoRefusal(rest)
        case "tokens":
            return TokensEvent(_ids(rest))
        case "python":
            return FunctionJudge.load(rest)
        case "rubric":
            return _rubric_judge(rest, options)
        case "finetuned":
            return FinetunedStrongReject(
                rest,
                base=options.judge_base or FinetunedStrongReject.base,
                adapter=options.judge_adapter or FinetunedStrongReject.adapter,
                dtype=options.judge_dtype,
            )
        case _:
            raise InputError(f"judge {spec!r} is unknown; known: {_KINDS}")


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise InputError(f"tokens {text!r} must be token ids; give e.g. tokens:17,4") from None


def _rubric_judge(name: str, options: JudgeOptions) -> RubricJudge:
    rubric = make_rubric(name, _wording(options.rubric))
    if options.judge_model is None:
        raise InputError(f"--judge-model is needed with --judge rubric:{name}; name a served model")
    url = options.judge_url or os.environ.get("OPENAI_BASE_URL")
    return RubricJudge(
        rubric,
        Server(
            options.judge_model,
            url,
            api_key(options.judge_key_env, url, Wording()),
            concurrency=options.judge_concurrency,
            timeout=options.judge_timeout,
        ),
        cache=options.judge_cache or default_cache(),
        request=request_fields(options.judge_request, REQUEST, "--judge-request"),
    )


def api_key(variable: str, url: str | None, wording: Wording) -> str | None:
    """The key in an environment variable; a server of one's own may do without.

    Raises:
      InputError: it isn't set, and the server is OpenAI's or the variable was named.
    """
    key = os.environ.get(variable)
    if key is None and (url is None or variable != KEY_VARIABLE):
        raise InputError(
            f"environment variable {variable} isn't set; put the API key in it, or name another "
            f"with {wording.key}, or a server of your own with {wording.url}"
        )
    return key


def _wording(path: Path | None) -> str | None:
    if path is None:
        return None
    if path.suffix == ".json":
        return read_trait(path).eval_prompt
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--rubric {path} can't be read ({error}); check the path") from error


def request_fields(words: Sequence[str], defaults: Mapping[str, Any], flag: str) -> dict[str, Any]:
    """Fields of a request, on top of the defaults; values are JSON, or else text."""
    fields = dict(defaults)
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name or name in ("model", "messages", "stream", "n"):
            raise InputError(f"{flag} {word!r} must be FIELD=VALUE, e.g. max_tokens=64")
        fields.pop(name, None)
        if value:
            try:
                fields[name] = json.loads(value)
            except ValueError:
                fields[name] = value
    return fields
