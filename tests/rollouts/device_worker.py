"""Draws what test_invariance.py draws, over a mesh of all devices; started by test_devices.py.

python device_worker.py OUT.npz DATA TENSOR
"""

import dataclasses
import sys
from importlib import import_module

import jax
import numpy as np
from jax.sharding import AxisType

from tailrisk_jax.models import shard
from tailrisk_jax.policies import Policy
from tailrisk_jax.rollouts import sample, token_log_probs
from tests.rollouts import test_invariance as calls


def note_layout(function: str, module: str, layouts: dict[str, np.ndarray]) -> None:
    """Wraps a jitted function so that it notes the global and per-device shape of its result."""
    room = import_module(f"tailrisk_jax.rollouts.{module}")
    original = getattr(room, function)

    def noting(*args):
        out = original(*args)
        layouts[function] = layout(jax.tree.leaves(out)[0])
        return out

    setattr(room, function, noting)


def layout(x: jax.Array) -> np.ndarray:
    return np.array([x.shape, x.sharding.shard_shape(x.shape)])


def main(out: str, data: str, tensor: str) -> None:
    axes, kinds = ("data", "tensor"), (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((int(data), int(tensor)), axes, axis_types=kinds)
    layouts: dict[str, np.ndarray] = {}
    note_layout("decode", "sample", layouts)
    note_layout("score_rows", "score", layouts)
    prompts = calls.as_prompts(calls.ROWS, calls.IDS)
    with jax.set_mesh(mesh):
        model = shard(calls.TARGET.model, mesh)
        target, proposal = Policy(model), dataclasses.replace(calls.PROPOSAL, model=model)
        rollouts = sample(calls.KEY, proposal, prompts, calls.SAMPLES, calls.LENGTH)
        scored = token_log_probs([target, proposal], rollouts)
    for path, leaf in jax.tree.leaves_with_path(model.params):
        layouts[jax.tree_util.keystr(path)] = layout(leaf)
    names = ("tokens", "mask", "ended", "token_log_probs")
    drawn = {name: np.asarray(getattr(rollouts, name)) for name in names}
    np.savez(out, devices=jax.device_count(), scored=scored, **drawn, **layouts)


if __name__ == "__main__":
    main(*sys.argv[1:])
