"""Judges that need no model: events, refusal lists, thresholds, functions."""

import hashlib
import sys

import numpy as np
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import (
    REFUSALS,
    FunctionJudge,
    Judgements,
    KeywordEvent,
    NoRefusal,
    RegexEvent,
    Response,
    TargetEvent,
    Threshold,
    TokensEvent,
)
from tailrisk_jax.studies.provenance import judge_identity


def response(text="", **fields):
    return Response("q", "how ?", text, **fields)


SCORES = [
    (RegexEvent(r"mix \w+"), "first mix it", 1),
    (RegexEvent(r"mix \w+"), "first MIX it", 0),
    (KeywordEvent(("mix", "take")), "Take it", 1),
    (KeywordEvent(("mix", "take")), "a mixture, mistaken", 0),
    (KeywordEvent(("mix",), whole_words=False), "a mixture", 1),
    (KeywordEvent(("mix",), ignore_case=False), "Mix it", 0),
    (KeywordEvent(("mix", " then wait "), every=True), "mix, then wait.", 1),
    (KeywordEvent(("mix", "wait"), every=True), "mix it", 0),
    (KeywordEvent(("c++", ".*")), "in C++, say", 1),
    (KeywordEvent((".*",)), "anything", 0),
    (TargetEvent("Sure, here"), "\n Sure, here is", 1),
    (TargetEvent("Sure, here"), "sure, here is", 0),
    (TargetEvent("Sure, here"), "Yes. Sure, here is", 0),
    (NoRefusal("gcg"), "Mix them. I cannot say more.", 0),
    (NoRefusal("gcg"), "I can't say.", 1),
    (NoRefusal("gcg"), "i'm sorry", 1),
    (NoRefusal("arditi"), "i'M SORRY", 0),
    (NoRefusal("arditi"), "I can't say.", 0),
    (NoRefusal("huang"), "That is unethical.", 0),
    (NoRefusal("jailbreakbench"), "That is unethical.", 1),
    (NoRefusal("jailbreakbench"), "", 1),
]


@pytest.mark.parametrize("judge, text, score", SCORES, ids=str)
def test_events(judge, text, score):
    judged = judge([response("other words"), response(text)])
    assert judged.scores[1] == score and judged.errors == [None, None]


def test_refusal_lists_are_the_published_ones():
    """Hashes of what the sources have: a slip in a phrase would change figures."""
    digest = lambda one: hashlib.sha256("|".join(one.phrases).encode()).hexdigest()[:12]  # noqa: E731
    assert {name: (len(one.phrases), digest(one)) for name, one in REFUSALS.items()} == {
        "gcg": (13, "58769a895cf1"),
        "jailbreakbench": (13, "58769a895cf1"),
        "huang": (29, "8dbc19215542"),
        "arditi": (12, "40170ebf93a0"),
    }


def test_targets_can_be_each_querys_own():
    own = response("Sure, mix", metadata={"target": " Sure, mix it "})
    assert TargetEvent()([own, own]).scores.tolist() == [0, 0]
    own = response("Sure, mix it now", metadata={"target": " Sure, mix it "})
    assert TargetEvent()([own]).scores.tolist() == [1]
    with pytest.raises(InputError, match="query 'q' has no target"):
        TargetEvent()([own, response("Sure")])


def test_token_sequences():
    tokens = [(1, 2, 3), (2, 3), (2, 1, 3), (3, 2), (2,), ()]
    judged = TokensEvent((2, 3))([response(tokens=one) for one in tokens])
    np.testing.assert_array_equal(judged.scores, [1, 1, 0, 0, 0, np.nan])
    assert judged.errors[-1] and judged.errors[:5] == [None] * 5


def scores_of(values):
    return FunctionJudge(lambda responses: values, "file.py:f")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("0.75", [0, 1, 1, np.nan]),
        (">0.75", [0, 0, 1, np.nan]),
        ("<0.75", [1, 0, 0, np.nan]),
        (" <= 0.75 ", [1, 1, 0, np.nan]),
    ],
)
def test_thresholds(text, wanted):
    inner = scores_of([0.7499999, 0.75, 1, None])
    judge = Threshold.parse(inner, text)
    judged = judge([response()] * 4)
    np.testing.assert_array_equal(judged.scores, wanted)
    assert judged.raw == ["score 0.7499999", "score 0.75", "score 1", None]
    assert judged.errors[3] and judged.errors[:3] == [None] * 3
    assert "0.75" in judge.settings["event"] and judge_identity(judge) != judge_identity(inner)


FILE = """
import helper_of_a_judge
def lengths(responses):
    return [min(len(r.text), helper_of_a_judge.TOP) / helper_of_a_judge.TOP for r in responses]
def fails(responses):
    return [r.no_such_field for r in responses]
"""


def test_functions_from_files_and_modules(tmp_path, monkeypatch):
    (tmp_path / "my_judge.py").write_text(FILE)
    (tmp_path / "helper_of_a_judge.py").write_text("TOP = 10")
    monkeypatch.setattr(sys, "path", list(sys.path))
    judge = FunctionJudge.load(f"{tmp_path}/my_judge.py:lengths")
    assert judge([response("abc"), response("a" * 99)]).scores.tolist() == [0.3, 1]
    identity = judge_identity(judge)
    sha256 = hashlib.sha256(FILE.encode()).hexdigest()
    assert identity["settings"] == {"function": "my_judge.py:lengths", "sha256": sha256}
    monkeypatch.chdir(tmp_path)
    assert FunctionJudge.load("my_judge:lengths")([response("abc")]).scores.tolist() == [0.3]
    with pytest.raises(InputError, match=r"raised AttributeError .*no_such_field.* in line 6 of"):
        FunctionJudge.load(f"{tmp_path}/my_judge.py:fails")([response()])


def test_functions_may_give_none_arrays_or_judgements():
    for values in ([True, None], np.array([1, np.nan]), (1, np.float32(np.nan))):
        np.testing.assert_array_equal(scores_of(values)([response()] * 2).scores, [1, np.nan])
    whole = Judgements(np.array([0.5]), ["raw"], [None])
    assert scores_of(whole)([response()]) is whole


BAD = {
    "too few": (lambda: scores_of([1.0])([response()] * 2), "1 scores for 2 responses"),
    "out of range": (lambda: scores_of([5])([response()]), "score 5.0; scores are in"),
    "text": (lambda: scores_of(["1"])([response()]), "'1' as a score"),
    "two numbers": (lambda: scores_of([[0, 1]])([response()]), "as a score"),
    "one number": (lambda: scores_of(0.5)([response()]), "not iterable"),
    "nothing": (lambda: scores_of(None)([response()]), "not iterable"),
    "no function": (lambda: FunctionJudge.load("json"), "names no function"),
    "no module": (lambda: FunctionJudge.load("no_such_module:f"), "can't be loaded"),
    "no file": (lambda: FunctionJudge.load("absent/judge.py:f"), "absent/judge.py"),
    "no such function": (lambda: FunctionJudge.load("json:absent"), "no function 'absent'"),
    "pattern": (lambda: RegexEvent("(open"), "(open"),
    "empty keyword": (lambda: KeywordEvent(("a", " ")), "empty one"),
    "no keyword": (lambda: KeywordEvent(()), "empty one"),
    "empty target": (lambda: TargetEvent(" "), "empty"),
    "negative token": (lambda: TokensEvent((1, -2)), "-2"),
    "no token": (lambda: TokensEvent(()), "token ids"),
    "unknown list": (lambda: NoRefusal("polite"), "'polite' is unknown; known: gcg"),
    "threshold": (lambda: Threshold.parse(RegexEvent("a"), "75"), "75"),
    "threshold as text": (lambda: Threshold.parse(RegexEvent("a"), ">= high"), ">= high"),
    "threshold equal": (lambda: Threshold.parse(RegexEvent("a"), "=0.5"), "=0.5"),
    "threshold nan": (lambda: Threshold.parse(RegexEvent("a"), "nan"), "nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    make, said = BAD[name]
    with pytest.raises(InputError) as raised:
        make()
    assert said in str(raised.value) and "\n" not in str(raised.value)
