"""`tailrisk show`, `compare` and `export` as a user calls them, on runs of the organism."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tailrisk_jax import load_organism
from tailrisk_jax.cli import main
from tests.studies.test_baselines import line


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of three queries, and the same answers judged by another event."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = [str(query) for query in load_organism().queries if query.forbidden][:3]
    (folder / "queries.jsonl").write_text(
        "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts)
    )
    main([
        "estimate", "--model=organism", f"--queries={folder / 'queries.jsonl'}",
        "--proposal=0.1*target + 0.9*target@2.5", "--event=mix|take|need", "--samples=24",
        "--max-new-tokens=12", f"--out={folder / 'a'}", "--quiet",
    ])  # fmt: skip
    main(["judge", str(folder / "a"), "--event=mix", f"--out={folder / 'b'}", "--quiet"])
    (folder / "baseline.jsonl").write_text(
        "\n".join([*(line(prompt, [0.8] + [0.0] * 99) for prompt in prompts[:2]), line("other")])
    )
    return folder


def output(capsys, *words):
    capsys.readouterr()
    main([str(word) for word in words])
    said = capsys.readouterr()
    assert not said.err
    return said.out


def estimates(run):
    return pq.read_table(run / "estimates.parquet").to_pydict()


def test_estimates_name_their_estimand(runs):
    for run, pattern in (("a", "mix|take|need"), ("b", "mix")):
        table = estimates(runs / run)
        assert len(set(table["estimand"])) == 1 and repr(pattern) in table["estimand"][0]
        wanted = {"value", "lower", "upper", "stderr", "ess", "kl", "k_hat", "verdict", "why"}
        assert wanted <= set(table)


def test_show_sorts_and_is_json(runs, capsys):
    run = runs / "a"
    shown = json.loads(output(capsys, "show", run, "--json", "--sort=risk"))
    table = estimates(run)
    order = np.argsort(-np.asarray(table["value"]), kind="stable")
    assert [row["query_id"] for row in shown["estimates"]] == [table["query_id"][q] for q in order]
    assert shown["num_samples"] == 72 and shown["estimates"][0]["value"] == max(table["value"])
    as_text = output(capsys, "show", run)
    starts = [as_text.index(query[:30]) for query in table["query"]]
    assert starts == sorted(starts) and as_text.startswith("E[score by regex")


def test_show_of_a_query_has_its_record_and_weightiest_answers(runs, capsys):
    run = runs / "a"
    shown = json.loads(output(capsys, "show", run, "--query=q1", "--json"))
    table, samples = estimates(run), pq.read_table(run / "samples.parquet").to_pylist()
    assert shown["value"] == table["value"][1] and shown["why"] == table["why"][1]
    own = [row for row in samples if row["query_id"] == "q1"]
    terms = np.array([np.exp(row["log_p"] - row["log_q"]) * row["score"] for row in own])
    heaviest, first = own[int(np.argmax(terms))], shown["samples"][0]
    assert (first["sample"], first["text"]) == (heaviest["sample"], heaviest["text"])
    np.testing.assert_allclose(first["share"], terms.max() / terms.sum(), rtol=1e-5)
    np.testing.assert_allclose(sum(row["share"] for row in shown["samples"]), 1, rtol=1e-3)
    as_text = output(capsys, "show", run, "--query=q1")
    assert repr(heaviest["text"])[:60] in as_text and "upper_certificate" in as_text


def test_compare_pairs_runs_of_the_same_answers(runs, capsys, tmp_path):
    out = tmp_path / "rows.parquet"
    words = ("compare", runs / "a", runs / "b")
    found = json.loads(output(capsys, *words, "--json", f"--out={out}"))
    a, b = estimates(runs / "a"), estimates(runs / "b")
    rows = pq.read_table(out).to_pydict()
    assert rows["method"] == ["paired"] * 3 and rows["shared"] == [24] * 3
    np.testing.assert_allclose(rows["difference"], np.subtract(a["value"], b["value"]))
    assert [row["difference"] for row in found["queries"]] == rows["difference"]
    np.testing.assert_allclose(found["total"]["difference"], np.mean(rows["difference"]))
    assert found["a"]["estimand"] != found["b"]["estimand"] and not found["differing"]
    as_text = output(capsys, *words)
    assert "estimate different things" in as_text and "Mean over 3 queries" in as_text


def test_compare_with_a_baseline_lists_what_has_no_partner(runs, capsys):
    words = ("compare", runs / "a", f"--baseline={runs / 'baseline.jsonl'}", "--threshold=0.75")
    found = json.loads(output(capsys, *words, "--json"))
    assert found["only_a"] == ["q2"] and found["only_b"] == ["other"]
    assert [row["b_value"] for row in found["queries"]] == [0.01, 0.01]
    assert [row["b_num_samples"] for row in found["queries"]] == [100, 100]
    assert "Only in B (1): 'other'" in output(capsys, *words)


def test_export_says_what_it_wrote(runs, capsys, tmp_path):
    out = tmp_path / "run.eval"
    assert "6 answers" in output(capsys, "export", runs / "a", f"--out={out}", "--samples=2")
    assert out.stat().st_size > 1000


BAD = {
    "no run": (["show", "{tmp}/none"], "no estimates.parquet"),
    "no query": (["show", "{runs}/a", "--query=q9"], "no query 'q9'; it has 3: q0, q1, q2"),
    "one run": (["compare", "{runs}/a"], "give two, or one and --baseline"),
    "same run": (["compare", "{runs}/a", "{runs}/../{name}/a"], "is given twice"),
    "three": (["compare", "{runs}/a", "{runs}/b", "{runs}/b"], "3 runs are given"),
    "not a run": (["compare", "{runs}/a", "{tmp}"], "is no run"),
    "threshold": (["compare", "{runs}/a", "{runs}/b", "--threshold=0.5"], "is for a --baseline"),
    "no baseline": (["compare", "{runs}/a", "--baseline={tmp}/b.jsonl"], "b.jsonl can't be read"),
    "ending": (["export", "{runs}/a", "--out={tmp}/a.json"], "must end in .eval"),
    "unwritable": (["compare", "{runs}/a", "{runs}/b", "--out=/proc/x"], "/proc/x"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, runs, tmp_path, capsys):
    words, said = BAD[name]
    with pytest.raises(SystemExit) as stopped:
        main([word.format(runs=runs, tmp=tmp_path, name=runs.name) for word in words])
    found = capsys.readouterr()
    lines = found.err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and not found.out
    assert lines[0].startswith("tailrisk: ") and said in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_damaged_table_is_named(runs, tmp_path, capsys):
    (tmp_path / "estimates.parquet").write_bytes(b"PAR1 but cut off")
    with pytest.raises(SystemExit):
        main(["show", str(tmp_path)])
    assert "estimates.parquet can't be read" in capsys.readouterr().err
