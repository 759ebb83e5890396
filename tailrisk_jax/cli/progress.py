"""Progress: bars on a terminal, a plain line now and then elsewhere; always on standard error."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from tailrisk_jax.studies import Progress

EVERY = 10.0  # seconds between plain lines


def table_console() -> Console:
    """Standard output, wide enough for the tables: a narrower terminal wraps their lines."""
    return Console(width=max(Console().width, 140))


@contextmanager
def track(total: int, *tasks: str) -> Iterator[list[Callable[[int], None]]]:
    """A bar for each task, advanced by calling its function with what is done."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Bars(*columns, console=Console(stderr=True)) as progress:
        bars = [progress.add_task(task, total=total) for task in tasks]
        yield [lambda done, bar=bar: progress.update(bar, completed=done) for bar in bars]


@contextmanager
def follow(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """What a run is told its progress by."""
    if quiet:
        yield lambda progress: None
    elif sys.stderr.isatty():
        with _bars() as tell:
            yield tell
    else:
        with _lines() as tell:
            yield tell


@contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[said]}"),
    )  # fmt: skip
    start = time.monotonic()
    with Bars(*columns, console=Console(stderr=True)) as bars:
        drawn = bars.add_task("drawn", total=None, said="")
        judged = bars.add_task("judged", total=None, said="")

        def tell(now: Progress) -> None:
            rates = _rates(now, time.monotonic() - start)
            bars.update(drawn, total=now.total, completed=now.drawn, said=rates)
            bars.update(judged, total=now.total, completed=now.judged, said=_found(now))

        yield tell


@contextmanager
def _lines() -> Iterator[Callable[[Progress], None]]:
    start = last = time.monotonic()
    lock, latest = threading.Lock(), Progress()

    def tell(now: Progress) -> None:
        nonlocal last, latest
        with lock:
            latest, moment = now, time.monotonic()
            if moment - last >= EVERY:
                last = moment
                _say(now, moment - start)

    yield tell
    if latest.total:
        _say(latest, time.monotonic() - start)


def _say(now: Progress, seconds: float) -> None:
    parts = [f"drawn {now.drawn:,} of {now.total:,}", f"judged {now.judged:,}"]
    parts += [_rates(now, seconds), _found(now)]
    left = now.total - now.drawn
    if left and now.fresh:
        parts.append(f"about {left * seconds / now.fresh:,.0f} s left")
    print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


def _rates(now: Progress, seconds: float) -> str:
    if not now.fresh:
        return ""
    return f"{now.fresh / seconds:,.0f} samples/s, {now.tokens / seconds:,.0f} tokens/s"


def _found(now: Progress) -> str:
    if not now.judged:
        return ""
    unscored = f", {now.unscored:,} unscored" if now.unscored else ""
    return f"{now.hits:,} hits{unscored}, mean risk {now.risk:.2e}"
