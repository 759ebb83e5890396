"""Logical axes to mesh axes: the only place where a mesh axis is named.

Parameters, caches and activations name *logical* axes; a rule table maps them to mesh axes.
A mesh made current with `jax.set_mesh(mesh)` is all that sampling and scoring need:

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = shard(model, mesh)
        rollouts = sample(key, Policy(model), ...)
"""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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


def parameter_specs(config, axis_sizes: Mapping[str, int], rules: Rules = DEFAULT_RULES):
    """The mesh axes of every parameter of a model of this config, as the tree of its parameters."""
    from tailrisk_jax.models.transformer import parameter_shapes  # a cycle otherwise

    def spec(boxed):
        return partition_spec(boxed.names, boxed.value.shape, axis_sizes, rules)

    is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)  # noqa: E731
    return jax.tree.map(spec, parameter_shapes(config), is_leaf=is_box)


def shard(model, mesh: Mesh, rules: Rules = DEFAULT_RULES):
    """A model with its parameters laid out over `mesh` by their logical axes."""

    def place(leaf, spec):
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    specs = parameter_specs(model.config, mesh.shape, rules)
    return dataclasses.replace(model, params=jax.tree.map(place, model.params, specs))
