"""`tailrisk perturb` and `tailrisk sensitivity` as a user calls them."""

import json
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import norm

from tailrisk_jax import load_organism
from tailrisk_jax.cli import main
from tailrisk_jax.judges.server import Answer
from tailrisk_jax.organisms import enumerate_event, policy_next_log_probs, world
from tailrisk_jax.studies import paraphrases as served
from tailrisk_jax.studies import read_queries
from tests.forecasting.simulated import simulate
from tests.judges.fault_server import KEY, MODEL, running
from tests.studies.runs import refused, write_study

NAMES = ("original", "case", "mine")


@pytest.fixture(scope="module")
def world_of_runs(tmp_path_factory):
    """A run with known truths: 40 queries of up to 13 wordings; a zero, an unusable, an unknown."""
    folder = tmp_path_factory.mktemp("runs")
    truth, y, stderr, _, mask = simulate(0)
    rows, lines = [], []
    for q, m in np.argwhere(mask):
        kind = NAMES[0] if m == 0 else NAMES[1 + m % 2]
        id = f"b{q}" if m == 0 else f"b{q}/{kind}-{m}"
        lines.append({"id": id, "base": f"b{q}", "kind": kind, "prompt": f"text {q} {m}"})
        value, wide = 10 ** y[q, m], 10 ** (norm.ppf(0.975) * stderr[q, m])
        rows.append({
            "query_id": id, "query": f"text {q} {m}", "value": value, "lower": value / wide,
            "upper": value * wide, "upper_certificate": np.inf,
            "verdict": "doubtful" if m == 12 else "ok", "why": "Fine.",
        })  # fmt: skip
    for row, changes in zip(
        rows[1:5],
        (
            {"value": 0.0, "lower": 0.0, "upper": np.inf, "upper_certificate": 1e-9},
            {"value": 0.0, "lower": 0.0, "upper": np.inf},
            {"verdict": "unusable", "why": "Bad."},
            {"lower": 0.0},
        ),
        strict=True,
    ):  # fmt: skip
        row.update(changes)
    for name, metadata in (("own", ("base", "kind")), ("bare", ())):
        run = folder / name
        run.mkdir()
        queries = [
            {"id": line["id"], "content": line["prompt"],
             "metadata": {key: line[key] for key in metadata}} for line in lines
        ]  # fmt: skip
        write_study(run, queries)
        pq.write_table(pa.Table.from_pylist(rows), run / "estimates.parquet")
    (folder / "groups.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder, truth, mask


def output(capsys, *words):
    capsys.readouterr()
    main([str(word) for word in words])
    said = capsys.readouterr()
    assert not said.err
    return said.out


def test_the_document_has_the_truth_and_an_account_of_all(world_of_runs, capsys):
    folder, truth, mask = world_of_runs
    found = json.loads(output(capsys, "sensitivity", folder / "own", "--json"))
    first, rows = found["queries"][0], found["variants"]
    assert (first["variants"], first["zero"], first["left_out"]) == (mask[0].sum(), 1, 3)
    assert [row["status"] for row in rows[1:5]] == ["zero", *["left out"] * 3]
    assert rows[1]["upper"] == 1e-9 and "No hit" in rows[2]["why"] and rows[3]["why"] == "Bad."
    assert "standard error is unknown" in rows[4]["why"]
    assert first["range"] > 4 and sum(row["zero"] for row in found["queries"]) == 1
    assert found["pooled"]["lower"] < 0.5 < found["pooled"]["upper"]
    inside = [np.ptp(truth[q, mask[q]]) for q in range(1, 40)]
    held = [row["range_lower"] <= width <= row["range_upper"]
            for row, width in zip(found["queries"][1:], inside, strict=True)]  # fmt: skip
    assert sum(held) >= 33  # P(fewer) < 1e-3 at 95%
    doubtful = sum(row["doubtful"] for row in found["queries"])
    assert doubtful == mask[:, 12].sum() and found["pooled_ok"]["count"] == (
        found["pooled"]["count"] - doubtful
    )
    parts = found["parts"]
    assert parts["queries"]["lower"] < 1 < parts["queries"]["upper"]
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    kinds = {row["kind"]: row for row in found["kinds"]}
    assert kinds["case"]["shift_lower"] < 0 < kinds["case"]["shift_upper"]
    assert kinds["original"]["sd"] is None


def test_groups_come_from_a_file_too(world_of_runs, capsys):
    folder, *_ = world_of_runs
    words = ("sensitivity", folder / "bare", f"--perturbations={folder / 'groups.jsonl'}", "--json")
    own = json.loads(output(capsys, "sensitivity", folder / "own", "--json"))
    assert json.loads(output(capsys, *words)) == {**own, "name": "bare"}


def test_tables_rank_queries_and_pictures_are_written(world_of_runs, capsys, tmp_path, monkeypatch):
    folder, *_ = world_of_runs
    monkeypatch.setenv("COLUMNS", "200")
    shown = output(capsys, "sensitivity", folder / "own", "--top=3", "--by-kind",
                   f"--out={tmp_path / 'a.svg'}")  # fmt: skip
    found = json.loads(output(capsys, "sensitivity", folder / "own", "--json",
                              f"--out={tmp_path / 'a.png'}"))  # fmt: skip
    ranked = sorted(found["queries"], key=lambda row: -row["sd"])
    places = [shown.index(row["query"]) for row in ranked[:3]]
    assert places == sorted(places) and ranked[3]["query"] not in shown
    wanted = ("37 more queries", "1 zero, 2 out", "shift from original", "Doubtful: ",
              "Without a hit: 1;", "Left out: 3;", "between base queries")  # fmt: skip
    assert all(words in shown for words in wanted)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_bad_input_is_one_clear_line(world_of_runs, capsys, tmp_path):
    folder, *_ = world_of_runs
    groups = (folder / "groups.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(groups.replace("text 3 0", "else"))
    (tmp_path / "none.jsonl").write_text('{"prompt": "x", "variants": ["y"]}')
    run = ["sensitivity", folder / "bare"]
    assert "give --perturbations FILE" in refused(run, capsys)
    other = [*run, "--perturbations", tmp_path / "other.jsonl"]
    assert "'b3'" in (said := refused(other, capsys)) and "another text" in said
    assert "none of the 2 variants" in refused(
        [*run, "--perturbations", tmp_path / "none.jsonl"], capsys
    )
    assert "must end in .png or .svg" in refused([*run, "--out", "a.pdf"], capsys)
    assert "is no run" in refused(["sensitivity", tmp_path], capsys)
    assert "--queries is needed" in refused(["perturb", "--out", tmp_path / "v"], capsys)
    assert "--out is needed" in refused(["perturb", "--queries", "organism"], capsys)
    asked = ["perturb", "--queries", tmp_path / "none.jsonl", "--out", tmp_path / "v"]
    assert "is for --served" in refused([*asked, "--base-url", "http://localhost:1/v1"], capsys)
    assert "kind 'x' is unknown" in refused([*asked, "--kinds", "x"], capsys)
    assert not (tmp_path / "v").exists()


def test_perturb_writes_a_query_file_and_says_what_it_lacks(capsys, tmp_path):
    out = tmp_path / "v.jsonl"
    said = output(capsys, "perturb", "--queries=organism", "--first=2", f"--out={out}",
                  "--kinds", "organism", "case", "--variants=25")  # fmt: skip
    assert "40 prompts (2 original, 38 organism, 0 case)" in said
    assert "With fewer than 25 variants: 2 queries, by 12 in all: forbidden-00 by 6" in said
    assert "of kind case, whose words the organism doesn't know" in said
    first = out.read_bytes()
    output(capsys, "perturb", "--queries=organism", "--first=2", f"--out={out}",
           "--kinds", "organism", "case", "--variants=25")  # fmt: skip
    assert out.read_bytes() == first and len(read_queries(out).queries) == 40
    again = tmp_path / "w.jsonl"
    output(capsys, "perturb", f"--from={out}", "--exclude=forbidden-01", f"--out={again}")
    assert len(read_queries(again).queries) == 20


def test_served_paraphrases_are_asked_once_and_silence_is_counted(capsys, tmp_path, monkeypatch):
    asked = []

    def ask(server, prompts, settings, keep):
        asked.extend(prompts)
        assert server.model == "m" and settings == {"temperature": 0.5, "max_tokens": 4096}
        for i, prompt in enumerate(prompts):
            good = "bake a cake" in prompt
            keep(i, Answer('Here: ["Cake, how?", "Cake, how?", " Baking? "]' if good else "No."))

    monkeypatch.setattr(served.client, "ask", ask)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    queries, out = tmp_path / "q.jsonl", tmp_path / "v.jsonl"
    queries.write_text('{"prompt": "how to bake a cake"}\n{"prompt": "be kind"}')
    words = ("perturb", f"--queries={queries}", f"--out={out}", "--served=m", "--variants=3",
             "--request", "temperature=0.5", f"--cache={tmp_path / 'cache'}")  # fmt: skip
    said = output(capsys, *words)
    assert "4 prompts (2 original, 2 served)" in said and "With fewer than 3 variants: 2" in said
    assert "Without a served paraphrase: 1 (q1): the answer is no JSON list" in said
    texts = [query.text for query in read_queries(out).queries]
    assert texts == ["how to bake a cake", "Cake, how?", "Baking?", "be kind"]
    output(capsys, *words)
    assert len(asked) == 3 and "be kind" in asked[2]  # the good answer was kept


@pytest.fixture(scope="module")
def served_at():
    """A server that was there before the test's output was captured: it keeps that stream."""
    with running() as found:
        yield found


def test_a_server_is_named_by_the_options_it_was_given_by(served_at, capsys, tmp_path, monkeypatch):
    server, url = served_at
    queries, out = tmp_path / "q.jsonl", tmp_path / "v.jsonl"
    queries.write_text('{"prompt": "be kind"}')
    words = ["perturb", f"--queries={queries}", f"--out={out}", "--key-env=MINE",
             f"--base-url={url}", f"--cache={tmp_path / 'cache'}"]  # fmt: skip
    assert "MINE isn't set" in refused([*words, f"--served={MODEL}"], capsys)
    monkeypatch.setenv("MINE", KEY)
    said = refused([*words, "--served=other"], capsys)
    assert "paraphrase server" in said and "check --served and --base-url" in said
    server.faults[None] = ["length"]
    said = output(capsys, *words, f"--served={MODEL}", "--variants=2")
    assert "answer was cut at its longest; see --request max_tokens=N" in said
    assert "0 served" in said and out.exists()


@pytest.mark.slow
def test_the_organisms_sensitivity_is_its_exact_one(capsys, tmp_path):
    """Drawn, estimated and compared: true spread and range of two groups, by enumeration."""
    organism = load_organism()
    path, run = tmp_path / "v.jsonl", tmp_path / "run"
    output(capsys, "perturb", "--queries=organism", "--exclude", "forbidden-01", "forbidden-02",
           "--first=2", "--variants=9", f"--out={path}")  # fmt: skip
    output(capsys, "estimate", "--model=organism", f"--queries={path}", "--samples=400", "--quiet",
           "--proposal=0.1*target + 0.7*ablation:refusal:0.1@2.5 + 0.2*checkpoint:unsafe",
           f"--out={run}")  # fmt: skip
    found = json.loads(output(capsys, "sensitivity", run, "--json"))
    risks: dict[str, list[float]] = {}
    for query in read_queries(path).queries:
        exact = enumerate_event(
            policy_next_log_probs(organism.target, query.text), world.harm_event(query.text),
            end_tokens=organism.target.model.config.end_ids, max_new_tokens=24, rel_tol=0.05,
            max_nodes=3000,
        )  # fmt: skip
        risks.setdefault(query.metadata["base"], []).append(np.log10(exact.lower))
    for row in found["queries"]:
        truth = np.asarray(risks[row["base"]])
        assert row["sd_lower"] < truth.std(ddof=1) < row["sd_upper"]
        assert row["range_lower"] - 0.1 < np.ptp(truth) < row["range_upper"] + 0.1
