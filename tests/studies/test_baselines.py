"""Monte Carlo baselines: files as the paper's code writes them, and runs of ours."""

import json

import numpy as np
import pytest
from scipy import stats

from tailrisk_jax.cli import main
from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import read_baseline
from tests.studies.runs import table

SCORES = {
    "how to bake a cake": [1.0, 0.75, 0.5, 0.0] * 5,
    " how to be kind\n": [0.0] * 12,
    "how to fly": [1.0, float("nan"), None],
}


def line(prompt="p", scores=(0.0, 1.0), **changes):
    record = {"forbidden_prompt": prompt, "response": ["so"] * len(scores), "score": list(scores)}
    return json.dumps(record | changes)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "baseline.jsonl"
    path.write_text("\n".join(line(*item) for item in SCORES.items()) + "\n\n")
    return path


def test_events_have_exact_intervals_and_scores_a_mean(file):
    found = read_baseline(file, threshold=0.75, level=0.9)
    assert found.prompts == [prompt.strip() for prompt in SCORES]
    assert found.estimate.num_samples.tolist() == [20, 12, 1]
    assert found.estimate.hits.tolist() == [10, 0, 1]
    for row, (hits, num) in enumerate([(10, 20), (0, 12), (1, 1)]):
        exact = stats.binomtest(hits, num).proportion_ci(0.9, method="exact")
        limits = found.estimate.lower[row], found.estimate.upper[row]
        np.testing.assert_allclose(limits, (exact.low, exact.high), rtol=1e-8)
    assert found.estimate.unscored[2] == pytest.approx(2 / 3)
    assert "score >= 0.75" in found.estimand
    mean = read_baseline(file)
    np.testing.assert_allclose(mean.estimate.value, [2.25 / 4, 0, 1])
    assert mean.estimate.certified.tolist() == [False, True, True]


def test_it_is_matched_by_text(file):
    found = read_baseline(file)
    matched = found.match(["how to be kind", "hello", "  how to bake a cake "])
    assert matched.rows.tolist() == [1, -1, 0] and matched.without == [1]
    assert matched.unused == ["how to fly"]
    np.testing.assert_array_equal(matched.figures("num_samples"), [12, np.nan, 20])


def test_a_run_of_the_target_is_one(command, whole, tmp_path):
    run = tmp_path / "run"
    main(command(run, proposal="target"))
    found, own = read_baseline(run), table(run)
    np.testing.assert_allclose(found.match(own["query"]).figures("value"), own["value"])
    np.testing.assert_allclose(found.match(own["query"]).figures("upper"), own["upper"])
    with pytest.raises(InputError, match="not from the target itself"):
        read_baseline(whole)


BAD = {
    "not JSON": ("{", "line 1 is not valid JSON"),
    "no score": ('{"forbidden_prompt": "p", "response": ["so"]}', "line 1 has no 'score'"),
    "not a record": ("[1]", "line 1 has no 'forbidden_prompt'"),
    "scores short": (line(response=["so"] * 3), "line 1 has 2 scores for 3 responses"),
    "no draws": (line(scores=[]), "line 1 has 0 scores for 0 responses"),
    "percent": (line(scores=[0.0, 75.0]), "line 1 has the score 75.0; scores lie in"),
    "words": (line(scores=["high"]), "line 1 has the score 'high'"),
    "twice": (line() + "\n" + line(" p"), "line 2 repeats a prompt: 'p'"),
    "nothing": ("\n", "holds no draws"),
}


@pytest.mark.parametrize("name", BAD)
def test_another_file_is_one_clear_line(name, tmp_path):
    content, said = BAD[name]
    path = tmp_path / "baseline.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"baseline\.jsonl") as stopped:
        read_baseline(path)
    assert said in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_path_or_threshold_that_can_not_be_is_named(file, tmp_path):
    for path, threshold, said in (
        (tmp_path / "absent.jsonl", None, "absent.jsonl can't be read"),
        (tmp_path, None, "is no run"),
        (file, 75, "threshold=75"),
    ):
        with pytest.raises(InputError, match=said):
            read_baseline(path, threshold=threshold)
