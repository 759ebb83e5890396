"""Asks an OpenAI-compatible server many prompts at once, through its faults.

| what comes back | what is done |
|---|---|
| an answer | kept |
| a cut or empty answer, a refusal by the server's filter | kept as no answer, with the reason |
| 400, 403, 413, 422: the server rejects this prompt | no answer, with the reason |
| 408, 409, 429, 5xx, no answer in time, a cut connection, a body that isn't JSON | asked again |
| 401, 402, 404, no quota, a model not listed, a bad setting, no server there | all asking ends |

Waits between attempts grow exponentially, with jitter. Where the server says how long to wait
(Retry-After, rate-limit headers), every request waits for so long.
"""

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges.waits import wait_asked

_OF_THE_PROMPT = ("content_filter", "context_length_exceeded")  # codes of a 400
_PATIENCE = 20  # requests in a row that fail before the rest are tried only once each


@dataclasses.dataclass(frozen=True)
class Wording:
    """What messages call a server, and the options that it was given by."""

    role: str = "judge"
    model: str = "--judge-model"
    url: str = "--judge-url"
    key: str = "--judge-key-env"
    request: str = "--judge-request"


@dataclasses.dataclass(frozen=True)
class Server:
    """A server, and how it is asked; no score depends on anything here but `model`.

    Attributes:
      model: its name there.
      url: as "http://localhost:8000/v1"; None for OpenAI's, or OPENAI_BASE_URL.
      key: the API key; shown nowhere.
      concurrency: requests at once.
      timeout: seconds for one answer, whole.
      attempts: for each prompt.
      first_wait: seconds before the second attempt; twice that before the third, and so on.
      longest_wait: seconds; where the server asks for a longer wait, asking ends.
      wording: of messages.

    Raises:
      InputError: a value out of range, a url that isn't one or that holds a password.
    """

    model: str
    url: str | None = None
    key: str | None = dataclasses.field(default=None, repr=False)
    concurrency: int = 16
    timeout: float = 60.0
    attempts: int = 7
    first_wait: float = 1.0
    longest_wait: float = 300.0
    wording: Wording = Wording()

    def __post_init__(self):
        for name in ("concurrency", "timeout", "attempts"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"{self.wording.role} {name}={getattr(self, name)} must be positive"
                )
        if self.url is not None:
            parts = urlsplit(self.url)
            if "@" in parts.netloc:
                raise InputError(
                    f"{self.wording.url} holds a password; give it in a variable, "
                    f"{self.wording.key} NAME"
                )
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise InputError(
                    f"{self.wording.url} {self.url!r} is no address; give e.g. "
                    "http://localhost:8000/v1"
                )

    @property
    def address(self) -> str:
        """For messages."""
        return f"{self.wording.role} server {self.url or 'of OpenAI'}"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server says.

    Attributes:
      text: the answer; None without one.
      error: why it can't be used; None where it can.
    """

    text: str | None
    error: str | None = None


def ask(
    server: Server,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    keep: Callable[[int, Answer], Any],
) -> None:
    """Asks every prompt as a user message; calls `keep` with its number and answer, as they come.

    Args:
      settings: further fields of each request, such as temperature and max_tokens.

    Raises:
      InputError: a fault that concerns all prompts; what was in flight has been kept.
    """
    if prompts:
        _run(_ask(server, prompts, settings, keep))


def check(server: Server) -> None:
    """Sees whether a server is there and takes the key, at no cost.

    Raises:
      InputError: it isn't, or doesn't.
    """
    import openai

    with openai.OpenAI(**_arguments(server)) as client:
        try:
            client.models.with_raw_response.list()
        except openai.AuthenticationError as error:
            raise _refused_key(server, error) from error
        except openai.APIConnectionError as error:
            raise _unreachable(server, _reason(error)) from error
        except openai.OpenAIError:
            pass  # not every server lists its models


async def _ask(
    server: Server,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    keep: Callable[[int, Answer], Any],
) -> None:
    import openai

    numbers = iter(range(len(prompts)))
    async with openai.AsyncOpenAI(**_arguments(server)) as client:
        asker = _Asker(server, settings, client)

        async def work() -> None:
            for i in numbers:
                answer = await asker.answer(prompts[i])
                if answer is None:
                    return
                keep(i, answer)

        await asyncio.gather(*(work() for _ in range(min(server.concurrency, len(prompts)))))
    if asker.ended is not None:
        raise asker.ended


class _Passing(Exception):
    """A fault that another attempt may not meet.

    `refused` where no connection was made, `silent` where nothing came back.
    """

    def __init__(self, reason: str, silent: bool = False, refused: bool = False):
        super().__init__(reason)
        self.silent, self.refused = silent, refused


class _Rejected(Exception):
    """The server won't answer this prompt."""


class _Ended(Exception):
    """All asking has ended."""


class _Asker:
    """What requests to one server have in common: how it fares, and when it may be asked again."""

    def __init__(self, server: Server, settings: Mapping[str, Any], client: Any):
        self.server, self._settings, self._client = server, dict(settings), client
        self.ended: InputError | None = None
        self._end = asyncio.Event()
        self._heard = 0  # replies, of any kind
        self._failed = self._silent = 0  # given up since the last answer, the last reply
        self._open_at = 0.0
        self._answered = False
        self._listed: bool | None = None

    async def answer(self, prompt: str) -> Answer | None:
        """One answer; None when asking has ended."""
        import tenacity

        heard = self._heard
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Passing),
            stop=self._enough,
            wait=tenacity.wait_exponential(self.server.first_wait, self.server.longest_wait)
            + tenacity.wait_random(0, self.server.first_wait),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            answer = await retrying(self._attempt, prompt)
        except _Ended:
            return None
        except _Rejected as rejected:
            return Answer(None, str(rejected))
        except _Passing as fault:
            self._failed += 1
            if fault.silent and self._heard == heard:
                self._silent += 1
                if fault.refused or self._silent >= _PATIENCE:
                    self._stop(_unreachable(self.server, str(fault)))
                    return None
            return Answer(None, f"the {self.server.wording.role}'s server fails: {fault}")
        self._failed, self._answered = 0, True
        return answer

    def _enough(self, state: Any) -> bool:
        """Whether to give a prompt up; quickly where the server is or seems to be down."""
        attempts = self.server.attempts
        if self._failed >= _PATIENCE:
            attempts = 1
        elif state.outcome.exception().refused and not self._heard:
            attempts = min(attempts, 3)
        return state.attempt_number >= attempts

    async def _attempt(self, prompt: str) -> Answer:
        import openai

        while (wait := self._open_at - time.monotonic()) > 0 and self.ended is None:
            await self._sleep(wait)
        if self.ended is not None:
            raise _Ended
        try:
            async with asyncio.timeout(self.server.timeout):
                reply = await self._client.chat.completions.with_raw_response.create(
                    model=self.server.model,
                    messages=[{"role": "user", "content": prompt}],
                    extra_body=self._settings,
                )
            self._reply()
            self._hold(wait_asked(reply.headers, failed=False))
            return _read(reply.parse(), self.server.wording)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise _Passing(f"no answer in {self.server.timeout:g} s", silent=True) from error
        except openai.APIConnectionError as error:
            refused = type(error.__cause__).__name__ == "ConnectError"
            raise _Passing(_reason(error), True, refused) from error
        except openai.APIStatusError as error:
            self._reply()
            if error.status_code == 400 and not await self._is_known(error):
                raise self._stop(_no_model(self.server, error)) from error
            raise self._fault(error) from error
        except (ValueError, openai.OpenAIError) as error:
            raise _Passing("the reply isn't valid JSON") from error

    def _fault(self, error: Any) -> Exception:
        """What an error status means."""
        status, said = error.status_code, _said(self.server, error)
        if status == 401:
            return self._stop(_refused_key(self.server, error))
        if status == 402 or error.code == "insufficient_quota":
            return self._stop(InputError(f"{self.server.address} has no quota left for us{said}"))
        if status in (404, 405):
            return self._stop(_no_model(self.server, error))
        if error.param in self._settings or error.param == "model":
            return self._stop(
                InputError(
                    f"{self.server.address} doesn't take {error.param}="
                    f"{self._settings.get(error.param, self.server.model)!r}{said}; "
                    f"see {self.server.wording.request}"
                )
            )
        if status not in (408, 409, 429) and status < 500:
            role = self.server.wording.role
            return _Rejected(f"the {role}'s server rejects this prompt: status {status}{said}")
        self._hold(wait_asked(error.response.headers, failed=True))
        return _Passing(f"status {status}{said}")

    async def _is_known(self, error: Any) -> bool:
        """Whether the server has the model, for all that it says; some reject others with 400."""
        import openai

        if self._answered or error.code in _OF_THE_PROMPT:
            return True
        if self._listed is None:
            try:
                names = [model.id for model in (await self._client.models.list()).data]
            except (openai.OpenAIError, ValueError, AttributeError):
                names = []
            self._listed = self.server.model in names or not names
        return self._listed

    def _reply(self) -> None:
        self._heard += 1
        self._silent = 0

    def _hold(self, seconds: float) -> None:
        """No request before so many seconds have passed."""
        if seconds > self.server.longest_wait:
            self._stop(
                InputError(
                    f"{self.server.address} asks to wait for {seconds:.0f} s; what is answered "
                    "is kept: go on later, with the same command"
                )
            )
        elif seconds > 0:
            spread = random.uniform(0, self.server.first_wait)
            self._open_at = max(self._open_at, time.monotonic() + seconds + spread)

    def _stop(self, error: InputError) -> _Ended:
        """Ends all asking, for the first such reason."""
        self.ended = self.ended or error
        self._end.set()
        return _Ended()

    async def _sleep(self, seconds: float) -> None:
        """Sleeps, until asking ends at the latest."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._end.wait(), seconds)


def _read(reply: Any, wording: Wording) -> Answer:
    """The answer in a reply."""
    choices = getattr(reply, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise _Passing("the reply isn't a chat completion")
    message, why = choices[0].message, choices[0].finish_reason
    text, error, role = _clean(message.content or ""), None, wording.role
    if why == "content_filter":
        error = f"the {role} was stopped by its server's content filter"
    elif getattr(message, "refusal", None):
        error = f"the {role} refused: {_clean(message.refusal)}"
    elif why == "length":
        error = f"the {role}'s answer was cut at its longest; see {wording.request} max_tokens=N"
    elif not text.strip():
        error = f"the {role}'s answer is empty"
    return Answer(text, error)


def _clean(text: Any) -> str:
    """Text that can be written: JSON may hold half a surrogate pair."""
    return str(text).encode(errors="replace").decode()


def _said(server: Server, error: Any) -> str:
    """The server's own words, in brackets, without the key."""
    body = error.body if isinstance(error.body, dict) else {}
    text = " ".join(_clean(body.get("message") or body.get("detail") or error.message).split())
    if server.key:
        text = text.replace(server.key, "[key]")
    return f" ({text[:200]})"


def _refused_key(server: Server, error: Any) -> InputError:
    return InputError(
        f"{server.address} refuses the API key{_said(server, error)}; set the variable that "
        f"{server.wording.key} names"
    )


def _no_model(server: Server, error: Any) -> InputError:
    return InputError(
        f"{server.address} has no model {server.model!r}, or is no OpenAI-compatible address"
        f"{_said(server, error)}; check {server.wording.model} and {server.wording.url}"
    )


def _unreachable(server: Server, reason: str) -> InputError:
    return InputError(
        f"{server.address} can't be reached ({reason}); start it, or check {server.wording.url}; "
        "what is answered is kept"
    )


def _reason(error: Exception) -> str:
    """Of a failed connection; openai's own error says no more than that."""
    cause = error.__cause__ or error
    return f"connection failed: {str(cause) or type(cause).__name__}"


def _arguments(server: Server) -> dict[str, Any]:
    return {
        "api_key": server.key or "none",
        "base_url": server.url,
        "timeout": server.timeout,
        "max_retries": 0,
    }


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Runs it; in a thread of its own where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
