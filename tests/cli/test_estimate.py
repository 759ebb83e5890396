"""`tailrisk estimate` as a user runs it: on a checkpoint folder, with files of their own."""

import json

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


@pytest.mark.slow
def test_until_draws_where_it_is_needed_and_no_draw_is_lost_or_new(files, tmp_path, capsys):
    out = tmp_path / "until"
    options = {"samples": 100, "until": "rel=0.5", "max-samples": 250, "seed": 3}
    main(arguments(files, out, **options))
    estimates = pq.read_table(out / "estimates.parquet").to_pydict()
    samples = pq.read_table(out / "samples.parquet").to_pydict()
    counts = np.array(estimates["num_samples"])
    assert counts.min() < 250 and counts.max() == 250
    assert "Answers per query" in capsys.readouterr().out
    main(arguments(files, tmp_path / "fixed", samples=250, seed=3))
    whole = pq.read_table(tmp_path / "fixed" / "samples.parquet").to_pydict()
    texts = dict(
        zip(zip(whole["query_id"], whole["sample"], strict=True), whole["text"], strict=True)
    )
    present = np.arange(250) < counts[:, None]
    scores, log_weights = np.zeros((2, *present.shape))
    scores[present] = samples["score"]
    log_weights[present] = np.array(samples["log_p"]) - np.array(samples["log_q"])
    wanted = in_float64(watched_interval, scores, log_weights, mask=present, tuned_for=100)
    for q, query in enumerate(estimates["query_id"]):
        own = [i for i, name in enumerate(samples["query_id"]) if name == query]
        assert [samples["sample"][i] for i in own] == list(range(counts[q]))
        assert all(samples["text"][i] == texts[query, samples["sample"][i]] for i in own)
    np.testing.assert_allclose(estimates["lower"], wanted.lower, rtol=1e-4)
    np.testing.assert_allclose(estimates["upper"], wanted.upper, rtol=1e-4)
    width = (wanted.upper - wanted.lower) / 2 / np.array(estimates["value"])
    np.testing.assert_array_equal(width <= 0.5, counts < 250)


@pytest.mark.slow
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


def test_an_output_that_exists_is_kept(files, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("kept")
    with pytest.raises(SystemExit) as stopped:
        main(arguments(files, out))
    assert stopped.value.code == 2 and "not empty" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["precious.txt"]


def test_help_names_commands_and_options(capsys):
    for argv, words in ((["--help"], ["demo", "estimate"]), (["estimate", "--help"], ["--event"])):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)
