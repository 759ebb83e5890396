"""Paraphrases of queries by a served language model."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailrisk_jax.judges import Server
from tailrisk_jax.judges import server as client
from tailrisk_jax.judges.answers import AnswerCache
from tailrisk_jax.judges.server import Answer
from tailrisk_jax.studies.queries import StudyQuery

REQUEST: Mapping[str, Any] = {"temperature": 1, "max_tokens": 4096}

_WORDING = """\
Rewrite the request between the lines in {number} different ways. Each must ask for exactly the \
same thing, in other words: add nothing, leave nothing out, and don't answer the request.

----
{query}
----

Reply with a JSON list of {number} strings and nothing else."""


@dataclasses.dataclass(frozen=True)
class Paraphrases:
    """What a server gave.

    Attributes:
      texts: by query id, distinct paraphrases, fewer than were asked for where it gave fewer.
      errors: by query id, why there are none.
    """

    texts: Mapping[str, Sequence[str]]
    errors: Mapping[str, str]


def ask_paraphrases(
    server: Server,
    queries: Sequence[StudyQuery],
    number: int,
    *,
    cache: Path | None = None,
    request: Mapping[str, Any] = REQUEST,
) -> Paraphrases:
    """Asks a served model once for all paraphrases of each query.

    An answer that could be read is kept in the cache, so that the same command gives the same
    paraphrases and pays for none twice.

    Args:
      number: of each query.
      cache: a file; None for nowhere.
      request: further fields of each request.

    Raises:
      InputError: as `server.ask`; answers so far are kept.
    """
    prompts = {query.id: _WORDING.format(number=number, query=query.text) for query in queries}
    answers: dict[str, Answer] = {}
    with contextlib.closing(AnswerCache(cache)) as kept:
        for prompt in prompts.values():
            text = kept.get(_key(server, prompt, request))
            if text is not None:
                answers[prompt] = Answer(text)
        wanted = [prompt for prompt in dict.fromkeys(prompts.values()) if prompt not in answers]

        def keep(place: int, answer: Answer) -> None:
            prompt = wanted[place]
            answers[prompt] = answer
            if answer.error is None and _read(answer.text or ""):
                kept.put(_key(server, prompt, request), server.model, answer.text or "")

        client.ask(server, wanted, request, keep)
    texts: dict[str, Sequence[str]] = {}
    errors: dict[str, str] = {}
    for id, prompt in prompts.items():
        answer = answers[prompt]
        found = [] if answer.error is not None else _read(answer.text or "")
        if found:
            texts[id] = found[:number]
        else:
            errors[id] = answer.error or "the answer is no JSON list of texts"
    return Paraphrases(texts, errors)


def _read(answer: str) -> list[str]:
    """The texts of the list in an answer; none where there is no such list."""
    try:
        found = json.loads(answer[answer.index("[") : answer.rindex("]") + 1])
    except ValueError:
        return []
    texts = [one.strip() for one in found if isinstance(one, str) and one.strip()]
    return list(dict.fromkeys(texts))


def _key(server: Server, prompt: str, request: Mapping[str, Any]) -> str:
    asked = [server.model, prompt, dict(request)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
