"""Tuned proposals on the organism: against brute force, exact efficiencies and their own texts."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tailrisk_jax import InputError, encode, load_organism
from tailrisk_jax.adaptation import (
    Grid,
    Pilot,
    adapt_shared,
    pilot_tokens,
    window_log_probs,
    windows,
)
from tailrisk_jax.estimators import mixture_log_prob
from tailrisk_jax.judges import Judgements
from tailrisk_jax.organisms import OrganismHarm
from tailrisk_jax.organisms.efficiency import efficiency, load_responses, log_prob_of_responses
from tailrisk_jax.rollouts import draw, log_prob, token_log_probs
from tailrisk_jax.studies import (
    Material,
    Settings,
    StudyQuery,
    choose_proposal,
    parse_proposal,
    read_tuned,
    save_tuned,
    search_proposal,
    window_proposal,
)
from tailrisk_jax.studies.pilots import draw_pilot, harmful_draws, in_chunks
from tailrisk_jax.studies.tuning import weighted_terms

WARM, UNSAFE = "ablation:refusal:0.1@2.5", "checkpoint:unsafe"
CANDIDATES = (UNSAFE, WARM, "target@2", f"switch:4({UNSAFE})")


@pytest.fixture(scope="module")
def organism():
    return load_organism()


@pytest.fixture(scope="module")
def queries(organism):
    """One of each decade."""
    return [next(q for q in organism.forbidden if q.decade == d) for d in range(-6, -1)]


@pytest.fixture(scope="module")
def material(organism, queries):
    return Material(
        target=organism.target,
        parse=functools.partial(
            parse_proposal,
            target=organism.target,
            vectors=organism.directions,
            checkpoints={"unsafe": organism.unsafe},
        ),
        queries=[StudyQuery(query.id, str(query)) for query in queries],
        judge=OrganismHarm(),
        settings=Settings(num_samples=200, max_new_tokens=24, seed=3),
        share=1.0,
    )


@pytest.fixture(scope="module")
def chosen(material):
    return choose_proposal(CANDIDATES, material)


@pytest.fixture(scope="module")
def exact(organism, queries, material):
    """From the text of a proposal to its exact efficiencies, by query."""
    responses = [load_responses()[query.id] for query in queries]

    def of(text):
        parsed = material.parse(text)
        log_q = log_prob_of_responses(parsed.policy, organism, queries, responses)
        floor = parsed.policy.weights[parsed.names.index("target")]
        rows = zip(queries, responses, log_q, strict=True)
        return [
            efficiency((query.lower, query.upper), known, row, max_weight=1 / float(floor))[0]
            for query, known, row in rows
        ]

    return of


def scored(material, score):
    """The same, with a judge that gives every answer one score."""

    class Same:
        def __call__(self, responses):
            return Judgements.of(np.full(len(responses), score))

    return dataclasses.replace(material, judge=Same())


@pytest.mark.slow
def test_the_search_is_brute_force_over_the_stored_pilot(organism, queries, material, tmp_path):
    grid, strengths = Grid((0, 2, 5, 24), (0.4, 1.0)), (0.25, 1.0)
    tuned = search_proposal(["ablation:refusal"], material, strengths=strengths, grid=grid)
    save_tuned(tuned, tmp_path, {"more": float("nan")})
    with np.load(tmp_path / "pilot.npz") as file:
        stored = {name: file[name] for name in file.files}
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert record["more"] is None and read_tuned(tmp_path)[0] == tuned.text == record["proposal"]

    mask = np.arange(24) < stored["lengths"][..., None]
    terms = [f"ablation:refusal:{strength}" for strength in strengths]
    policies = [organism.target, *(material.parse(term).policy for term in terms)]
    again = dataclasses.replace(tuned.pilot.draws, tokens=stored["tokens"], mask=mask)
    logs = np.asarray(token_log_probs(policies, again), np.float64)
    log_p, *log_u = logs.sum(axis=-1)
    log_m = np.logaddexp.reduce([log_p, *log_u], axis=0) - np.log(3)
    weights = np.exp(log_p - log_m) * stored["scores"]
    seen = weights.sum(axis=1) > 0
    weights = weights[seen] / weights[seen].sum(axis=1, keepdims=True)
    surface = {}
    for s, bias, step in np.ndindex(2, 2, 4):
        b, w = grid.biases[bias], grid.switches[step]
        mixed = np.log(b * np.exp(logs[1 + s]) + (1 - b) * np.exp(logs[0]))
        log_q = np.where(np.arange(24) < w, mixed, logs[0])[seen].sum(axis=-1)
        surface[terms[s], b, w] = -np.mean(np.sum(weights * log_q, axis=1))
    best = min(surface, key=surface.get)  # pyright: ignore[reportCallIssue, reportArgumentType]
    found = record["figures"]["setting"]
    assert (found["term"], found["bias"], found["switch"]) == best
    np.testing.assert_allclose(found["objective"], surface[best], rtol=1e-5)

    # What is written is what was found: with a share of 0.1 of the target beside it.
    term, b, w = best
    policy = material.parse(term).policy
    mixed = np.log(b * np.exp(logs[1 + terms.index(term)]) + (1 - b) * np.exp(logs[0]))
    log_q = np.where(np.arange(24) < w, mixed, logs[0]).sum(axis=-1)
    wanted = np.logaddexp(np.log(0.1) + log_p, np.log(0.9) + log_q)
    np.testing.assert_allclose(
        log_prob(material.parse(tuned.text).policy, again), wanted, atol=1e-3
    )
    assert policy.model is organism.target.model

    account = record["pilot"]
    assert account["hits"] == (stored["scores"] > 0).sum(axis=1).tolist()
    assert account["without_hits"] == [
        q.id for q, found in zip(queries, seen, strict=True) if not found
    ]
    prompts = np.asarray(encode(organism.target.model, queries).mask).sum(axis=1)
    assert account["tokens"] == pilot_tokens(prompts, stored["lengths"], drawing=3, scoring=3)


def test_what_is_chosen_is_worth_more_than_the_target(chosen, material, exact):
    assert chosen.method == "choose" and chosen.reason.startswith("Chosen: ")
    parsed = material.parse(chosen.text)
    rows = {row["term"]: row for row in chosen.figures["candidates"]}
    assert list(rows) == ["target", *CANDIDATES]
    kept = {name: row["weight"] for name, row in rows.items() if row["weight"] > 0}
    assert parsed.names == list(kept) and rows["target"]["weight"] > 0.05
    np.testing.assert_allclose(np.asarray(parsed.policy.weights), list(kept.values()), atol=2e-4)
    assert min(exact(chosen.text)) > 1

    # A switch runs two policies for each token; all its policies are scored for others already.
    labels, lengths = np.asarray(chosen.pilot.draws.labels), chosen.pilot.lengths
    prompts = np.asarray(chosen.pilot.draws.prompts.mask).sum(axis=1)
    switch = rows[CANDIDATES[-1]]
    assert switch["score_tokens"] == 0 < rows[WARM]["score_tokens"]
    one = lengths[labels == 4].mean() + prompts.mean() / 200
    np.testing.assert_allclose(switch["draw_tokens"], 2 * one)
    drawn = lengths.sum() + lengths[labels == 4].sum()
    assert chosen.pilot.tokens == 2 * 4 * prompts.sum() + drawn + 4 * lengths.sum()


def test_pilot_draws_are_their_own(chosen, material):
    """An estimate from the very mixture under the same seed has other draws."""
    pilot = chosen.pilot
    prompts = encode(material.target.model, [query.content for query in pilot.queries])
    others = draw(jax.random.key(3), pilot.mixed, prompts, 200, 24)
    assert np.mean(np.asarray(others.labels) == np.asarray(pilot.draws.labels)) < 0.3


@pytest.mark.slow
def test_windows_are_what_was_fitted(organism, queries, material, exact):
    tuned = window_proposal([WARM, f"switch:4({WARM})"], material)
    weights = tuned.figures["weights"]
    assert len(weights) == len(windows(1, 24)) and "target" in weights
    kept = {name: w for name, w in weights.items() if w >= 0.001}
    np.testing.assert_allclose(tuned.figures["dropped"], 1 - sum(kept.values()), atol=1e-9)
    parsed = material.parse(tuned.text)
    assert parsed.names == list(kept) and kept["target"] >= 0.1
    wanted = np.array(list(kept.values())) / sum(kept.values())
    np.testing.assert_allclose(np.asarray(parsed.policy.weights), wanted, atol=1e-3)

    draws = tuned.pilot.draws
    tokens = token_log_probs([organism.target, material.parse(WARM).policy], draws)
    parts = np.asarray(window_log_probs(tokens, windows(1, 24)), np.float64)

    # Only harmful draws were scored, and with the others nothing would be different.
    log_m = mixture_log_prob(parts, np.log(tuned.pilot.mixed.weights))
    every = adapt_shared(Pilot(parts, log_m, tuned.pilot.scores), target_share=0.1)
    np.testing.assert_allclose(list(weights.values()), every.weights[0], rtol=1e-3, atol=1e-6)
    moments = tuned.figures["log_second_moment"]
    np.testing.assert_allclose(moments, every.log_second_moment, atol=1e-3)
    prompts, lengths = np.asarray(draws.prompts.mask).sum(axis=1), tuned.pilot.lengths
    inside = np.asarray(draws.labels) > 0  # a window has two policies side by side
    spent = pilot_tokens(prompts, lengths, drawing=2, scoring=0) + lengths[inside].sum()
    spent += 2 * prompts.sum() + 2 * lengths[tuned.pilot.scores > 0].sum()
    assert tuned.pilot.tokens == spent
    rows = [list(weights).index(name) for name in parsed.names]
    log_alpha = np.log(np.asarray(parsed.policy.weights, np.float64))
    log_q = np.logaddexp.reduce(log_alpha[:, None, None] + parts[rows], axis=0)
    np.testing.assert_allclose(log_prob(parsed.policy, draws), log_q, atol=1e-3)
    assert np.median(exact(tuned.text)) > 2


@pytest.mark.slow
def test_chunks_change_no_draw_and_are_told_of(chosen, material):
    told = []
    settings = dataclasses.replace(material.settings, chunk_size=150)
    cut = dataclasses.replace(material, settings=settings, tell=told.append)
    pilot = draw_pilot(chosen.pilot.mixed, cut)
    for name in ("tokens", "mask", "ended", "labels"):
        np.testing.assert_array_equal(
            *(np.asarray(getattr(one.draws, name)) for one in (pilot, chosen.pilot))
        )
    np.testing.assert_array_equal(pilot.scores, chosen.pilot.scores)
    assert [one.drawn for one in told] == [0, *np.repeat(range(100, 1001, 100), 2)]
    assert [one.judged for one in told] == [0, *np.repeat(range(0, 1001, 100), 2)[1:-1]]
    assert told[-1].hits == pilot.hits.sum() > 0 and told[-1].total == 1000

    hits, scores = harmful_draws(pilot)
    counts = pilot.hits.tolist()
    mask, real = np.asarray(hits.mask).any(axis=-1), ~np.isnan(scores)
    assert np.array_equal(mask, real) and real.sum(axis=1).tolist() == counts
    lengths = in_chunks(lambda draws: draws.mask.sum(axis=-1), hits, pilot, cut)
    for q in range(5):
        np.testing.assert_array_equal(
            lengths[q, : counts[q]], pilot.lengths[q][pilot.scores[q] > 0]
        )
    assert told[-1].scored == told[-1].scoring == sum(counts) and told[-1].judged == 1000


def test_without_a_harmful_draw_the_fallback_is_named(material):
    harmless = scored(material, 0.0)
    equal = choose_proposal(CANDIDATES, harmless)
    assert equal.text == " + ".join(f"0.2000*{name}" for name in ("target", *CANDIDATES))
    assert "None of 1,000 pilot draws" in equal.reason and "equal shares" in equal.reason
    with pytest.raises(InputError, match="none of the 1000 pilot draws is harmful"):
        search_proposal(["ablation:refusal"], harmless, strengths=[0.25, 1.0])
    named = choose_proposal(CANDIDATES, harmless, fallback="0.3*target + 0.7*target@3")
    assert named.text == "0.3*target + 0.7*target@3" and named.text in named.reason


def test_weights_are_written_so_that_they_sum_to_one():
    rng = np.random.default_rng(0)
    for count in (2, 3, 40, 400):
        weights = rng.dirichlet(np.full(count, 0.3))
        weights[0] = 0
        weights /= weights.sum()
        terms = [
            term.split("*")
            for term in weighted_terms([str(k) for k in range(count)], weights).split(" + ")
        ]
        if count > 2:
            assert sum(round(float(weight) * 10_000) for weight, _ in terms) == 10_000
            assert [int(name) for _, name in terms] == list(np.flatnonzero(weights))
            far = [abs(float(weight) - weights[int(name)]) for weight, name in terms]
            assert np.sort(far)[-2] <= 1e-4  # all but the largest, which takes the rest
    assert weighted_terms(["target", "b"], np.array([0, 1.0])) == "b"


def test_bad_input(material):
    def refused(match, call, *arguments, **options):
        with pytest.raises(InputError, match=match):
            call(*arguments, **options)

    refused("nothing to tune", choose_proposal, ["target"], material)
    refused("'0.5\\*target' isn't understood", choose_proposal, ["0.5*target + 0.5*x"], material)
    refused("sum to 1", choose_proposal, ["target@2 + 0.5*target@3"], material)
    refused("'jailbreak' isn't understood", choose_proposal, ["jailbreak"], material)
    refused("neither ablation", search_proposal, ["target@2"], material)
    refused("beyond max_new_tokens=24", search_proposal, ["ablation:refusal"], material,
            grid=Grid((25,), (1.0,)))  # fmt: skip
    refused("target_share=1", search_proposal, ["ablation:refusal"], material, target_share=1)
    refused("none is a policy", window_proposal, ["switch:4(target@2)"], material)
    silent = scored(material, np.nan)
    refused("none of the 1000 pilot draws has a score", choose_proposal, CANDIDATES, silent)
    refused("holds no proposal", read_tuned, Path("absent"))
