"""One system in a process of its own, kept alive: JSON requests in, JSON replies out.

    python worker.py SYSTEM FOLDER SETTING-AS-JSON

A request is {"do": method, **arguments}; a reply {"value": ...} or {"error": traceback}. Whatever
else the libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from setting import Setting


def load(system: str, setting: Setting, folder: Path) -> Any:
    """The object whose methods answer requests."""
    if system == "ours":
        from ours import Ours

        return Ours(setting, folder)
    if system == "shapes":
        from ours import Shapes

        return Shapes(setting, folder)
    import peers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {
        "checkpoint": peers.Checkpoint,
        "lock-step": peers.LockStep,
        "generate": peers.Generate,
    }
    return kinds[system](setting, folder, device)


def main() -> None:
    """Answers requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    system, folder, fields = sys.argv[1:]
    setting = Setting(**json.loads(fields))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.threads])
    target: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if target is None:
                target = load(system, setting, Path(folder))
            reply = {"value": getattr(target, request.pop("do"))(**request)}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
