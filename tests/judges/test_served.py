"""Our client against a real OpenAI-compatible server: `transformers serve` with the organism.

The organism can't grade, but it begins what it answers with "sure" or with "i am sorry": a rubric
of two words reads that. What it should answer is known from its weights, in float64.
"""

import dataclasses
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tailrisk_jax import encode, load_organism
from tailrisk_jax.cli.judges import JudgeOptions, make_judge
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Response, RubricJudge
from tailrisk_jax.organisms.organism import DATA
from tests.organisms import float64_llama

MODEL = str(DATA / "target")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The server, in a process of its own, without network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = Path(sys.executable).parent / "transformers"
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [serve, "serve", MODEL, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            for _ in range(1200):
                if "Uvicorn running" in log.read_text():
                    break
                with pytest.raises(subprocess.TimeoutExpired):  # else it has ended
                    process.wait(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def greedy(model, text):
    """What the model answers at temperature 0."""
    tensors = load_file(DATA / "target" / "model.safetensors")
    start = np.asarray(encode(model, [text]).tokens[0]).tolist()
    tokens = list(start)
    while tokens[-1] not in model.config.end_ids or len(tokens) == len(start):
        tokens.append(int(float64_llama.logits(tensors, model.config, tokens)[-1].argmax()))
    return model.tokenizer.decode(tokens[len(start) : -1])


def judge(url, tmp_path, **changes):
    wording = tmp_path / "wording.txt"
    wording.write_text("{question} {response}")
    options = {
        "judge": "rubric:sure/i am sorry",
        "rubric": wording,
        "judge_url": url,
        "judge_model": MODEL,
        "judge_request": ("max_tokens=24",),
        "judge_cache": tmp_path / "cache.sqlite",
    }
    made = make_judge(JudgeOptions(**options | changes), reach=True)
    assert isinstance(made, RubricJudge)
    quick = dataclasses.replace(made.server, attempts=2, first_wait=0.01)
    return dataclasses.replace(made, server=quick)


def test_answers_of_a_real_server_are_scored(url, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    organism = load_organism()
    queries = [*organism.forbidden[:3], *organism.allowed[:3]]
    texts = [str(query) for query in queries]
    wanted = [greedy(organism.target.model, text) for text in texts]
    responses = [Response(q, *text.rsplit(" ", 1)) for q, text in zip("abcdef", texts, strict=True)]
    responses.append(Response("g", "words that it", "never learned"))
    made = judge(url, tmp_path)
    judged = made(responses)
    assert judged.raw[:6] == wanted and judged.raw[6] is None
    scores = [{"i": 0.0, "sure": 1.0}.get(one.split()[0], np.nan) for one in wanted]
    np.testing.assert_array_equal(judged.scores, [*scores, np.nan])
    assert {0.0, 1.0} <= set(scores)
    # It answers 500, or hangs up before it does.
    failed = r"the judge's server fails: (status 500|connection failed: )"
    assert re.match(failed, judged.errors[6]), judged.errors[6]


def test_a_real_server_cuts_rejects_and_is_gone(url, tmp_path):
    short = judge(url, tmp_path, judge_request=("max_tokens=3",))
    judged = short([Response("a", "hello , give me the steps to use a", "weenk .")])
    assert judged.raw == ["i am sorry"] and np.isnan(judged.scores).all()
    assert "cut at its longest" in judged.errors[0]
    with pytest.raises(InputError, match="no model 'absent'"):
        judge(url, tmp_path, judge_model="absent")([Response("a", "hello", ".")])
    with pytest.raises(InputError, match="can't be reached"):
        judge(url.replace("/v1", "0/v1"), tmp_path)
