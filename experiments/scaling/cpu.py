"""Time, memory and compile time of drawing and scoring on this machine's CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments.machine import Usage, hardware
from experiments.scaling.record import Record, versions
from experiments.scaling.setting import OnCpu, Point
from experiments.workers import ROOT, Worker

CACHED = {
    "JAX_COMPILATION_CACHE_DIR": os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax")
    ),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # glibc gives larger arrays back when freed
UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def measure(
    setting: OnCpu, out: Path, *, rounds: int, compile_rounds: int, tell: Callable[[str], None]
) -> None:
    """Measures what is missing in `out`/cpu.json: memory once, the rest in rounds.

    Times come first, in one process that has compiled all points; the next two measurements have
    processes of their own.

    Raises:
      InputError: the file is of another setting.
    """
    record = Record(
        out / "cpu.json",
        {
            "setting": dataclasses.asdict(setting),
            "versions": versions(),
            "hardware": hardware(),
        },
    )
    _times(setting, record, rounds, tell)
    _peaks(setting, record, tell)
    _compiling(setting, record, compile_rounds, tell)
    record.write(complete=True)


def _times(setting: OnCpu, record: Record, rounds: int, tell: Callable[[str], None]) -> None:
    """Seconds of all points in turn, every second round backwards; and what XLA says of them."""
    points = setting.points
    found = record.results.setdefault("seconds", {str(point): [] for point in points})
    programs = record.results.setdefault("programs", {})
    if _rounds(found) >= rounds:
        return
    with _watched(record, "seconds"), _worker(setting, CACHED) as ask:
        for number, point in enumerate(points):
            tell(f"compiling {point} ({number + 1} of {len(points)})")
            programs[str(point)] = ask("warm", point=dataclasses.asdict(point))
        _alternate(ask, "seconds", points, found, rounds, record, tell)


def _peaks(setting: OnCpu, record: Record, tell: Callable[[str], None]) -> None:
    """The process's peak memory at every point."""
    found = record.results.setdefault("peaks", {})
    missing = [point for point in setting.points if str(point) not in found]
    if missing:
        with _worker(setting, CACHED | RETURNED) as ask:
            for point in missing:
                tell(f"memory of {point}")
                found[str(point)] = ask("peaks", point=dataclasses.asdict(point))
                record.write()


def _compiling(setting: OnCpu, record: Record, rounds: int, tell: Callable[[str], None]) -> None:
    """Seconds of compilation at every depth in turn, every second round backwards."""
    points = setting.compiled
    found = record.results.setdefault("compiling", {str(point): [] for point in points})
    if _rounds(found) >= rounds:
        return
    with _watched(record, "compiling"), _worker(setting, UNCACHED) as ask:
        ask("compiling", point=dataclasses.asdict(points[0]))  # what is done once in a process
        _alternate(ask, "compiling", points, found, rounds, record, tell)


def _alternate(
    ask: Worker,
    do: str,
    points: Sequence[Point],
    found: dict[str, list],
    rounds: int,
    record: Record,
    tell: Callable[[str], None],
) -> None:
    """Asks for what is missing, round by round; a round that was cut off begins anew."""
    for number in range(_rounds(found), rounds):
        tell(f"{do}: round {number + 1} of {rounds}")
        for point in points if number % 2 == 0 else points[::-1]:
            more = {"seed": number + 1} if do == "seconds" else {}
            values = found[str(point)][:number]
            found[str(point)] = [*values, ask(do, point=dataclasses.asdict(point), **more)]
        record.write()


def _rounds(found: dict[str, list]) -> int:
    """How many are whole."""
    return min(map(len, found.values()))


@contextlib.contextmanager
def _worker(setting: OnCpu, environment: dict[str, str]) -> Iterator[Worker]:
    """A started process, ended at the exit."""
    fields = json.dumps(dataclasses.asdict(setting))
    command = ["-m", "experiments.scaling.worker", fields]
    worker = Worker(command, {"JAX_PLATFORMS": "cpu", **environment})
    try:
        yield worker
    finally:
        worker.close()


@contextlib.contextmanager
def _watched(record: Record, name: str) -> Iterator[None]:
    """Notes how many cores others used; the worker that measures must end within."""
    usage = Usage()
    yield
    record.results.setdefault("others_cores", {}).setdefault(name, []).append(usage.others())
