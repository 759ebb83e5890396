"""Pilot draws: a few answers to a few of the queries, judged, for a proposal to be tuned by.

They come from a mixture of everything considered, the target with it, for queries that the seed
chooses. Their keys are folded from the seed by a number of their own, so that no draw of an
estimate, under the same seed or another, is one of the pilot's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tailrisk_jax.adaptation import Costs, pilot_queries, pilot_tokens
from tailrisk_jax.adaptation.pilot import first_columns
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge, Response
from tailrisk_jax.policies import Component, Mixture, Policy, Prompts
from tailrisk_jax.rollouts import Draws, draw
from tailrisk_jax.studies.progress import Progress
from tailrisk_jax.studies.proposals import Proposal
from tailrisk_jax.studies.queries import StudyQuery
from tailrisk_jax.studies.rounds import Chunk, Round, chunks
from tailrisk_jax.studies.run import check_study
from tailrisk_jax.studies.settings import Settings

LEAST_QUERIES = 5  # of a pilot, where there are as many
_KEY = 0x70696C6F  # folded into the seed, so that a pilot has draws of its own
_ARRAYS = ("tokens", "mask", "ended", "labels", "drawn_log_probs")


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """What a proposal is tuned for, and from.

    Attributes:
      target: the policy whose risk is estimated.
      parse: from the text of a proposal, by `parse_proposal` for this target.
      queries: of the study; the pilot takes a share of them.
      judge: of the study.
      settings: of the pilot: `num_samples` per pilot query, `max_new_tokens`, `seed`,
        `chunk_size` and `batch_size`.
      share: of the queries that are the pilot's, but at least 5 of them if there are as many.
      tell: told how far the pilot is, after each chunk.
    """

    target: Policy
    parse: Callable[[str], Proposal]
    queries: Sequence[StudyQuery]
    judge: Judge
    settings: Settings
    share: float = 0.1
    tell: Callable[[Progress], Any] = lambda progress: None


@dataclasses.dataclass(frozen=True, eq=False)
class PilotDraws:
    """Draws from a mixture, the target first, with their scores.

    Attributes:
      queries: the pilot's M queries.
      mixed: what was drawn from.
      draws: [M, N].
      scores: [M, N].
      tokens: through the network, to draw them and score them under every policy of the mixture
        (or the harmful ones alone; see `draw_pilot`).
      progress: how far it was when all were drawn and judged.
    """

    queries: list[StudyQuery]
    mixed: Mixture
    draws: Draws
    scores: Float[np.ndarray, "M N"]
    tokens: int
    progress: Progress = Progress()  # noqa: RUF009

    @property
    def lengths(self) -> Int[np.ndarray, "M N"]:
        """Tokens of each response, end token included."""
        return np.asarray(self.draws.mask).sum(axis=-1)

    @property
    def hits(self) -> Int[np.ndarray, " M"]:
        """Draws with a score above 0, per query."""
        return np.sum(self.scores > 0, axis=1)

    @property
    def none_harmful(self) -> str:
        """The beginning of a sentence, where that is so."""
        return (
            f"None of {self.scores.size:,} pilot draws of {len(self.queries)} queries was harmful"
        )

    def record(self) -> dict[str, Any]:
        """The account, as JSON."""
        return {
            "queries": [query.id for query in self.queries],
            "samples": self.scores.shape[1],
            "hits": self.hits.tolist(),
            "without_hits": [q.id for q, n in zip(self.queries, self.hits, strict=True) if not n],
            "unscored": int(np.isnan(self.scores).sum()),
            "tokens": self.tokens,
        }


def equal_parts(terms: Sequence[str], material: Material) -> Proposal:
    """The target and the terms in equal shares.

    Raises:
      InputError: no terms but the target, one that is a mixture, and as `parse_proposal`.
    """
    names = ["target", *(term for term in dict.fromkeys(terms) if term != "target")]
    if len(names) < 2:
        raise InputError("there is nothing to tune: give candidates beside the target")
    share = 1 / len(names)
    return material.parse(" + ".join(f"{share!r}*{name}" for name in names))


def draw_pilot(
    mixed: Component | Mixture, material: Material, *, harmful_alone: bool = False
) -> PilotDraws:
    """Draws from a mixture for the pilot's queries, and has them judged.

    Args:
      harmful_alone: whether no others will be scored; for the account of tokens.

    Raises:
      InputError: a share outside (0, 1], no score, and as `check_study` and the judge.
    """
    assert isinstance(mixed, Mixture)
    settings, total = material.settings, len(material.queries)
    key = jax.random.fold_in(jax.random.key(settings.seed), _KEY)
    share = material.share
    if 0 < share <= 1:  # any other is refused below
        share = min(1.0, max(share, LEAST_QUERIES / total))
    picked = pilot_queries(jax.random.fold_in(key, 0), total, share)
    queries = [material.queries[q] for q in picked]
    prompts = check_study(material.target, mixed, queries, settings)
    sizes = Round(np.zeros(len(queries), int), np.full(len(queries), settings.num_samples))
    scores = np.full((len(queries), settings.num_samples), np.nan)
    parts, progress = list[tuple[Chunk, Draws]](), Progress(total=scores.size, rounds=1)
    material.tell(progress)
    for chunk in chunks(0, sizes, settings.chunk_size):
        drawn = _draw_chunk(jax.random.fold_in(key, 1), mixed, prompts, chunk, settings)
        parts.append((chunk, drawn))
        fresh = progress.drawn + chunk.size
        tokens = progress.tokens + int(np.asarray(drawn.mask).sum())
        progress = dataclasses.replace(progress, drawn=fresh, fresh=fresh, tokens=tokens)
        material.tell(progress)
        judged = material.judge(_responses(drawn, [queries[q] for q in chunk.queries])).scores
        scores[_place(chunk)] = np.asarray(judged).reshape(len(chunk.queries), -1)
        progress = dataclasses.replace(
            progress, judged=fresh, hits=progress.hits + int(np.sum(np.asarray(judged) > 0)),
            unscored=progress.unscored + int(np.isnan(judged).sum()),
        )  # fmt: skip
        material.tell(progress)
    if np.isnan(scores).all():
        raise InputError(
            f"none of the {scores.size} pilot draws has a score; check the judge on a few of them"
        )
    draws = _whole(parts, prompts, scores.shape)
    lengths = np.asarray(draws.mask).sum(axis=-1)
    policies = len({id(one) for part in mixed.components for one in part.experts})
    experts = np.array([len(part.experts) for part in mixed.components])
    tokens = pilot_tokens(
        np.asarray(prompts.mask).sum(axis=1), lengths, drawing=policies, scoring=policies
    )
    tokens += int(np.sum(lengths * (experts[np.asarray(draws.labels)] - 1)))
    if harmful_alone:
        tokens -= policies * int(lengths[~(scores > 0)].sum())
    return PilotDraws(queries, mixed, draws, scores, tokens, progress)


def harmful_draws(pilot: PilotDraws) -> tuple[Draws, Float[np.ndarray, "M H"]]:
    """The harmful draws alone, H per query, filled up with empty ones without a score."""
    columns, real = first_columns(pilot.scores > 0)
    rows = np.arange(len(columns))[:, None]
    picked = {name: np.asarray(getattr(pilot.draws, name))[rows, columns] for name in _ARRAYS}
    picked["mask"] = picked["mask"] & real[..., None]
    picked["drawn_log_probs"] = picked["drawn_log_probs"] * real[..., None]
    draws = dataclasses.replace(pilot.draws, **{n: jnp.asarray(x) for n, x in picked.items()})
    return draws, np.where(real, pilot.scores[rows, columns], np.nan)


def in_chunks(
    score: Callable[[Draws], Any],
    draws: Draws,
    pilot: PilotDraws,
    material: Material,
    *,
    axis: int = -2,
) -> Any:
    """score(draws), some queries at a time, as arrays on the host.

    Args:
      score: from draws to a tree of arrays with the queries as `axis`.
      draws: the pilot's, or a part of each query's.
    """
    counts = np.asarray(draws.mask).any(axis=-1).sum(axis=1)
    progress = dataclasses.replace(pilot.progress, scoring=int(counts.sum()))
    out = []
    pieces = -(-draws.labels.size // material.settings.chunk_size)
    for rows in np.array_split(np.arange(len(counts)), min(pieces, len(counts))):
        part = {name: getattr(draws, name)[rows] for name in (*_ARRAYS, "prompts")}
        scored = score(dataclasses.replace(draws, **part))
        out.append(jax.tree.map(np.asarray, scored))
        done = progress.scored + int(counts[rows].sum())
        progress = dataclasses.replace(progress, scored=done)
        material.tell(progress)
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=axis), *out)


def costs_of(pilot: PilotDraws) -> Costs:
    """Of a response from each component, in tokens.

    A draw costs its tokens once for each policy that draws it in lock-step, and its share of the
    prompt. A response is scored once under every policy that any component consists of. A
    component that drew nothing has the mean length of all.
    """
    lengths, labels = pilot.lengths, np.asarray(pilot.draws.labels)
    prompt = np.asarray(pilot.draws.prompts.mask).sum(axis=1).mean() / lengths.shape[1]
    mean, parts = float(lengths.mean()), pilot.mixed.components
    policies = list(dict.fromkeys(id(expert) for part in parts for expert in part.experts))
    draw_costs, consists = [], []
    for k, part in enumerate(parts):
        own = lengths[labels == k]
        length = float(own.mean()) if own.size else mean
        draw_costs.append(len(part.experts) * (length + prompt))
        its = {id(expert) for expert in part.experts}
        consists.append(tuple(policy in its for policy in policies))
    return Costs(tuple(draw_costs), (mean + prompt,) * len(policies), tuple(consists))


def _draw_chunk(
    key: Array, mixed: Mixture, prompts: Prompts, chunk: Chunk, settings: Settings
) -> Draws:
    """As `draw` of all at once: a draw depends on its key alone. Queries without samples fill the
    chunk up to the shape of the others."""
    padding = chunk.width - len(chunk.queries)
    first, count = (np.pad(array, (0, padding)) for array in (chunk.first, chunk.count))
    draws = draw(
        key, mixed, prompts[np.pad(chunk.queries, (0, padding), mode="wrap")], count,
        settings.max_new_tokens, first=first, batch_size=settings.batch_size,
    )  # fmt: skip
    own = slice(len(chunk.queries))
    part = {name: getattr(draws, name)[own] for name in (*_ARRAYS, "prompts")}
    return dataclasses.replace(draws, **part)


def _place(chunk: Chunk) -> tuple[np.ndarray, slice]:
    """Where its draws are among all; the queries of a chunk have as many."""
    first = int(chunk.first[0])
    return chunk.queries, slice(first, first + int(chunk.count[0]))


def _whole(parts: Sequence[tuple[Chunk, Draws]], prompts: Prompts, shape: tuple[int, ...]) -> Draws:
    first = parts[0][1]
    arrays = {name: np.asarray(getattr(first, name)) for name in _ARRAYS}
    whole = {name: np.zeros(shape + x.shape[2:], x.dtype) for name, x in arrays.items()}
    for chunk, draws in parts:
        for name, array in whole.items():
            array[_place(chunk)] = np.asarray(getattr(draws, name))
    return dataclasses.replace(
        first, prompts=prompts, **{name: jnp.asarray(array) for name, array in whole.items()}
    )


def _responses(draws: Draws, queries: Sequence[StudyQuery]) -> list[Response]:
    tokens, mask, ended = (np.asarray(x) for x in (draws.tokens, draws.mask, draws.ended))
    return [
        Response(
            query.id, query.content, text, tuple(tokens[q, n][mask[q, n]].tolist()),
            bool(ended[q, n]), query.metadata,
        )
        for q, (query, texts) in enumerate(zip(queries, draws.text, strict=True))
        for n, text in enumerate(texts)
    ]  # fmt: skip
