"""Processes of one run: one that dies stops the others, and the same command goes on."""

import json
import signal
import socket
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tailrisk_jax.cli import main
from tailrisk_jax.cli.processes import LOST
from tests.studies.runs import SHARDS, assert_same_but_for_rounding, contents
from tests.studies.spawner import wait_until

WEIGHTS = "adapter_model.safetensors"
NAMES = ("samples.parquet", "estimates.parquet", *SHARDS, "rounds.json")


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(spawner, argv, count, devices=1):
    address = free_address()
    words = [f"--processes={address},{k}/{count}" for k in range(count)]
    return [spawner.start([*argv, word], devices=devices) for word in words]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "killed", "mesh"),
    [(2, 2, 1, "data=2,tensor=2"), (4, 1, 0, "fsdp=2,tensor=2")],
    ids=["two", "four"],
)
def test_processes_draw_together_on_one_mesh(
    count, devices, killed, mesh, command, spawner, whole, tmp_path
):
    """Tokens and scores are those of one process, log-probs to rounding; a loss stops all."""
    run, argv = tmp_path / "run", {"mesh": mesh, "samples": 48}
    every = start(spawner, command(run, **argv), count, devices)
    wait_until(lambda: drawn(run) >= 1, 120)
    assert every[killed].kill() == -signal.SIGKILL
    others = [process for k, process in enumerate(every) if k != killed]
    assert [process.wait() for process in others] == [LOST] * (count - 1)
    assert not (run / "estimates.parquet").exists()
    before = contents(run, "samples/*.parquet")
    again = start(spawner, ["resume", run, "--json", f"--mesh={mesh}"], count, devices)
    codes = [process.wait() for process in again]
    assert codes == [0] * count, "\n".join(line for one in again for line in one.errors)
    assert json.loads(again[0].output)["missing"] == 0
    assert not any(process.output for process in again[1:])
    after = contents(run, "samples/*.parquet")
    assert {name: after[name] for name in before} == before
    alone = tmp_path / "alone"
    main(command(alone, samples=48))
    assert_same_but_for_rounding(run, alone)


@pytest.mark.slow
def test_several_devices_tune_and_learn_what_one_does(spawner, tmp_path):
    """Whole commands, on a mesh over all devices of the process by default."""
    options = ["--model=organism", "--first=6", "--seed=3", "--quiet"]
    pilots = ["--pilot=60", "--pilot-share=1", "--candidates", "checkpoint:unsafe", "target@2.5"]
    start = "0.5*target + 0.5*checkpoint:unsafe"
    learning = [f"--start={start}", "--rounds=1", "--samples=60", "--steps=5", "--rank=2"]
    commands = {
        "tuned": ["tune", *options, *pilots],
        "learned": ["learn", *options, *learning],
    }
    for name, words in commands.items():
        for devices in (1, 8):
            out = tmp_path / f"{name}-{devices}"
            process = spawner.start([*words, f"--out={out}"], devices=devices)
            assert process.wait() == 0, process.errors
    one, eight = ((tmp_path / f"tuned-{n}" / "proposal.txt").read_text() for n in (1, 8))
    assert one == eight
    one, eight = (load_file(tmp_path / f"learned-{n}" / WEIGHTS) for n in (1, 8))
    assert one.keys() == eight.keys() and any(np.any(factor) for factor in one.values())
    for key, factor in one.items():
        np.testing.assert_allclose(eight[key], factor, rtol=1e-3, atol=1e-5, err_msg=key)
