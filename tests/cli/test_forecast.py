"""`tailrisk forecast` on a run's folder, as a user calls it."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tailrisk_jax.cli import main
from tests.forecasting.test_forecast import exponential, risk
from tests.studies.runs import refused, write_study

M = 60


def estimates(value, **columns):
    names = [f"q{q}" for q in range(len(value))]
    columns = {
        "query_id": names, "estimand": ["E[h]"] * len(value), "value": value,
        "stderr": value / 20, "lower": value * 0.9, "upper": value / 0.9,
        "truncated": np.zeros(len(value)), "verdict": ["ok"] * len(value), **columns,
    }  # fmt: skip
    return pa.table(columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 60 queries with an exponential tail, and the groups of its queries."""
    folder = tmp_path_factory.mktemp("forecast")
    write_study(
        folder, [{"id": f"q{q}", "content": f"how {q} ?", "metadata": {}} for q in range(M)]
    )
    pq.write_table(estimates(risk(exponential())), folder / "estimates.parquet")
    lines = [
        json.dumps({"id": f"q{q}", "base": f"b{q // 4}", "kind": "case", "prompt": f"how {q} ?"})
        for q in range(M)
    ]
    (folder / "groups.jsonl").write_text("\n".join(lines))
    other = {"id": "z/case-1", "base": "z", "kind": "case", "prompt": "another"}
    (folder / "other.jsonl").write_text(json.dumps(other))
    return folder


def output(capsys, *words):
    main(["forecast", *map(str, words)])
    said = capsys.readouterr()
    assert not said.err
    return said.out


def test_tables_json_and_picture_say_the_same(folder, capsys, tmp_path):
    picture = tmp_path / "risk.png"
    words = (folder, "--deployment", "600", "1e6", "--threshold=0.1", "--threshold=0.3")
    text = output(capsys, *words, f"--out={picture}")
    found = json.loads(output(capsys, *words, "--json"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    near, far = found["forecasts"]
    assert (near["queries"], near["factor"], near["verdict"]) == (600, 10, "ok")
    assert far["verdict"] == "doubtful" and f"Doubtful at 1e+06 queries: {far['why']}" in text
    assert found["tail"]["num_tail"] == 10 and "the 10 riskiest of 60 queries, by peaks" in text
    worst = near["worst"]
    assert 0 < worst["lower"] < worst["value"] < worst["upper"] < 1
    assert f"{worst['value']:.2g}" in text and f"{near['harmful']['value']:.2g}" in text
    np.testing.assert_allclose(near["harmful"]["value"], 600 * found["mean"]["value"])
    assert [row["risk"] for row in found["thresholds"]] == [0.1, 0.3]
    assert near["exceeds"][0] > near["exceeds"][1]


@pytest.mark.slow
def test_groups_change_the_bands_alone(folder, capsys):
    words = (folder, "--deployment", "600", "--json", "--threshold=0.3")
    plain = json.loads(output(capsys, *words))["forecasts"][0]["worst"]
    groups = f"--perturbations={folder / 'groups.jsonl'}"
    grouped = json.loads(output(capsys, *words, groups))["forecasts"][0]["worst"]
    assert plain["value"] == grouped["value"] and plain["upper"] != grouped["upper"]


def test_a_refusal_has_words_and_no_figures(folder, capsys, tmp_path):
    value = np.where(np.arange(M) < 3, 0.01, 0.0)
    (tmp_path / "study.json").write_bytes((folder / "study.json").read_bytes())
    table = estimates(value, upper=np.full(M, np.inf), stderr=np.full(M, np.nan))
    pq.write_table(table, tmp_path / "estimates.parquet")
    text = output(capsys, tmp_path, "--deployment", "600", "--threshold=0.3")
    assert "Unusable: The tail has only 3 queries above 0" in text
    assert "57 queries had no hit: they count as low" in text
    [row] = json.loads(output(capsys, tmp_path, "--deployment", "600", "--json"))["forecasts"]
    assert row["worst"] == dict.fromkeys(("value", "lower", "upper"))


BAD = {
    "few": (["--deployment", "10"], "a deployment of 10 queries is no forecast from 60"),
    "threshold": (["--deployment", "600", "--threshold=2"], "threshold 2 is no risk"),
    "top": (["--deployment", "600", "--top=61"], "hold 61 of 60 queries"),
    "level": (["--deployment", "600", "--level=95"], "level is 95"),
    "ending": (["--deployment", "600", "--out=a.pdf"], "must end in .png or .svg"),
    "groups": (
        ["--deployment", "600", "--perturbations={folder}/other.jsonl"],
        "has none of the 1 variants in",
    ),
    "none": ([], "deployment"),
    "empty": (["--deployment"], "holds no number of queries"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, folder, capsys):
    words, said = BAD[name]
    assert said in refused(["forecast", folder, *(w.format(folder=folder) for w in words)], capsys)


def test_runs_that_are_none_or_small_are_named(folder, capsys, tmp_path):
    assert "no estimates.parquet" in refused(["forecast", tmp_path, "--deployment=9"], capsys)
    (tmp_path / "study.json").write_bytes((folder / "study.json").read_bytes())
    pq.write_table(estimates(np.full(5, 0.1)), tmp_path / "estimates.parquet")
    assert "has 5 queries, too few" in refused(["forecast", tmp_path, "--deployment=900"], capsys)
