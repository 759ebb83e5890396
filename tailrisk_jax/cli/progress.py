"""Progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def table_console() -> Console:
    """Standard output, wide enough for the tables: a narrower terminal wraps their lines."""
    return Console(width=max(Console().width, 140))


@contextmanager
def track(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, advanced by calling the function it yields with what is done."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
