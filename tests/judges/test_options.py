"""Judges as a user names them: the grammar of --judge, and a run whose judge is served."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tailrisk_jax import load_organism
from tailrisk_jax.cli import main
from tailrisk_jax.cli.judges import JudgeOptions, make_judge
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import (
    FunctionJudge,
    KeywordEvent,
    NoRefusal,
    RegexEvent,
    RubricJudge,
    TargetEvent,
    TokensEvent,
)
from tailrisk_jax.studies import StudyQuery
from tests.judges.fault_server import KEY, MODEL, grade, running

SERVED = {"judge_model": "m", "judge_url": "http://127.0.0.1:9/v1"}
URL = SERVED["judge_url"]


@pytest.mark.parametrize(
    "spec, wanted",
    [
        ("regex:a:b|c", RegexEvent("a:b|c")),
        ("keywords:mix it,take", KeywordEvent(("mix it", "take"))),
        ("all-keywords:mix,take", KeywordEvent(("mix", "take"), every=True)),
        ("no-refusal:arditi", NoRefusal("arditi")),
        ("target:Sure: here", TargetEvent("Sure: here")),
        ("target", TargetEvent(None)),
        ("tokens:17, 4", TokensEvent((17, 4))),
    ],
)
def test_events_by_name(spec, wanted):
    assert make_judge(JudgeOptions(judge=spec)) == wanted


def test_the_rest_by_name(tmp_path, monkeypatch):
    assert make_judge(JudgeOptions()) is None
    assert make_judge(JudgeOptions(event="a")) == RegexEvent("a")
    assert isinstance(make_judge(JudgeOptions(judge="python:json:dumps")), FunctionJudge)
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trait = {"questions": ["how ?"], "eval_prompt": "{question} {answer}"}
    (tmp_path / "kind.json").write_text(json.dumps(trait))
    options = JudgeOptions(
        judge="rubric:trait", rubric=tmp_path / "kind.json", judge_model="m",
        judge_key_env="MY_KEY", judge_request=("temperature=", "max_tokens=8", "service_tier=flex"),
        judge_concurrency=3, judge_timeout=2.5, threshold="0.5",
    )  # fmt: skip
    judge = make_judge(options)
    inner = judge.judge
    assert isinstance(inner, RubricJudge) and inner.server.key == KEY
    assert (inner.server.concurrency, inner.server.timeout) == (3, 2.5)
    assert inner.cache == tmp_path / "tailrisk_jax" / "judge_answers.sqlite"
    assert inner.rubric.prompt("q", "a") == "q a"
    assert judge.settings == {
        "model": "m", "max_tokens": 8, "service_tier": "flex", "event": "score >= 0.5",
        "wording": inner.rubric.settings["wording"],
    }  # fmt: skip
    changed = {"judge_url": URL, "judge_concurrency": 9, "judge_timeout": 1.0}
    for name, value in changed.items():
        other = make_judge(JudgeOptions(**{**vars(options), name: value}))
        assert (other.name, other.version, other.settings) == (
            judge.name, judge.version, judge.settings,
        )  # fmt: skip


BAD = {
    "unknown judge": ({"judge": "oracle:x"}, "'oracle:x' is unknown; known: regex:PATTERN"),
    "both": ({"judge": "regex:a", "event": "b"}, "both given"),
    "tokens": ({"judge": "tokens:a"}, "'a' must be token ids"),
    "python": ({"judge": "python:f"}, "python:f names no function"),
    "unknown rubric": ({"judge": "rubric:strict", **SERVED}, "rubric 'strict' is unknown"),
    "no model": ({"judge": "rubric:coherence"}, "--judge-model is needed"),
    "no key": ({"judge": "rubric:coherence", "judge_model": "m"}, "OPENAI_API_KEY isn't set"),
    "no such key": (
        {"judge": "rubric:coherence", "judge_key_env": "MY_KEY", **SERVED},
        "MY_KEY isn't set",
    ),
    "no wording": ({"judge": "rubric:trait", **SERVED}, "--rubric FILE"),
    "wording absent": (
        {"judge": "rubric:1-5", "rubric": Path("absent.txt"), **SERVED},
        "absent.txt",
    ),
    "url": ({"judge": "rubric:coherence", "judge_model": "m", "judge_url": "here"}, "'here'"),
    "password": (
        {"judge": "rubric:coherence", "judge_model": "m", "judge_url": "http://me:pw@here/v1"},
        "holds a password",
    ),
    "request": ({"judge": "rubric:coherence", "judge_request": ("hot",), **SERVED}, "'hot'"),
    "own model": ({"judge": "rubric:coherence", "judge_request": ("n=2",), **SERVED}, "'n=2'"),
    "concurrency": ({"judge": "rubric:coherence", "judge_concurrency": 0, **SERVED}, "=0"),
    "timeout": ({"judge": "rubric:coherence", "judge_timeout": -1.0, **SERVED}, "=-1.0"),
    "unreachable": ({"judge": "rubric:coherence", **SERVED}, "127.0.0.1:9/v1 can't be reached"),
    "threshold alone": ({"threshold": "0.5"}, "needs a --judge"),
    "threshold": ({"event": "a", "threshold": "2"}, "[0, 1]"),
    "served option": ({"judge": "regex:a", "judge_url": URL}, "--judge-url is for"),
    "no target": ({"judge": "target"}, "query 'q' has no target"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_clear_line(name, monkeypatch):
    options, said = BAD[name]
    for variable in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "MY_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError) as raised:
        make_judge(JudgeOptions(**options), [StudyQuery("q", "how ?")], reach=True)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert "pw" not in str(raised.value)


def test_a_run_with_a_served_judge_resumes_and_is_judged_anew_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    query = {"id": "one", "prompt": str(load_organism().forbidden[0])}
    (tmp_path / "queries.jsonl").write_text(json.dumps(query))
    (tmp_path / "wording.txt").write_text("{question} | {response}")
    out, cache = tmp_path / "run", tmp_path / "cache.sqlite"
    with running() as (faulty, url):
        judging = [
            "--judge", "rubric:0-100", "--rubric", f"{tmp_path}/wording.txt", "--judge-url", url,
            "--judge-model", MODEL, "--judge-key-env", "MY_KEY", "--judge-cache", str(cache),
            "--quiet",
        ]  # fmt: skip
        faulty.faults[None] = ["prose"]
        main(
            ["estimate", "--model", "organism", "--proposal", "target@2.5", "--samples", "24",
             "--max-new-tokens", "12", "--queries", f"{tmp_path}/queries.jsonl",
             "--out", str(out), "--threshold", "0.5", *judging]
        )  # fmt: skip
        table = pq.read_table(out / "samples.parquet").to_pydict()
        errors = [error for error in table["error"] if error]
        assert errors and all("isn't a number alone" in error for error in errors)
        main(["resume", str(out), "--quiet"])
        table = pq.read_table(out / "samples.parquet").to_pydict()
        grades = [grade(f"{query['prompt']} | {text}") for text in table["text"]]
        assert table["score"] == [float(n >= 50) for n in grades]
        assert table["raw"] == [str(n) for n in grades]
        assert set(faulty.graded.values()) == {1}
        asked = faulty.asked.total()
        main(["judge", str(out), "--out", f"{tmp_path}/again", "--threshold", "<0.3", *judging])
        again = pq.read_table(tmp_path / "again" / "samples.parquet").to_pydict()
        assert again["score"] == [float(n < 30) for n in grades]
        assert faulty.asked.total() == asked
    summary = json.loads((out / "summary.json").read_text())
    assert "rubric:0-100" in summary["estimand"] and "score >= 0.5" in summary["estimand"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)
