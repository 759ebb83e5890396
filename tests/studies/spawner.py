"""Runs `tailrisk` in processes that can be killed, without paying for its imports each time.

As a script it imports everything but computes nothing, so that it has no thread and no device
yet, and forks a process for each line on standard input, which says as JSON what to run.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Spawner:
    """Starts processes of `tailrisk`; a context manager that ends with the script."""

    def __init__(self, folder: Path):
        self._folder, self._number = folder, 0

    def __enter__(self) -> "Spawner":
        self._script = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self._script.communicate("")

    def start(
        self, argv: Sequence[str | Path], *, largest_file: int = -1, devices: int = 1
    ) -> "Spawned":
        """A process of `tailrisk`, which runs beside this one.

        Args:
          largest_file: bytes that it may write into a file.
          devices: that it has.
        """
        self._number += 1
        errors, output = (
            self._folder / f"{name}-{self._number}.txt" for name in ("errors", "output")
        )
        ask = {
            "argv": list(map(str, argv)),
            "errors": str(errors),
            "output": str(output),
            "largest_file": largest_file,
            "devices": devices,
        }
        return Spawned(self, int(self._tell(ask)), errors, output)

    def _tell(self, ask: dict) -> str:
        assert self._script.stdin and self._script.stdout
        print(json.dumps(ask), file=self._script.stdin, flush=True)
        return self._script.stdout.readline()


class Spawned:
    """A process of `tailrisk`."""

    def __init__(self, spawner: Spawner, pid: int, errors: Path, output: Path):
        self._spawner, self.pid, self._errors, self._output = spawner, pid, errors, output
        self._code: int | None = None

    def wait(self) -> int:
        """Its exit code, minus the signal that killed it."""
        if self._code is None:
            self._code = int(self._spawner._tell({"wait": self.pid}))
        return self._code

    @property
    def errors(self) -> list[str]:
        """The lines that it has written to standard error."""
        return self._errors.read_text().splitlines() if self._errors.exists() else []

    @property
    def output(self) -> str:
        """What it has written to standard output."""
        return self._output.read_text()

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Its exit code after a signal."""
        os.kill(self.pid, number)  # nobody has waited for it, so the id is still its own
        return self.wait()


def wait_until(condition, seconds: float = 60) -> None:
    """Looks again and again, about every tenth of a millisecond."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(1e-4)


def serve() -> None:
    import transformers  # noqa: F401  # what a command imports later

    import tailrisk_jax.cli  # noqa: F401

    for line in sys.stdin:
        ask = json.loads(line)
        if "wait" in ask:
            print(os.waitstatus_to_exitcode(os.waitpid(ask["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            run(**ask)
            return
        print(pid, flush=True)


def run(argv: Sequence[str], errors: str, output: str, largest_file: int, devices: int) -> None:
    import jax

    from tailrisk_jax.cli import main

    for number, path in ((0, os.devnull), (1, output), (2, errors)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest_file >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))  # EFBIG in Python
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    main(argv)


if __name__ == "__main__":
    serve()
