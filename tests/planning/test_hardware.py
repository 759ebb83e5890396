"""Chips and slices by name."""

import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.planning import CHIPS, topology
from tailrisk_jax.planning.hardware import alike


def test_topologies_by_name():
    slices = {
        "v5e:4x4": 16,
        "v5e:1x1": 1,
        " V5P:2x2x4": 16,
        "v6e:8x8": 64,
        "h100:8": 8,
        "a100:1": 1,
    }
    for text, count in slices.items():
        found = topology(text)
        assert (found.name, found.count) == (text.strip().lower(), count)
        assert found.chip.is_tpu == text.strip().lower().startswith("v")


@pytest.mark.parametrize(
    "text", ["v5e", "v5e:", "v5e:3x5", "v5e:4x4x1", "h100:3", "h100", "tpu", ""]
)
def test_an_unknown_topology_lists_the_known(text):
    with pytest.raises(InputError) as caught:
        topology(text)
    assert repr(text) in str(caught.value) and "v5e: 1x1, 2x2" in str(caught.value)
    assert all(f"{name}: " in str(caught.value) for name in CHIPS)


def test_slices_are_listed_smallest_first():
    for chip in CHIPS.values():
        counts = [one.count for one in alike(chip)]
        assert counts == sorted(set(counts))
