"""An OpenAI-compatible server on loopback that grades by arithmetic, and fails as it is told."""

import asyncio
import json
import threading
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = "sk-fictional-5d41402abc4b2a76"
MODEL = "grader"


def grade(prompt: str) -> int:
    """The number that the server answers, 0 to 100."""
    return zlib.crc32(prompt.encode()) % 101


class FaultServer:
    """Answers each prompt with its grade, after the faults that are planned for it.

    Attributes:
      faults: by prompt, what to do with its next requests; under None for all prompts, under
        "models" for requests of the list of models.
      asked: requests by prompt.
      graded: requests by prompt that were answered with a grade.
      largest: most requests that were in work at once.
      settings: further fields of the last request.
    """

    def __init__(self):
        self.faults: dict[str | None, list[str]] = defaultdict(list)
        self.asked, self.graded = Counter(), Counter()
        self.largest = self._now = 0
        self.settings: dict = {}
        self.times: list[float] = []

    async def chat(self, request) -> Response:
        content = await request.json()
        prompt = content.pop("messages")[-1]["content"]
        self.asked[prompt] += 1
        self.times.append(asyncio.get_running_loop().time())
        self._now += 1
        self.largest = max(self.largest, self._now)
        try:
            if request.headers["authorization"] != f"Bearer {KEY}":
                said = request.headers["authorization"]
                return _error(401, f"Incorrect API key provided: {said}", "invalid_api_key")
            if content.pop("model") != MODEL:
                return _error(404, "The model does not exist", "model_not_found")
            self.settings = content
            await asyncio.sleep(0.002)
            planned = self.faults[prompt] or self.faults[None]
            return await self._reply(prompt, planned.pop(0) if planned else "")
        finally:
            self._now -= 1

    async def models(self, request) -> Response:
        if request.headers["authorization"] != f"Bearer {KEY}":
            return _error(401, "Incorrect API key provided", "invalid_api_key")
        if self.faults["models"]:
            return await self._reply("", self.faults["models"].pop(0))
        return JSONResponse({"object": "list", "data": []})

    async def _reply(self, prompt: str, fault: str) -> Response:
        number = str(grade(prompt))
        match fault:
            case "slow":
                await asyncio.sleep(2.3)
                return _completion(number)
            case "dribble":
                return StreamingResponse(_dribble(), media_type="application/json")
            case "cut":
                body = _completion(number).body
                headers = {"content-length": str(len(body))}
                return StreamingResponse(iter([body[:20]]), headers=headers)
            case "malformed":
                return Response('{"choices": [', media_type="application/json")
            case "not a completion":
                return JSONResponse({"error": {"message": "upstream is busy"}})
            case "page":
                return Response("<html>maintenance</html>", media_type="text/html")
            case "empty":
                return _completion("")
            case "null":
                return _completion(None)
            case "length":
                return _completion(number, "length")
            case "filter":
                return _completion(number, "content_filter")
            case "refusal":
                return _completion("I can't help with grading this.")
            case "refusal field":
                return _completion(None, refusal="I won't.")
            case "out of range":
                return _completion("101")
            case "prose":
                return _completion(f"There are 3 reasons for {number}.")
            case "half a pair":
                return _completion("\ud83d")
            case "exhausted":
                self.graded[prompt] += 1
                left = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0m0.4s"}
                return _completion(number, headers=left)
            case "quota":
                return _error(429, "You exceeded your current quota", "insufficient_quota")
            case "parameter":
                return _error(400, "Unsupported parameter", "unsupported", param="max_tokens")
            case _ if fault:
                status, _, wait = fault.partition(" ")
                return _error(int(status), "told to", None, {"retry-after": wait} if wait else {})
        self.graded[prompt] += 1
        return _completion(number)


def _completion(content, reason="stop", refusal=None, headers=None) -> Response:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choices = [{"index": 0, "message": message, "finish_reason": reason}]
    content = {"id": "1", "object": "chat.completion", "created": 0, "model": MODEL}
    content = json.dumps(content | {"choices": choices})
    return Response(content, media_type="application/json", headers=headers)


def _error(status, message, code, headers=None, param=None) -> Response:
    content = {"error": {"message": message, "type": "error", "param": param, "code": code}}
    return JSONResponse(content, status, headers)


async def _dribble():
    for _ in range(25):
        yield b" "
        await asyncio.sleep(0.1)


@contextmanager
def running():
    """The server and its address, in a thread."""
    faulty = FaultServer()
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", faulty.chat, methods=["POST"]),
            Route("/v1/models", faulty.models),
        ]
    )
    config = uvicorn.Config(
        app, port=0, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield faulty, f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()
