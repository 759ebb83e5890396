"""What a run's folder keeps, and what of it is trusted again."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import Store, locked
from tailrisk_jax.studies import store as files
from tailrisk_jax.studies.rounds import Round
from tailrisk_jax.studies.store import stop_writing, write_atomically

TABLE = pa.table({"query_id": ["a", "a"], "sample": pa.array([0, 1], pa.int32())})
FILE = "samples/000-00000.parquet"


@pytest.fixture
def kept(tmp_path):
    """A folder that holds one shard."""
    Store(tmp_path, "ours").write("samples", "000-00000", TABLE)
    return tmp_path


def reread(folder, name="000-00000"):
    """What a later process reads, and what it says of it."""
    store = Store(folder, "ours")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        store.clean()
        return store.read("samples", name), [str(w.message) for w in said]


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def foreign(folder, name):
    Store(folder / "other", "theirs").write("samples", name, TABLE)
    (folder / "other" / "samples" / f"{name}.parquet").rename(
        folder / "samples" / f"{name}.parquet"
    )
    return folder / "other" / "samples" / "manifest-0.jsonl"


def foreign_and_listed(folder):
    manifest = foreign(folder, "000-00000")
    manifest.rename(folder / "samples" / "manifest-0.jsonl")


DAMAGE = {
    "one bit": (lambda f: flip(f / FILE, 100), "checksum differs"),
    "cut short": (lambda f: cut(f / FILE, 200), "checksum differs"),
    "empty": (lambda f: cut(f / FILE, 0), "checksum differs"),
    "no Parquet": (lambda f: (f / FILE).write_bytes(b"text"), "checksum differs"),
    "gone": (lambda f: (f / FILE).unlink(), "is gone"),
    "another run's": (lambda f: foreign(f, "000-00000"), "checksum differs"),
    "another run's, with its list": (foreign_and_listed, "was written by another run"),
    "no manifest": (lambda f: (f / "samples/manifest-0.jsonl").unlink(), "was not listed"),
    "torn manifest": (lambda f: cut(f / "samples/manifest-0.jsonl", -1), "was not listed"),
    "damaged manifest": (lambda f: flip(f / "samples/manifest-0.jsonl", 0), "was not listed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_shard_that_is_not_ours_and_whole_is_named_and_set_aside(name, kept):
    damage, said = DAMAGE[name]
    damage(kept)
    present = (kept / FILE).exists()
    table, messages = reread(kept)
    assert table is None
    assert len(messages) == 1 and said in messages[0] and FILE in messages[0], messages
    assert not (kept / FILE).exists()
    assert len(list(kept.glob("aside/*"))) == present
    Store(kept, "ours").write("samples", "000-00000", TABLE)  # made again, it is trusted
    table, messages = reread(kept)
    assert table.equals(TABLE) and not messages


def test_what_is_whole_is_kept_through_leftovers(kept):
    manifest = kept / "samples" / "manifest-0.jsonl"
    manifest.write_bytes(manifest.read_bytes() + b'{"file": "samples/000-000')  # torn
    for folder in (kept, kept / "samples"):
        (folder / ".000-00001.parquet.77").write_bytes(b"half")
    (kept / ".gitignore").write_text("*")  # no temporary file of ours
    table, messages = reread(kept)
    assert table.equals(TABLE) and not messages
    Store(kept, "ours").write("samples", "000-00001", TABLE)
    assert [json.loads(line)["rows"] for line in manifest.read_text().splitlines()] == [2, 2]
    assert {path.name for path in kept.rglob(".*")} == {".gitignore"}


def test_processes_read_what_others_wrote(tmp_path):
    stores = [Store(tmp_path, "ours", process) for process in range(2)]
    for process, store in enumerate(stores):
        store.write("samples", f"000-0000{process}", TABLE)
    assert stores[0].read("samples", "000-00001") is None
    stores[0].refresh()
    assert stores[0].read("samples", "000-00001").equals(TABLE)
    stores[0].add_round(Round(np.array([0, 3]), np.array([3, 0])))
    assert stores[1].rounds[0].count.tolist() == [3, 0]


def test_one_process_holds_a_run(tmp_path):
    script = (
        "import sys, pathlib; from tailrisk_jax.studies.store import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, tmp_path / "run"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=f"being written by process {holder.pid} on "),
            locked(tmp_path / "run"),
        ):
            pass
        with locked(tmp_path / "run", process=1):  # another of one run's processes
            pass
        holder.send_signal(signal.SIGKILL)
    with locked(tmp_path / "run"):  # the dead hold nothing
        assert (tmp_path / "run" / ".lock-0").read_text().startswith(f"{os.getpid()} on ")


@contextmanager
def largest_file(size):
    """Writes beyond `size` bytes of a file fail half way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_what_was_there(kept, monkeypatch):
    path = kept / "file"
    write_atomically(path, b"before")
    with largest_file(1000), pytest.raises(InputError, match=r"file can't be written \(File too"):
        write_atomically(path, b"x" * 2000)
    store = Store(kept, "ours")
    with largest_file(100), pytest.raises(InputError, match="what is in the run is kept"):
        store.write("samples", "000-00001", TABLE)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupted)
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before" and reread(kept)[0].equals(TABLE)
    assert not list(kept.rglob(".*"))


def test_a_manifest_line_that_did_not_fit_is_no_obstacle(kept):
    manifest = kept / "samples" / "manifest-0.jsonl"
    store, size = Store(kept, "ours"), manifest.stat().st_size
    with pytest.MonkeyPatch.context() as patch, largest_file(size + 20):
        patch.setattr(files, "write_atomically", lambda path, content: None)
        with pytest.raises(InputError, match=r"manifest-0.jsonl can't be written"):
            store.write("samples", "000-00001", TABLE)
    assert manifest.stat().st_size == size + 20  # torn
    store.write("samples", "000-00001", TABLE)
    assert reread(kept, "000-00001")[0].equals(TABLE)


def test_a_process_that_ends_waits_for_a_write_and_lets_none_begin(tmp_path, monkeypatch):
    release, begun = threading.Event(), threading.Event()

    def slow(_):
        begun.set()
        release.wait()

    monkeypatch.setattr(os, "fsync", slow)
    first, second = (
        threading.Thread(target=write_atomically, args=(tmp_path / name, b"")) for name in "ab"
    )
    first.start()
    begun.wait()
    threading.Timer(0.05, release.set).start()
    stop_writing()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    second.start()
    second.join(0.05)
    assert second.is_alive() and [path.name for path in tmp_path.iterdir()] == ["a"]
    files._writing.release()  # as no process that ends does
    second.join()


def test_memory_keeps_the_same(tmp_path):
    for store in (Store(), Store(tmp_path)):
        store.write("samples", "000-00000", TABLE)
        store.add_round(Round(np.array([0]), np.array([2])))
        store.clean()
        assert store.need("samples", "000-00000").equals(TABLE)
        assert store.read("judgements", "000-00000") is None
        assert [sizes.count.tolist() for sizes in store.rounds] == [[2]]
        with pytest.raises(InputError, match="judgements shard 000-00000"):
            store.need("judgements", "000-00000")
