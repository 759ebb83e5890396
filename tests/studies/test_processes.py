"""Processes of one run: one that dies stops the others, and the same command goes on."""

import json
import signal
import socket
import time

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from jax.sharding import AxisType

from tailrisk_jax import InputError
from tailrisk_jax.cli.processes import LOST
from tailrisk_jax.studies import Store, read_study
from tailrisk_jax.studies.rounds import Round
from tailrisk_jax.studies.run import run_kept
from tests.studies.runs import SHARDS, contents
from tests.studies.spawner import wait_until

NAMES = ("samples.parquet", "estimates.parquet", *SHARDS, "rounds.json")


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(spawner, argv, count):
    address = free_address()
    return [spawner.start([*argv, f"--processes={address},{k}/{count}"]) for k in range(count)]


def drawn(run):
    return len(list(run.glob("samples/*.parquet")))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "killed"), [(2, 1), (2, 0), (4, 2)])
def test_a_lost_process_stops_the_others_and_the_command_goes_on(
    count, killed, command, spawner, whole, tmp_path
):
    run = tmp_path / "run"
    every = start(spawner, command(run), count)
    wait_until(lambda: drawn(run) >= 1, 120)
    assert every[killed].kill() == -signal.SIGKILL
    began = time.monotonic()
    others = [process for k, process in enumerate(every) if k != killed]
    assert [process.wait() for process in others] == [LOST] * (count - 1)
    assert time.monotonic() - began < 60
    for process in others:
        [line] = [line for line in process.errors if line.startswith("tailrisk:")]
        assert f"process {killed} of {count} is gone" in line
    assert not (run / "estimates.parquet").exists()
    again = start(spawner, [*command(run), "--json"], count)
    codes = [process.wait() for process in again]
    assert codes == [0] * count, "\n".join(line for one in again for line in one.errors)
    assert json.loads(again[0].output)["missing"] == 0  # and nothing else, such as Gloo's greeting
    assert not any(process.output for process in again[1:])
    assert contents(run, *NAMES) == contents(whole, *NAMES)


def test_a_run_is_not_drawn_on_a_mesh_over_processes(whole, monkeypatch):
    """Each draws chunks of its own, so their programs would wait for each other for ever."""
    study, samples = read_study(whole), pq.read_table(whole / "samples.parquet")
    monkeypatch.setattr("jax.sharding.Mesh.is_multi_process", True)
    planned = [Round(np.zeros(3, int), np.full(3, 24))]
    with (
        jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))),
        pytest.raises(InputError, match="mesh lies on the devices of several of 1 processes"),
    ):
        run_kept(study.queries, study.settings, Store(None, "ours"), planned, lambda _: samples)
