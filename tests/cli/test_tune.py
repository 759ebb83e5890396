"""`tailrisk tune`, and what `tailrisk estimate` makes of tuned:FOLDER and auto."""

import json
import re
import shutil

import numpy as np
import pytest
import scipy.special

from tailrisk_jax.cli import main
from tailrisk_jax.studies import read_estimates
from tests.studies.runs import QUERIES, command_for, contents, refused, save_tiny, table

CANDIDATES = ("target@0.5", "target@1")
SHARP = 0.15  # temperature of the target, at which some words are rare
RARE = "fine"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def tune(tiny, out, *words):
    return [
        "tune", "--model", str(tiny / "model"), "--queries", str(tiny / "queries.jsonl"),
        "--event", RARE, "--temperature", str(SHARP), "--pilot", "200", "--max-new-tokens", "6",
        "--out", str(out), *words,
    ]  # fmt: skip


def auto(tiny, out, **changes):
    command = command_for(
        tiny, out, event=RARE, temperature=SHARP, proposal="auto", pilot=200, seed=1, **changes
    )
    return [*command, "--candidates", *CANDIDATES]


def read(run, name):
    return json.loads((run / name).read_text())


def no_pilot(*_, **__):
    raise AssertionError("a pilot is drawn again")


def test_what_is_tuned_can_be_drawn_from(tiny, tmp_path, capsys, monkeypatch):
    folder, run = tmp_path / "tuned", tmp_path / "run"
    main(tune(tiny, folder, "--candidates", *CANDIDATES))
    said, progress = capsys.readouterr()
    assert "drawn 600 of 600, judged 600, scored 600 of 600, " in progress
    text = (folder / "proposal.txt").read_text().strip()
    record = read(folder, "tuning.json")
    assert f"Proposal: {text}\n" in said and record["reason"] in said
    assert f"{record['pilot']['tokens']:,} tokens" in said
    assert record["proposal"] == text and record["method"] == "choose"
    assert record["settings"]["seed"] == 0 and record["selection"]["kept"] == 3
    assert {"model", "tokens", "judge", "dtype", "temperature"} <= set(record["identity"])
    assert record["pilot"]["queries"] == ["cake", "kind", "greeting"]  # fewer than 5: all

    argv = command_for(tiny, run, event=RARE, temperature=SHARP, proposal=f"tuned:{folder}")
    main(argv)
    study = read(run, "study.json")
    assert study["identity"]["proposal"]["text"] == text
    tuning = read(run, "summary.json")["selection"]["proposal"]
    assert tuning["given"] == f"tuned:{folder}" and tuning["pilot"] == record["pilot"]
    before = contents(run)
    main(argv)
    main(["resume", "--quiet", str(run)])
    assert contents(run) == before


def terms_of(text):
    """The weights in the text of a mixture."""
    return {name: float(weight) for weight, name in (term.split("*") for term in text.split(" + "))}


def assert_drawn_with(run, own, shared):
    """Each query from its own weights or the shared ones: density, labels, what is kept."""
    samples, per_query = table(run, "samples"), read(run, "study.json")["weighting"]["per_query"]
    parts, labels = (np.array(samples[name]) for name in ("component_log_q", "component"))
    for name, kept in zip(QUERIES, per_query, strict=True):
        row = np.array([own.get(name, shared).get(term, 0) for term in shared])
        drawn = np.array(samples["query_id"]) == name
        wanted = scipy.special.logsumexp(parts[drawn], axis=1, b=row)
        np.testing.assert_allclose(np.array(samples["log_q"])[drawn], wanted, atol=1e-4)
        np.testing.assert_allclose(kept, row, atol=1e-6)
        assert np.all(row[labels[drawn]] > 0)


@pytest.mark.filterwarnings("ignore::tailrisk_jax.studies.SetAside")
def test_queries_are_drawn_with_weights_of_their_own(tiny, tmp_path, capsys):
    folder, run = tmp_path / "tuned", tmp_path / "run"
    folder.mkdir()
    own = {"cake": {"target": 0.6, "target@2": 0.4}, "kind": {"target@0.5": 1.0}, "other": {"a": 1}}
    text = "0.2*target + 0.3*target@0.5 + 0.5*target@2"
    (folder / "proposal.txt").write_text(text)
    (folder / "tuning.json").write_text('{"method": "windows", "reason": "", "pilot": {}}')
    (folder / "weights.json").write_text(json.dumps(own))
    argv = [w for w in command_for(tiny, run, proposal=f"tuned:{folder}") if w != "--quiet"]
    assert "query 'other' has a weight for 'a', which the proposal" in refused(argv, capsys)
    own["other"] = {"target": 1.0}
    (folder / "weights.json").write_text(json.dumps(own))
    main(argv)
    assert "2 of 3 queries have weights of their own" in capsys.readouterr().err
    assert_drawn_with(run, own, terms_of(text))
    bounds = table(run)["upper_certificate"]
    assert bounds[1] == np.inf and np.isfinite(bounds[0])

    # It goes on by itself, to the same answers, with what it was begun with ...
    before = contents(run, "samples.parquet", "estimates.parquet", "weights.json", "study.json")
    (folder / "weights.json").write_text(json.dumps(own | {"cake": {"target": 1.0}}))
    (run / "samples" / "manifest-0.jsonl").unlink()
    main(["resume", "--quiet", str(run)])
    assert contents(run, *before) == before
    # ... and with nothing else.
    assert "proposal.weights" in refused(argv, capsys)
    (folder / "weights.json").unlink()
    assert "proposal.weights" in refused(argv, capsys)
    shutil.copy(folder / "tuning.json", run / "weights.json")
    assert "weights.json can't be read" in refused(["resume", run], capsys)


@pytest.mark.slow
def test_weights_are_tuned_for_each_query(tiny, tmp_path, capsys):
    folder, run = tmp_path / "tuned", tmp_path / "run"
    main(tune(tiny, folder, "--method", "windows", "--per-query", "--candidates", "target@0.5"))
    said, own = capsys.readouterr().out, read(folder, "weights.json")
    assert f"{len(own)} of 3 queries have weights of their own" in said
    record = read(folder, "tuning.json")
    assert record["share"] == 1 and len(own) > 1
    assert list(own) == [q for q in QUERIES if q not in record["pilot"]["without_hits"]]
    shared = terms_of((folder / "proposal.txt").read_text().strip())
    for row in own.values():
        assert set(row) <= set(shared) and row["target"] > 0.09
        np.testing.assert_allclose(sum(row.values()), 1)
    assert len({json.dumps(row) for row in own.values()}) == len(own)
    changes = dict(event=RARE, temperature=SHARP, proposal=f"tuned:{folder}")
    main(command_for(tiny, run, **changes))
    assert_drawn_with(run, own, shared)

    # Runs over some of the queries, in another order, are the same together.
    halves = [tmp_path / "0", tmp_path / "1"]
    for half, others in zip(halves, (["cake"], ["kind", "greeting"]), strict=True):
        main([*command_for(tiny, half, **changes), "--exclude", *others])
    main(["merge", *map(str, halves), f"--out={tmp_path / 'both'}", "--quiet"])
    ours, wanted = (
        {row["query_id"]: (row["value"], row["upper_certificate"]) for row in rows.to_pylist()}
        for rows in (read_estimates(tmp_path / "both"), read_estimates(run))
    )
    assert list(ours) != list(wanted) and ours.keys() == wanted.keys()
    np.testing.assert_allclose([ours[name] for name in wanted], list(wanted.values()), rtol=1e-5)


def test_auto_is_chosen_once_and_changes_no_estimate(tiny, tmp_path, capsys, monkeypatch):
    run, plain = tmp_path / "run", tmp_path / "plain"
    main([word for word in auto(tiny, run) if word != "--quiet"])
    said = capsys.readouterr().err
    choice = read(run, "summary.json")["selection"]["proposal"]
    assert choice["given"] == "auto" and choice["reason"] in said
    assert f"{choice['pilot']['tokens']:,} tokens, not used again" in said
    assert choice["pilot"]["tokens"] > 3 * 200 and sum(choice["pilot"]["hits"]) > 0
    text = read(run, "study.json")["identity"]["proposal"]["text"]
    assert text.count(" + ") >= 1 and "target@0.5" in text
    assert "\nproposal: auto" not in (run / "study.yaml").read_text()

    main(command_for(tiny, plain, event=RARE, temperature=SHARP, proposal=text, seed=1))
    results = "samples.parquet", "estimates.parquet"
    assert contents(run, *results) == contents(plain, *results)

    before = contents(run)
    monkeypatch.setattr("tailrisk_jax.cli.estimate.choose_proposal", no_pilot)
    main(auto(tiny, run))
    main(["resume", "--quiet", str(run)])
    assert contents(run) == before
    assert "no pilot chose" in refused(auto(tiny, plain), capsys)


def test_auto_without_a_harmful_pilot_answer_says_so(tiny, tmp_path, capsys):
    argv = [word.replace(RARE, "never") for word in auto(tiny, tmp_path / "run")]
    main(argv)
    said = capsys.readouterr().err
    assert "None of 600 pilot draws of 3 queries was harmful" in said  # though it is --quiet
    text = read(tmp_path / "run", "study.json")["identity"]["proposal"]["text"]
    assert text == "0.3334*target + 0.3333*target@0.5 + 0.3333*target@1"


BAD = {
    "no candidates": ([], "--candidates is needed with --model"),
    "no such candidate": (["--candidates", "jailbreak"], "'jailbreak' isn't understood"),
    "a share above 1": (["--candidates", "target@2", "--pilot-share", "2"], "pilot of share=2"),
    "no draws": (["--candidates", "target@2", "--pilot", "0"], "num_samples=0"),
    "nothing scored": (
        ["--candidates", "target@2", "--judge", "python:{t}/judges.py:silent"],
        "none of the 600 pilot draws has a score",
    ),
    "no steering": (["--method", "search"], "--steer is needed"),
    "another method's": (["--candidates", "target@2", "--biases", "1"], "--biases is for --method"),
    "weights of a choice": (["--candidates", "target@2", "--per-query"], "--per-query is for"),
    "not empty": (["--candidates", "target@2", "--out", "{t}"], "exists and is not empty"),
    "a bias above 1": (["--method", "search", "--steer", "ablation:x", "--biases", "2"], "bias 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_gives_no_proposal_is_one_line(tiny, tmp_path, capsys, name):
    words, named = BAD[name]
    silent = "def silent(responses):\n    return [None] * len(responses)\n"
    (tiny / "judges.py").write_text(silent)
    argv = [word.format(t=tiny) for word in (*tune(tiny, tmp_path / "out", "--quiet"), *words)]
    if "--judge" in argv:
        at = argv.index("--event")
        argv = argv[:at] + argv[at + 2 :]
    line = refused(argv, capsys)
    assert re.search(named, line), line
    assert not (tmp_path / "out").exists()


def test_options_of_auto_are_for_auto(tiny, tmp_path, capsys):
    argv = command_for(tiny, tmp_path / "run", pilot=100)
    assert "--pilot is for --proposal auto" in refused(argv, capsys)
    argv = command_for(tiny, tmp_path / "run", proposal=f"tuned:{tiny}")
    assert "holds no proposal of `tailrisk tune`" in refused(argv, capsys)
    argv = command_for(tiny, tmp_path / "run", proposal="auto")
    assert "--candidates is needed" in refused(argv, capsys)
    assert not (tmp_path / "run").exists()
