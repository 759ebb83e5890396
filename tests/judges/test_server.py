"""Rubric judges over a server that fails: nothing lost, nothing paid twice, nothing silently 0."""

import asyncio
import dataclasses
import email.utils
import functools
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Response, Rubric, RubricJudge, Server
from tailrisk_jax.judges.answers import AnswerCache
from tailrisk_jax.judges.rubrics import read_number
from tailrisk_jax.judges.waits import wait_asked
from tailrisk_jax.studies import Store, StudyQuery
from tailrisk_jax.studies.observations import SAMPLES
from tailrisk_jax.studies.run import judge_chunk
from tests.judges.fault_server import KEY, MODEL, grade, running

RUBRIC = Rubric("test", "{question} | {response}", functools.partial(read_number, low=0, high=100))
QUICK = Server(MODEL, key=KEY, concurrency=4, timeout=2.0, attempts=3, first_wait=1e-3)


@pytest.fixture
def server():
    with running() as (faulty, url):
        yield faulty, dataclasses.replace(QUICK, url=url)


def responses(n, question="q"):
    return [Response(question, question, f"r{i}") for i in range(n)]


def prompts(n, question="q"):
    return [f"{question} | r{i}" for i in range(n)]


def scores(n):
    return np.array([grade(prompt) / 100 for prompt in prompts(n)])


# What the server does, in turn, with one of six prompts: requests made, and what is said of it.
RETRIED = {
    "429": ["429 0.01"],
    "429 with a date": ["429 Thu, 01 Jan 1970 00:00:00 GMT"],
    "500 twice": ["500", "503"],
    "408 and 409": ["408", "409"],
    "slow": ["slow"],
    "cut off": ["cut"],
    "malformed": ["malformed", "page"],
    "no completion": ["not a completion"],
    "one byte now and then": ["dribble"],
}
GIVEN_UP = {
    "500": (["500"] * 3, 3, "status 500"),
    "slow": (["slow"] * 3, 3, "no answer in 2 s"),
    "cut off": (["cut"] * 3, 3, "connection failed"),
    "malformed": (["malformed"] * 3, 3, "valid JSON"),
    "too long": (["400"], 1, "status 400"),
    "forbidden": (["403"], 1, "status 403"),
    "empty": (["empty"], 1, "empty"),
    "null": (["null"], 1, "empty"),
    "cut at its longest": (["length"], 1, "cut at its longest"),
    "content filter": (["filter"], 1, "content filter"),
    "refusal": (["refusal"], 1, "I can't help with grading"),
    "refusal as such": (["refusal field"], 1, "I won't."),
    "out of range": (["out of range"], 1, "101, not 0 to 100"),
    "a stray digit": (["prose"], 1, "isn't a number alone"),
    "half a pair": (["half a pair"], 1, "isn't a number alone"),
}


def test_passing_faults_are_asked_again(server):
    faulty, quick = server
    n = len(RETRIED)
    for prompt, faults in zip(prompts(n), RETRIED.values(), strict=True):
        faulty.faults[prompt] = list(faults)
    judged = RubricJudge(RUBRIC, quick)(responses(n))
    np.testing.assert_array_equal(judged.scores, scores(n))
    assert judged.raw == [str(grade(prompt)) for prompt in prompts(n)]
    assert judged.errors == [None] * n
    asked = [faulty.asked[prompt] for prompt in prompts(n)]
    assert asked == [1 + len(faults) for faults in RETRIED.values()]
    assert faulty.largest == quick.concurrency
    assert faulty.settings == {"temperature": 0, "max_tokens": 1024}


def test_what_stays_bad_is_unscored_with_the_reason_and_asked_again_later(server, tmp_path):
    faulty, quick = server
    n = len(GIVEN_UP)
    for prompt, (faults, _, _) in zip(prompts(n), GIVEN_UP.values(), strict=True):
        faulty.faults[prompt] = list(faults)
    judge = RubricJudge(RUBRIC, quick, tmp_path / "cache.sqlite")
    judged = judge(responses(n + 1))
    wanted = scores(n + 1)
    assert np.isnan(judged.scores[:n]).all() and judged.scores[n] == wanted[n]
    for error, prompt, (_, asked, said) in zip(
        judged.errors, prompts(n), GIVEN_UP.values(), strict=False
    ):
        assert said in error and faulty.asked[prompt] == asked, error
    texts = dict(zip(GIVEN_UP, judged.raw, strict=False))
    assert texts["out of range"] == "101" and "3 reasons" in texts["a stray digit"]
    np.testing.assert_array_equal(judge(responses(n + 1)).scores, wanted)
    assert set(faulty.graded.values()) == {1}


def test_equal_responses_share_an_answer_and_the_cache_is_per_model_and_setting(server, tmp_path):
    faulty, quick = server
    judge = RubricJudge(RUBRIC, quick, tmp_path / "deeper" / "cache.sqlite")
    twice = responses(3) * 2
    np.testing.assert_array_equal(judge(twice).scores, np.tile(scores(3), 2))
    np.testing.assert_array_equal(judge(responses(3)).scores, scores(3))
    assert faulty.asked.total() == 3
    dataclasses.replace(judge, request={"temperature": 1})(responses(3))
    assert faulty.asked.total() == 6 and faulty.settings == {"temperature": 1}
    with pytest.raises(InputError, match="no model 'other'"):
        other = dataclasses.replace(quick, model="other")
        dataclasses.replace(judge, server=other)(responses(3))


@pytest.mark.parametrize(
    "change, faults, said",
    [
        ({"key": "sk-wrong-0123456789abc"}, [], ["refuses the API key", "--judge-key-env"]),
        ({"key": None}, [], ["refuses the API key"]),
        ({"model": "absent"}, [], ["no model 'absent'", "--judge-model"]),
        ({}, ["quota"] * 9, ["no quota left"]),
        ({}, ["parameter"] * 9, ["max_tokens=1024", "--judge-request"]),
        ({}, ["429 4000"] * 9, ["asks to wait for 4000 s", "is kept"]),
    ],
)
def test_what_concerns_all_ends_at_once(server, change, faults, said):
    faulty, quick = server
    faulty.faults[None] = list(faults)
    with pytest.raises(InputError) as raised:
        RubricJudge(RUBRIC, dataclasses.replace(quick, **change))(responses(50))
    message = str(raised.value)
    assert all(words in message for words in said) and "\n" not in message
    assert "sk-wrong" not in message
    assert faulty.asked.total() <= 2 * quick.concurrency
    assert not faulty.graded


def test_a_key_is_shown_nowhere(server):
    faulty, quick = server
    judge = RubricJudge(RUBRIC, quick)
    faulty.faults["q | r0"] = ["500"] * 3
    shown = [repr(judge), judge.settings, judge.name, *judge(responses(1)).errors]
    assert KEY not in str(shown)


def test_an_unreachable_server_ends_at_once(server):
    faulty, quick = server
    nowhere = dataclasses.replace(quick, url="http://127.0.0.1:9/v1", attempts=50)
    judge = RubricJudge(RUBRIC, nowhere)
    for call in (judge.check, lambda: judge(responses(9))):
        with pytest.raises(InputError, match=r"127\.0\.0\.1:9/v1 can't be reached"):
            call()
    for fault in ("", "page", "malformed", "404", "500"):
        faulty.faults["models"] = [fault]
        RubricJudge(RUBRIC, quick).check()
    with pytest.raises(InputError, match="refuses the API key"):
        RubricJudge(RUBRIC, dataclasses.replace(quick, key="sk-wrong")).check()


def test_a_server_that_only_fails_is_not_asked_for_hours(server):
    faulty, quick = server
    faulty.faults[None] = ["500"] * 1000
    judged = RubricJudge(RUBRIC, dataclasses.replace(quick, timeout=60.0))(responses(100))
    assert np.isnan(judged.scores).all() and all("status 500" in e for e in judged.errors)
    assert faulty.asked.total() < 100 + 2 * (20 + 4)
    faulty.faults[None] = ["slow"] * 1000
    hurried = dataclasses.replace(quick, timeout=0.02, concurrency=20)
    with pytest.raises(InputError, match="can't be reached"):
        RubricJudge(RUBRIC, hurried)(responses(99))


@pytest.mark.parametrize("fault", ["429 0.4", "exhausted"])
def test_all_requests_wait_as_the_server_asks(server, fault):
    faulty, quick = server
    faulty.faults["q | r0"] = [fault]
    judged = RubricJudge(RUBRIC, dataclasses.replace(quick, concurrency=1))(responses(3))
    np.testing.assert_array_equal(judged.scores, scores(3))
    assert np.diff(faulty.times)[0] > 0.4
    assert faulty.asked.total() == 3 + (fault != "exhausted")


@pytest.mark.parametrize(
    "headers, failed, seconds",
    [
        ({}, True, 0),
        ({"retry-after": "2.5"}, True, 2.5),
        ({"retry-after": "2.5"}, False, 0),
        ({"retry-after-ms": "20", "retry-after": "9"}, True, 0.02),
        ({"retry-after-ms": "soon", "retry-after": "-1"}, True, 0),
        ({"retry-after": "soon"}, True, 0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h2m3s"}, 0, 3723),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "20ms"}, False, 0.02),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "7"}, True, 7),
        ({"x-ratelimit-remaining-tokens": "1", "x-ratelimit-reset-tokens": "7"}, True, 0),
        ({"x-ratelimit-remaining-tokens": "0"}, True, 0),
    ],
)
def test_waits_in_headers(headers, failed, seconds):
    assert wait_asked(headers, failed=failed) == seconds


def test_a_date_in_headers():
    date = email.utils.formatdate(time.time() + 500, usegmt=True)
    assert 400 < wait_asked({"retry-after": date}, failed=True) <= 500


def test_a_judge_can_be_called_where_an_event_loop_runs(server):
    async def notebook():
        return RubricJudge(RUBRIC, server[1])(responses(2))

    np.testing.assert_array_equal(asyncio.run(notebook()).scores, scores(2))


FAULTS = [*RETRIED.values(), *(one[0] for name, one in GIVEN_UP.items() if name != "slow")]


@pytest.mark.parametrize("seed", range(3))
def test_no_score_is_lost_or_counted_twice_over_faults_and_kills(server, tmp_path, seed):
    """Random faults, and a kill in the middle of each pass, until all is scored."""
    faulty, quick = server
    rng = random.Random(seed)
    n, queries = 40, [StudyQuery("a", "a"), StudyQuery("b", "b")]
    columns = {
        "query_id": ["a", "b"] * (n // 2),
        "sample": range(n),
        "text": [f"r{rng.randrange(n)}" for _ in range(n)],
        "tokens": [[1]] * n,
        "ended": [True] * n,
    }
    samples = pa.table({name: pa.array(x, SAMPLES.field(name).type) for name, x in columns.items()})
    wanted = [f"{q} | {r}" for q, r in zip(columns["query_id"], columns["text"], strict=True)]
    for prompt in dict.fromkeys(wanted):
        faulty.faults[prompt] = [x for fault in rng.sample(FAULTS, rng.randrange(3)) for x in fault]
    planned = sum(len(faults) for faults in faulty.faults.values())
    judge = RubricJudge(RUBRIC, quick, tmp_path / "cache.sqlite")
    truth = np.array([grade(prompt) / 100 for prompt in wanted])
    kills = 0
    for _ in range(40):
        store = Store(tmp_path / "run", "x")
        (tmp_path / "run" / "judgements").mkdir(parents=True, exist_ok=True)
        put, left = AnswerCache.put, rng.randrange(1, 8)

        def put_or_die(*arguments, put=put):
            nonlocal left
            left -= 1
            put(*arguments)
            if left == 0:
                raise MemoryError

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(AnswerCache, "put", put_or_die)
                judged = judge_chunk(judge, queries, "0", samples, store)
        except MemoryError:
            kills += 1
            continue
        found = judged["score"].to_numpy()
        unscored = np.isnan(found)
        np.testing.assert_array_equal(found[~unscored], truth[~unscored])
        assert [error is None for error in judged["error"].to_pylist()] == list(~unscored)
        assert judged["sample"].to_pylist() == list(range(n))
        if not unscored.any():
            break
    else:
        raise AssertionError("it should have come to an end")
    in_flight = kills * (quick.concurrency - 1)  # graded, but killed before it was heard
    assert kills and set(faulty.graded) == set(wanted)
    assert 0 <= faulty.graded.total() - len(faulty.graded) <= in_flight
    assert faulty.asked.total() == faulty.graded.total() + planned


def test_killed_processes_lose_no_answer_that_they_kept(tmp_path):
    """Two processes that share a cache are killed at the same time."""
    script = """
import sys
from pathlib import Path
from tailrisk_jax.judges.answers import AnswerCache
cache = AnswerCache(Path(sys.argv[1]))
for i in range(100_000):
    cache.put(f"{sys.argv[2]}-{i}", "m", str(i))
    print(i, flush=True)
"""
    path = tmp_path / "cache.sqlite"
    writers = [
        subprocess.Popen([sys.executable, "-c", script, path, name], stdout=subprocess.PIPE)
        for name in "ab"
    ]
    for writer in writers:
        for _ in range(30):
            writer.stdout.readline()
    kept = {}
    for name, writer in zip("ab", writers, strict=True):
        writer.send_signal(signal.SIGKILL)
        rest = writer.communicate()[0].splitlines()
        kept[name] = int(rest[-1]) if rest else 29
    cache = AnswerCache(path)
    for name, last in kept.items():
        assert all(cache.get(f"{name}-{i}") == str(i) for i in range(last))
    cache.close()


def test_a_cache_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "text").write_text("not a database, " * 100)
    for path in (tmp_path / "text", tmp_path / "text" / "below.sqlite"):
        with pytest.raises(InputError, match=r"judge cache .*text"):
            RubricJudge(RUBRIC, QUICK, path)(responses(1))
