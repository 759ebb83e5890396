"""Draws, scores and trains over meshes of all devices; started by test_devices.py.

python device_worker.py OUT [train] AXIS=SIZE,... [AXIS=SIZE,... ...] [HOST:PORT,INDEX/COUNT]

It trains if it is told to. With an address the devices are those of COUNT processes, each of which
writes OUT.INDEX.npz.
"""

import dataclasses
import sys
from importlib import import_module
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from tailrisk_jax.adaptation import Training, init_adapter
from tailrisk_jax.adaptation.training import examples, fit
from tailrisk_jax.cli.processes import join_processes, leave_processes
from tailrisk_jax.models import LowRank, Model, shard
from tailrisk_jax.models.checkpoint import to_checkpoint
from tailrisk_jax.models.sharding import fetch
from tailrisk_jax.policies import Policy, mixture
from tailrisk_jax.rollouts import sample, token_log_probs, weigh
from tailrisk_jax.rollouts.network import network

DRAWN = ("tokens", "mask", "ended", "labels")


def drawn(model: Model) -> dict[str, np.ndarray]:
    """Draws from a mixture and their log-probs, on the current mesh."""
    from tests.rollouts import test_invariance as calls  # its models need devices

    prompts = calls.as_prompts(calls.ROWS, calls.IDS)
    target, proposal = Policy(model), dataclasses.replace(calls.PROPOSAL, model=model)
    whole = mixture([target, proposal], [0.3, 0.7])
    rollouts = sample(calls.KEY, whole, prompts, calls.SAMPLES, calls.LENGTH)
    found: dict[str, Any] = {name: np.asarray(getattr(rollouts, name)) for name in DRAWN}
    found["decoded"] = rollouts.token_log_probs
    found["scored"] = token_log_probs([target, proposal], rollouts)
    weighed = weigh(target, whole, rollouts)
    found |= {"log_p": weighed.log_p, "log_q": weighed.log_q}

    return {name: np.asarray(value) for name, value in found.items()}


def trained(model: Model) -> dict[str, np.ndarray]:
    """An adapter after three steps on made-up responses, what they measured, what is written."""
    from tests.rollouts import test_invariance as calls

    rng, count = np.random.default_rng(0), 20
    lengths = rng.integers(1, calls.LENGTH + 1, count)
    data = examples(
        calls.as_prompts(calls.ROWS, calls.IDS)[np.arange(count) % len(calls.ROWS)],
        rng.integers(0, model.config.vocab_size, (count, calls.LENGTH)),
        np.arange(calls.LENGTH) < lengths[:, None],
        rng.uniform(0, 1 / count, count),
        moments=rng.uniform(0, 1 / count, count),
        log_rest=rng.normal(-9, 1, count),
        log_start=rng.normal(-9, 1, count),
    )
    start = init_adapter(jax.random.key(1), model.config, rank=2, targets=("q_proj", "down_proj"))
    adapter, log = fit(
        Training(steps=3, learning_rate=1e-2), network(Policy(model)), start, data,
        odds=np.ones(count), rows=16, micro_rows=8, seed=(0,),
    )  # fmt: skip
    low_ranks = jax.tree.leaves(adapter, is_leaf=lambda x: isinstance(x, LowRank))
    factors = [x for one in low_ranks for x in (one.a, one.b)]
    tensors = to_checkpoint(model.params, model.config)
    columns = [fetch(leaf[..., 0]) for leaf in jax.tree.leaves(model.params)]  # as judges hash them
    return (
        {f"step {name}": values for name, values in log.items()}
        | {f"factor {k}": factor for k, factor in enumerate(factors)}
        | {f"saved {key}": tensor for key, tensor in tensors.items()}
        | {f"column {k}": column for k, column in enumerate(columns)}
    )


def note_layout(function: str, module: str, layouts: dict[str, np.ndarray]) -> None:
    """Wraps a jitted function so that it notes the global and per-device shape of its result."""
    room = import_module(f"tailrisk_jax.{module}")
    original = getattr(room, function)

    def noting(*args):
        out = original(*args)
        layouts[function] = layout(jax.tree.leaves(out)[0])
        return out

    setattr(room, function, noting)


def layout(x: jax.Array) -> np.ndarray:
    return np.array([x.shape, x.sharding.shard_shape(x.shape)])


def on_mesh(shape: str, train: bool) -> dict[str, np.ndarray]:
    """What is computed on a mesh such as data=4,tensor=2, and how its parameters lie."""
    from tests.rollouts import test_invariance as calls

    sizes = {axis: int(size) for axis, size in (part.split("=") for part in shape.split(","))}
    kinds = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
    with jax.set_mesh(mesh):
        model = shard(calls.TARGET.model, mesh)
        found = drawn(model) | (trained(model) if train else {})
    leaves = jax.tree.leaves_with_path(model.params)
    return found | {jax.tree_util.keystr(path): layout(leaf) for path, leaf in leaves}


def main(out: str, *words: str) -> None:
    shapes = [word for word in words if "=" in word]
    if address := [word for word in words if ":" in word]:
        join_processes(address[0])
        out = f"{out}.{jax.process_index()}.npz"
    layouts: dict[str, np.ndarray] = {}
    note_layout("decode", "rollouts.sample", layouts)
    note_layout("score_rows", "rollouts.score", layouts)
    kept = {}
    for shape in shapes:
        found = on_mesh(shape, "train" in words) | layouts
        kept |= {f"{shape} {name}": value for name, value in found.items()}
    np.savez(out, devices=jax.device_count(), **kept)
    leave_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
