"""Runs that are stopped, changed, shared, hindered or damaged, as a user meets them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tailrisk_jax.cli import main
from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import Store, file_hashes, model_identity, open_store, read_study
from tailrisk_jax.studies import observations as observations_of
from tailrisk_jax.studies.analysis import watched_widths
from tailrisk_jax.studies.rounds import Round, next_round
from tailrisk_jax.studies.run import run_kept
from tests.studies.runs import (
    QUERIES,
    RESULTS,
    SHARDS,
    assert_same_but_for_rounding,
    contents,
    leftovers,
    refused,
    table,
)
from tests.studies.spawner import wait_until

# What a kill leaves unlisted is said, and no error.
pytestmark = pytest.mark.filterwarnings("always::tailrisk_jax.studies.SetAside")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def stop_before_analysis(argv, capsys):
    """Draws and judges all that a command asks for, and stops."""

    def stop(*_):
        raise InputError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailrisk_jax.cli.outcome.analyse", stop)
        assert refused(argv, capsys) == "tailrisk: stopped"


def test_the_folder_says_what_the_figures_rest_on(whole, tiny):
    study = json.loads((whole / "study.json").read_text())
    identity = study["identity"]
    assert identity["model"]["files"] == file_hashes(tiny / "model")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= identity["model"][
        "files"
    ].keys()
    assert identity["judge"] == {"name": "regex", "version": "1", "settings": {"pattern": "cake"}}
    assert all(identity["tokens"][name] for name in ("end_ids", "vocabulary", "chat_template"))
    assert study["settings"]["seed"] == 0 and [q["id"] for q in study["queries"]] == list(QUERIES)
    options = yaml.safe_load((whole / "study.yaml").read_text())
    assert options["command"] == "estimate" and options["samples"] == 24 and "out" not in options
    [session] = map(json.loads, (whole / "sessions.jsonl").read_text().splitlines())
    assert session["packages"]["jax"] and session["devices"] and session["processes"] == 1
    assert len(session["git"]["tailrisk_jax"]) >= 40 and session["options"]["chunk_size"] == 6
    for kind in ("samples", "judgements"):
        entries = (whole / kind / "manifest-0.jsonl").read_text().splitlines()
        assert len(entries) == len(list((whole / kind).glob("*.parquet"))) == 12
        for entry in map(json.loads, entries):
            assert file_hashes(whole / entry["file"]) == {entry["file"][-17:]: entry["sha256"]}
    assert not leftovers(whole)


def test_a_checkpoint_of_the_hub_is_named_by_its_revision(tmp_path):
    blob, snapshot = tmp_path / "blobs" / ("ab" * 32), tmp_path / "snapshots" / "c0ffee"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_bytes(b"not read: the name is the hash")
    (snapshot / "model.safetensors").symlink_to(blob)
    found = model_identity("org/name", snapshot)
    assert found["revision"] == "c0ffee"
    assert found["files"] == {"model.safetensors": "ab" * 32}


@pytest.mark.slow
def test_a_killed_run_goes_on_over_other_devices_and_batches(command, spawner, whole, tmp_path):
    run = tmp_path / "run"
    mesh = "data=4,tensor=2"
    process = spawner.start(command(run, batch_size=4, mesh=mesh), devices=8)
    wait_until(lambda: len(list(run.glob("judgements/*.parquet"))) > 3, 120)
    assert process.kill() == -signal.SIGKILL
    before = contents(run, "samples/*.parquet")
    main(command(run, batch_size=5, score_batch_size=3))
    after = contents(run, "samples/*.parquet")
    assert {name: after[name] for name in before} == before
    assert_same_but_for_rounding(run, whole)


CHANGES = {
    "judge": (dict(event="kind"), "judge.settings.pattern 'cake' -> 'kind'"),
    "seed": (dict(seed=1), "seed 0 -> 1"),
    "length": (dict(max_new_tokens=7), "max_new_tokens 6 -> 7"),
    "temperature": (dict(temperature=0.5), "temperature 1.0 -> 0.5"),
    "dtype": (dict(dtype="bfloat16"), "dtype 'float32' -> 'bfloat16'"),
    "proposal": (dict(proposal="0.4*target + 0.6*target@2"), "'0.4*target + 0.6*target@2'"),
    "repeats": (dict(replicates=2), "replicates 1 -> 2"),
    "stopping": (dict(until="rel=0.5"), "stopping 'fixed' -> 'until precise'"),
    "fewer": (dict(samples=12), "num_samples=24 already, 12 is asked for"),
    "model": (dict(model="{tiny}/other"), "model.model.safetensors '"),
    "a query": (dict(queries="{tmp}/changed.jsonl"), "queries.kind '"),
    "queries": (dict(queries="{tmp}/fewer.jsonl"), "-> 'absent'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_is_estimated_is_refused(name, command, whole, tiny, tmp_path, capsys):
    lines = (tiny / "queries.jsonl").read_text().splitlines()
    (tmp_path / "changed.jsonl").write_text("\n".join(lines).replace("be kind", "be"))
    (tmp_path / "fewer.jsonl").write_text(lines[0])
    changes, said = CHANGES[name]
    changes = {
        option: value.format(tiny=tiny, tmp=tmp_path) if isinstance(value, str) else value
        for option, value in changes.items()
    }
    before = contents(whole, "**/*")
    line = refused(command(whole, **changes), capsys)
    assert said in line and f"{whole}" in line, line
    assert contents(whole, "**/*") == before


def test_a_change_of_anything_else_is_accepted(command, copy, whole, tiny, tmp_path):
    for name in ("model", "queries.jsonl"):
        copied = shutil.copytree if (tiny / name).is_dir() else shutil.copy
        copied(tiny / name, tmp_path / name)
    moved = {"model": tmp_path / "model", "queries": tmp_path / "queries.jsonl"}
    main(command(copy, **moved, batch_size=3, chunk_size=1000, level=0.9))
    names = ("samples.parquet", *SHARDS, "rounds.json")
    assert contents(copy, *names) == contents(whole, *names)
    assert table(copy)["value"] == table(whole)["value"]
    assert all(a < b for a, b in zip(table(copy)["upper"], table(whole)["upper"], strict=True))


def test_moved_vectors_are_the_same_and_changed_ones_are_not(command, tmp_path, capsys):
    vector = tmp_path / "v.npy"
    np.save(vector, np.ones(8, np.float32))
    run, proposal = tmp_path / "run", "0.5*target + 0.5*ablation:{}:0.5@2"
    stop_before_analysis(command(run, proposal=proposal.format(vector)), capsys)
    vector.rename(tmp_path / "w.npy")
    stop_before_analysis(command(run, proposal=proposal.format(tmp_path / "w.npy")), capsys)
    np.save(vector, np.arange(8, dtype=np.float32))
    assert "proposal.files" in refused(command(run, proposal=proposal.format(vector)), capsys)


def test_more_samples_are_the_further_ones_of_a_longer_run(command, whole, tmp_path, capsys):
    run = tmp_path / "run"
    stop_before_analysis(command(run, samples=12), capsys)
    before = contents(run, "samples/*.parquet")
    main(command(run))
    assert {n: c for n, c in contents(run, "samples/*.parquet").items() if n in before} == before
    assert_same_but_for_rounding(run, whole)
    rounds = json.loads((run / "rounds.json").read_text())
    assert [sizes["count"] for sizes in rounds] == [[12] * 3] * 2


def test_shards_that_are_not_to_be_trusted_are_made_again(copy, whole, second, capsys):
    (copy / "samples/000-00003.parquet").write_bytes(b"damaged")
    shutil.copy(second / "samples/000-00004.parquet", copy / "samples")
    (copy / "judgements/000-00005.parquet").unlink()
    main(["resume", str(copy), "--quiet"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all("will be made again" in line for line in said)
    assert len(list(copy.glob("aside/*"))) == 2
    assert contents(copy) == contents(whole)


def test_shards_of_other_rounds_are_not_trusted(command, copy, whole, capsys):
    """The rounds are decided anew, with other responses in the chunk of each name."""
    study = json.loads((copy / "study.json").read_text())
    study["settings"]["chunk_size"] = 12
    (copy / "study.json").write_text(json.dumps(study))
    main(command(copy))
    assert "holds other responses" in capsys.readouterr().err
    assert_same_but_for_rounding(copy, whole)


def test_two_processes_share_a_run(command, spawner, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    run = tmp_path / "run"
    both = [
        spawner.start([*command(run), f"--processes={address},{index}/2"]) for index in range(2)
    ]
    codes = [process.wait() for process in both]
    assert codes == [0, 0], "\n".join(both[0].errors + both[1].errors)
    names = ("samples.parquet", "estimates.parquet", *SHARDS, "rounds.json")
    assert contents(run, *names) == contents(whole, *names)
    for index in range(2):
        assert len((run / f"samples/manifest-{index}.jsonl").read_text().splitlines()) == 6
    main(["estimate", str(run), "--quiet"])  # and one process can take it from there
    assert contents(run, *names) == contents(whole, *names)


def test_processes_stay_in_step(whole, tmp_path, monkeypatch):
    """Threads in their place; the second is slow after each meeting."""
    study, samples = read_study(whole), pq.read_table(whole / "samples.parquet")
    planned = [Round(np.full(3, first), np.full(3, 12)) for first in (0, 12)]
    here, barrier, met = threading.local(), threading.Barrier(2, timeout=20), ([], [])

    def meet(name):
        met[here.process].append(name)
        barrier.wait()
        time.sleep(0.05 * here.process)

    def rows(chunk):
        where = [
            np.arange(24 * q + first, 24 * q + first + count)
            for q, first, count in zip(chunk.queries, chunk.first, chunk.count, strict=True)
        ]
        return samples.take(np.concatenate(where))

    def work(process):
        here.process = process
        store = Store(tmp_path, "ours", process)
        return run_kept(study.queries, study.settings, store, planned, rows)

    monkeypatch.setattr("tailrisk_jax.studies.loop._meet", meet)
    monkeypatch.setattr("jax.process_index", lambda: here.process)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    with pytest.raises(InputError, match="2 processes share a run through a folder"):
        run_kept(study.queries, study.settings, Store(), planned, rows)
    assert met[0] == met[1] and len(met[0]) == 6
    assert first.equals(second) and first.equals(samples.select(first.column_names))


def test_ctrl_c_and_a_second_process(command, spawner, whole, tmp_path, capsys):
    run = tmp_path / "run"
    process = spawner.start(command(run, samples=120))
    wait_until(lambda: len(list(run.glob("judgements/*.parquet"))) > 2)
    assert f"being written by process {process.pid} on" in refused(command(run), capsys)
    assert process.kill(signal.SIGINT) == 130
    [line] = process.errors
    assert line.startswith("tailrisk: interrupted") and "tailrisk resume" in line
    assert not leftovers(run) and not (run / "summary.json").exists()
    study = json.loads((run / "study.json").read_text())
    assert study["settings"]["num_samples"] == 120
    kept = contents(run, "judgements/*.parquet")
    assert len(kept) > 2
    stop_before_analysis(["resume", run, "--quiet"], capsys)
    ours = contents(run, "judgements/*.parquet")
    assert {name: ours[name] for name in kept} == kept and len(ours) == 60


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and how it is remounted."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tailrisk", disk], capture_output=True
        )
        if done.returncode:
            pytest.skip("needs the right to mount")

    mount("size=120k")
    yield disk, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_and_a_read_only_one(command, whole, small_disk, capsys):
    disk, remount = small_disk
    run = disk / "run"
    assert "can't be written (No space left on device)" in refused(command(run), capsys)
    assert not leftovers(run) and list(run.glob("samples/*.parquet"))
    assert "No space left on device" in refused(["resume", run, "--quiet"], capsys)
    remount("ro")
    for argv in (["resume", run], command(run), ["estimate", run], command(disk / "new")):
        assert "(Read-only file system)" in refused(argv, capsys)
    remount("rw,size=10m")
    main(["resume", str(run), "--quiet"])
    names = (*RESULTS, *SHARDS, "rounds.json")
    assert contents(run, *names) == contents(whole, *names)


def test_a_file_that_can_not_grow_is_named(command, spawner, whole, tmp_path):
    """As on a full disk, with no right to mount one; only samples.parquet is larger."""
    largest = max(len(content) for content in contents(whole, *SHARDS, "study.json").values())
    process = spawner.start(command(tmp_path / "run"), largest_file=largest + 1)
    assert process.wait() == 2
    [line] = process.errors
    assert "estimates.parquet can't be written (File too large)" in line
    assert not leftovers(tmp_path / "run")
    main(["resume", str(tmp_path / "run"), "--quiet"])
    assert contents(tmp_path / "run", *RESULTS) == contents(whole, *RESULTS)


def test_relative_paths_are_meant_from_where_the_run_began(command, whole, tiny, tmp_path, capsys):
    run = tmp_path / "run"
    with chdir(tiny):
        relative = {"model": "model", "queries": "queries.jsonl"}
        stop_before_analysis(command(os.path.relpath(run), **relative), capsys)
    with chdir(tmp_path):
        main(["resume", "run", "--quiet"])
    names = ("samples.parquet", "estimates.parquet", *SHARDS)
    assert contents(run, *names) == contents(whole, *names)


def test_a_run_is_repeated_from_its_own_options(whole, tmp_path):
    main(["estimate", f"--config={whole / 'study.yaml'}", f"--out={tmp_path / 'run'}", "--quiet"])
    assert contents(tmp_path / "run") == contents(whole)


@pytest.fixture(scope="module")
def until(command, tmp_path_factory):
    """A run whose rounds are shared by variance, and how it is made."""
    options = dict(until="rel=0.6", max_samples=192, allocation="variance", chunk_size=24)
    make = lambda out: command(out, **options)  # noqa: E731
    run = tmp_path_factory.mktemp("until") / "run"
    main(make(run))
    return run, make


@pytest.mark.slow
def test_rounds_by_variance_look_at_earlier_rounds_alone(until):
    run, _ = until
    study, rounds = read_study(run), open_store(run).rounds
    samples = table(run, "samples")
    drawn = np.zeros(len(QUERIES), int)
    assert len(rounds) > 2
    for sizes in rounds:
        if drawn.any():
            index = {name: q for q, name in enumerate(QUERIES)}
            earlier = np.array(
                [
                    n < drawn[index[name]]
                    for name, n in zip(samples["query_id"], samples["sample"], strict=True)
                ]
            )
            before = pq.read_table(run / "samples.parquet").filter(pa.array(earlier))
            widths = watched_widths(observations_of(study.queries, before), study.settings)
            wanted = next_round(widths, drawn, study.settings)
            np.testing.assert_array_equal(wanted.count, sizes.count)
            open_ones = sizes.count > 0
            assert (widths[open_ones] > 0.6).all() and (widths[~open_ones] <= 0.6).all()
        np.testing.assert_array_equal(sizes.first, drawn)
        drawn = drawn + sizes.count
    assert table(run)["num_samples"] == drawn.tolist()


def test_a_killed_run_repeats_its_rounds(until, spawner, tmp_path):
    run, make = until
    process = spawner.start(make(tmp_path / "run"))
    wait_until(lambda: list((tmp_path / "run").glob("samples/001-*.parquet")))
    assert process.kill() == -signal.SIGKILL
    main(["resume", str(tmp_path / "run"), "--quiet"])
    assert contents(tmp_path / "run") == contents(run)
