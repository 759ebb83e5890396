"""A run's folder: shards that are whole or absent, checked when they are read.

    RUN/study.json            what is run: the settings and hashes that every figure depends on
    RUN/sessions.jsonl        each process that worked on it: versions, devices, options
    RUN/rounds.json           what was decided to be drawn, round by round
    RUN/samples/NAME.parquet, RUN/judgements/NAME.parquet    one shard per chunk
    RUN/*/manifest-P.jsonl    what process P wrote: file, rows, sha256; written after the shard
    RUN/aside/                shards that were not trusted
    RUN/estimates.parquet, samples.parquet, summary.json     results, made from the shards

A process that is killed leaves at most a temporary file, or a shard that no manifest names; both
are made again. A shard that differs from its manifest, or that another run wrote, is named and
set aside.
"""

import fcntl
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tailrisk_jax.errors import InputError
from tailrisk_jax.studies.rounds import Round

KINDS = ("samples", "judgements")
FORMAT = 1  # of the folder; a higher one was written by a later version


class SetAside(UserWarning):
    """A shard was not trusted; it will be made again."""


class Store:
    """One run's folder, or memory alone (`folder` None), for one of its processes."""

    def __init__(self, folder: Path | None = None, identity: str = "", process: int = 0):
        self.folder, self._identity, self._process = folder, identity, process
        self._listed: dict[str, dict[str, Any]] = {}
        self._memory: dict[str, pa.Table] = {}
        self._rounds: list[Round] = []
        if folder is not None:
            self._listed = _read_manifests(folder)

    def write(self, kind: str, name: str, table: pa.Table) -> None:
        """Keeps a shard: written whole, then listed."""
        if self.folder is None:
            self._memory[f"{kind}/{name}"] = table
            return
        buffer = io.BytesIO()
        table = table.replace_schema_metadata({"run": self._identity})
        pq.write_table(table, buffer, compression="zstd")
        content, file = buffer.getvalue(), f"{kind}/{name}.parquet"
        write_atomically(self.folder / file, content)
        entry = {
            "file": file,
            "rows": table.num_rows,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        _append(self.folder / kind / f"manifest-{self._process}.jsonl", entry)
        self._listed[file] = entry

    def read(self, kind: str, name: str) -> pa.Table | None:
        """A shard, or None where it is missing or not to be trusted."""
        if self.folder is None:
            return self._memory.get(f"{kind}/{name}")
        file = f"{kind}/{name}.parquet"
        entry, path = self._listed.get(file), self.folder / file
        if entry is None or not path.exists():
            return None
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            self._set_aside(path, "is not what was written (its checksum differs)")
            return None
        return pq.read_table(io.BytesIO(content))

    def need(self, kind: str, name: str) -> pa.Table:
        """A shard that must be there.

        Raises:
          InputError: it isn't, or is not to be trusted.
        """
        table = self.read(kind, name)
        if table is None:
            raise InputError(
                f"{kind} shard {name} of run {self.folder} is missing or damaged; "
                "finish that run first: tailrisk resume"
            )
        return table

    @property
    def rounds(self) -> list[Round]:
        """What was decided to be drawn."""
        if self.folder is None:
            return list(self._rounds)
        path = self.folder / "rounds.json"
        records = read_json(path, f"run {self.folder} is damaged") if path.exists() else []
        return [Round(np.asarray(r["first"]), np.asarray(r["count"])) for r in records]

    def add_round(self, sizes: Round) -> None:
        """Decides, before it is drawn, what is drawn next."""
        rounds = [*self.rounds, sizes]
        self._rounds = rounds
        if self.folder is not None and self._process == 0:
            records = [{"first": r.first.tolist(), "count": r.count.tolist()} for r in rounds]
            write_json(self.folder / "rounds.json", records)

    def refresh(self) -> None:
        """Reads what other processes have written since."""
        if self.folder is not None:
            self._listed = _read_manifests(self.folder)

    def clean(self) -> None:
        """Removes what a killed process left, and sets aside files that this run did not write."""
        if self.folder is None:
            return
        for kind in KINDS:
            for path in sorted((self.folder / kind).glob("*")):
                unlisted = path.suffix == ".parquet" and f"{kind}/{path.name}" not in self._listed
                if path.name.startswith(".") or (unlisted and self._wrote(path)):
                    path.unlink()
                elif unlisted:
                    self._set_aside(path, "was not written by this run")

    def _wrote(self, path: Path) -> bool:
        try:
            metadata = pq.read_schema(path).metadata or {}
        except (OSError, pa.ArrowException):
            return False
        return metadata.get(b"run", b"").decode() == self._identity

    def _set_aside(self, path: Path, why: str) -> None:
        assert self.folder is not None
        aside = self.folder / "aside"
        aside.mkdir(exist_ok=True)
        number = sum(1 for _ in aside.iterdir())
        target = aside / f"{number}-{path.parent.name}-{path.name}"
        path.rename(target)
        self._listed.pop(f"{path.parent.name}/{path.name}", None)
        warnings.warn(
            f"shard {path} {why}; it was moved to {target} and will be made again",
            SetAside,
            stacklevel=3,
        )


def create(folder: Path, study: Mapping[str, Any]) -> None:
    """Makes a run's folder; `study` is what `read_study` returns."""
    for kind in KINDS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    write_json(folder / "study.json", {"format": FORMAT, **study})


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / "study.json").is_file()


def read_study(folder: Path) -> dict[str, Any]:
    """What a run is of.

    Raises:
      InputError: no run, a damaged file, or one of a later version.
    """
    study = read_json(folder / "study.json", f"{folder} is no run of `tailrisk estimate`")
    if study.get("format", 0) > FORMAT:
        raise InputError(
            f"run {folder} has format {study['format']}, this version reads up to {FORMAT}; "
            "update tailrisk_jax"
        )
    return study


def read_json(path: Path, absent: str) -> Any:
    """The content of a JSON file of ours."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{absent}: there is no {path.name}; check the folder") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}); restore it from a copy") from error


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a file in place when all of it is on disk.

    Raises:
      InputError: the disk is full or can't be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds a line; a torn last line of a killed process is cut off first."""
    try:
        with open(path, "ab+") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps(entry, default=str).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from error


def append_session(folder: Path, session: Mapping[str, Any]) -> None:
    """Records a process that works on the run."""
    _append(folder / "sessions.jsonl", session)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} can't be written ({error.strerror}); what is in the run is kept: make room, then "
        "give the same command again"
    )


def _read_manifests(folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["file"]: entry for kind in KINDS for entry in _lines(folder / kind)}


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("manifest-*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last end is torn
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(f"{path} is damaged ({error}); restore it from a copy") from error


@contextmanager
def locked(folder: Path, process: int = 0) -> Iterator[None]:
    """Holds a run for this process; the lock ends with it, however it ends.

    Raises:
      InputError: another process works on the run.
    """
    path = folder / f".lock-{process}"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"run {folder} is being written by process {file.read().strip() or 'unknown'}; "
                "wait for it, or give another --out"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
