"""Many devices, of one process or several, draw, score and train what one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.rollouts import device_worker
from tests.rollouts import test_invariance as calls

ROOT = Path(__file__).parents[2]
DATA, TENSOR = 4, 2
USUAL = f"data={DATA},tensor={TENSOR}"

# Three axes; parameters split along their width alone; one device of the eight.
SHAPES = ("data=2,fsdp=2,tensor=2", "fsdp=4,data=2", "data=1")


def start(*words, devices: int) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", device_worker.__file__, *map(str, words)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )


def read(path: Path, shape: str) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        prefix = f"{shape} "
        found = {name[len(prefix) :]: arrays[name] for name in arrays if name.startswith(prefix)}
        return found | {"devices": arrays["devices"]}


@pytest.fixture(scope="module")
def one() -> dict[str, np.ndarray]:
    """What one device draws and scores without a mesh."""
    return device_worker.drawn(calls.TARGET.model)


@pytest.fixture(scope="module")
def one_trained() -> dict[str, np.ndarray]:
    trained = device_worker.trained(calls.TARGET.model)
    moved = [name for name in trained if name.startswith("factor") and np.any(trained[name])]
    assert len(moved) == 4 and np.abs(trained["factor 1"]).max() > 1e-3  # B starts at zero
    return trained


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> dict[str, np.ndarray]:
    """What a process with a mesh over eight devices computes, and how its arrays lay."""
    out = tmp_path_factory.mktemp("mesh") / "out.npz"
    assert start(out, USUAL, devices=DATA * TENSOR).wait() == 0
    return read(out, USUAL)


def assert_same(ours, wanted):
    for name, value in wanted.items():
        if name in device_worker.DRAWN:
            np.testing.assert_array_equal(ours[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-4, err_msg=name)


def assert_trained(ours, wanted):
    """Adam divides a gradient by its size: rounding counts for more in the factors than before."""
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_tokens_are_equal_and_log_probs_to_rounding(eight, one):
    assert eight["devices"] == DATA * TENSOR
    assert len(np.unique(one["labels"])) == 2 and np.abs(one["log_p"]).max() > 10
    assert_same(eight, one)


def test_parameters_are_sharded_over_the_tensor_axis(eight):
    # The axis that is split: columns of what fans out, rows of what writes back, vocabulary rows.
    split = {
        "query": 2, "key": 2, "value": 2, "out": 1, "gate": 2, "up": 2, "down": 1,
        "embedding": 0, "lm_head": 0,
    }  # fmt: skip
    parameters = {name: shapes for name, shapes in eight.items() if name.startswith("[")}
    assert len(parameters) == len(split) + 3  # and the norms, which every device holds whole
    for name, (whole, part) in parameters.items():
        for key, axis in split.items():
            if f"'{key}'" in name:
                whole[axis] //= TENSOR
        assert part.tolist() == whole.tolist(), name


def test_samples_are_sharded_over_the_data_axis(eight):
    """Six samples a query, in two components, run as eight rows or fewer, a part on each device."""
    for name, axis in (("decode", 1), ("score_rows", 2)):
        whole, part = eight[name][:, axis]
        assert whole >= DATA and part == whole // DATA, name


@pytest.mark.slow
def test_meshes_of_every_shape_draw_and_train_the_same(one, one_trained, tmp_path):
    out = tmp_path / "out.npz"
    assert start(out, "train", *SHAPES, devices=8).wait() == 0
    for shape in SHAPES:
        ours = read(out, shape)
        assert ours["devices"] == 8
        assert_same(ours, one)
        assert_trained(ours, one_trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "shape"),
    [(2, 2, "tensor=2,data=2"), (4, 1, "fsdp=2,tensor=2")],
    ids=["two", "four"],
)
def test_processes_of_one_mesh_draw_and_train_the_same(
    processes, devices, shape, one, one_trained, tmp_path
):
    """The parameters lie on several processes, none of which can read all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out = tmp_path / "out"
    every = [
        start(out, "train", shape, f"{address},{index}/{processes}", devices=devices)
        for index in range(processes)
    ]
    assert [process.wait() for process in every] == [0] * processes
    for index in range(processes):
        ours = read(tmp_path / f"out.{index}.npz", shape)
        assert ours["devices"] == processes * devices
        whole, part = ours["['lm_head']"]
        assert part[0] == whole[0] // 2
        assert_same(ours, one)
        assert_trained(ours, one_trained)
