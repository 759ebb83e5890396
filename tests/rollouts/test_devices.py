"""Eight devices draw what one draws: parameters sharded over 2, samples over 4."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.rollouts import device_worker
from tests.rollouts import test_invariance as calls

ROOT = Path(__file__).parents[2]
DATA, TENSOR = 4, 2


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> dict[str, np.ndarray]:
    """What a process with a mesh over eight devices computes, and how its arrays lay."""
    out = tmp_path_factory.mktemp("mesh") / "out.npz"
    flags = f"--xla_force_host_platform_device_count={DATA * TENSOR}"
    subprocess.run(
        [sys.executable, "-W", "error", device_worker.__file__, out, str(DATA), str(TENSOR)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    with np.load(out) as arrays:
        return dict(arrays)


def test_tokens_are_equal_and_log_probs_to_rounding(eight):
    rollouts, scored = calls.drawn(calls.PROPOSAL, calls.as_prompts(calls.ROWS, calls.IDS))
    assert eight["devices"] == DATA * TENSOR
    for name in ("tokens", "mask", "ended"):
        np.testing.assert_array_equal(eight[name], getattr(rollouts, name))
    for ours, wanted in (
        (eight["token_log_probs"], rollouts.token_log_probs),
        (eight["scored"], scored),
    ):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-4)


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
    """Six samples a query run as eight rows, two on each of four devices."""
    assert eight["decode"][:, 1].tolist() == [8, 8 // DATA]
    assert eight["score_rows"][:, 2].tolist() == [8, 8 // DATA]
