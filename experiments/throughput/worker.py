"""One system in a process of its own, kept alive: `experiments.workers` says how it is asked.

python worker.py SYSTEM FOLDER SETTING-AS-JSON
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from setting import Setting

from experiments.workers import serve


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
    system, folder, fields = sys.argv[1:]
    setting = Setting(**json.loads(fields))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.threads])
    serve(lambda: load(system, setting, Path(folder)))


if __name__ == "__main__":
    main()
