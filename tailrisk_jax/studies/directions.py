"""A model's refusal direction, from queries to a folder."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import (
    DirectionScores,
    Policy,
    Prompts,
    choose_direction,
    encode,
    mean_differences,
    post_instruction_tokens,
    refusal_log_odds,
    score_directions,
)
from tailrisk_jax.reports.plots import plot_direction_scores
from tailrisk_jax.rollouts.blocks import rows_that_fit, score_row_bytes
from tailrisk_jax.studies.provenance import content_hash
from tailrisk_jax.studies.queries import StudyQuery
from tailrisk_jax.studies.store import write_atomically, write_json


@dataclasses.dataclass(frozen=True)
class DirectionSettings:
    """How a refusal direction is found.

    Attributes:
      train, validation: queries of each set that directions are formed from, and scored on.
      seed: of the choice of queries.
      filtered: leave out harmful queries that the model doesn't refuse, and harmless ones that it
        does: log-odds of a refusal token of at most 0, and of at least 0.
      max_kl, min_induced: thresholds of `choose_direction`.
      drop_last: the share of layers, the last ones, that have no candidates.
      batch_size: prompts on the device at once, None for what fits.
    """

    train: int = 128
    validation: int = 32
    seed: int = 0
    filtered: bool = True
    max_kl: float = 0.1
    min_induced: float = 0.0
    drop_last: float = 0.2
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("train", "validation", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")


@dataclasses.dataclass(frozen=True)
class RefusalDirection:
    """What was found.

    Attributes:
      pos: of the chosen direction, counted from the end.
      layer: at whose input it was measured.
      directions: all of them, not normalised.
      scores: of the candidates.
      tokens: ids that refusals begin with.
      settings: that it was found with.
      queries: by set and use, the ids of the queries and a hash of their contents.
    """

    pos: int
    layer: int
    directions: Float[np.ndarray, "positions L D"]
    scores: DirectionScores
    tokens: tuple[int, ...]
    settings: DirectionSettings
    queries: Mapping[str, Mapping[str, Any]]

    @property
    def vector(self) -> Float[np.ndarray, " D"]:
        """The chosen direction, not normalised."""
        return self.directions[self.pos, self.layer]

    def record(self) -> dict[str, Any]:
        """All but the vectors, as JSON."""
        scores = self.scores
        passing = scores.passing(max_kl=self.settings.max_kl, min_induced=self.settings.min_induced)
        candidates = [
            {
                "pos": int(position) - passing.shape[0],
                "layer": int(layer),
                "refusal": float(scores.refusal[position, layer]),
                "induced": float(scores.induced[position, layer]),
                "kl": float(scores.kl[position, layer]),
                "passes": bool(passing[position, layer]),
            }
            for position, layer in np.argwhere(np.isfinite(scores.refusal))
        ]
        return {
            "pos": self.pos,
            "layer": self.layer,
            "norm": float(np.linalg.norm(self.vector)),
            "plain": {"refusal": scores.plain_refusal, "induced": scores.plain_induced},
            "candidates": candidates,
            "refusal_tokens": list(self.tokens),
            "settings": dataclasses.asdict(self.settings),
            "queries": {name: dict(of) for name, of in self.queries.items()},
        }


def find_refusal_direction(
    policy: Policy,
    harmful: Sequence[StudyQuery],
    harmless: Sequence[StudyQuery],
    tokens: Sequence[int],
    settings: DirectionSettings = DirectionSettings(),
    *,
    on_progress: Callable[[int, int], Any] = lambda done, total: None,
) -> RefusalDirection:
    """Forms directions from some queries of both sets, and chooses by their effect on others.

    Arditi et al. 2024 (arXiv 2406.11717): differences in means at every token that the chat
    template writes after the instruction, and every layer; see `score_directions` and
    `choose_direction`.

    Args:
      tokens: ids that refusals begin with.
      on_progress: told how many rows are scored, of how many.

    Raises:
      InputError: fewer queries than are needed, none that the model refuses or none that it
        answers, or no direction that meets the thresholds.
    """
    parts = {
        (name, use): chosen
        for name, queries in (("harmful", harmful), ("harmless", harmless))
        for use, chosen in _split(name, queries, settings).items()
    }
    contents = [query.content for chosen in parts.values() for query in chosen]
    positions = post_instruction_tokens(policy.model, contents)
    whole = encode(policy.model, contents)  # of one length, so that little is compiled
    size = settings.batch_size or _batch_size(policy, whole)
    rows = min(size, settings.validation)
    sets, account, start = {}, {"harmful": {}, "harmless": {}}, 0
    for (name, use), chosen in parts.items():
        prompts = whole[start : start + len(chosen)]
        start += len(chosen)
        if settings.filtered:
            odds = refusal_log_odds(policy, prompts, tokens, batch_size=rows)
            keep = np.flatnonzero(odds > 0 if name == "harmful" else odds < 0)
            _check_some(name, use, odds, keep)
            prompts, chosen = prompts[keep], [chosen[i] for i in keep]
        sets[name, use] = prompts
        account[name][use] = {
            "ids": [query.id for query in chosen],
            "sha256": content_hash([query.content for query in chosen]),
        }
    directions = mean_differences(
        policy, sets["harmful", "train"], sets["harmless", "train"],
        positions=positions, batch_size=rows,
    )  # fmt: skip
    scores = score_directions(
        policy, directions, sets["harmful", "validation"], sets["harmless", "validation"], tokens,
        drop_last=settings.drop_last, batch_size=size, on_progress=on_progress,
    )  # fmt: skip
    pos, layer = choose_direction(scores, max_kl=settings.max_kl, min_induced=settings.min_induced)
    return RefusalDirection(pos, layer, directions, scores, tuple(tokens), settings, account)


def save_direction(found: RefusalDirection, folder: Path, about: Mapping[str, Any]) -> None:
    """Writes direction.safetensors, mean_differences.safetensors, direction.json and a picture.

    Dashed in the picture: the score without steering, and the two thresholds.

    Args:
      about: what else is recorded: the model, the files of the queries, versions.
    """
    arrays = {"direction": found.vector, "mean_differences": found.directions}
    for name, array in arrays.items():
        content = save({name: np.ascontiguousarray(array)})  # others are written in another order
        write_atomically(folder / f"{name}.safetensors", content)
    write_json(folder / "direction.json", {**found.record(), **about})
    scores, settings = found.scores, found.settings
    panels = {
        "log-odds of refusal on harmful, ablated": (scores.refusal, scores.plain_refusal),
        "log-odds of refusal on harmless, added": (scores.induced, settings.min_induced),
        "KL on harmless, ablated (nats)": (scores.kl, settings.max_kl),
    }
    plot_direction_scores(panels, (found.pos, found.layer), folder / "direction_scores.png")


def _split(
    name: str, queries: Sequence[StudyQuery], settings: DirectionSettings
) -> dict[str, list[StudyQuery]]:
    """The queries of one set by their use, chosen by the seed."""
    needed = settings.train + settings.validation
    if len(queries) < needed:
        raise InputError(
            f"the {name} set has {len(queries)} queries, and {settings.train} to form directions "
            f"from with {settings.validation} to score them on are {needed}; give more queries, or "
            "ask for fewer"
        )
    order = np.random.default_rng(settings.seed).permutation(len(queries))
    chosen = [queries[i] for i in order[:needed]]
    return {"train": chosen[: settings.train], "validation": chosen[settings.train :]}


def _check_some(name: str, use: str, odds: np.ndarray, keep: np.ndarray) -> None:
    if not len(keep):
        wanted = "refused" if name == "harmful" else "answered"
        raise InputError(
            f"none of the {len(odds)} {name} queries for {use} is {wanted}: the log-odds of a "
            f"refusal token lie between {odds.min():.1f} and {odds.max():.1f}; check the refusal "
            "tokens, or keep them all with --no-filter"
        )


def _batch_size(policy: Policy, prompts: Prompts) -> int:
    itemsize = policy.model.params["embedding"].dtype.itemsize
    return rows_that_fit(score_row_bytes(policy.model.config, 0, prompts.tokens.shape[1], itemsize))
