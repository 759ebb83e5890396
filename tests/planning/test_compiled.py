"""What libtpu compiles for slices that aren't there; slow, and needs the extra `plan`."""

import importlib.util
import time

import jax
import pytest

from tailrisk_jax.planning import Layout, Workload, phases, topology
from tailrisk_jax.planning.compiled import Compiler, topology_mesh
from tests.oracles import tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is absent: pip install 'tailrisk_jax[plan]'",
    ),
]
STUDY = Workload(queries=4, samples=128, prompt=128, length=128, policies=2, itemsize=2)


def small(layers: int = 4):
    return tiny_config(
        vocab_size=8192, num_layers=layers, width=512, num_heads=8, num_kv_heads=4, head_dim=128,
        mlp_width=2048,
    )  # fmt: skip


@pytest.mark.parametrize("layout", [Layout(2, 1, 2), Layout(2, 2, 1)], ids=str)
def test_formulas_within_a_quarter_of_the_compilers_figures(layout):
    """Whole memory and operations of every phase, as README says; 256 rows on 4 chips."""
    mesh = topology_mesh(topology("v5e:2x2"), layout)
    compiler = Compiler(small(), STUDY, mesh, "bfloat16")
    for phase in phases(small(), STUDY, layout, draw_rows=256, score_rows=256):
        seen = compiler.compile(phase)
        if seen.flops is not None:
            assert phase.work.flops / seen.flops == pytest.approx(1, abs=0.25), phase.name
        assert phase.memory.total / seen.memory == pytest.approx(1, abs=0.25), phase.name


def test_compiling_takes_no_longer_for_more_layers():
    """In processor time; a decoder whose layers were unrolled would take 8 times as long."""
    mesh = topology_mesh(topology("v5e:2x2"), Layout(2, 1, 2))

    def seconds(layers):
        config = small(layers)
        phase = phases(config, STUDY, Layout(2, 1, 2), draw_rows=256, score_rows=256)[0]
        start = time.process_time()
        with jax.set_mesh(mesh):
            Compiler(config, STUDY, mesh, "bfloat16")._executable(config, phase)
        return time.process_time() - start

    seconds(4)
    assert seconds(32) < 2 * seconds(4)
