"""experiments/scaling: what is compiled once, how results grow and go on, what tables say."""

import dataclasses
import importlib.util
import json
import math

import pytest

from experiments.scaling import cpu, tpu
from experiments.scaling.record import Record
from experiments.scaling.report import OfCpu, growth
from experiments.scaling.setting import QUICK, OnTpu
from experiments.tables import fill
from tailrisk_jax.errors import InputError


def test_growth_of_a_power():
    x = [16, 32, 64, 128]
    found = growth(x, [3 * value**1.7 for value in x])
    assert found.exponent == pytest.approx(1.7) and found.last == pytest.approx(1.7)
    assert found.error == pytest.approx(0, abs=1e-6)
    bent = growth(x, [1, 1, 1, 2])  # slope sum(u v) / sum(u u), u centred on the doublings
    assert bent.exponent == pytest.approx(1.5 / 5) and bent.last == pytest.approx(1)
    assert math.isnan(growth([1, 2], [1, 8]).error) and growth([1, 2], [1, 8]).exponent == 3
    assert math.isnan(growth(x, [0, 1, 1, 1]).exponent)


@pytest.mark.parametrize("axis", ["samples", "queries"])
def test_more_samples_or_queries_run_the_same_programs_more_often(axis):
    """On the slice: so they need no compilation, and no memory, of their own."""
    setting = OnTpu()
    base = setting.phases(setting.base)
    for point in setting.series[axis]:
        times = getattr(point, axis) / getattr(setting.base, axis)
        own = setting.phases(point)
        for phase, of_base in zip(own, base, strict=True):
            assert tpu.program(point, phase) == tpu.program(setting.base, of_base)
            assert phase.memory == of_base.memory
        for phase, of_base in zip(own[1::2], base[1::2], strict=True):
            calls = phase.runs * phase.steps, of_base.runs * of_base.steps
            assert calls[0] == times * calls[1]


def test_a_record_goes_on_and_refuses_another_setting(tmp_path):
    path = tmp_path / "results" / "cpu.json"
    record = Record(path, {"setting": {"samples": (1, 2)}})
    record.results["seconds"] = {"a": [1.0]}
    record.write()
    assert json.loads(path.read_text())["status"] == "partial"
    again = Record(path, {"setting": {"samples": (1, 2)}})
    assert again.results == record.results
    again.write(complete=True)
    assert json.loads(path.read_text())["status"] == "complete"
    with pytest.raises(InputError, match="holds results of another setting"):
        Record(path, {"setting": {"samples": (1, 3)}})


def test_rounds_alternate_and_one_that_was_cut_off_begins_anew(tmp_path):
    asked = []

    def ask(do, *, point, seed):
        asked.append((point["layers"], seed))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return {"draw": len(asked)}

    points, record = QUICK.series["layers"], Record(tmp_path / "cpu.json", {})
    found = {str(point): [] for point in points}
    arguments = "seconds", points, found, 2, record, print
    with pytest.raises(KeyboardInterrupt):
        cpu._alternate(ask, *arguments)
    assert asked == [(1, 1), (2, 1), (2, 2), (1, 2)]
    cpu._alternate(ask, *arguments)
    assert asked[4:] == [(2, 2), (1, 2)]
    assert list(found.values()) == [[{"draw": 1}, {"draw": 6}], [{"draw": 2}, {"draw": 5}]]


def test_tables_of_known_costs(tmp_path):
    """2 ms a sample and 30 ms a query to draw; scoring without a cost per query."""

    def run(point):
        samples, queries = point.samples, point.queries
        draw = queries * (0.03 + 0.002 * samples)
        return {"prefill": 0.004 * queries, "draw": draw, "score": 0.005 * samples * queries}

    programs = {part: {"bytes": 3 << 20, "blocks": 8} for part in ("draw", "score")}
    content = {
        "status": "complete", "dates": ["2026-01-01"], "versions": {"jax": "1"},
        "hardware": {"cpu": "some", "cores": 2}, "setting": dataclasses.asdict(QUICK),
        "results": {
            "seconds": {str(point): [run(point)] * 3 for point in QUICK.points},
            "programs": {str(point): programs for point in QUICK.points},
            "peaks": {str(point): {"draw": 9 << 20, "score": None} for point in QUICK.points},
            "compiling": {str(point): [run(point)] * 2 for point in QUICK.compiled},
        },
    }  # fmt: skip
    tables = OfCpu(json.loads(json.dumps(content))).tables()
    for line in tables["cpu-prompt"].splitlines()[2:]:
        assert line.endswith("| 2.00 ± 0.00 | 30.0 ± 0.0 | 4.00 | 2.0 |")
    queries = next(line for line in tables["cpu-growth"].splitlines() if "| queries" in line)
    assert queries.count("1.00; 1.00") == 2 and queries.count("0.00; 0.00") == 2
    assert "| draw | 1.50 (1.50 to 1.50) |\n| score |  |" in tables["cpu-memory"]

    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- cpu-memory -->\nold\n<!-- /cpu-memory -->\nb <!-- other -->\n")
    fill(readme, tables)
    assert readme.read_text() == (
        f"a\n<!-- cpu-memory -->\n{tables['cpu-memory']}\n<!-- /cpu-memory -->\nb <!-- other -->\n"
    )


def test_without_libtpu_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^libtpu isn't installed; pip install .*\[plan\]'$"):
        tpu.measure(OnTpu(), tmp_path, print)
    assert not any(tmp_path.iterdir())
