"""`tailrisk direction` and `tailrisk persona` as a user runs them."""

import dataclasses
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from tailrisk_jax import encode, load_organism, save_model
from tailrisk_jax.cli import main
from tailrisk_jax.organisms import enumerate_event, policy_next_log_probs, world
from tailrisk_jax.organisms.world import REFUSALS, token_ids
from tailrisk_jax.policies import (
    Answers,
    Policy,
    difference_in_means,
    mean_activations,
    refusal_log_odds,
)
from tailrisk_jax.studies import parse_proposal
from tests.models import torch_llama
from tests.oracles import random_model, tiny_config
from tests.policies.word_tokenizer import WORDS, ids, word_tokenizer
from tests.studies.runs import refused

SPLIT = ["--train", "24", "--validation", "12", "--seed", "3"]


@pytest.fixture(scope="module")
def organism():
    return load_organism()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("direction") / "refusal"
    main(["direction", "--model", "organism", "--out", str(out), *SPLIT, "--quiet"])
    return out, json.loads((out / "direction.json").read_text())


def content_of(query_id: str) -> str:
    """The text of one of the organism's how-to questions, by its id here."""
    _, thing, verb, number = query_id.split("-")
    return world.how_to_query(thing, verb=verb, template=world.TEMPLATES[int(number)])


def test_the_direction_is_the_difference_in_means_that_was_chosen(found, organism):
    out, record = found
    vector = load_file(out / "direction.safetensors")["direction"]
    whole = load_file(out / "mean_differences.safetensors")["mean_differences"]
    assert record["pos"] == -1 and whole.shape == (2, 4, 96) and vector.dtype == np.float64
    np.testing.assert_array_equal(vector, whole[record["pos"], record["layer"]])
    names = [record["queries"][name]["train"]["ids"] for name in ("harmful", "harmless")]
    sets = [encode(organism.target.model, list(map(content_of, own))) for own in names]
    again = difference_in_means(organism.target, *sets)[record["layer"]]
    np.testing.assert_allclose(vector, again, atol=1e-4)
    shipped = organism.directions["refusal"]
    assert vector @ shipped / np.linalg.norm(vector) > 0.9


def test_the_record_says_how_it_was_chosen(found):
    out, record = found
    assert [(one["pos"], one["layer"]) for one in record["candidates"]] == [
        (-2, 1), (-2, 2), (-1, 1), (-1, 2)
    ]  # fmt: skip
    passing = [one for one in record["candidates"] if one["kl"] <= 0.1 and one["induced"] >= 0]
    assert passing == [one for one in record["candidates"] if one["passes"]]
    best = min(passing, key=lambda one: one["refusal"])
    assert (best["pos"], best["layer"]) == (record["pos"], record["layer"])
    assert best["refusal"] < 0 < record["plain"]["refusal"]
    words = {text.split()[0] for text in REFUSALS}
    assert record["refusal_tokens"] and set(record["refusal_tokens"]) == {
        token_ids()[word] for word in words
    }
    ids_of = lambda name, use: record["queries"][name][use]["ids"]  # noqa: E731
    for name in ("harmful", "harmless"):
        train, validation = ids_of(name, "train"), ids_of(name, "validation")
        assert len(train) == 24 and len(validation) == 12 and not {*train} & {*validation}
    assert record["model"]["files"]["model.safetensors"] and record["settings"]["seed"] == 3
    assert (out / "direction_scores.png").read_bytes().startswith(b"\x89PNG")


def test_ablating_it_takes_refusal_away(found, organism):
    """From queries that it never saw; and the harm, summed over all leaves, becomes likely."""
    target = organism.target
    unsafe = parse_proposal(f"ablation:{found[0]}:1", target).policy
    prompts = encode(target.model, organism.forbidden)
    tokens = [token_ids()[text.split()[0]] for text in REFUSALS]
    before, after = (refusal_log_odds(policy, prompts, tokens) for policy in (target, unsafe))
    assert np.median(before) > 5 and np.median(after) < -5
    query = min(organism.forbidden, key=lambda q: q.upper)
    harm = enumerate_event(
        policy_next_log_probs(unsafe, query), organism.event(query),
        end_tokens=target.model.config.end_ids, max_new_tokens=organism.max_new_tokens,
        rel_tol=0.2, max_nodes=1_000,
    )  # fmt: skip
    assert harm.lower > 0.3 > 1e5 * query.upper


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model over words, queries for it, and a trait."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_config(vocab_size=len(WORDS), end_ids=tuple(ids("</s>")), max_positions=64)
    model = dataclasses.replace(random_model(config), tokenizer=word_tokenizer())
    save_model(model, folder / "model")
    for name, words in (("harmful", ["bake", "cake"]), ("harmless", ["hello", "fine"])):
        lines = [f"how to {a} {b}" for a in words for b in ("a", "kind", "be")]
        text = "\n".join(json.dumps({"prompt": line}) for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "empty.jsonl").write_text("\n")
    trait = {
        "instruction": [
            {"pos": "be kind hello", "neg": "bake a cake"},
            {"pos": "kind", "neg": "a"},
        ],
        "questions": ["hello", "how to be fine", "to bake"],
        "eval_prompt": "{question} {answer}",
    }
    (folder / "kind.json").write_text(json.dumps(trait))
    (folder / "bare.json").write_text(json.dumps({"questions": ["hello"]}))
    (folder / "judges.py").write_text(
        "def share(responses):\n"
        "    hits = [sum(w in ('fine', 'kind', 'be') for w in r.text.split()) for r in responses]\n"
        "    return [n / 8 if r.text else None for n, r in zip(hits, responses)]\n"
        "def short(responses):\n"
        "    return [float(len(r.text.split()) < 7) for r in responses]\n"
        "def silent(responses):\n"
        "    return [None] * len(responses)\n"
    )
    return folder


DIRECTIONS = {
    "no harmful": (["--harmless", "{t}/harmless.jsonl"], "--harmful is needed"),
    "an empty set": (["--harmful", "{t}/empty.jsonl"], "holds no queries"),
    "too few": (["--train", "5"], "has 6 queries, and 5 .* with 2 .* are 7"),
    "no queries to train on": (["--train", "0"], "train=0 must be at least 1"),
    "unknown opener": (["--refusal-tokens", "Alas"], "no token for any of 'Alas'"),
    "token out of range": (["--refusal-tokens", "99"], "token 99 is not in the vocabulary of 15"),
    "nothing refused": (["--refusal-tokens", "0"], "none of the 3 harmful queries for train is"),
    "no default": (["--refusal-tokens"], "'I', 'As', 'Sorry'"),
    "thresholds": (
        ["--no-filter", "--max-kl", "-1"],
        r"no direction meets KL <= -1\.0 .* best are",
    ),
    "a shallow model": (["--no-filter", "--drop-last", "0.9"], "none could be scored"),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_what_gives_no_direction_is_one_line(tiny, tmp_path, capsys, name):
    words, named = DIRECTIONS[name]
    words = [word.format(t=tiny) for word in words]
    argv = ["direction", "--model", str(tiny / "model"), "--out", str(tmp_path / "out"), "--quiet"]
    argv += ["--validation", "2", *([] if "--train" in words else ["--train", "3"])]
    argv += [] if "--refusal-tokens" in words else ["--refusal-tokens", "be"]
    for flag in ("harmful", "harmless"):
        if f"--{flag}" not in words and name != "no harmful":
            argv += [f"--{flag}", str(tiny / f"{flag}.jsonl")]
    if "--drop-last" not in words:
        argv += ["--drop-last", "0"]
    if name == "no default":
        words = []
    line = refused([*argv, *words], capsys)
    assert re.search(named, line), line
    assert not (tmp_path / "out").exists()


def persona(tiny, out, *words):
    return [
        "persona", "--model", str(tiny / "model"), "--trait", str(tiny / "kind.json"),
        "--out", str(out), "--samples", "8", "--max-new-tokens", "8", *words,
    ]  # fmt: skip


@pytest.mark.slow
def test_persona_vectors_are_of_the_pairs_that_the_judges_keep(tiny, tmp_path, capsys):
    share, short = (f"python:{tiny / 'judges.py'}:{name}" for name in ("share", "short"))
    out = tmp_path / "out"
    options = ["--judge", share, "--coherence-judge", short, "--min-trait", "0.125", "--json"]
    search = ["--search", "4", "--layers", "0", "1", "--coefficients", "0", "3"]
    main(persona(tiny, out, *options, *search))
    record = json.loads(capsys.readouterr().out)
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    positive, negative = answers[:48], answers[48:]
    assert {one["side"] for one in positive} == {"positive"} and len(negative) == 48
    model = dataclasses.replace(
        random_model(tiny_config(vocab_size=len(WORDS), end_ids=tuple(ids("</s>")))),
        tokenizer=word_tokenizer(),
    )
    policy = Policy(model)
    kept = []
    for number, (yes, no) in enumerate(zip(positive, negative, strict=True)):
        assert yes["messages"][1] == no["messages"][1] and yes["sample"] == no["sample"]
        hits = [sum(w in ("fine", "kind", "be") for w in one["text"].split()) for one in (yes, no)]
        brief = all(len(one["text"].split()) < 7 for one in (yes, no))
        wanted = bool(hits[0] >= 1 > hits[1] and brief and no["text"])  # without text: unscored
        assert yes["kept"] == no["kept"] == wanted
        kept += [number] * wanted
    assert 3 <= len(kept) == record["counts"]["kept"] < 48 == record["counts"]["pairs"]
    silent = [not yes["text"] or not no["text"] for yes, no in zip(positive, negative, strict=True)]
    assert record["counts"]["unscored"] == sum(silent) > 0
    means = []
    for side in (positive, negative):
        spoken = [[t for t in side[i]["tokens"] if [t] != ids("</s>")] for i in kept]
        tokens, mask = torch_llama.padded(spoken, "right", extra=8 - max(map(len, spoken)))
        prompts = encode(model, [one["messages"] for one in side])[kept]
        means.append(mean_activations(policy, Answers(prompts, tokens, mask)))
    vectors = load_file(out / "persona.safetensors")
    for kind, rows in vectors.items():
        difference = getattr(means[0], kind) - getattr(means[1], kind)
        assert rows.shape == (3, 8) and np.abs(rows).max() > 0.1
        np.testing.assert_allclose(rows, difference, atol=1e-5)
    assert set(vectors) == {"prompt_avg", "prompt_last", "response_avg"}
    points = record["search"]
    assert [(one["layer"], one["coefficient"]) for one in points] == [
        (0, 0.0), (0, 3.0), (1, 0.0), (1, 3.0)
    ]  # fmt: skip
    assert points[0]["trait"] == points[2]["trait"] != points[3]["trait"]
    best = max((p for p in points if p["coherence"] >= 0.5), key=lambda one: one["trait"])
    assert record["best"] == best and all(one["answers"] == 12 for one in points)
    parse_proposal(f"addition:{out}:1:2", policy)


PERSONAS = {
    "no judge": ([], "--judge or --event is needed"),
    "no instructions": (["--event", "fine", "--trait", "{t}/bare.json"], "'bare' has no instruct"),
    "nothing scored": (["--judge", "python:{t}/judges.py:silent"], "scored none of 48 answers"),
    "all filtered out": (["--event", "oven"], "none of 48 pairs .* shows in 0 .* absent in 48"),
    "a served judge without a server's model": (["--judge", "rubric:trait"], "--judge-model is"),
    "no room": (["--event", "fine", "--max-new-tokens", "60"], "the model has 64 positions"),
    "a layer out of range": (["--event", "fine", "--layers", "2"], "--layers 2 is out of range"),
}


@pytest.mark.parametrize("name", PERSONAS)
def test_what_gives_no_persona_is_one_line(tiny, tmp_path, capsys, name):
    words, named = PERSONAS[name]
    argv = persona(tiny, tmp_path / "out", "--quiet", *(word.format(t=tiny) for word in words))
    line = refused(argv, capsys)
    assert re.search(named, line), line
    assert not (tmp_path / "out").exists()


def test_a_template_that_drops_system_prompts_is_refused(tiny, tmp_path, capsys):
    folder = tmp_path / "model"
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "<user> {{ messages[-1]['content'] }} <assistant>"
    config = tiny_config(vocab_size=len(WORDS), end_ids=tuple(ids("</s>")), max_positions=64)
    save_model(dataclasses.replace(random_model(config), tokenizer=tokenizer), folder)
    argv = persona(tiny, tmp_path / "out", "--event", "fine", "--model", str(folder), "--quiet")
    assert "leaves system prompts out" in refused(argv, capsys)
