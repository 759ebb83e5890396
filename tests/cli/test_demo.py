"""`tailrisk demo`, made small."""

import json

import numpy as np
import pytest

from tailrisk_jax import load_organism
from tailrisk_jax.cli import main


def test_the_demo_sets_estimates_beside_exact_truth(tmp_path, capsys):
    out = tmp_path / "demo"
    for _ in range(2):  # an earlier demo is replaced
        main(["demo", "--queries", "2", "--samples", "40", "--out", str(out)])
    assert "verdict" in capsys.readouterr().out
    rows = json.loads((out / "summary.json").read_text())["comparison"]
    organism = load_organism()
    assert [tuple(row["truth"]) for row in rows] == [organism.truth(row["query"]) for row in rows]
    for row in rows:
        assert row["efficiency"][0] > 0 and row["monte_carlo_samples"] > 40
        parts = np.array_split(np.arange(row["monte_carlo_samples"]), 4)
        whole = np.average(row["monte_carlo_repeats"], weights=[len(part) for part in parts])
        np.testing.assert_allclose(whole, row["monte_carlo"])
    # The likelier of the two can be judged by 40 draws: within a factor of 10 of the truth.
    assert 0.1 < rows[0]["value"] / rows[0]["truth"][0] < 10
    assert {p.name for p in out.iterdir()} == {
        "estimate_against_truth.png", "estimates.parquet", "samples.parquet", "summary.json"
    }  # fmt: skip


def test_another_folder_is_not_replaced(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("kept")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path)])
    assert stopped.value.code == 2 and "not empty" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").exists()
