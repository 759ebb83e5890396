"""Which mesh and how many rows, by the formulas of analytic.py; then what the compiler says."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import ModelConfig
from tailrisk_jax.planning.analytic import Layout, Phase, Workload, parameters, phases
from tailrisk_jax.planning.compiled import Compiled, Compiler, OutOfMemory, topology_mesh, unkept
from tailrisk_jax.planning.hardware import GIB, Topology, alike

ALIKE = 1.05  # times within this factor are equal; then fewer calls or a simpler mesh are better
FULL = 0.9  # of the memory; the rest is left to the runtime, and to errors of the formulas


@dataclasses.dataclass(frozen=True)
class Option:
    """A mesh, and the rows with which it takes least time.

    Attributes:
      draw_rows, score_rows: responses at once, `batch_size` of `sample` and `log_prob`; 0 where
        not even one fits.
      phases: in their order; empty where nothing fits.
    """

    layout: Layout
    draw_rows: int
    score_rows: int
    phases: tuple[Phase, ...]

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return bool(self.phases)

    @property
    def memory(self) -> float:
        """Bytes on a device, at most."""
        return max(phase.memory.total for phase in self.phases)

    def seconds(self, topology: Topology) -> float:
        """Of the whole study, each phase at the peak rate of what limits it."""
        return sum(phase_seconds(phase, topology) for phase in self.phases)


def phase_seconds(phase: Phase, topology: Topology) -> float:
    """All calls of a phase, at the peak rate of what limits it."""
    return phase.runs * max(phase.work.seconds(topology.chip).values())


def layouts(config: ModelConfig, topology: Topology) -> list[Layout]:
    """The meshes of a topology along which a model's axes can be cut, least `tensor` first.

    More of `tensor` than there are key-value heads would copy the caches to several devices.
    """
    sizes = [size for size in range(1, topology.count + 1) if topology.count % size == 0]
    return [
        Layout(topology.count // (fsdp * tensor), fsdp, tensor)
        for tensor in sizes
        for fsdp in sizes
        if topology.count % (fsdp * tensor) == 0
        and config.num_kv_heads % tensor == 0
        and config.mlp_width % tensor == 0
        and config.width % fsdp == 0
    ]


def options(
    config: ModelConfig,
    study: Workload,
    topology: Topology,
    *,
    layout: Layout | None = None,
    batch_size: int | None = None,
) -> list[Option]:
    """All meshes, the best first; those that don't fit last.

    The best is, of those that are quickest but for a few percent, the one with least `fsdp` and
    then least `tensor`: along `fsdp` parameters are gathered for each use.

    Args:
      layout: this one alone.
      batch_size: rows to draw and to score at once; by default, of the powers of 2 that fit, the
        largest that takes least time.
    """
    found = [
        _option(config, study, topology, one, batch_size)
        for one in ([layout] if layout else layouts(config, topology))
    ]
    times = {one: one.seconds(topology) for one in found if one.fits}
    near = ALIKE * min(times.values(), default=0.0)

    def order(one: Option):
        if not one.fits:
            return 2, 0.0
        simple = one.layout.fsdp, one.layout.tensor
        return (0, *simple) if times[one] <= near else (1, times[one], *simple)

    return sorted(found, key=order)


def choose(
    config: ModelConfig,
    study: Workload,
    topology: Topology,
    *,
    name: str,
    layout: Layout | None = None,
    batch_size: int | None = None,
) -> list[Option]:
    """`options`, the first of which fits.

    Raises:
      InputError: none does; it names the least topology of the same chip that would.
    """
    found = options(config, study, topology, layout=layout, batch_size=batch_size)
    if found[0].fits:
        return found
    least = min(parameters(config, one.layout, study.itemsize).resident for one in found)
    given = f"{name} does not fit {topology.name}" + (f" with {layout}" if layout else "")
    given += f" at batch size {batch_size:,}" if batch_size else ""
    given += (
        f": parameters take {least / GIB:.1f} of a chip's {topology.chip.memory / GIB:.0f} GiB"
        " before any cache"
    )
    for larger in alike(topology.chip):
        if options(config, study, larger)[0].fits:
            if larger.count > topology.count:
                raise InputError(f"{given}; the least topology that holds it is {larger.name}")
            raise InputError(f"{given}; leave out --mesh and --batch-size to see what fits")
    raise InputError(f"{given}, and no {topology.chip.name} topology holds it; take another chip")


def compile_option(
    config: ModelConfig,
    study: Workload,
    topology: Topology,
    option: Option,
    *,
    dtype: Any,
    tell: Callable[[str], None],
) -> tuple[Option, list[Compiled]]:
    """An option's phases as the compiler sees them; rows are halved until they fit.

    Args:
      tell: is told what is being compiled.

    Raises:
      InputError: libtpu is absent, or one row is too many.
    """
    compiler = Compiler(config, study, topology_mesh(topology, option.layout), dtype)
    found: list[Compiled] = []
    for part, rows_of in ((slice(0, 2), "draw_rows"), (slice(2, 4), "score_rows")):
        while True:
            rows = getattr(option, rows_of)
            try:
                some = []
                for phase in option.phases[part]:
                    tell(f"compiling {phase.name} for {phase.queries} x {phase.rows} rows")
                    with unkept():
                        some.append(compiler.compile(phase))
                    if some[-1].memory > topology.chip.memory:
                        raise OutOfMemory
                break
            except OutOfMemory as error:
                if rows == 1:
                    raise InputError(
                        f"not one row fits {topology.name} with {option.layout}; give a larger "
                        "topology, or another --mesh"
                    ) from error
                tell(f"{rows:,} rows don't fit, trying {rows // 2:,}")
                option = _of_rows(
                    config, study, dataclasses.replace(option, **{rows_of: rows // 2})
                )
        found += some
    return option, found


def _option(
    config: ModelConfig,
    study: Workload,
    topology: Topology,
    layout: Layout,
    batch_size: int | None,
) -> Option:
    """The rows with which a mesh takes least time."""
    room = FULL * topology.chip.memory
    if parameters(config, layout, study.itemsize).resident > room:
        return Option(layout, 0, 0, ())
    best: list[int] = []
    for part in (slice(0, 2), slice(2, 4)):
        times: dict[int, float] = {}
        least = layout.data * layout.fsdp  # one on each device
        for rows in [batch_size] if batch_size else _powers(least, study.queries * study.samples):
            some = phases(config, study, layout, draw_rows=rows, score_rows=rows)[part]
            if max(phase.memory.total for phase in some) > room:
                break
            times[rows] = sum(phase_seconds(phase, topology) for phase in some)
        if not times:
            return Option(layout, 0, 0, ())
        quickest = min(times.values())
        best.append(max(rows for rows, time in times.items() if time <= ALIKE * quickest))
    return _of_rows(config, study, Option(layout, best[0], best[1], ()))


def _of_rows(config: ModelConfig, study: Workload, option: Option) -> Option:
    found = phases(
        config, study, option.layout, draw_rows=option.draw_rows, score_rows=option.score_rows
    )
    return dataclasses.replace(option, phases=tuple(found))


def _powers(least: int, largest: int) -> Iterator[int]:
    """From `least` on, doubled until one is `largest` or more."""
    rows = least
    yield rows
    while rows < largest:
        rows *= 2
        yield rows
