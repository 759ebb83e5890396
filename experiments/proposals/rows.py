"""Responses to several queries, one below the other, and their scores under many policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tailrisk_jax.policies import Component, Prompts
from tailrisk_jax.rollouts import Draws, token_log_probs

PACK = 32  # responses of one query that are scored together


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """M responses.

    Attributes:
      query: index of the query, [M].
      tokens: 0 beyond the end, [M, T].
      lengths: [M].
    """

    query: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.query)

    def identities(self) -> list[tuple[int, bytes]]:
        """What tells one response from another."""
        tokens = np.ascontiguousarray(self.tokens, np.int32)
        return [(int(q), row.tobytes()) for q, row in zip(self.query, tokens, strict=True)]


def stack(parts: Sequence[Rows]) -> Rows:
    """All of them, one below the other."""
    return Rows(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Rows)
        )
    )


def saved(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in a file, made and written first if there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **make())  # pyright: ignore[reportArgumentType]
    with np.load(path) as arrays:
        return dict(arrays)


def score(
    policies: Sequence[Component], prompts: Prompts, end_ids: tuple[int, ...], rows: Rows
) -> np.ndarray:
    """log-probabilities of the tokens under each policy, 0 beyond the end, [E, M, T] float32."""
    packs = [
        places[i : i + PACK]
        for query in np.unique(rows.query)
        for places in [np.flatnonzero(rows.query == query)]
        for i in range(0, len(places), PACK)
    ]
    length = rows.tokens.shape[1]
    tokens = np.zeros((len(packs), PACK, length), np.int32)
    lengths = np.zeros((len(packs), PACK), np.int32)
    for pack, places in enumerate(packs):
        tokens[pack, : len(places)] = rows.tokens[places]
        lengths[pack, : len(places)] = rows.lengths[places]
    mask = np.arange(length) < lengths[..., None]
    draws = Draws(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        ended=jnp.asarray(lengths < length),
        labels=jnp.zeros(lengths.shape, jnp.int32),
        drawn_log_probs=jnp.zeros(mask.shape, jnp.float32),
        prompts=prompts[np.array([rows.query[places[0]] for places in packs])],
        end_ids=end_ids,
    )
    scored = np.asarray(token_log_probs(policies, draws))
    out = np.zeros((len(policies), len(rows), length), np.float32)
    for pack, places in enumerate(packs):
        out[:, places] = scored[:, pack, : len(places)]
    return out


def padded(
    query: np.ndarray, num_queries: int, values: np.ndarray, fill: float, *, axis: int = -1
) -> np.ndarray:
    """Values of M responses, on one axis, as [Q, H] there: H is the most responses of a query."""
    axis = axis % values.ndim
    counts = np.bincount(query, minlength=num_queries)
    order = np.argsort(query, kind="stable")
    column = np.concatenate([np.arange(count) for count in counts])
    moved = np.moveaxis(values, axis, 0)
    out = np.full((num_queries, max(int(counts.max()), 1), *moved.shape[1:]), fill, values.dtype)
    out[query[order], column] = moved[order]
    return np.moveaxis(out, (0, 1), (axis, axis + 1))
