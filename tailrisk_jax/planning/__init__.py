"""What a study takes on given accelerators, before there are any."""

from tailrisk_jax.planning.analytic import (
    Layout,
    Memory,
    Phase,
    Work,
    Workload,
    parameter_count,
    phases,
)
from tailrisk_jax.planning.compiled import Compiled
from tailrisk_jax.planning.configs import PUBLISHED, published
from tailrisk_jax.planning.hardware import CHIPS, Chip, Topology, topology
from tailrisk_jax.planning.plan import Option, choose, compile_option, options, phase_seconds

__all__ = [
    "CHIPS",
    "PUBLISHED",
    "Chip",
    "Compiled",
    "Layout",
    "Memory",
    "Option",
    "Phase",
    "Topology",
    "Work",
    "Workload",
    "choose",
    "compile_option",
    "options",
    "parameter_count",
    "phase_seconds",
    "phases",
    "published",
    "topology",
]
