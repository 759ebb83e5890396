"""Progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def table_console() -> Console:
    """Standard output, wide enough for the tables: a narrower terminal wraps their lines."""
    return Console(width=max(Console().width, 140))


@contextmanager
def track(total: int, *tasks: str) -> Iterator[list[Callable[[int], None]]]:
    """A bar on standard error for each task, advanced by calling its function with what is done."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = [progress.add_task(task, total=total) for task in tasks]
        yield [lambda done, bar=bar: progress.update(bar, completed=done) for bar in bars]
