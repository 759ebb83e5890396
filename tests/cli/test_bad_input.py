"""Whatever is wrong with what a user gives is one clear line, exit code 2, and nothing written."""

import http.server
import json
import shutil
import socket
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tailrisk_jax.cli import main
from tests.oracles import tiny_config, unit_vector
from tests.studies.runs import command_for, contents, refused, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    main(command_for(tiny, out))
    return out


def fill(value, places):
    return value.format(**places) if isinstance(value, str) else value


def assert_refused(argv, said, capsys, *folders):
    """One line that says all of `said`; no file of the folders is new or changed."""
    before = [contents(folder, "**/*") for folder in folders]
    line = refused(argv, capsys)
    assert all(words in line for words in said), line
    assert not line.endswith(" ") and "Traceback" not in line
    assert [contents(folder, "**/*") for folder in folders] == before


# Changes to the options of `tailrisk estimate`, and what is said of them.
OPTIONS = {
    "no such model": (dict(model="nowhere/at/all"), ["'nowhere/at/all'", "neither a folder"]),
    "not on the hub": (dict(model="nobody/nothing"), ["'nobody/nothing'", "hub", "check the name"]),
    "model is a file": (dict(model="{tiny}/queries.jsonl"), ["neither a folder"]),
    "no model": (dict(model=None), ["--model is needed"]),
    "no proposal": (dict(proposal=None), ["--proposal is needed"]),
    "no output": (dict(out=None), ["--out is needed"]),
    "no queries": (dict(queries=None), ["--queries is needed"]),
    "no judge": (dict(event=None), ["--judge or --event is needed"]),
    "unknown proposal": (dict(proposal="jailbreak"), ["'jailbreak'", "ablation"]),
    "no such direction": (dict(proposal="ablation:absent.npy:1"), ["'absent.npy'", "check"]),
    "wrong width": (dict(proposal="ablation:{tmp}/narrow.npy:1"), ["[7]", "[8]"]),
    "broken direction": (dict(proposal="ablation:{tmp}/broken.npy:1"), ["can't be read"]),
    "bad intensity": (dict(proposal="ablation:{tmp}/vector.npy:x"), ["intensity 'x'"]),
    "layer out of range": (dict(proposal="addition:{tmp}/vector.npy:9:1"), ["9", "layer"]),
    "layer no number": (dict(proposal="addition:{tmp}/vector.npy:0.5:1"), ["layer 0.5"]),
    "weights": (dict(proposal="0.5*target + 0.4*target@2"), ["sum to 1"]),
    "no weight": (dict(proposal="target + target@2"), ["a weight before each"]),
    "negative weight": (dict(proposal="1.5*target + -0.5*target@2"), ["-0.5"]),
    "cold proposal": (dict(proposal="target@0"), ["temperature"]),
    "another vocabulary": (dict(proposal="checkpoint:{tmp}/words"), ["vocab_size"]),
    "no samples": (dict(samples=0), ["num_samples=0"]),
    "negative samples": (dict(samples=-5), ["num_samples=-5"]),
    "samples no number": (dict(samples="many"), ["--samples", "'many'", "estimate --help"]),
    "negative tokens": (dict(max_new_tokens=-1), ["max_new_tokens=-1"]),
    "no room": (dict(max_new_tokens=60), ["query 'cake'", "60", "64 positions"]),
    "level": (dict(level=1.0), ["level=1.0", "0.95"]),
    "until": (dict(until="0.2"), ["'0.2'", "rel=0.2"]),
    "until what": (dict(until="rel=-1"), ["until=-1", "above 0"]),
    "max samples": (dict(until="rel=1", max_samples=5), ["max_samples=5"]),
    "allocation": (dict(allocation="fair"), ["'fair'", "'equal'", "'variance'"]),
    "replicates": (dict(replicates=0), ["replicates=0"]),
    "both": (dict(replicates=2, until="rel=1"), ["replicates=2", "one of the two"]),
    "temperature": (dict(temperature=0.0), ["temperature=0.0"]),
    "temperature no number": (dict(temperature="nan"), ["temperature=nan"]),
    "negative seed": (dict(seed=-1), ["seed=-1"]),
    "large seed": (dict(seed=2**32), [f"seed={2**32}"]),
    "chunks": (dict(chunk_size=0), ["chunk_size=0"]),
    "batch": (dict(batch_size=0), ["batch_size=0"]),
    "scored batch": (dict(score_batch_size=0), ["score_batch_size=0"]),
    "dtype": (dict(dtype="float8"), ["'float8'", "'bfloat16'"]),
    "processes": (dict(processes="two"), ["'two'", "HOST:PORT,INDEX/COUNT"]),
    "process of none": (dict(processes="127.0.0.1:1,2/2"), ["'127.0.0.1:1,2/2'"]),
    "event": (dict(event="(unclosed"), ["'(unclosed'", "regular expression"]),
    "unknown judge": (dict(event=None, judge="oracle:delphi"), ["oracle:delphi", "regex:"]),
    "two judges": (dict(judge="keywords:a"), ["--judge and --event"]),
    "unreachable server": (
        dict(event=None, judge="rubric:strongreject", judge_model="m", judge_url="{closed}"),
        ["{closed}"],
    ),
    "bad key": (
        dict(event=None, judge="rubric:strongreject", judge_model="m", judge_url="{strict}"),
        ["{strict}", "refuses the API key", "--judge-key-env"],
    ),
    "output in use": (dict(out="{tmp}/used"), ["used exists and is not empty"]),
    "output a file": (dict(out="{tmp}/used/precious.txt"), ["precious.txt exists"]),
    "output below a file": (dict(out="{tmp}/used/precious.txt/run"), ["can't be written"]),
    "output nowhere": (dict(out="/proc/run"), ["/proc/run can't be written"]),
    "output too long": (dict(out="{tmp}/" + "x" * 300), ["too long"]),
    "missing queries": (dict(queries="{tmp}/absent.jsonl"), ["absent.jsonl"]),
    "queries a folder": (dict(queries="{tiny}"), ["{tiny}", "can't be read"]),
    "cut off weights": (dict(model="{tmp}/cut off"), ["model.safetensors", "cut off"]),
    "half-downloaded": (dict(model="{tmp}/half"), ["model-00002-of-00002.safetensors"]),
    "no weights": (dict(model="{tmp}/no weights"), ["model.safetensors"]),
    "broken config": (dict(model="{tmp}/broken"), ["config.json", "JSON"]),
    "unsupported field": (dict(model="{tmp}/field"), ["attention_bias=True"]),
    "unsupported family": (dict(model="{tmp}/family"), ["mamba"]),
    "no tokenizer": (dict(model="{tmp}/no tokenizer"), ["tokenizer"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tiny, tmp_path_factory):
    """Files of every broken kind, and servers."""
    tmp = tmp_path_factory.mktemp("files")
    config = tiny_config()
    np.save(tmp / "vector.npy", unit_vector(config))
    np.save(tmp / "narrow.npy", unit_vector(config)[:-1])
    (tmp / "broken.npy").write_bytes((tmp / "vector.npy").read_bytes()[:50])
    (tmp / "used").mkdir()
    (tmp / "used" / "precious.txt").write_text("kept")
    shutil.copytree(tiny / "model", tmp / "words")
    words = json.loads((tmp / "words" / "config.json").read_text()) | {"vocab_size": 14}
    (tmp / "words" / "config.json").write_text(json.dumps(words))
    tensors = load_file(tmp / "words" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:14]
    save_file(tensors, tmp / "words" / "model.safetensors")
    for name, change in CHECKPOINTS.items():
        shutil.copytree(tiny / "model", tmp / name)
        change(tmp / name)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{port.getsockname()[1]}/v1"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Strict)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    strict = f"http://127.0.0.1:{server.server_port}/v1"
    yield {"tiny": tiny, "tmp": tmp, "closed": closed, "strict": strict}
    server.shutdown()
    server.server_close()


class Strict(http.server.BaseHTTPRequestHandler):
    """Takes no key."""

    def do_GET(self):
        content = b'{"error": {"message": "no such key", "code": "invalid_api_key"}}'
        self.send_response(401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, *_):
        pass


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def half(folder):
    names = sorted(load_file(folder / "model.safetensors"))
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    weights = {name: parts[n > len(names) // 2] for n, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / parts[0])


def set_config(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def no_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


CHECKPOINTS = {
    "cut off": cut_off,
    "half": half,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "broken": lambda folder: (folder / "config.json").write_text("{"),
    "field": set_config(attention_bias=True),
    "family": set_config(model_type="mamba"),
    "no tokenizer": no_tokenizer,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, places, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    changes, said = OPTIONS[name]
    changes = {"out": tmp_path / "out"} | {k: fill(v, places) for k, v in changes.items()}
    argv = command_for(tiny, **changes)
    assert_refused(argv, [fill(w, places) for w in said], capsys, tmp_path, places["tmp"])


LONG = json.dumps({"prompt": "cake " * 70})
QUERY_FILES = {
    "not JSON": ("q.jsonl", '{"prompt": "hello"}\n{broken\n', ["q.jsonl line 2", "JSON"]),
    "empty": ("q.jsonl", "\n", ["q.jsonl", "holds no queries"]),
    "no prompt": ("q.jsonl", '{"text": "hello"}\n', ["q.jsonl", '"prompt"']),
    "blank prompt": ("q.jsonl", '{"prompt": " "}\n', ["no queries", "1 of them blank"]),
    "bad messages": ("q.jsonl", '{"messages": [{"role": "user"}]}\n', ["line 1", '"content"']),
    "repeated id": ("q.jsonl", '{"id": "a", "prompt": "hello"}\n' * 2, ["line 2", "'a'"]),
    "wrong column": ("q.csv", "text,label\nhello,1\n", ["q.csv", "text", "label"]),
    "too long": ("q.jsonl", LONG, ["'q0'", "64 positions", "--max-prompt-tokens"]),
}  # fmt: skip


@pytest.mark.parametrize("name", QUERY_FILES)
def test_query_files(name, tiny, tmp_path, capsys):
    file, content, said = QUERY_FILES[name]
    (tmp_path / file).write_text(content)
    argv = command_for(tiny, tmp_path / "out", queries=tmp_path / file)
    assert_refused(argv, said, capsys, tmp_path)


CONFIGS = {
    "not YAML": ("model: [", ["study.yaml", "not valid YAML"]),
    "a list": ("- model", ["study.yaml", "'name: value'"]),
    "newer": ("version: 2\nmodel: organism", ["version 2", "reads 1"]),
    "unknown option": ("modle: organism", ["'modle'", "model"]),
    "another command's": ("command: judge\nrun: x", ["`tailrisk judge`", "`tailrisk estimate`"]),
    "a mapping": ("model: {name: organism}", ["'model'", "mapping"]),
    "wrong kind": ("samples: many", ["--samples", "'many'"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files(name, tmp_path, capsys):
    content, said = CONFIGS[name]
    (tmp_path / "study.yaml").write_text(content)
    argv = ["estimate", f"--config={tmp_path / 'study.yaml'}", f"--out={tmp_path / 'out'}"]
    assert_refused(argv, said, capsys, tmp_path)


COMMANDS = {
    "nothing": ("", ["estimate", "resume", "tailrisk --help"]),
    "unknown command": ("guess", ["guess"]),
    "unknown option": ("estimate --modle organism", ["--modle", "tailrisk estimate --help"]),
    "no value": ("estimate --model", ["--model"]),
    "missing arguments": ("judge", ["judge", "--out"]),
    "config without file": ("estimate --config", ["--config needs a file"]),
    "config that is absent": ("estimate --config {tmp}/a.yaml", ["a.yaml", "can't be read"]),
    "config elsewhere": ("merge --config {tmp}/a.yaml --out {tmp}/out", ["--config"]),
    "resume nothing": ("resume {tmp}/absent", ["absent is no run", "study.yaml"]),
    "resume an empty folder": ("resume {tmp}", ["is no run"]),
    "show nothing": ("show {tmp}/absent", ["absent"]),
    "recompute nothing": ("estimate {tmp}/absent", ["absent is no run"]),
    "recompute with options": ("estimate {run} --samples 99", ["--samples", "--out {run}"]),
    "judge nothing": ("judge {tmp} --event a --out {tmp}/out", ["is no run"]),
    "judge by nobody": ("judge {run} --out {tmp}/out", ["--judge or --event is needed"]),
    "score nothing": ("score {tmp} --model organism --out {tmp}/out", ["is no run"]),
    "score by no model": ("score {run} --model nowhere --out {tmp}/out", ["'nowhere'"]),
    "score over other words": ("score {run} --model organism --out {tmp}/out", ["one tokenizer"]),
    "score in another type": ("score {run} --model organism --dtype int8 --out a", ["'int8'"]),
    "merge nothing": ("merge --out {tmp}/out", ["0 run is nothing to merge"]),
    "merge one": ("merge {run} --out {tmp}/out", ["1 run is nothing to merge"]),
    "merge no run": ("merge {run} {tmp} --out {tmp}/out", ["is no run"]),
    "demo of none": ("demo --queries 0 --out {tmp}/out", ["queries=0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, run, tmp_path, capsys):
    words, said = COMMANDS[name]
    places = {"tmp": tmp_path, "run": run}
    argv = words.format(**places).split()
    assert_refused(argv, [fill(w, places) for w in said], capsys, tmp_path, run)


def rewrite(name, **fields):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


FOLDERS = {
    "newer": (rewrite("study.json", format=2), ["format 2", "reads up to 1"]),
    "of something else": (lambda f: (f / "study.json").write_text("[]"), ["study.json"]),
    "cut off": (lambda f: (f / "study.json").write_text('{"format": 1'), ["can't be read"]),
    "half": (lambda f: (f / "study.json").write_text('{"format": 1}'), ["study.json is damaged"]),
    "other rounds": (lambda f: (f / "rounds.json").write_text("[{}]"), ["can't be read"]),
    "rounds": (lambda f: (f / "rounds.json").write_text("[{"), ["rounds.json", "can't be read"]),
    "its config newer": (
        lambda f: (f / "study.yaml").write_text("version: 2\n"), ["study.yaml", "version 2"],
    ),
    "its config of no run": (
        lambda f: (f / "study.yaml").write_text("command: show\n"), ["'show'", "can't be resumed"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_run_folders(name, run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    change, said = FOLDERS[name]
    change(folder)
    assert_refused(["resume", folder], said, capsys, tmp_path)


def test_there_are_more_than_forty():
    assert sum(map(len, (OPTIONS, QUERY_FILES, CONFIGS, COMMANDS, FOLDERS))) > 40
