"""Logical axes to mesh axes: the only place where a mesh axis is named.

Parameters, caches and activations name *logical* axes; a rule table maps them to mesh axes.
A mesh made current with `jax.set_mesh(mesh)` is all that sampling and scoring need:

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = load_model(path)  # or shard(model, mesh), of a model that is loaded already
        rollouts = sample(key, Policy(model), ...)
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tailrisk_jax.models.config import ModelConfig
from tailrisk_jax.models.quantised import Int8

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]

DEFAULT_RULES: Rules = {
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    # activations and caches
    "queries": None,
    "samples": ("data", "fsdp"),
    "positions": None,
    "head_dim": None,
    "width": None,
}
"""Logical axis to mesh axes: "data", "fsdp" and "tensor", those that a mesh has."""


def partition_spec(
    logical: tuple[str | None, ...],
    shape: tuple[int, ...],
    axis_sizes: Mapping[str, int],
    rules: Rules = DEFAULT_RULES,
) -> PartitionSpec:
    """The mesh axes of an array: absent mesh axes and those that do not divide are left out."""
    spec = []
    for name, size in zip(logical, shape, strict=True):
        axes = rules.get(name) if name else None
        axes = (axes,) if isinstance(axes, str) else axes or ()
        axes = tuple(axis for axis in axes if axis in axis_sizes)
        divides = size % math.prod(axis_sizes[axis] for axis in axes) == 0
        spec.append(axes if axes and divides else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins an intermediate array to the current mesh; without a mesh (or eagerly) it is `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical, x.shape, mesh.shape))


def current_mesh() -> Mesh | None:
    """The mesh that `jax.set_mesh` made current; None without one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def off_mesh() -> jax.set_mesh:
    """A context without a mesh: of what one process of several computes alone."""
    return jax.set_mesh(None)


def own_mesh() -> Mesh | None:
    """The current mesh, or one like it over the devices of this process where others share it."""
    mesh = current_mesh()
    return local_mesh() if mesh is not None and mesh.is_multi_process else mesh


def local_mesh() -> Mesh | None:
    """All devices of this process as `data`; None for a single one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def sample_shards(rules: Rules = DEFAULT_RULES) -> int:
    """Among how many devices the current mesh shares out samples; 1 without a mesh."""
    sizes, axes = jax.sharding.get_abstract_mesh().shape, rules["samples"]
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(sizes.get(axis, 1) for axis in axes)


def fetch(x: Any) -> np.ndarray:
    """An array on the host, whole, in every process.

    Of a mesh over several processes none can read what lies on the others' devices, so the parts
    are gathered first: all processes must fetch the same arrays, in the same order.
    """
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        assert isinstance(x.sharding, NamedSharding)
        whole = NamedSharding(x.sharding.mesh, PartitionSpec())  # type: ignore[arg-type]
        x = _laid_out(whole)(x).addressable_data(0)
    return np.asarray(x)


@functools.cache
def _laid_out(sharding: NamedSharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


def parameter_specs(
    config: ModelConfig, axis_sizes: Mapping[str, int], rules: Rules = DEFAULT_RULES
) -> Any:
    """The mesh axes of every parameter of a model of this config, as the tree of its parameters."""
    from tailrisk_jax.models.transformer import parameter_shapes  # a cycle otherwise

    def spec(boxed):
        return partition_spec(boxed.names, boxed.value.shape, axis_sizes, rules)

    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(spec, parameter_shapes(config), is_leaf=is_box)


def leaf_shardings(
    config: ModelConfig, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> dict[tuple[str, ...], NamedSharding]:
    """How each leaf of the parameter tree lies on the mesh, by its path."""
    specs: Any = traverse_util.flatten_dict(parameter_specs(config, mesh.shape, rules))
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def shard(model, mesh: Mesh, rules: Rules = DEFAULT_RULES):
    """A model with its parameters laid out over `mesh` by their logical axes."""
    shardings = leaf_shardings(model.config, mesh, rules)
    leaves: Any = traverse_util.flatten_dict(model.params)

    def place(leaf, sharding):
        if isinstance(leaf, Int8):
            layers, _, outputs = sharding.spec
            scales = NamedSharding(mesh, PartitionSpec(layers, outputs))
            return jax.device_put(leaf, Int8(sharding, scales))  # type: ignore[arg-type]
        return jax.device_put(leaf, sharding)

    placed = {path: place(leaf, shardings[path]) for path, leaf in leaves.items()}
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(placed))
