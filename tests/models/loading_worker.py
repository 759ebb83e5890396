"""Loads a checkpoint onto a mesh of all devices of all processes; started by test_loading.py.

python loading_worker.py CHECKPOINT CACHE OUT PROCESS/COUNT PORT
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import AxisType

from tailrisk_jax.models import checkpoint, load_model, loading, quantise, shard, tensor_files
from tailrisk_jax.policies import Policy, logits


def main(folder: str, cache: str, out: str, place: str, port: str) -> None:
    index, count = map(int, place.split("/"))
    if count > 1:
        jax.distributed.initialize(f"localhost:{port}", count, index)
    loading.PIECE_BYTES = 1000
    read = {"bytes": 0, "calls": 0}
    original, load_params = tensor_files.TensorFile.read, checkpoint.load_params

    def counting(self, tensor, index):
        part = original(self, tensor, index)
        read["bytes"] += part.nbytes
        return part

    def noting(*args, **kwargs):
        read["calls"] += 1
        return load_params(*args, **kwargs)

    tensor_files.TensorFile.read, checkpoint.load_params = counting, noting
    kinds = (AxisType.Auto, AxisType.Auto)
    devices = jax.device_count()
    mesh = jax.make_mesh((1, devices), ("data", "tensor"), axis_types=kinds)
    told: list[tuple[int, int]] = []
    model = load_model(folder, mesh=mesh, on_progress=lambda *now: told.append(now))
    facts = {"read": read["bytes"], "told": told[-1], "devices": devices}
    facts |= {"own": sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(model.params))}
    for name in ("first", "second"):
        read["calls"] = 0
        again = load_model(folder, mesh=mesh, cache=cache)
        facts[f"{name} read"] = read["calls"]
        facts[f"{name} equal"] = all(
            bool(jnp.array_equal(one, other)) and one.sharding == other.sharding
            for one, other in zip(
                jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True
            )
        )
    arrays = {}
    if count == 1:
        whole = load_model(folder)
        for path, leaf in traverse_util.flatten_dict(model.params, sep="/").items():
            arrays[path] = np.asarray(leaf)
        facts["as shard"] = jax.tree.map(lambda x: str(x.sharding), model.params) == jax.tree.map(
            lambda x: str(x.sharding), shard(whole, mesh).params
        )
        tokens, mask = np.array([[1, 2, 3, 0]]), np.ones((1, 4), bool)
        with jax.set_mesh(mesh):
            for name, one in (
                ("plain", model),
                ("made on the mesh", quantise(model)),
                ("laid out", shard(quantise(whole), mesh)),
                ("current mesh", load_model(folder)),
            ):
                arrays[f"logits {name}"] = np.asarray(logits(Policy(one), tokens, mask))
                kernel = one.params["layers"]["mlp"]["up"]["kernel"]
                layouts = [leaf.sharding.spec for leaf in jax.tree.leaves(kernel)]
                facts[f"layout {name}"] = [list(spec) for spec in layouts]
    np.savez(Path(out) / f"{index}.npz", **arrays)
    (Path(out) / f"{index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
