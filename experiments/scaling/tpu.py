"""What libtpu compiles for a slice that isn't there: memory, operations and compile time.

A study's four programs come in two pairs, since what prefill leaves lies as it left it. A program
belongs to several points, which may run it more often or, in decoding, for more steps; what is kept
of it is the same for all, operations by the step.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import jax

from experiments.machine import hardware
from experiments.scaling.record import Record, versions
from experiments.scaling.setting import OnTpu, Point
from tailrisk_jax.errors import InputError
from tailrisk_jax.planning import topology
from tailrisk_jax.planning.analytic import Phase
from tailrisk_jax.planning.compiled import Compiler, topology_mesh, unkept

PAIRS = (slice(0, 2), slice(2, 4))


def program(point: Point, phase: Phase) -> str:
    """What tells a compiled program from others; prefill doesn't know T."""
    length = "" if phase.prefills else f" T{point.new_tokens}"
    rows = f"{phase.queries}x{phase.rows}"
    return f"{phase.name}: {rows} P{point.prompt}{length} L{point.layers}"


def measure(setting: OnTpu, out: Path, tell: Callable[[str], None]) -> None:
    """Compiles what is missing in `out`/tpu.json.

    Raises:
      InputError: libtpu is absent, or the file is of another setting.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu isn't installed; pip install 'tailrisk_jax[plan]'")
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is there stays free
    mesh = topology_mesh(topology(setting.topology), setting.layout)
    record = Record(
        out / "tpu.json",
        {
            "setting": dataclasses.asdict(setting),
            "versions": versions("libtpu"),
            "hardware": hardware(),
        },
    )
    for point in setting.points:
        compiler = Compiler(setting.config(point.layers), setting.workload(point), mesh, "bfloat16")
        for pair in PAIRS:
            some = setting.phases(point)[pair]
            if all(program(point, phase) in record.results for phase in some):
                continue
            for phase in some:
                tell(f"compiling {program(point, phase)}")
                busy = time.process_time()
                with unkept():
                    found = dataclasses.asdict(compiler.compile(phase))
                flops, spent = found.pop("flops"), time.process_time() - busy
                found |= {"step_flops": flops / phase.steps, "processor_seconds": spent}
                record.results.setdefault(program(point, phase), found)
            record.write()
    record.write(complete=True)
