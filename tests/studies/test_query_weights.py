"""Weights of single queries: files, rows, and what is refused."""

import numpy as np
import pytest

from tailrisk_jax.errors import InputError
from tailrisk_jax.organisms import OrganismHarm
from tailrisk_jax.policies import Mixture, Policy
from tailrisk_jax.studies import StudyQuery, parse_proposal
from tailrisk_jax.studies.learning import LearnSettings, learn
from tailrisk_jax.studies.query_weights import (
    own_weights,
    query_weights_file,
    read_query_weights,
    weights_hash,
    with_query_weights,
)
from tests.oracles import random_model, tiny_config

TARGET = Policy(random_model(tiny_config()))
PROPOSAL = parse_proposal("0.2*target + 0.3*target@2 + 0.5*target@3", TARGET)
OWN = {"b": {"target": 0.4, "target@3": 0.6}, "elsewhere": {"target": 0.1, "target@2": 0.9}}
QUERIES = [StudyQuery(name, f"{name}?") for name in "abc"]


def test_each_query_has_its_own_weights_or_the_shared_ones():
    found = with_query_weights(PROPOSAL, OWN, QUERIES)
    assert found.names == PROPOSAL.names and found.files == PROPOSAL.files
    assert isinstance(found.policy, Mixture)
    wanted = [[0.2, 0.3, 0.5], [0.4, 0.0, 0.6], [0.2, 0.3, 0.5]]
    np.testing.assert_allclose(found.policy.weights, wanted, rtol=1e-6)
    assert found.policy.components[0] is TARGET
    assert own_weights(OWN, QUERIES).startswith("1 of 3 queries have weights of their own")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "weights.json"
    assert read_query_weights(path) == {}
    path.write_bytes(query_weights_file(OWN))
    assert read_query_weights(path) == OWN
    for damaged in ("{", "[1]", '{"b": {"target": "much"}}', '{"b": 1}'):
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"weights.json can't be read"):
            read_query_weights(path)


def test_the_hash_is_of_the_weights_and_not_of_the_names_in_terms():
    moved = parse_proposal("0.2*target + 0.3*target@2.0 + 0.5*target@3", TARGET)
    renamed = OWN | {"elsewhere": {"target": 0.1, "target@2.0": 0.9}}
    first = weights_hash(PROPOSAL, OWN)
    assert weights_hash(moved, renamed) == first
    other = OWN | {"elsewhere": {"target": 0.2, "target@2": 0.8}}
    assert weights_hash(PROPOSAL, other) != first != weights_hash(PROPOSAL, {"b": OWN["b"]})


@pytest.mark.parametrize(
    ("proposal", "own", "named"),
    [
        ("target", OWN, "'target' is no mixture"),
        ("0.5*target + 0.5*target@2", OWN, "query 'b' has a weight for 'target@3'"),
        (None, {"b": {"target": 0.4}}, "weights of query 'b' sum to 0.4"),
        (None, {"b": {"target": 1.4, "target@2": -0.4}}, "the least is -0.4"),
        (None, {"b": {"target": float("nan")}}, "sum to nan"),
    ],
)
def test_what_does_not_fit_is_refused(proposal, own, named):
    parsed = PROPOSAL if proposal is None else parse_proposal(proposal, TARGET)
    with pytest.raises(InputError, match=named) as caught:
        with_query_weights(parsed, own, QUERIES)
    assert "\n" not in str(caught.value)


def test_an_adapter_is_not_learned_from_weights_per_query(tmp_path):
    start = with_query_weights(PROPOSAL, OWN, QUERIES).policy
    with pytest.raises(InputError, match="the start has weights per query"):
        learn(TARGET, start, QUERIES, OrganismHarm(), LearnSettings(), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
