"""Results that grow, in one file: what was measured, on what, and whether it is all there."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from tailrisk_jax.errors import InputError
from tailrisk_jax.studies.store import write_atomically


class Record:
    """A file of results that a later call goes on with.

    Attributes:
      results: what was measured so far.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        """Reads what is there.

        Args:
          identity: what results must share to stand in one file.

        Raises:
          InputError: the file is of another setting, version or machine.
        """
        self.path, self.identity = path, json.loads(json.dumps(identity))
        found = json.loads(path.read_text()) if path.exists() else {}
        for name, value in self.identity.items():
            if found and found.get(name) != value:
                raise InputError(
                    f"{path} holds results of another {name}; move it away or give another --out"
                )
        self.dates: list[str] = found.get("dates", [])
        self.results: dict[str, Any] = found.get("results", {})

    def write(self, *, complete: bool = False) -> None:
        """Puts all that is known in place."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        self.dates = sorted({*self.dates, today})
        status = "complete" if complete else "partial"
        content = {"status": status, "dates": self.dates, **self.identity, "results": self.results}
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())


def versions(*more: str) -> dict[str, str]:
    """Of Python and of the packages that the results depend on."""
    names = ("jax", "jaxlib", "flax", "numpy", *more)
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}
