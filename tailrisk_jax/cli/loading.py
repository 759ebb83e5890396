"""Models for commands: with a bar where it takes long, in the dtype that fits the device."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from tailrisk_jax.cli.embedded import FOLDERS
from tailrisk_jax.cli.progress import EVERY
from tailrisk_jax.models import Model, load_model

DType = Literal["auto", "float32", "bfloat16", "float16"]
SOON = 1.0  # seconds without a bar


def resolved_dtype(dtype: str, model: str | None = None) -> str:
    """The dtype that "auto" stands for: bfloat16 on GPU and TPU, float32 on CPU and for
    embedded models."""
    if dtype != "auto":
        return dtype
    return "float32" if model in FOLDERS or jax.default_backend() == "cpu" else "bfloat16"


def load(folder: Path, dtype: str, *, quiet: bool, cache: Path | None = None) -> Model:
    """`load_model`, with a bar."""
    with loading(quiet or jax.process_index() > 0) as tell:
        return load_model(folder, dtype=jnp.dtype(dtype), cache=cache, on_progress=tell)


@contextmanager
def loading(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """What `load_model` is told its progress by: nothing for a second, then a bar on a terminal,
    and a line now and then elsewhere."""
    last, terminal = time.monotonic(), sys.stderr.isatty()
    with ExitStack() as stack:
        show: Callable[[int, int], None] | None = None

        def tell(done: int, total: int) -> None:
            nonlocal show, last
            late = time.monotonic() - last
            if quiet or (late < (SOON if terminal else EVERY) and show is None):
                return
            if terminal:
                show = show or stack.enter_context(_bar())
                show(done, total)
            else:
                last = time.monotonic()
                said = f"loaded {done / 1e9:.1f} of {total / 1e9:.1f} GB of parameters"
                print(said, file=sys.stderr, flush=True)

        yield tell


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("parameters", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
