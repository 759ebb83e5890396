"""Progress: bars on a terminal, a plain line now and then elsewhere; always on standard error."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column

from tailrisk_jax.studies import Progress

EVERY = 10.0  # seconds between plain lines
LAST = 6  # changes that the pace is taken from


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
    text = TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True))
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(),
        TimeElapsedColumn(), text,
    )  # fmt: skip
    pace = Pace(time.monotonic())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        drawn = bars.add_task("drawn", total=None, said="")
        judged = bars.add_task("judged", total=None, said="")
        scored = bars.add_task("scored", total=None, said="", visible=False)

        def tell(now: Progress) -> None:
            pace.tell(now, time.monotonic())
            bars.update(drawn, total=now.total, completed=now.drawn, said=pace.said())
            bars.update(judged, total=now.total, completed=now.judged, said=_found(now))
            bars.update(scored, total=now.scoring, completed=now.scored, visible=now.scoring > 0)

        yield tell


@contextmanager
def _lines() -> Iterator[Callable[[Progress], None]]:
    last = time.monotonic()
    latest, pace = Progress(), Pace(last)

    def tell(now: Progress) -> None:
        nonlocal last, latest
        latest, moment = now, time.monotonic()
        pace.tell(now, moment)
        if moment - last >= EVERY:
            last = moment
            _say(now, pace)

    yield tell
    if latest.total:
        _say(latest, pace)


class Pace:
    """How fast a run goes, by its last few chunks: what an earlier session kept, and the
    compilation before the first, are soon forgotten."""

    def __init__(self, start: float):
        self._now = Progress()
        self._drawing = deque([(start, self._now)], maxlen=LAST)
        self._judging = self._drawing.copy()

    def tell(self, now: Progress, moment: float) -> None:
        """How far the run is at a moment."""
        if now.fresh > self._now.fresh:
            self._drawing.append((moment, now))
        if now.judged > self._now.judged:
            self._judging.append((moment, now))
        self._now = now

    def said(self) -> str:
        """Rates of what is drawn anew, and how long the rounds decided so far will take."""
        parts, seconds, now = [], self.left(), self._now
        if now.fresh:
            rates = _rate(self._drawing, "fresh"), _rate(self._drawing, "tokens")
            parts = [f"{rates[0]:,.0f} samples/s", f"{rates[1]:,.0f} tokens/s"]
        if seconds:
            round_ = f" of round {now.rounds}" if now.rounds > 1 else ""
            parts.append(f"{_duration(seconds)} left{round_}")
        return ", ".join(parts)

    def left(self) -> float:
        """Seconds until all is drawn and judged, whichever takes longer; 0 where unknown."""
        now = self._now
        remaining = now.total - now.drawn, now.total - now.judged
        rates = _rate(self._drawing, "fresh"), _rate(self._judging, "judged")
        return max(n / rate if rate else 0.0 for n, rate in zip(remaining, rates, strict=True))


def _rate(seen: Sequence[tuple[float, Progress]], name: str) -> float:
    """How much a count grew per second; 0 before it has."""
    (start, first), (end, last) = seen[0], seen[-1]
    return (getattr(last, name) - getattr(first, name)) / (end - start) if end > start else 0.0


def _say(now: Progress, pace: Pace) -> None:
    parts = [f"drawn {now.drawn:,} of {now.total:,}", f"judged {now.judged:,}"]
    parts += [f"scored {now.scored:,} of {now.scoring:,}"] if now.scoring else []
    parts += [_found(now), pace.said()]
    print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _found(now: Progress) -> str:
    if not now.judged:
        return ""
    unscored = f", {now.unscored:,} unscored" if now.unscored else ""
    risk = f", mean risk {now.risk:.2e}" if now.risk == now.risk else ""
    return f"{now.hits:,} hits{unscored}{risk}"
