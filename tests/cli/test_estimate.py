"""`tailrisk estimate` as a user runs it: on a checkpoint folder, with files of their own."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from tailrisk_jax import load_organism
from tailrisk_jax.cli import main
from tailrisk_jax.estimators import importance, in_float64, watched_interval
from tailrisk_jax.organisms.organism import DATA

TARGET = DATA / "target"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Queries and a direction, as files."""
    folder = tmp_path_factory.mktemp("files")
    organism = load_organism()
    queries = [q for q in organism.queries if q.forbidden][:3]
    lines = [
        json.dumps({"id": "first", "prompt": queries[0]}),
        "",
        json.dumps({"messages": [{"role": "user", "content": queries[1]}]}),
        json.dumps({"prompt": queries[2]}),
    ]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    direction = np.asarray(organism.directions["refusal"])
    save_file({"direction": direction}, folder / "direction.safetensors")
    save_file({"direction": direction[:-1]}, folder / "narrow.safetensors")
    (folder / "bad.jsonl").write_text(lines[0] + "\n{broken\n")
    (folder / "empty.jsonl").write_text("\n")
    return folder


def arguments(files, out, **changes):
    options = {
        "model": TARGET,
        "queries": files / "queries.jsonl",
        "proposal": f"0.1*target + 0.9*ablation:{files / 'direction.safetensors'}:0.2",
        "event": r"(mix|take|need)\s",
        "samples": 24,
        "max-new-tokens": 12,
        "out": out,
    } | changes
    return ["estimate", *(str(x) for name, value in options.items() for x in (f"--{name}", value))]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "deeper" / "run"
    main(arguments(files, out))
    return out


def test_it_writes_what_its_estimates_rest_on(run):
    estimates = pq.read_table(run / "estimates.parquet").to_pydict()
    samples = pq.read_table(run / "samples.parquet").to_pydict()
    assert estimates["query_id"] == ["first", "q1", "q2"]
    assert samples["query_id"] == [name for name in estimates["query_id"] for _ in range(24)]
    log_weights = np.reshape(samples["log_p"], (3, 24)) - np.reshape(samples["log_q"], (3, 24))
    again = in_float64(importance, np.reshape(samples["score"], (3, 24)), log_weights)
    for name in ("value", "lower", "upper", "ess_harm", "hits"):
        np.testing.assert_allclose(estimates[name], getattr(again, name), rtol=1e-5)
    components = np.asarray(samples["component_log_q"]).reshape(3, 24, 2)
    mixed = np.logaddexp(np.log(0.1) + components[..., 0], np.log(0.9) + components[..., 1])
    np.testing.assert_allclose(mixed, np.reshape(samples["log_q"], (3, 24)), rtol=1e-4)
    np.testing.assert_array_equal(components[..., 0].ravel(), samples["log_p"])
    last = [running[-1] for running in estimates["running_value"]]
    np.testing.assert_allclose(last, estimates["value"])
    assert set(samples["score"]) == {0.0, 1.0}
    scored = [float(any(w in t for w in ("mix ", "take ", "need "))) for t in samples["text"]]
    assert scored == samples["score"]
    assert all(1 <= len(tokens) <= 12 for tokens in samples["tokens"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["settings"]["seed"] == 0 and summary["environment"]["packages"]["jax"]
    assert not [p for p in run.rglob(".*") if not p.name.startswith(".lock")]
    assert [p.name for p in run.parent.iterdir()] == ["run"]


def test_batch_size_changes_no_sample_and_seed_does(files, run, tmp_path):
    main(arguments(files, tmp_path / "small", **{"batch-size": 5}))
    main(arguments(files, tmp_path / "seed", seed=1))
    read = lambda folder: pq.read_table(folder / "samples.parquet")  # noqa: E731
    first, small, seed = (read(folder) for folder in (run, tmp_path / "small", tmp_path / "seed"))
    assert small["text"].equals(first["text"]) and small["component"].equals(first["component"])
    np.testing.assert_allclose(small["log_q"], first["log_q"], atol=1e-4)
    assert not seed["text"].equals(first["text"])


def test_until_draws_where_it_is_needed_and_no_draw_is_lost_or_new(files, tmp_path, capsys):
    out = tmp_path / "until"
    options = {"samples": 100, "until": "rel=0.5", "max-samples": 450, "seed": 3}
    main(arguments(files, out, **options))
    estimates = pq.read_table(out / "estimates.parquet").to_pydict()
    samples = pq.read_table(out / "samples.parquet").to_pydict()
    counts = np.array(estimates["num_samples"])
    assert counts.min() < 450 and counts.max() == 450
    assert "Answers per query" in capsys.readouterr().out
    main(arguments(files, tmp_path / "fixed", samples=450, seed=3))
    whole = pq.read_table(tmp_path / "fixed" / "samples.parquet").to_pydict()
    texts = dict(
        zip(zip(whole["query_id"], whole["sample"], strict=True), whole["text"], strict=True)
    )
    for q, query in enumerate(estimates["query_id"]):
        own = [i for i, name in enumerate(samples["query_id"]) if name == query]
        assert [samples["sample"][i] for i in own] == list(range(counts[q]))
        assert all(samples["text"][i] == texts[query, samples["sample"][i]] for i in own)
        log_w = np.array(samples["log_p"])[own] - np.array(samples["log_q"])[own]
        wanted = in_float64(watched_interval, np.array(samples["score"])[own], log_w, tuned_for=100)
        np.testing.assert_allclose(estimates["lower"][q], wanted.lower, rtol=1e-4)
        np.testing.assert_allclose(estimates["upper"][q], wanted.upper, rtol=1e-4)
        width = (wanted.upper - wanted.lower) / 2 / estimates["value"][q]
        assert (width <= 0.5) == (counts[q] < 450)


def test_replicates_are_kept_with_what_they_claim(files, tmp_path, capsys):
    main(arguments(files, tmp_path / "run", replicates=4, samples=30))
    table = pq.read_table(tmp_path / "run" / "estimates.parquet").to_pydict()
    values = np.array(table["replicate_values"])
    assert values.shape == (3, 4) and set(table["num_samples"]) == {120}
    np.testing.assert_allclose(values.mean(axis=1), table["value"], rtol=1e-6)
    np.testing.assert_allclose(values.std(axis=1, ddof=1), table["replicate_spread"], rtol=1e-6)
    assert "Spread between 4 repeats" in capsys.readouterr().out


def test_draws_from_the_target_are_monte_carlo(files, tmp_path):
    main(arguments(files, tmp_path / "run", proposal="target"))
    table = pq.read_table(tmp_path / "run" / "estimates.parquet").to_pydict()
    assert set(table["estimator"]) == {"monte_carlo"} and set(table["certified"]) == {True}
    assert all(upper < 1 for upper in table["upper"])


def checkpoint_with(tmp_path, change):
    folder = tmp_path / "checkpoint"
    shutil.copytree(TARGET, folder)
    change(folder)
    return folder


def set_config(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


BAD = {
    "no such model": (dict(model="nowhere/at/all"), ["nowhere/at/all", "neither a folder"]),
    "no such queries": (dict(queries="absent.jsonl"), ["absent.jsonl"]),
    "bad JSON": (dict(queries="{files}/bad.jsonl"), ["bad.jsonl line 2", "JSON"]),
    "no queries": (dict(queries="{files}/empty.jsonl"), ["holds no queries"]),
    "wrong width": (dict(proposal="ablation:{files}/narrow.safetensors:1"), ["[95]", "[96]"]),
    "no such direction": (dict(proposal="ablation:absent.npy:1"), ["absent.npy"]),
    "bad intensity": (dict(proposal="ablation:{files}/direction.safetensors:x"), ["'x'"]),
    "layer out of range": (dict(proposal="addition:{files}/direction.safetensors:9:1"), ["9"]),
    "unknown proposal": (dict(proposal="jailbreak"), ["jailbreak", "ablation"]),
    "weights": (dict(proposal="0.5*target + 0.4*target@2"), ["sum to 1"]),
    "no samples": (dict(samples=0), ["num_samples=0"]),
    "negative tokens": (dict({"max-new-tokens": -1}), ["max_new_tokens=-1"]),
    "level": (dict(level=1.0), ["level=1.0"]),
    "until": (dict(until="0.2"), ["'0.2'", "rel=0.2"]),
    "until what": (dict(until="rel=-1"), ["until=-1", "above 0"]),
    "max samples": (dict({"until": "rel=1", "max-samples": 5}), ["max_samples=5"]),
    "replicates": (dict(replicates=0), ["replicates=0"]),
    "both": (dict(replicates=2, until="rel=1"), ["replicates=2", "one of the two"]),
    "temperature": (dict(temperature=0.0), ["temperature=0.0"]),
    "event": (dict(event="(unclosed"), ["(unclosed"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name, files, tmp_path, capsys):
    changes, said = BAD[name]
    changes = {
        key: value.format(files=files) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    refused(arguments(files, tmp_path / "out", **changes), said, tmp_path, capsys)


@pytest.mark.parametrize(
    "change, said",
    [
        (set_config(attention_bias=True), ["attention_bias=True"]),
        (set_config(model_type="mamba"), ["mamba"]),
        (cut_off, ["model.safetensors", "cut off"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
    ],
    ids=["unsupported field", "unsupported family", "cut off", "no weights", "broken config"],
)
def test_a_bad_checkpoint_is_one_clear_line(change, said, files, tmp_path, capsys):
    folder = checkpoint_with(tmp_path, change)
    refused(arguments(files, tmp_path / "out", model=folder), said, tmp_path, capsys)


def test_an_output_that_exists_is_kept(files, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("kept")
    with pytest.raises(SystemExit) as stopped:
        main(arguments(files, out))
    assert stopped.value.code == 2 and "not empty" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["precious.txt"]


def refused(argv, said, tmp_path, capsys):
    """The command exits with 2 and one line that says all of `said`; nothing is written."""
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tailrisk: ")
    assert all(words in lines[0] for words in said), lines[0]
    assert set(tmp_path.iterdir()) == before


def test_help_names_commands_and_options(capsys):
    for argv, words in ((["--help"], ["demo", "estimate"]), (["estimate", "--help"], ["--event"])):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)
