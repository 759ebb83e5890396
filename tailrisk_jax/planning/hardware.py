"""Chips, with the figures that their makers publish, and slices of them.

TPUs: "System architecture" of each generation, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e};
links as the bandwidth one way, half of the bidirectional figure (v4: six links of 50 GB/s, Jouppi
et al. 2023, arXiv 2304.01433). GPUs: NVIDIA's data sheets of the SXM modules, bfloat16 without
sparsity, NVLink one way. Prices are not here: they differ by region, contract and day.
"""

import dataclasses
import math
import re
from typing import Any

from tailrisk_jax.errors import InputError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as topologies are written.
      flops: bfloat16 operations per second; a multiplication and an addition are two.
      memory: bytes of HBM.
      bandwidth: of the HBM, bytes per second.
      links: to other chips, bytes per second one way, all links together.
      slices: shapes that a TPU comes in, smallest first; empty for a GPU.
      compiler: more that libtpu must be told of it.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    links: float
    slices: tuple[str, ...] = ()
    compiler: tuple[tuple[str, Any], ...] = ()

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return bool(self.slices)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip
_GPUS = (1, 2, 4, 8)  # of one machine, each linked with every other

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1200e9, 300e9, _CUBIC, (("chip_config_name", "megacore"),)),
        Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, _FLAT),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, _CUBIC),
        Chip("v6e", 918e12, 32 * GIB, 1640e9, 400e9, _FLAT),
        Chip("a100", 312e12, 80 * 10**9, 2039e9, 300e9),
        Chip("h100", 989e12, 80 * 10**9, 3350e9, 450e9),
        Chip("h200", 989e12, 141 * 10**9, 4800e9, 450e9),
    )
}
"""Peak rates and memory of accelerators, by name."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPUs, or the GPUs of one machine.

    Attributes:
      name: such as "v5e:4x4" or "h100:8".
    """

    name: str
    chip: Chip
    count: int


def topology(text: str) -> Topology:
    """The topology that a text like "v5e:4x4" names.

    Raises:
      InputError: an unknown chip, or a shape that it does not come in, with those that are known.
    """
    name, _, shape = text.strip().lower().partition(":")
    if name not in CHIPS or shape not in shapes(CHIPS[name]):
        known = "; ".join(f"{chip.name}: {', '.join(shapes(chip))}" for chip in CHIPS.values())
        raise InputError(
            f"topology {text!r} is unknown; give a chip and its shape, such as v5e:4x4 or h100:8. "
            f"Known are {known}"
        )
    return Topology(f"{name}:{shape}", CHIPS[name], math.prod(map(int, re.split("x", shape))))


def shapes(chip: Chip) -> tuple[str, ...]:
    """What may stand behind a chip's name, smallest first."""
    return chip.slices or tuple(map(str, _GPUS))


def alike(chip: Chip) -> list[Topology]:
    """All topologies of a chip, smallest first."""
    return [topology(f"{chip.name}:{shape}") for shape in shapes(chip)]
