"""What XLA makes of prefill, decoding and scoring for a TPU slice that isn't there.

The functions that sampling and scoring run are lowered with the shapes and layouts that they get
at run time, and compiled ahead of time by libtpu (extra `plan`) for the slice's devices.

XLA's cost analysis counts the body of a loop once, however often it runs. So each function is
compiled a second time for a model without layers: the difference of the two is one layer. The
operations of a call are

    flops = steps * (chunks * base + layers * (whole - base)),

with the chunks that the head is cut into in scoring, and the steps of the loop over tokens in
decoding; either is 1 elsewhere. Where parameters are cut along `fsdp`, XLA may turn a product into
a loop of its own, over the parts as they arrive, and would count one part: then nothing is said.
The bytes that it counts are of no use (an update of one position of a cache counts as the whole
cache, and what a fusion hands on inside itself counts too), so traffic is by formula alone.
"""

import dataclasses
import importlib.util
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import ModelConfig, no_steering
from tailrisk_jax.models.sharding import parameter_specs
from tailrisk_jax.models.transformer import parameter_shapes
from tailrisk_jax.planning.analytic import AXES, Layout, Phase, Workload
from tailrisk_jax.planning.hardware import Topology
from tailrisk_jax.rollouts.blocks import TURNS
from tailrisk_jax.rollouts.decode import decode
from tailrisk_jax.rollouts.network import Network, prefill_one, prefill_stacked
from tailrisk_jax.rollouts.score import score_rows

Struct = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one phase, for one device.

    Attributes:
      seconds: that lowering and compiling took, of both models.
      memory: bytes while it runs: parameters, other arguments, results and temporaries.
      temporaries: of these, what is neither argument nor result.
      flops: operations of a call; None where they can't be told, as below.
    """

    seconds: float
    memory: int
    temporaries: int
    flops: float | None


class OutOfMemory(Exception):
    """The compiler found that a program doesn't fit the device."""


def topology_mesh(topology: Topology, layout: Layout) -> Mesh:
    """A mesh over devices that need not be there; `jax.make_mesh` lays it out as on the slice.

    Raises:
      InputError: libtpu is absent or refuses.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"libtpu, which compiles for {topology.name}, isn't installed; "
            "pip install 'tailrisk_jax[plan]', or give --analytic for estimates by formula"
        )
    from jax.experimental import topologies

    # It compiles only, beside other processes and away from any TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    settings = dict(topology.chip.compiler)
    if topology.count == 1:
        settings["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **settings
        )
    except Exception as error:  # the runtime's own, without a base class
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"libtpu has no topology {topology.name} ({reason}); install the libtpu that this jax "
            "asks for with pip install 'tailrisk_jax[plan]', or give --analytic"
        ) from error
    return jax.make_mesh(
        tuple(layout.axes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=list(found.devices),
    )


class Compiler:
    """Compiles the phases of one study, in their order, for a mesh."""

    def __init__(self, config: ModelConfig, study: Workload, mesh: Mesh, dtype: Any):
        self.study, self.mesh, self.dtype = study, mesh, jnp.dtype(dtype)
        self.models = config, dataclasses.replace(config, num_layers=0)
        self._prefixes: dict[ModelConfig, Any] = {}

    def compile(self, phase: Phase) -> Compiled:
        """One phase, as it runs on the mesh; what prefill leaves is laid out as it left it.

        Raises:
          OutOfMemory: it doesn't fit.
        """
        start = time.perf_counter()
        with jax.set_mesh(self.mesh):
            whole, base = (self._executable(config, phase) for config in self.models)
        used = whole.memory_analysis()
        config = self.models[0]
        arguments = used.argument_size_in_bytes
        if phase.name.startswith("prefill") and not config.tie_embeddings:
            arguments += self._head_bytes()  # of no use to it, but there
        layer = _flops(whole) - _flops(base)
        call = phase.chunks * _flops(base) + config.num_layers * layer
        looped = "windowed_dot_general" in whole.as_text()
        return Compiled(
            seconds=time.perf_counter() - start,
            memory=arguments
            + used.output_size_in_bytes
            + used.temp_size_in_bytes
            - used.alias_size_in_bytes,
            temporaries=used.temp_size_in_bytes,
            flops=None if looped else phase.steps * call,
        )

    def _executable(self, config: ModelConfig, phase: Phase) -> Any:
        """The compiled function of a phase."""
        queries, rows, study = phase.queries, phase.rows, self.study
        network = self._network(config, phase.policies)
        if phase.prefills:
            prefill = prefill_one if phase.policies is None else prefill_stacked
            shape = (queries, study.prompt)
            arguments = network, Struct(shape, jnp.int32), Struct(shape, jnp.bool_)
            compiled = _compile(prefill.lower(*arguments))
            self._prefixes[config] = jax.tree.map(
                lambda x, sharding: Struct(x.shape, x.dtype, sharding=sharding),
                jax.eval_shape(prefill, *arguments),
                compiled.output_shardings,
            )
            return compiled
        prefix = self._prefixes[config]
        if phase.policies is None:
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), queries))
            queue = Struct((queries, rows, TURNS), jnp.int32)
            sizes = Struct((queries, rows), jnp.int32)
            return _compile(decode.lower(study.length, network, prefix, keys, queue, sizes))
        shape = (queries, rows, study.length)
        tokens, mask = Struct(shape, jnp.int32), Struct(shape, jnp.bool_)
        return _compile(score_rows.lower(network, prefix, tokens, mask))

    def _network(self, config: ModelConfig, policies: int | None) -> Network:
        """Parameters laid out by the rules, and the steering of K policies, as shapes."""
        leading = () if policies is None else (policies,)
        steering = jax.eval_shape(lambda: no_steering(config))
        return Network(
            config=config,
            params=self._parameters(config),
            steering=jax.tree.map(lambda x: Struct((*leading, *x.shape), x.dtype), steering),
            adapter=None,
            temperature=Struct(leading, jnp.float32),
        )

    def _parameters(self, config: ModelConfig) -> Any:
        return jax.tree.map(
            lambda leaf, spec: Struct(
                leaf.shape, self.dtype, sharding=NamedSharding(self.mesh, spec)
            ),
            nn.meta.unbox(parameter_shapes(config)),
            parameter_specs(config, self.mesh.shape),
        )

    def _head_bytes(self) -> int:
        head = self._parameters(self.models[1])["lm_head"]
        return math.prod(head.sharding.shard_shape(head.shape)) * self.dtype.itemsize


@contextmanager
def unkept() -> Iterator[None]:
    """Keeps what is compiled for absent devices out of the persistent cache: it can't be read."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _compile(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OutOfMemory(str(error).strip().splitlines()[0]) from error
        raise


def _flops(compiled: Any) -> float:
    return float(compiled.cost_analysis()["flops"])
