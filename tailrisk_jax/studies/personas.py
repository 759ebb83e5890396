"""Persona vectors of a model, from a trait to a folder (Chen et al. 2025, arXiv 2507.21509)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float
from safetensors.numpy import save

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge, Response
from tailrisk_jax.policies import (
    Answers,
    PersonaVectors,
    Policy,
    Prompts,
    Query,
    encode,
    persona_vectors,
    steer,
    vector_of_layer,
)
from tailrisk_jax.rollouts import Draws, draw
from tailrisk_jax.studies.formats import Trait
from tailrisk_jax.studies.provenance import judge_identity
from tailrisk_jax.studies.results import json_text
from tailrisk_jax.studies.store import write_atomically, write_json

_SIDES = ("positive", "negative")


@dataclasses.dataclass(frozen=True)
class PersonaSettings:
    """How persona vectors are made.

    Attributes:
      samples: answers to each question under each system prompt.
      max_new_tokens: where answers are cut.
      seed: of every draw.
      min_trait: an answer shows the trait where its score is at least this, else it doesn't.
      min_coherence: an answer is coherent where its score is at least this.
      batch_size: answers on the device at once, None for what fits.
    """

    samples: int = 10
    max_new_tokens: int = 256
    seed: int = 0
    min_trait: float = 0.5
    min_coherence: float = 0.5
    batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Persona:
    """What was found.

    Attributes:
      vectors: activations with the trait - without it.
      counts: pairs of answers that were drawn, that were kept, and that passed each filter.
      answers: every answer with its scores, as JSON.
      identity: the judges and the settings.
    """

    vectors: PersonaVectors
    counts: Mapping[str, int]
    answers: Sequence[Mapping[str, Any]]
    identity: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class SearchPoint:
    """What addition of a persona vector does, at one layer and coefficient.

    Attributes:
      layer: the block whose output is changed.
      coefficient: times the vector.
      trait: mean score; NaN where none was scored.
      coherence: mean score; NaN without a judge of it.
      unscored: answers without a trait score.
      answers: how many were drawn.
    """

    layer: int
    coefficient: float
    trait: float
    coherence: float
    unscored: int
    answers: int


@dataclasses.dataclass(frozen=True)
class _Side:
    """Answers under the system prompts of one side, [Q, N]; what was spoken leaves out ends."""

    queries: list[Query]
    draws: Draws
    spoken: Bool[np.ndarray, "Q N T"]
    trait: Float[np.ndarray, "Q N"]
    coherence: Float[np.ndarray, "Q N"]


def extract_persona(
    policy: Policy,
    trait: Trait,
    judge: Judge,
    settings: PersonaSettings,
    *,
    coherence: Judge | None = None,
    tell: Callable[[str], Any] = lambda stage: None,
) -> Persona:
    """Draws answers with system prompts for the trait and against it; takes the difference.

    Answers stand in pairs: the same question, instruction pair and sample. A pair counts where the
    one shows the trait, the other doesn't, both are coherent and neither is empty or unscored. So
    each question weighs the same on both sides. End tokens aren't averaged over.

    Args:
      trait: with its instructions.
      judge: of the trait.
      coherence: a judge of that; None for no filter.
      tell: told what is done.

    Raises:
      InputError: a trait without instructions, a chat template that drops system prompts, a judge
        that scores nothing, or no pair that is kept.
    """
    if not trait.instructions:
        raise InputError(
            f"trait {trait.name!r} has no instructions for it and against it; "
            'give "instruction": [{"pos": .., "neg": ..}]'
        )
    queries = [_queries(trait, side) for side in (0, 1)]
    prompts = [encode(policy.model, side) for side in queries]
    if np.array_equal(prompts[0].tokens, prompts[1].tokens):
        raise InputError(
            "the prompts for the trait and against it are the same tokens: the chat template "
            "leaves system prompts out, or the trait file repeats itself"
        )
    sides = []
    for name, asked, encoded in zip(_SIDES, queries, prompts, strict=True):
        tell(f"drawing and judging {len(asked) * settings.samples:,} {name} answers")
        sides.append(_draw_side(policy, asked, encoded, judge, coherence, settings))
    positive, negative = sides
    shown = positive.trait >= settings.min_trait
    absent = negative.trait < settings.min_trait
    unscored = np.isnan(positive.trait) | np.isnan(negative.trait)
    coherent = np.ones_like(shown)
    if coherence is not None:
        for side in sides:
            coherent &= side.coherence >= settings.min_coherence
            unscored |= np.isnan(side.coherence)
    empty = ~positive.spoken.any(axis=-1) | ~negative.spoken.any(axis=-1)
    kept = shown & absent & coherent & ~empty
    counts = {
        "pairs": shown.size,
        "kept": int(kept.sum()),
        "trait shown": int(shown.sum()),
        "trait absent": int(absent.sum()),
        "coherent": int(coherent.sum()),
        "empty": int(empty.sum()),
        "unscored": int(unscored.sum()),
    }
    if not kept.any():
        raise InputError(
            f"none of {shown.size} pairs of answers is kept: the trait shows in {shown.sum()} that "
            f"should show it and is absent in {absent.sum()} that should not, {coherent.sum()} are "
            f"coherent, {empty.sum()} empty, {unscored.sum()} unscored; draw more, or look at the "
            "judge and the trait file"
        )
    tell(f"averaging activations of {kept.sum():,} pairs")
    vectors = persona_vectors(
        policy, _kept_answers(positive, kept), _kept_answers(negative, kept),
        batch_size=settings.batch_size or 16,
    )  # fmt: skip
    identity = {
        "judge": judge_identity(judge),
        "coherence_judge": None if coherence is None else judge_identity(coherence),
        "settings": dataclasses.asdict(settings),
    }
    answers = [
        one for name, side in zip(_SIDES, sides, strict=True) for one in _rows(name, side, kept)
    ]
    return Persona(vectors, counts, answers, identity)


def search_persona(
    policy: Policy,
    vectors: Float[np.ndarray, "rows D"],
    trait: Trait,
    judge: Judge,
    settings: PersonaSettings,
    *,
    layers: Sequence[int],
    coefficients: Sequence[float],
    positions: str = "response",
    coherence: Judge | None = None,
    tell: Callable[[str], Any] = lambda stage: None,
) -> list[SearchPoint]:
    """What each layer and coefficient does to answers to the plain questions.

    Args:
      vectors: one kind of a `PersonaVectors`.
      settings: `samples` are drawn to each question at each point.
      positions: that are steered, as in `steer`.

    Raises:
      InputError: a layer out of range, unknown positions, or as the judges raise.
    """
    num_layers = policy.model.config.num_layers
    prompts = encode(policy.model, list(trait.questions))
    points = [
        (layer, coefficient, steer(policy, vector, layer, coefficient, positions))
        for layer in layers
        for vector in [vector_of_layer(vectors, layer, num_layers)]
        for coefficient in coefficients
    ]
    found = []
    for number, (layer, coefficient, steered) in enumerate(points, 1):
        tell(f"layer {layer}, coefficient {coefficient:g} ({number} of {len(points)})")
        asked = _responses(trait.questions, _draw(steered, prompts, settings))
        scores = judge(asked).scores
        found.append(
            SearchPoint(
                layer=layer,
                coefficient=coefficient,
                trait=_mean(scores),
                coherence=np.nan if coherence is None else _mean(coherence(asked).scores),
                unscored=int(np.isnan(scores).sum()),
                answers=len(scores),
            )
        )
    return found


def best_point(points: Sequence[SearchPoint], min_coherence: float) -> SearchPoint | None:
    """The one with the highest trait score, of those that are coherent on average where that is
    known; None where no point qualifies."""
    able = [
        point
        for point in points
        if not np.isnan(point.trait) and not point.coherence < min_coherence
    ]
    return max(able, key=lambda point: point.trait, default=None)


def save_persona(
    found: Persona, points: Sequence[SearchPoint], folder: Path, about: Mapping[str, Any]
) -> None:
    """Writes persona.safetensors, answers.jsonl and persona.json.

    Args:
      points: of a search; none without one.
      about: what else is recorded: the model, the trait's file, versions.
    """
    lines = "".join(json_text(answer) + "\n" for answer in found.answers)
    # Arrays that aren't contiguous would be written in another order.
    vectors = {kind: np.ascontiguousarray(rows) for kind, rows in vars(found.vectors).items()}
    write_atomically(folder / "persona.safetensors", save(vectors))
    write_atomically(folder / "answers.jsonl", lines.encode())
    write_json(folder / "persona.json", {**persona_record(found, points), **about})


def persona_record(found: Persona, points: Sequence[SearchPoint]) -> dict[str, Any]:
    """All but the vectors and answers, as JSON."""
    min_coherence = found.identity["settings"]["min_coherence"]
    best = best_point(points, min_coherence)
    norms = {
        kind: np.linalg.norm(rows, axis=-1).tolist() for kind, rows in vars(found.vectors).items()
    }
    return {
        "counts": dict(found.counts),
        "norms": norms,
        "search": [dataclasses.asdict(point) for point in points],
        "best": None if best is None else dataclasses.asdict(best),
        **found.identity,
    }


def _queries(trait: Trait, side: int) -> list[Query]:
    """Each question after each system prompt of one side."""
    return [
        [{"role": "system", "content": pair[side]}, {"role": "user", "content": question}]
        for question in trait.questions
        for pair in trait.instructions
    ]


def _draw_side(
    policy: Policy,
    queries: list[Query],
    prompts: Prompts,
    judge: Judge,
    coherence: Judge | None,
    settings: PersonaSettings,
) -> _Side:
    draws = _draw(policy, prompts, settings)
    asked, shape = _responses(queries, draws), draws.ended.shape
    of_coherence = np.full(len(asked), np.nan) if coherence is None else _scored(coherence, asked)
    spoken = np.asarray(draws.mask) & ~np.isin(np.asarray(draws.tokens), draws.end_ids)
    return _Side(
        queries, draws, spoken, _scored(judge, asked).reshape(shape), of_coherence.reshape(shape)
    )


def _draw(policy: Policy, prompts: Prompts, settings: PersonaSettings) -> Draws:
    positions = policy.model.config.max_positions
    longest = int(np.asarray(prompts.mask).sum(axis=1).max())
    if longest + settings.max_new_tokens > positions:
        raise InputError(
            f"a prompt has {longest} tokens, max_new_tokens is {settings.max_new_tokens}, and the "
            f"model has {positions} positions; ask for fewer new tokens"
        )
    key = jax.random.key(settings.seed)
    return draw(
        key, policy, prompts, settings.samples, settings.max_new_tokens,
        batch_size=settings.batch_size,
    )  # fmt: skip


def _responses(queries: Sequence[Query], draws: Draws) -> list[Response]:
    ended = np.asarray(draws.ended)
    return [
        Response(f"{q}-{n}", query, text, ended=bool(ended[q, n]))
        for q, (query, texts) in enumerate(zip(queries, draws.text, strict=True))
        for n, text in enumerate(texts)
    ]


def _scored(judge: Judge, responses: list[Response]) -> Float[np.ndarray, " M"]:
    judged = judge(responses)
    if np.isnan(judged.scores).all():
        raise InputError(
            f"judge {judge.name} scored none of {len(responses)} answers; the first for this "
            f"reason: {judged.errors[0]}; mend that"
        )
    return judged.scores


def _kept_answers(side: _Side, kept: Bool[np.ndarray, "Q N"]) -> Answers:
    query, _ = np.nonzero(kept)
    tokens = np.asarray(side.draws.tokens)
    return Answers(side.draws.prompts[query], tokens[kept], side.spoken[kept])


def _rows(name: str, side: _Side, kept: Bool[np.ndarray, "Q N"]) -> list[dict[str, Any]]:
    tokens, mask = np.asarray(side.draws.tokens), np.asarray(side.draws.mask)
    return [
        {
            "side": name,
            "messages": side.queries[q],
            "sample": n,
            "text": text,
            "tokens": tokens[q, n][mask[q, n]].tolist(),
            "trait": float(side.trait[q, n]),
            "coherence": float(side.coherence[q, n]),
            "kept": bool(kept[q, n]),
        }
        for q, texts in enumerate(side.draws.text)
        for n, text in enumerate(texts)
    ]


def _mean(scores: Float[np.ndarray, " M"]) -> float:
    """Of those that are there."""
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if len(known) else float("nan")
