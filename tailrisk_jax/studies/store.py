"""A run's folder: shards that are whole or absent, checked when they are read.

    RUN/study.yaml            the command's options, as `--config` reads them
    RUN/weights.json          weights of single queries in the proposal, where they have their own
    RUN/study.json            what is run: the settings and hashes that every figure depends on
    RUN/sessions.jsonl        each time that it was worked on: versions, devices, options
    RUN/rounds.json           what was decided to be drawn, round by round
    RUN/samples/NAME.parquet, RUN/judgements/NAME.parquet    one shard per chunk
    RUN/*/manifest-P.jsonl    what process P wrote: file, rows, sha256; written after the shard
    RUN/aside/                shards that were not trusted
    RUN/.lock-P               held by process P while it works on the run
    RUN/estimates.parquet, samples.parquet, summary.json     results, made from the shards

A process that is killed leaves at most a temporary file, which is removed, or a shard that no
manifest names. Such a shard, one that differs from its manifest and one that another run wrote
are named, set aside and made again.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tailrisk_jax.errors import InputError
from tailrisk_jax.studies.rounds import Round

KINDS = ("samples", "judgements")
FORMAT = 1  # of the folder; a higher one was written by a later version

_TEMPORARY = re.compile(r"\..+\.\d+")
_writing = threading.RLock()


class SetAside(UserWarning):
    """A shard was not trusted; it will be made again."""


class Store:
    """One run's folder, or memory alone (`folder` None), for one of its processes.

    Args:
      identity: of the run, written into its shards; those of another are not trusted.
      process: which of several this is.
    """

    def __init__(self, folder: Path | None = None, identity: str = "", process: int = 0):
        self.folder, self._identity, self._process = folder, identity, process
        self._listed: dict[str, dict[str, Any]] = {}
        self._memory: dict[str, pa.Table] = {}
        self._rounds: list[Round] = []
        self.refresh()

    def write(self, kind: str, name: str, table: pa.Table) -> None:
        """Keeps a shard: written whole, then listed."""
        if self.folder is None:
            self._memory[f"{kind}/{name}"] = table
            return
        buffer = io.BytesIO()
        table = table.replace_schema_metadata({"run": self._identity})
        pq.write_table(table, buffer, compression="zstd")
        content, file = buffer.getvalue(), f"{kind}/{name}.parquet"
        entry = {
            "file": file,
            "rows": table.num_rows,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_atomically(self.folder / file, content)
        _append(self.folder / kind / f"manifest-{self._process}.jsonl", entry)
        self._listed[file] = entry

    def read(self, kind: str, name: str) -> pa.Table | None:
        """A shard, or None where it is missing or not to be trusted."""
        if self.folder is None:
            return self._memory.get(f"{kind}/{name}")
        entry = self._listed.get(f"{kind}/{name}.parquet")
        if entry is None:
            return None
        try:
            content = self._path(kind, name).read_bytes()
        except FileNotFoundError:
            self.set_aside(kind, name, "is gone")
            return None
        except OSError as error:
            raise unreadable(self._path(kind, name), error) from error
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            self.set_aside(kind, name, "is not what was written (its checksum differs)")
            return None
        table = pq.read_table(pa.BufferReader(content))
        if (table.schema.metadata or {}).get(b"run", b"").decode() != self._identity:
            self.set_aside(kind, name, "was written by another run")
            return None
        return table.replace_schema_metadata(None)

    def need(self, kind: str, name: str) -> pa.Table:
        """A shard that must be there.

        Raises:
          InputError: it isn't, or is not to be trusted.
        """
        table = self.read(kind, name)
        if table is None:
            raise InputError(
                f"{kind} shard {name} of run {self.folder} is missing or damaged; "
                f"finish that run first: tailrisk resume {self.folder}"
            )
        return table

    def set_aside(self, kind: str, name: str, why: str) -> None:
        """Moves a shard away, says so in a warning, and forgets it."""
        path, said = self._path(kind, name), ""
        aside = path.parents[1] / "aside"
        self._listed.pop(f"{kind}/{name}.parquet", None)
        try:
            if path.exists():
                aside.mkdir(exist_ok=True)
                target = aside / f"{sum(1 for _ in aside.iterdir())}-{kind}-{path.name}"
                path.rename(target)
                said = f"it was moved to {target} and "
        except OSError as error:
            raise _unwritable(path, error) from error
        warnings.warn(f"shard {path} {why}; {said}will be made again", SetAside, stacklevel=3)

    @property
    def rounds(self) -> list[Round]:
        """What was decided to be drawn.

        Raises:
          InputError: a damaged file.
        """
        if self.folder is None:
            return list(self._rounds)
        path = self.folder / "rounds.json"
        records = read_json(path, f"run {self.folder} is damaged") if path.exists() else []
        try:
            return [Round(np.asarray(r["first"]), np.asarray(r["count"])) for r in records]
        except (KeyError, TypeError) as error:
            raise unreadable(path, error) from error

    def add_round(self, sizes: Round) -> None:
        """Decides, before it is drawn, what is drawn next."""
        rounds = [*self.rounds, sizes]
        self._rounds = rounds
        if self.folder is not None:
            records = [{"first": r.first.tolist(), "count": r.count.tolist()} for r in rounds]
            write_json(self.folder / "rounds.json", records)

    def refresh(self) -> None:
        """Reads what other processes have written since."""
        if self.folder is not None:
            self._listed = {
                entry["file"]: entry for kind in KINDS for entry in _lines(self.folder / kind)
            }

    def clean(self) -> None:
        """Removes the temporary files of a killed process; sets aside shards that none listed."""
        if self.folder is None:
            return
        for folder in (self.folder, *(self.folder / kind for kind in KINDS)):
            for path in folder.glob(".*"):
                if _TEMPORARY.fullmatch(path.name):
                    _remove(path)
        for kind in KINDS:
            for path in sorted((self.folder / kind).glob("*.parquet")):
                if f"{kind}/{path.name}" not in self._listed:
                    self.set_aside(kind, path.stem, "was not listed when the run was stopped")

    def _path(self, kind: str, name: str) -> Path:
        assert self.folder is not None
        return self.folder / kind / f"{name}.parquet"


def create(folder: Path, study: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Makes a run's folder, or brings it up to date; `study` is what `read_study` returns.

    `files` are written first: where study.json is, they are.
    """
    for name, content in files.items():
        write_atomically(folder / name, content)
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
    if not isinstance(study, dict) or not isinstance(study.get("format"), int):
        raise InputError(f"{folder / 'study.json'} is not of a run; check the folder")
    if study["format"] > FORMAT:
        raise InputError(
            f"run {folder} has format {study['format']}, this version reads up to {FORMAT}; "
            "update tailrisk_jax"
        )
    return study


def read_json(path: Path, absent: str) -> Any:
    """The content of a JSON file of ours."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{absent}: there is no {path.name}; check the folder") from error
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Puts a file in place when all of it is on disk, in a folder that is made if need be.

    Raises:
      InputError: the disk is full or can't be written.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    with _writing:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException as error:  # Ctrl-C too
            with suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise _unwritable(path, error) from error
            raise


def stop_writing(timeout: float = 10.0) -> None:
    """Lets a write of another thread end, and none begin: for a process that is about to end."""
    _writing.acquire(timeout=timeout)


def append_session(folder: Path, session: Mapping[str, Any]) -> None:
    """Records that the run is worked on."""
    _append(folder / "sessions.jsonl", session)


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds a line; a torn last line of a killed process is cut off first."""
    try:
        with _writing, open(path, "ab+") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps(entry, default=str).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} can't be written ({error.strerror}); what is in the run is kept: make room, then "
        "give the same command again"
    )


def unreadable(path: Path, error: Exception) -> InputError:
    """For a file of ours that is there, but not as we wrote it."""
    return InputError(f"{path} can't be read ({error}); restore it from a copy")


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The entries of a folder's manifests; a line that can't be read is passed over."""
    for path in sorted(folder.glob("manifest-*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last end is torn
            with suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                yield {name: entry[name] for name in ("file", "rows", "sha256")}


@contextmanager
def locked(folder: Path, process: int = 0) -> Iterator[None]:
    """Holds a run for this process, and makes its folder; the lock ends with the process.

    Raises:
      InputError: another process works on the run, or the folder can't be written.
    """
    path = folder / f".lock-{process}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(file, 200).decode(errors="replace") or "unknown"
            raise InputError(
                f"run {folder} is being written by process {owner}; "
                "wait for it, or give another --out"
            ) from error
        except OSError as error:
            raise _unwritable(path, error) from error
        with suppress(OSError):  # on a full disk the lock holds, and its owner stays unnamed
            os.ftruncate(file, 0)
            os.write(file, f"{os.getpid()} on {os.uname().nodename}".encode())
        yield
    finally:
        os.close(file)
