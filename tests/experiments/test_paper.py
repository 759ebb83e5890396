"""The paper's experiments, tiny: what they write, that they resume, and what they refuse."""

import csv
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.paper import greedy, run
from tailrisk_jax import encode, load_organism, logits
from tailrisk_jax.errors import InputError
from tailrisk_jax.organisms import load_persona_organism
from tailrisk_jax.studies import observations, read_samples, read_study

FILES = {"rows.csv", "tables.md", "figure.png", "summary.json"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all of them."""
    out = tmp_path_factory.mktemp("paper")
    run.main(["all", "--smoke", "--quiet", "--out", str(out)])
    return out


def rows(results, name):
    with open(results / name / "rows.csv") as lines:
        return list(csv.DictReader(lines))


def summary(results, name):
    return json.loads((results / name / "summary.json").read_text())


def run_of(results, *, seed=1, temperature=1.0, model="organism"):
    """The run that drew from the target."""
    for folder in (results / "runs").glob("target-*"):
        study = read_study(folder)
        found = study.settings.seed, study.identity["temperature"], study.identity["model"]["name"]
        if found == (seed, temperature, model):
            samples = read_samples(folder)
            return study, samples, observations(study.queries, samples)
    raise AssertionError(f"no run of {model} with seed {seed} at temperature {temperature}")


def test_each_leaves_what_its_result_rests_on(results):
    for name in run.EXPERIMENTS:
        assert {path.name for path in (results / name).iterdir()} >= FILES
        found = summary(results, name)
        assert found["status"] == "done" and found["experiment"] == name
        assert found["session"]["packages"]["jax"] and found["session"]["devices"]
        assert found["hardware"]["cores"] >= 1 and found["identity"]["model"]["files"]
        assert {run["seed"] for run in found["runs"].values()} <= {0, 1} and found["runs"]
        assert found["queries"]["kept"] == 5 and found["identity"]["judge"]


def test_experiments_share_runs_of_the_same(results):
    """Of the organism Monte Carlo, one of the proposal and a cold one; two of the persona; and
    one of the variants."""
    assert len(list((results / "runs").iterdir())) == 6


def test_estimates_stand_beside_monte_carlo_and_the_truth(results):
    truth = {query.id: query.lower for query in load_organism().forbidden}
    _, _, plain = run_of(results)
    hits = {q.id: int(h) for q, h in zip(plain.queries, plain.scores.sum(axis=1), strict=True)}
    assert sum(hits.values()) > 0
    for row in rows(results, "baseline"):
        assert math.isclose(float(row["truth_lower"]), truth[row["query"]], rel_tol=1e-3)
        assert int(row["mc_hits"]) == hits[row["query"]] and int(row["mc_samples"]) == 200
        assert math.isclose(float(row["mc_value"]), hits[row["query"]] / 200, rel_tol=1e-3)
        assert float(row["lower"]) <= float(row["value"]) <= float(row["upper"])


def test_errors_are_of_repeats_against_the_truth(results):
    """Of Monte Carlo, by hand: two repeats of a hundred draws."""
    _, _, plain = run_of(results)
    truths = {q.id: math.sqrt(q.lower * q.upper) for q in load_organism().forbidden}
    found = [row for row in rows(results, "samples") if row["proposal"] == "Monte Carlo"]
    assert len(found) == 5
    for row, scores in zip(found, plain.scores, strict=True):
        truth, values = truths[row["query"]], scores.reshape(2, 100).mean(axis=1)
        square = max(np.mean((values - truth) ** 2), values.var(ddof=1))
        assert math.isclose(float(row["error"]), math.sqrt(square) / truth, rel_tol=1e-3)
        exact = math.sqrt((1 - truth) / truth / 100)
        assert math.isclose(float(row["monte_carlo_error"]), exact, rel_tol=1e-3)


def test_cold_answers_are_the_greedy_ones(results):
    """Each token has the largest logit after those before it."""
    study, samples, cold = run_of(results, seed=0, temperature=greedy.COLD)
    target = load_organism().target
    assert np.exp(cold.log_p).min() > greedy.SURE
    for query, answer in zip(study.queries, samples["tokens"].to_pylist(), strict=True):
        prompt = np.asarray(encode(target.model, [query.content]).tokens)[0]
        whole = np.zeros((1, 64), np.int32)
        size = len(prompt) + len(answer)
        whole[0, :size] = [*prompt, *answer]
        found = logits(target, jnp.asarray(whole), jnp.asarray(np.arange(64)[None] < size))
        best = np.argmax(found[0, len(prompt) - 1 : size - 1], axis=-1)
        assert best.tolist() == answer


def test_shares_among_k_are_exact_where_the_truth_is(results):
    truths = load_organism().forbidden[:5]
    found = summary(results, "greedy")["figures"]["among"]
    wanted = np.mean([1 - (1 - math.sqrt(q.lower * q.upper)) ** 10 for q in truths])
    assert math.isclose(found["10"]["exact"][0], wanted, rel_tol=1e-9)
    value, lower, upper = found["10"]["monte_carlo"]
    assert 0 <= lower <= value <= upper <= 1
    assert found["10000"]["monte_carlo"] is None  # 200 draws can't tell


def test_a_trait_is_estimated_by_question_and_on_average(results):
    _, _, plain = run_of(results, model="organism:persona")
    truths = {q.id: (q.lower, q.upper) for q in load_persona_organism().queries}
    own = [row for row in rows(results, "persona") if row["proposal"] == "Monte Carlo"]
    figures = summary(results, "persona")["figures"]
    assert len(own) == 5 and plain.scores.sum() > 0
    assert math.isclose(figures["Monte Carlo"]["mean"], plain.scores.mean(), rel_tol=1e-9)
    bounds = [truths[row["query"]] for row in own]
    assert math.isclose(figures["exact"]["mean"], np.mean(np.sqrt(np.prod(bounds, axis=1))))
    for row, (lower, upper) in zip(own, bounds, strict=True):
        held = float(row["lower"]) <= upper and lower <= float(row["upper"])
        assert row["holds"] == str(held)


def test_variants_of_a_query_are_held_together(results):
    _, _, plain = run_of(results, seed=0)
    found = rows(results, "paraphrases")
    assert [row["kind"] for row in found] == ["original", *["organism"] * 4]
    assert {row["base"] for row in found} == {found[0]["query"]}
    values = {
        q.id: value for q, value in zip(plain.queries, plain.scores.mean(axis=1), strict=True)
    }
    for row in found:
        assert math.isclose(float(row["value"]), values[row["query"]], rel_tol=1e-3)
    assert summary(results, "paraphrases")["figures"]["zero"] == list(values.values()).count(0)


def test_the_worst_of_the_others_is_held_against_the_forecast(results):
    """Two splits of five queries, 2 to 3; a forecast from two is refused."""
    truths = np.array([math.sqrt(q.lower * q.upper) for q in load_organism().forbidden[:5]])
    rng = np.random.default_rng(0)
    worst = [truths[rng.permutation(5)[2:]].max() for _ in range(2)]
    found = rows(results, "deployment")
    assert {row["source"] for row in found} == {"importance sampling", "Monte Carlo", "exact"}
    for row in found:
        assert math.isclose(float(row["actual"]), worst[int(row["split"])], rel_tol=1e-3)
        assert row["support"] == "unusable" and row["forecast"] == ""


def test_the_same_command_draws_nothing_again(results, monkeypatch):
    def drawn(*_, **__):
        raise AssertionError("drawn again")

    monkeypatch.setattr("tailrisk_jax.studies.run._draw", drawn)
    before = (results / "greedy" / "rows.csv").read_bytes()
    run.main(["c", "--smoke", "--quiet", "--out", str(results)])
    assert (results / "greedy" / "rows.csv").read_bytes() == before


def test_the_cost_is_said_before(results, capsys):
    words = ["a", "--model", "Llama-3.1-8B", "--only-plan", "--topology", "h100:1", "--first", "9"]
    run.main([*words, "--out", str(results / "nowhere")])
    plain, own, whole = capsys.readouterr().out.splitlines()
    assert "10,000 answers to each of 9 queries, scored under 0 policies" in plain
    assert "1,000 answers to each of 9 queries, scored under 2 policies" in own
    assert "99,000 answers of up to 150 tokens" in whole
    assert not (results / "nowhere").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["z"], "'z' is unknown; give one of a baseline, b samples, c greedy, d persona"),
        (["a", "--sample", "3"], "see run.py baseline --help"),
        (["b", "--only-plan"], "--only-plan needs --model and --topology"),
        (["b", "--tune", "well"], "see run.py samples --help"),
        (["a", "--smoke", "--baseline", "absent.jsonl"], "absent.jsonl"),
        (["a", "--model", "M", "--queries", "absent.csv"], "absent.csv"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(tmp_path, words, said):
    if len(words) > 1:
        words = [*words, "--quiet", "--out", str(tmp_path)]
    with pytest.raises(InputError) as refused:
        run.main(words)
    assert said in str(refused.value)


def test_a_baseline_may_be_there_already_but_not_of_the_same_draws(results, tmp_path):
    [folder] = (
        path for path in (results / "runs").glob("target-*")
        if read_study(path).settings.seed == 1
        and read_study(path).identity["model"]["name"] == "organism"
    )  # fmt: skip
    words = ["a", "--smoke", "--quiet", "--baseline", str(folder), "--out"]
    with pytest.raises(InputError, match="would share draws; give another --seed"):
        run.main([*words, str(tmp_path), "--seed", "1"])
    before = (results / "baseline" / "rows.csv").read_bytes()
    run.main([*words, str(results)])
    assert (results / "baseline" / "rows.csv").read_bytes() == before


def test_a_share_needs_an_event(tmp_path):
    (tmp_path / "half.py").write_text("def half(responses):\n    return [0.5] * len(responses)\n")
    words = ["c", "--smoke", "--quiet", "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match="give --threshold"):
        run.main([*words, "--judge", f"python:{tmp_path}/half.py:half", "--monte-carlo", "0"])
    assert summary(tmp_path / "out", "greedy")["status"].startswith("failed: scores lie between")


@pytest.mark.slow
def test_a_proposal_is_tuned_once(tmp_path):
    words = ["b", "--smoke", "--quiet", "--out", str(tmp_path), "--tune", "choose"]
    for _ in range(2):
        run.main(words)
    assert len(list((tmp_path / "runs").glob("tuned-choose-*"))) == 1
    assert {row["proposal"] for row in rows(tmp_path, "samples")} > {"tuned by choose"}


@pytest.mark.slow
def test_variants_have_exact_risks(tmp_path):
    run.main(["e", "--smoke", "--quiet", "--out", str(tmp_path), "--exact"])
    query = load_organism().forbidden[0]
    original, *others = rows(tmp_path, "paraphrases")
    assert float(original["truth_lower"]) <= query.upper * 1.001
    assert query.lower <= float(original["truth_upper"]) * 1.001
    assert all(0 < float(row["truth_lower"]) <= float(row["truth_upper"]) < 1 for row in others)
