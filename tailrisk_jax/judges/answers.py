"""Answers that were paid for, kept on disk."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tailrisk_jax.errors import InputError

_BUSY = 60.0  # seconds that another process may take to write


class AnswerCache:
    """Answers by key, in an sqlite file that several processes may share.

    An answer is on disk when `put` returns: a process that is killed then loses none. On a network
    disk, only processes of one machine may share it.
    """

    def __init__(self, path: Path | None):
        """Opens a file, or makes one; None for memory."""
        self._name = path or "in memory"
        with self._clear():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                path or ":memory:", timeout=_BUSY, isolation_level=None, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, answer TEXT)"
            )

    def get(self, key: str) -> str | None:
        """The answer that is kept, if any."""
        with self._clear():
            row = self._database.execute("SELECT answer FROM answers WHERE key = ?", (key,))
            found = row.fetchone()
        return None if found is None else found[0]

    def put(self, key: str, model: str, answer: str) -> None:
        """Keeps an answer."""
        with self._clear():
            self._database.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, model, answer)
            )

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    @contextmanager
    def _clear(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"judge cache {self._name} can't be used ({error}); make room for it, or give "
                "another --judge-cache"
            ) from error


def default_cache() -> Path:
    """The cache of all runs of this user, in XDG_CACHE_HOME or ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "tailrisk_jax" / "judge_answers.sqlite"
