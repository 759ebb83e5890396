"""Processes that stay alive and answer requests: JSON lines in, JSON lines out.

A request is {"do": method, **arguments}; a reply {"value": ...} or {"error": traceback}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Failed(RuntimeError):
    """A worker's error, or a result that isn't what it should be."""


class Worker:
    """The side that asks.

    Args:
      command: what follows `python`.
      environment: beside this process's own; the repository comes first among the places of
        imports.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment | {"PYTHONPATH": path},
        )

    def __call__(self, do: str, **arguments: Any) -> Any:
        """Sends a request and waits for its reply.

        Raises:
          Failed: the worker's error, or its end.
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"the worker ended (exit status {self.process.wait()})")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply["value"]

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(load: Callable[[], Any]) -> None:
    """Answers requests by the methods of what `load` returns, until standard input ends.

    Whatever else is printed goes to standard error. An error in loading is a reply too.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    target: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if target is None:
                target = load()
            reply = {"value": getattr(target, request.pop("do"))(**request)}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)
