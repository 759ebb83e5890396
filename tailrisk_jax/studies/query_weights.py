"""Weights of single queries in a mixture whose weights the others share: kept by query id.

In weights.json: {QUERY ID: {TERM: WEIGHT, ..}, ..}, each query's weights summing to 1; terms that
are not named have none.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import Mixture, mixture
from tailrisk_jax.studies.proposals import Proposal
from tailrisk_jax.studies.provenance import content_hash
from tailrisk_jax.studies.queries import StudyQuery

WEIGHTS = "weights.json"

QueryWeights = Mapping[str, Mapping[str, float]]


def with_query_weights(
    proposal: Proposal, own: QueryWeights, queries: Sequence[StudyQuery]
) -> Proposal:
    """The mixture with a row of weights for each query: its own, or else the shared ones.

    Raises:
      InputError: as `weights_hash`.
    """
    policy = proposal.policy
    rows = _rows(proposal, own)
    assert isinstance(policy, Mixture)
    whole = mixture(policy.components, np.concatenate([np.asarray(policy.weights)[None], rows]))
    place = {name: 1 + row for row, name in enumerate(own)}
    picked = np.array([place.get(query.id, 0) for query in queries])
    return dataclasses.replace(proposal, policy=whole.for_queries(picked))


def weights_hash(proposal: Proposal, own: QueryWeights) -> str:
    """Of all weights by query id, whatever the names of the files in the proposal's terms.

    Raises:
      InputError: a proposal that is no mixture, a term that it doesn't have, weights that are
        below 0 or don't sum to 1.
    """
    return content_hash(dict(zip(own, _rows(proposal, own).tolist(), strict=True)))


def own_weights(own: QueryWeights, queries: Sequence[StudyQuery]) -> str:
    """In words: how many of these queries have some."""
    count = sum(query.id in own for query in queries)
    return (
        f"{count:,} of {len(queries):,} queries have weights of their own; the others share the "
        "proposal's."
    )


def read_query_weights(path: Path) -> dict[str, dict[str, float]]:
    """What a file holds; nothing where there is none.

    Raises:
      InputError: a damaged file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(query): {str(term): float(weight) for term, weight in weights.items()}
            for query, weights in content.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} can't be read ({error}); restore it, or tune again: it holds "
            "{query id: {term: weight}}"
        ) from error


def query_weights_file(own: QueryWeights) -> bytes:
    """What `read_query_weights` reads."""
    lines = (f"{json.dumps(query)}: {json.dumps(dict(own[query]))}" for query in own)
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _rows(proposal: Proposal, own: QueryWeights) -> Float[np.ndarray, "M K"]:
    if not isinstance(proposal.policy, Mixture):
        raise InputError(
            f"queries have weights of their own, and the proposal {proposal.names[0]!r} is no "
            "mixture; tune it again"
        )
    rows = np.zeros((len(own), len(proposal.names)))
    place = {name: k for k, name in enumerate(proposal.names)}
    for row, (query, weights) in zip(rows, own.items(), strict=True):
        for term, weight in weights.items():
            if term not in place:
                raise InputError(
                    f"query {query!r} has a weight for {term!r}, which the proposal doesn't name; "
                    "tune it again"
                )
            row[place[term]] = weight
        if not (np.all(row >= 0) and abs(row.sum() - 1) <= 1e-6):
            raise InputError(
                f"the weights of query {query!r} sum to {row.sum():.6g}, the least is "
                f"{row.min():.6g}; give weights of 0 or more that sum to 1"
            )
    return rows
