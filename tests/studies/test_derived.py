"""Runs made from runs: judged anew, scored for another model, merged, recomputed."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tailrisk_jax.cli import main
from tailrisk_jax.estimators import importance, in_float64
from tailrisk_jax.models import load_model
from tailrisk_jax.policies import Policy, encode
from tailrisk_jax.studies import locked
from tests.oracles import exact_log_probs
from tests.studies.runs import QUERIES, RESULTS, contents, refused, table

ESTIMATE = ("value", "stderr", "lower", "upper", "ess", "ess_harm", "hits")


@pytest.fixture(scope="module")
def kind(command, tmp_path_factory):
    """A run like `whole`, drawn with another event."""
    run = tmp_path_factory.mktemp("kind") / "run"
    main(command(run, event="kind"))
    return run


def test_judging_anew_is_what_drawing_with_that_judge_gives(whole, kind, tmp_path):
    out = tmp_path / "out"
    main(["judge", str(whole), "--event=kind", f"--out={out}", "--quiet"])
    names = ("samples.parquet", "estimates.parquet")
    assert contents(out, *names) == contents(kind, *names)
    summary = json.loads((out / "summary.json").read_text())
    assert "kind" in summary["estimand"] and summary["origin"]["judge"]["settings"] == {
        "pattern": "cake"
    }
    back = tmp_path / "back"
    main(["judge", str(out), "--event=cake", f"--out={back}", "--quiet"])
    assert contents(back, *names) == contents(whole, *names)


def test_scoring_for_the_same_model_changes_nothing(whole, tiny, tmp_path):
    out = tmp_path / "out"
    main(["score", str(whole), f"--model={tiny / 'model'}", f"--out={out}", "--quiet"])
    ours, theirs = table(out, "samples"), table(whole, "samples")
    np.testing.assert_allclose(ours["log_p"], theirs["log_p"], rtol=0, atol=1e-5)
    for name in theirs.keys() - {"log_p"}:
        assert ours[name] == theirs[name], name
    assert table(out).keys() == table(whole).keys()
    for name in ESTIMATE:
        np.testing.assert_allclose(table(out)[name], table(whole)[name], rtol=1e-4)


def test_scoring_for_another_model_is_importance_sampling_for_it(whole, tiny, tmp_path):
    """From float64 log-probabilities of the other model, one response at a time."""
    out = tmp_path / "out"
    main(["score", str(whole), f"--model={tiny / 'other'}", f"--out={out}", "--quiet"])
    samples, estimates = table(out, "samples"), table(out)
    other = Policy(load_model(tiny / "other", dtype=jnp.float32))
    prompts = encode(other.model, list(QUERIES.values()))
    log_p = [
        exact_log_probs(
            other,
            prompts.tokens[q][prompts.mask[q]].tolist(),
            samples["tokens"][24 * q : 24 * (q + 1)],
        )
        for q in range(len(QUERIES))
    ]
    np.testing.assert_allclose(np.reshape(samples["log_p"], (3, 24)), log_p, atol=1e-3)
    scores, log_q = (np.reshape(samples[name], (3, 24)) for name in ("score", "log_q"))
    wanted = in_float64(importance, scores, np.asarray(log_p) - log_q)
    for name in ESTIMATE:
        np.testing.assert_allclose(estimates[name], getattr(wanted, name), rtol=1e-2)
    assert samples["score"] == table(whole, "samples")["score"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["identity"]["drawn_for"]["name"] == str(tiny / "model")
    # No component is the new target, so no bound on its weights is claimed.
    before = table(whole)
    assert estimates["target_share"] == [0] * 3 and min(before["target_share"]) > 0
    assert all(0.5 < max(shares) <= 1.001 for shares in before["component_coverage"])


def test_statistics_are_computed_anew_from_what_is_kept(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    for name in RESULTS:
        (run / name).unlink()
    main(["estimate", str(run), "--json"])
    assert contents(run) == contents(whole)
    told = json.loads(capsys.readouterr().out)
    assert [row["value"] for row in told["estimates"]] == table(whole)["value"]
    (run / "samples" / "manifest-0.jsonl").unlink()  # nothing is known to be whole
    assert "holds no judged responses" in refused(["estimate", run], capsys)


def test_merged_runs_are_one_run_over_all_draws(whole, second, tmp_path):
    out = tmp_path / "out"
    main(["merge", str(whole), str(second), f"--out={out}", "--quiet"])
    samples = table(out, "samples")
    parts = [table(run, "samples") for run in (whole, second)]
    for name in ("tokens", "score", "log_p", "log_q"):
        both = [
            value for q in range(3) for part in parts for value in part[name][24 * q : 24 * (q + 1)]
        ]
        assert samples[name] == both, name
    assert samples["sample"] == [*range(48)] * 3
    scores, log_p, log_q = (
        np.reshape(samples[name], (3, 48)) for name in ("score", "log_p", "log_q")
    )
    wanted = in_float64(importance, scores, log_p - log_q)
    for name in ("value", "hits", "ess"):
        np.testing.assert_allclose(table(out)[name], getattr(wanted, name), rtol=1e-5)
    assert table(out)["num_samples"] == [48] * 3


def test_runs_over_other_queries_are_merged(command, whole, second, tiny, tmp_path):
    """Each query then has as many draws as the runs that asked it."""
    lines = (tiny / "queries.jsonl").read_text().splitlines()
    runs = [tmp_path / "0", tmp_path / "1"]
    for seed, run in enumerate(runs):
        (tmp_path / "queries.jsonl").write_text("\n".join([lines[0], lines[1 + seed]]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tailrisk_jax.cli.estimate.finish", lambda *_, **__: None)
            main(command(run, queries=tmp_path / "queries.jsonl", seed=seed))
    main(["merge", *map(str, runs), f"--out={tmp_path / 'out'}", "--quiet"])
    samples = table(tmp_path / "out", "samples")
    zero, one = (table(run, "samples")["tokens"] for run in (whole, second))
    assert samples["tokens"] == zero[:24] + one[:24] + zero[24:48] + one[48:]
    estimates = table(tmp_path / "out")
    assert estimates["query_id"] == list(QUERIES) and estimates["num_samples"] == [48, 24, 24]
    np.testing.assert_allclose(estimates["value"][1], table(whole)["value"][1], rtol=1e-4)
    np.testing.assert_allclose(estimates["value"][2], table(second)["value"][2], rtol=1e-4)


def test_runs_that_are_not_of_one_study_are_not_merged(
    command, whole, second, kind, tiny, tmp_path, capsys
):
    merged = tmp_path / "merged"
    main(["merge", str(whole), str(second), f"--out={merged}", "--quiet"])
    unfinished = shutil.copytree(second, tmp_path / "unfinished")
    (unfinished / "judgements" / "manifest-0.jsonl").unlink()
    stopped = shutil.copytree(second, tmp_path / "stopped")
    study = json.loads((stopped / "study.json").read_text())
    study["settings"]["until"] = 0.5
    (stopped / "study.json").write_text(json.dumps(study))
    renamed = shutil.copytree(second, tmp_path / "renamed")
    study = (renamed / "study.json").read_text()
    (renamed / "study.json").write_text(study.replace("how to be kind", "be kind"))
    cases = [
        ([whole], "1 run is nothing to merge"),
        ([whole, whole], "has the same draws of query 'cake' as one before it (seed 0)"),
        ([merged, second], "(seed 1)"),
        ([second, merged], "(seed 1)"),
        ([second, kind], "judge.settings.pattern 'cake' -> 'kind'"),
        ([whole, unfinished], "misses 72 responses"),
        ([whole, stopped], "was stopped by --until"),
        ([whole, renamed], "another query named 'kind'"),
        ([whole, tmp_path], "is no run"),
    ]
    for runs, said in cases:
        out = tmp_path / "out"
        line = refused(["merge", *runs, f"--out={out}"], capsys)
        assert said in line, line
        assert not out.exists()


def test_derived_runs_are_held_and_kept_to(whole, second, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    judge = ["judge", whole, f"--out={out}"]
    with locked(out):
        assert "being written by process" in refused([*judge, "--event=kind"], capsys)
    main([*map(str, judge), "--event=kind", "--quiet"])
    before = contents(out, "**/*")
    for argv, said in (
        ([*judge, "--event=to"], "judge.settings.pattern 'kind' -> 'to'"),
        (["judge", second, f"--out={out}", "--event=kind"], "seed 0 -> 1"),
        (["score", whole, f"--out={out}", f"--model={tiny / 'other'}"], "is of something else"),
        (["merge", whole, second, f"--out={out}"], "is of something else"),
        (["judge", out, f"--out={out}", "--event=kind"], "origin"),
    ):
        assert said in refused(argv, capsys)
        assert contents(out, "**/*") == before
    unfinished = shutil.copytree(whole, tmp_path / "unfinished")
    (unfinished / "samples" / "manifest-0.jsonl").unlink()
    for argv in (["judge", unfinished, "--event=kind"], ["score", unfinished, "--model=organism"]):
        assert "misses 72 responses" in refused([*argv, f"--out={tmp_path / 'new'}"], capsys)
    assert not (tmp_path / "new").exists()
