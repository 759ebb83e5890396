"""`tailrisk report` on folders as users have them."""

import json

import pyarrow.parquet as pq
import pytest

from tailrisk_jax.cli import main


@pytest.fixture
def folder(run, tmp_path):
    """The synthetic run, as a folder."""
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps({"format": 1, **run.study}))
    (folder / "summary.json").write_text(json.dumps(run.summary))
    (folder / "sessions.jsonl").write_bytes(b'{"started": "2026", "note": "\xff<b>"}\n')
    pq.write_table(run.estimates, folder / "estimates.parquet")
    pq.write_table(run.samples, folder / "samples.parquet")
    return folder


def said(capsys, *arguments) -> str:
    """The one line of a command that refuses."""
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, arguments)])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("tailrisk: ") and line.count("\n") == 1
    return line


def test_a_page_is_written_with_a_baseline(run, folder, tmp_path, capsys):
    queries = run.estimates["query"].to_pylist()[1:]
    draws = {"response": [""] * 4, "score": [0, 1, 1, 0.8]}
    lines = [json.dumps({"forbidden_prompt": text, **draws}) for text in queries]
    baseline = tmp_path / "baseline.jsonl"
    baseline.write_text("\n".join(lines))
    main(["report", str(folder), "--baseline", str(baseline), "--threshold", "0.75"])
    assert capsys.readouterr().out == f"Written to {folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    assert "<bdi>first</bdi>" in page and r"\xff&lt;b&gt;" in page
    assert "<dt>queries with both</dt><dd>5 of 6</dd>" in page
    assert page.count("7.5e-01<small>") == page.count("<small>4 draws") == 5
    assert "baseline.jsonl, P(score &gt;= 0.75)" in page


def test_bad_input_is_one_line_and_nothing_is_written(folder, tmp_path, capsys):
    before = sorted(folder.iterdir())
    other = tmp_path / "other.jsonl"
    other.write_text('{"forbidden_prompt": "else", "response": ["a"], "score": [1]}\n')
    (tmp_path / "file").touch()
    assert "no run" in said(capsys, tmp_path)
    assert "no study.json" in said(capsys, tmp_path / "nowhere")
    assert "is a folder" in said(capsys, folder, "--out", tmp_path)
    assert "can't be written" in said(capsys, folder, "--out", tmp_path / "file" / "page.html")
    assert "none of the queries" in said(capsys, folder, "--baseline", other)
    assert "can't be read" in said(capsys, folder, "--baseline", tmp_path / "absent.jsonl")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("estimates.parquet", None, "tailrisk resume"),
        ("summary.json", None, "tailrisk resume"),
        ("samples.parquet", None, "tailrisk resume"),
        ("estimates.parquet", b"PAR1", "tailrisk estimate"),
        ("summary.json", b"{}", "another version"),
        ("study.json", b"{}", "is not of a run"),
    ],
)
def test_an_unfinished_or_damaged_run_is_named(folder, capsys, name, content, wanted):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    line = said(capsys, folder)
    assert wanted in line and folder.name in line
    assert not (folder / "report.html").exists()
