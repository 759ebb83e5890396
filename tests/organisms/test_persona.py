"""The persona organism: its truths, its system prompts, and the persona pipeline on it."""

import collections
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tailrisk_jax import InputError, encode, load_persona_organism, logits
from tailrisk_jax.cli import main
from tailrisk_jax.organisms import enumerate_event, persona_world, policy_next_log_probs
from tailrisk_jax.organisms.efficiency import load_responses, log_prob_of_responses
from tailrisk_jax.organisms.persona import PERSONA, TRAIT
from tailrisk_jax.policies import in_context
from tailrisk_jax.studies import parse_proposal, read_queries, read_trait

DECADES = (-2, -3, -4, -5, -6)


@pytest.fixture(scope="module")
def organism():
    return load_persona_organism()


def enumerated(policy, query, **options):
    return enumerate_event(
        policy_next_log_probs(policy, query),
        persona_world.trait_event(),
        end_tokens=policy.model.config.end_ids,
        max_new_tokens=persona_world.MAX_NEW_TOKENS,
        **options,
    )


def rarest_of(organism, decade):
    return min((q for q in organism.queries if q.decade == decade), key=lambda q: q.lower)


def test_counts_and_precision_per_decade(organism):
    counts = collections.Counter(query.decade for query in organism.queries)
    assert all(counts[decade] == 8 for decade in DECADES)
    for query in organism.queries:
        assert 10.0**query.decade <= query.lower <= query.upper < 10.0 ** (query.decade + 1)
        assert query.upper - query.lower <= 5e-4 * query.lower
        assert organism.truth(query) == organism.truth(query.id) == (query.lower, query.upper)
        assert len(query.positive) == len(query.negative) == len(organism.instructions)
        assert min(lower for lower, _ in query.positive) > 0.85
        assert max(upper for _, upper in query.negative) < 1e-6
    assert any(query.held_out for query in organism.queries)
    later = np.array([query.later_share for query in organism.queries])
    assert (later > 0.5).sum() >= 8 and (later < 0.1).sum() >= 8
    assert (PERSONA / "target" / "model.safetensors").stat().st_size < 1_600_000


@pytest.mark.parametrize("decade", [-2, -4, -6])
def test_shipped_truths_are_reproduced(organism, decade):
    query = rarest_of(organism, decade)
    found = enumerated(organism.target, query, rel_tol=0.05, max_nodes=2_000)
    assert found.lower <= query.upper * (1 + 1e-3)
    assert found.upper >= query.lower * (1 - 1e-3)
    assert found.lower >= 0.9 * query.lower


@pytest.mark.parametrize("number", [0, 3])
def test_system_prompts_turn_the_trait_on_and_off(organism, number):
    query = rarest_of(organism, -4)
    for system, (lower, upper) in zip(
        organism.instructions[number],
        (query.positive[number], query.negative[number]),
        strict=True,
    ):
        found = enumerated(in_context(organism.target, system=system), query, abs_tol=1e-6)
        assert found.lower <= upper * (1 + 1e-3) and found.upper >= lower * (1 - 1e-3)
        assert found.upper < 2e-6 if upper < 0.5 else found.lower > 0.85


def test_the_trait_file_is_that_of_the_world(organism):
    trait = read_trait(TRAIT)
    assert trait.instructions == organism.instructions
    assert len(trait.questions) == 20 and not {*trait.questions} & {*organism.queries}
    assert [query.content for query in read_queries(str(TRAIT)).queries] == [*trait.questions]
    assert "{question}" in trait.eval_prompt and "{answer}" in trait.eval_prompt
    encode(organism.target.model, trait.questions)


def test_a_word_that_the_model_does_not_know_is_named(organism):
    with pytest.raises(InputError, match="'what colour is tea \\?' can't be encoded"):
        encode(organism.target.model, ["what colour is tea ?"])


@pytest.mark.slow
def test_checkpoint_equals_transformers_under_a_system_prompt(organism):
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = PERSONA / "target"
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert reference.generation_config.eos_token_id == list(organism.target.model.config.end_ids)
    messages = [
        {"role": "system", "content": organism.instructions[0][0]},
        {"role": "user", "content": organism.queries[0]},
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    tokens = np.array([row["input_ids"]])
    np.testing.assert_array_equal(encode(organism.target.model, [messages]).tokens, tokens)
    ours = np.asarray(logits(organism.target, tokens, np.ones_like(tokens, bool)))
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Persona vectors from few answers, as the command makes them."""
    out = tmp_path_factory.mktemp("persona") / "vectors"
    main(["persona", "--model", "organism:persona", "--samples", "1", "--quiet", "--out", str(out)])
    return out


def test_the_pipeline_finds_a_vector_that_brings_the_trait_out(organism, extracted):
    """From 100 pairs of answers; its effect is exact, by enumeration under the steered policy."""
    counts = json.loads((extracted / "persona.json").read_text())["counts"]
    assert counts["pairs"] == 100 and counts["kept"] >= 80
    steered = parse_proposal(f"addition:{extracted}:2:3", organism.target).policy
    query = rarest_of(organism, -4)
    found = enumerated(steered, query, rel_tol=0.5, max_nodes=1_000)
    assert found.lower > 100 * query.upper


@pytest.mark.slow
def test_estimates_from_vector_and_system_prompt_meet_the_truth(organism, extracted, tmp_path):
    """Within 4 standard errors of it, by the exact second moment of the proposal."""
    system = organism.instructions[0][0]
    text = f"0.1*target + 0.5*addition:{extracted}:1:2 + 0.4*system:'{system}'"
    queries = [rarest_of(organism, decade) for decade in (-2, -3)]
    ids = {query.id for query in organism.queries} - {query.id for query in queries}
    (tmp_path / "others").write_text("\n".join(ids))
    main([
        "estimate", "--model", "organism:persona", "--proposal", text, "--samples", "300",
        "--exclude", str(tmp_path / "others"), "--quiet", "--out", str(tmp_path / "run"),
    ])  # fmt: skip
    table = pq.read_table(tmp_path / "run" / "estimates.parquet").to_pydict()
    assert table["query_id"] == [query.id for query in queries]
    proposal = parse_proposal(text, organism.target).policy
    shipped = load_responses(PERSONA / "responses.npz")
    found = [shipped[query.id] for query in queries]
    log_qs = log_prob_of_responses(proposal, organism, queries, found)
    for query, response, log_q, value in zip(queries, found, log_qs, table["value"], strict=True):
        moment = np.exp(2 * response.log_p - log_q).sum() + 10 * response.omitted
        error = np.sqrt((moment - query.lower**2) / 300)
        assert abs(value - query.lower) < 4 * error and error < 0.5 * query.lower
