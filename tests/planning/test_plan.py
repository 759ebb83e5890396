"""The choice of a mesh and of rows."""

import dataclasses
import math

import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.planning import Layout, Workload, choose, options, published, topology
from tailrisk_jax.planning.plan import ALIKE, FULL
from tests.planning.test_analytic import model

STUDY = Workload(queries=313, samples=500, prompt=256, length=150, policies=2, itemsize=2)


def test_what_is_chosen_fits_and_is_among_the_quickest():
    where = topology("v5e:4x4")
    found = choose(model("Llama-3.1-8B"), STUDY, where, name="Llama-3.1-8B")
    fitting = [one for one in found if one.fits]
    for one in found:
        assert math.prod(one.layout.axes.values()) == 16
    for one in fitting:
        assert one.memory <= FULL * where.chip.memory
        assert found[0].seconds(where) <= ALIKE * one.seconds(where)
    # 16 GB of parameters leave no chip of 16 GiB room for anything else.
    assert Layout(16) not in [one.layout for one in fitting]


def test_rows_are_as_many_as_fit_or_as_help():
    """With a tenth of the answers to draw, no more are drawn at once than there are."""
    where = topology("h100:1")
    whole = options(model("Llama-3.2-1B"), STUDY, where)[0]
    few = options(model("Llama-3.2-1B"), dataclasses.replace(STUDY, queries=1, samples=10), where)
    assert few[0].draw_rows <= 16 < whole.draw_rows
    given = options(model("Llama-3.2-1B"), STUDY, where, batch_size=96)[0]
    assert (given.draw_rows, given.score_rows) == (96, 96)
    assert given.seconds(where) > whole.seconds(where)


def test_time_grows_with_the_study_and_falls_with_the_chips():
    config = model("Llama-3.1-8B")

    def seconds(name, **changes):
        where = topology(name)
        return options(config, dataclasses.replace(STUDY, **changes), where)[0].seconds(where)

    base = seconds("v5e:2x4", queries=64)
    assert 1.8 < seconds("v5e:2x4", queries=128) / base < 2.1
    assert 1.8 < seconds("v5e:2x4", queries=64, samples=1000) / base < 2.1
    assert seconds("v5e:4x4", queries=64) < 0.7 * base
    assert base < seconds("v5e:2x4", queries=64, policies=3) < 1.5 * base


def test_the_least_topology_that_would_do_is_named():
    with pytest.raises(InputError, match=r"X does not fit v5e:2x2: .* GiB.*holds it is v5e:4x4"):
        choose(model("Llama-3.1-70B"), STUDY, topology("v5e:2x2"), name="X")
    with pytest.raises(InputError, match="no h100 topology holds it"):
        choose(model("Llama-3.1-405B"), STUDY, topology("h100:8"), name="X")
    with pytest.raises(InputError, match=r"data=16: .*leave out --mesh"):
        config = published("Llama-3.1-8B")
        assert config is not None
        choose(config, STUDY, topology("v5e:4x4"), name="X", layout=Layout(16))
