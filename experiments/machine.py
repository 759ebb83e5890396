"""The machine that measures: what it is, and who else uses it meanwhile."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any


class Usage:
    """How many cores all other processes used, from its making on (Linux; None elsewhere)."""

    def __init__(self):
        self.start = self._read()

    def others(self) -> float | None:
        """Cores' worth of work done by processes that aren't this one's or its ended children."""
        if self.start is None:
            return None
        seconds, busy, own = (b - a for a, b in zip(self.start, self._read() or (), strict=True))
        return round(max(0.0, (busy - own) / seconds), 2)

    def _read(self) -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(
            int, stat.read_text().split("\n", 1)[0].split()[1:9]
        )
        ticks = user + nice + system + irq + softirq + steal
        own = os.times()
        return time.time(), ticks / os.sysconf("SC_CLK_TCK"), sum(own[:4])


def hardware() -> dict[str, Any]:
    """CPU model and cores."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "system": platform.system()}
