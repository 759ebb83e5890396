"""A run as a log of Inspect AI: read back by Inspect, and opened by its command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tailrisk_jax.cli import main
from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import write_inspect_log
from tailrisk_jax.studies.inspect_log import SCORER
from tests.studies.runs import table


@pytest.fixture(scope="module")
def judged(whole, tmp_path_factory):
    """A run with an unscored answer."""
    judge = tmp_path_factory.mktemp("judge") / "unsure.py"
    judge.write_text(
        "def score(responses):\n"
        "    return [None if i == 4 else i % 2 for i, _ in enumerate(responses)]\n"
    )
    run = judge.parent / "run"
    main(["judge", str(whole), f"--judge=python:{judge}:score", f"--out={run}", "--quiet"])
    return run


@pytest.mark.filterwarnings("ignore")  # Inspect's own
def test_inspect_reads_back_equal_numbers(judged, tmp_path):
    from inspect_ai.log import read_eval_log

    path = tmp_path / "run.eval"
    assert write_inspect_log(judged, path) == 72
    assert [p.name for p in tmp_path.iterdir()] == ["run.eval"]
    log = read_eval_log(str(path))
    samples, estimates = table(judged, "samples"), table(judged)
    unscored = int(np.isnan(samples["score"]).sum())
    assert log.status == "success" and len(log.samples) == 72 and unscored > 0
    by_place = {(one.id, one.epoch): one for one in log.samples}
    for i, place in enumerate(zip(samples["query_id"], samples["sample"], strict=True)):
        one = by_place[place[0], place[1] + 1]
        assert one.scores[SCORER].value == pytest.approx(samples["score"][i], nan_ok=True)
        assert one.output.completion == samples["text"][i]
        assert one.metadata["log_p"] == samples["log_p"][i]
        assert one.metadata["log_q"] == samples["log_q"][i]
        assert one.metadata["log_weight"] == samples["log_p"][i] - samples["log_q"][i]
        assert one.metadata["component"] == ["target", "target@2"][samples["component"][i]]
        assert one.metadata["ended"] == samples["ended"][i]
        assert (one.output.stop_reason == "stop") == samples["ended"][i]
    kept = log.results.metadata["estimates"]
    for i, name in enumerate(estimates["query_id"]):
        for column in ("value", "lower", "upper", "stderr", "upper_certificate"):
            assert kept[name][column] == pytest.approx(estimates[column][i], nan_ok=True)
        assert kept[name]["verdict"] == estimates["verdict"][i]
    [score] = log.results.scores
    assert score.metrics["mean_risk"].value == pytest.approx(np.mean(estimates["value"]))
    assert (score.scored_samples, score.unscored_samples) == (72 - unscored, unscored)
    assert write_inspect_log(judged, path, samples=2) == 6


def test_its_command_opens_it(judged, tmp_path):
    path = tmp_path / "run.eval"
    write_inspect_log(judged, path, samples=2)
    inspect = Path(sys.executable).parent / "inspect"
    done = subprocess.run([inspect, "log", "dump", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["eval"]["model"].startswith("tailrisk/") and len(shown["samples"]) == 6


def test_bad_input_is_one_clear_line(judged, tmp_path, monkeypatch):
    for out, said in (("run.json", "must end in .eval"), ("no/run.eval", "there is no folder")):
        with pytest.raises(InputError, match=said):
            write_inspect_log(judged, tmp_path / out)
    with pytest.raises(InputError, match="is no run"):
        write_inspect_log(tmp_path, tmp_path / "run.eval")
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    with pytest.raises(InputError, match=r"tailrisk-jax\[inspect\]"):
        write_inspect_log(judged, tmp_path / "run.eval")
    assert not list(tmp_path.iterdir())
