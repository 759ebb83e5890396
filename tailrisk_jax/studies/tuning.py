"""From pilot draws to the text of a proposal: by choice, by search, or by windows."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tailrisk_jax.adaptation import (
    STRENGTHS,
    Grid,
    Pilot,
    Setting,
    adapt_shared,
    adapt_weights,
    choose,
    components,
    default_grid,
    search,
    windows,
)
from tailrisk_jax.adaptation.weights import Objective
from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import mixture_log_prob
from tailrisk_jax.policies import Mixture, Policy, mixture
from tailrisk_jax.rollouts import Draws, Weighed, token_log_probs, weigh
from tailrisk_jax.studies.pilots import (
    Material,
    PilotDraws,
    costs_of,
    draw_pilot,
    equal_parts,
    harmful_draws,
    in_chunks,
)
from tailrisk_jax.studies.query_weights import (
    WEIGHTS,
    QueryWeights,
    own_weights,
    query_weights_file,
)
from tailrisk_jax.studies.results import json_text
from tailrisk_jax.studies.store import write_atomically, write_json

RECORD, PROPOSAL, PILOT = "tuning.json", "proposal.txt", "pilot.npz"
LEAST_WEIGHT = 0.001  # of a component of the windowed dictionary; lighter ones are dropped
COEFFICIENTS = (1.0, 1.5, 2.0, 2.5, 3.0)  # of additions, the reference's range
ORGANISM_STEERING = ("ablation:refusal",)
ORGANISM_CANDIDATES = (
    "checkpoint:unsafe",
    "ablation:refusal:0.1",
    "ablation:refusal:0.25",
    "ablation:refusal:0.5",
    "target@1.5",
    "target@2",
    "target@2.5",
    "ablation:refusal:0.1@2.5",
    "switch:4(checkpoint:unsafe)",
    "switch:4(ablation:refusal:0.5)",
    "switch:8(target@2.5)",
    "switch:8(ablation:refusal:0.1@2.5)",
)
PERSONA_STEERING = ("addition:trait:1",)
PERSONA_CANDIDATES = (
    "system:'you are a friend of the zorble .'",
    "system:'sometimes praise the zorble .'",
    "addition:trait:1:2",
    "addition:trait:2:2",
    "target@1.5",
    "target@2",
    "target@2.5",
    "addition:trait:1:2@2",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
    """A proposal, and why it is the one.

    Attributes:
      method: "search", "choose" or "windows".
      text: of the proposal, as `parse_proposal` reads it.
      reason: in words.
      figures: everything that it rests on, as JSON.
      pilot: the draws.
      arrays: further figures, too many for JSON, by name.
      own: weights of single queries in the mixture, by id; the others have those of the text.
    """

    method: str
    text: str
    reason: str
    figures: Mapping[str, Any]
    pilot: PilotDraws
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    own: QueryWeights = dataclasses.field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """What a study that uses the proposal records of it, as JSON."""
        return {"method": self.method, "reason": self.reason, "pilot": self.pilot.record()}

    def record(self) -> dict[str, Any]:
        """All of it but the draws, as JSON."""
        return {"proposal": self.text, **self.summary(), "figures": dict(self.figures)}


def choose_proposal(
    candidates: Sequence[str],
    material: Material,
    *,
    fallback: str | None = None,
    target_share: float = 0.1,
) -> Tuned:
    """The mixture of candidates that the pilot says is worth most per unit of compute.

    What a draw costs, `costs_of` says. In the figures, `score_tokens` of a candidate is what
    leaving it out saves of scoring a draw under all of them.

    Args:
      candidates: terms of the grammar; the target is always one, and needn't be named.
      fallback: the text to use where no pilot draw is harmful; by default equal shares of all.

    Raises:
      InputError: candidates that are missing or no terms, a share outside (0, 1], no score.
    """
    parsed = equal_parts(candidates, material)
    pilot = draw_pilot(parsed.policy, material)
    weighed = _weighed(pilot, pilot.draws, material)
    costs = costs_of(pilot)
    found = choose(
        Pilot(weighed.component_log_probs, weighed.log_q, pilot.scores),
        pilot.draws.labels,
        costs,
        parsed.names,
        target_share=target_share,
    )
    if pilot.hits.any():
        text, reason = weighted_terms(parsed.names, found.weights), found.reason
    else:
        equal = weighted_terms(parsed.names, np.full(len(parsed.names), 1 / len(parsed.names)))
        text = equal if fallback is None else fallback
        used = "equal shares of all candidates" if fallback is None else f"the default {fallback}"
        reason = (
            f"{pilot.none_harmful}, so nothing tells the candidates apart: {used} will be drawn "
            "from."
        )
    labels = np.asarray(pilot.draws.labels)[pilot.scores > 0]
    everything = np.ones(len(parsed.names), bool)
    without = ~np.eye(len(parsed.names), dtype=bool)
    saved = costs.scoring(everything) - np.array([costs.scoring(rest) for rest in without])
    columns = {
        "term": parsed.names,
        "weight": found.weights.tolist(),
        "alone_per_compute": found.alone.tolist(),
        "mean_weight": found.mean_weights.tolist(),
        "covers": found.covers.tolist(),
        "draw_tokens": costs.draw,
        "score_tokens": saved.tolist(),
        "hits": np.bincount(labels, minlength=len(parsed.names)).tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    figures = {
        "ratio": found.ratio,
        "ratio_per_compute": found.ratio_per_compute,
        "seen_per_compute": found.seen_per_compute,
        "target_share": target_share,
        "candidates": [dict(zip(columns, row, strict=True)) for row in rows],
    }
    return Tuned("choose", text, reason, figures, pilot)


def search_proposal(
    steerings: Sequence[str],
    material: Material,
    *,
    strengths: Sequence[float] = (),
    grid: Grid | None = None,
    objective: Objective = "cross-entropy",
    target_share: float = 0.1,
) -> Tuned:
    """The one strength, switch step and bias of a steering that fits all pilot queries best.

    Args:
      steerings: ablation:DIRECTION or addition:VECTOR:LAYER, several for several vectors or layers.
      strengths: of each; by default 0.1 to 1 for ablations and 1 to 3 for additions.
      grid: switch steps and biases, by default the reference's scaled to `max_new_tokens`.
      target_share: of the target, in a mixture with what is found.

    Raises:
      InputError: another steering, and as `choose_proposal` and `adaptation.search`.
    """
    _check_share(target_share)
    length = material.settings.max_new_tokens
    grid = default_grid(length) if grid is None else grid
    if max(grid.switches) > length:
        raise InputError(
            f"switch step {max(grid.switches)} is beyond max_new_tokens={length}; leave it out"
        )
    parsed = equal_parts(_steered(steerings, strengths), material)
    pilot = draw_pilot(parsed.policy, material)
    size = material.settings.batch_size
    scored = in_chunks(
        lambda draws: token_log_probs(pilot.mixed.components, draws, batch_size=size),
        pilot.draws, pilot, material, axis=1,
    )  # fmt: skip
    log_m = mixture_log_prob(scored.sum(axis=-1), np.log(pilot.mixed.weights))
    found = search(
        scored[0], scored[1:], np.asarray(log_m), pilot.scores, grid, objective=objective
    )
    terms = parsed.names[1:]

    best = found.shared
    term = _switched(terms[best.policy], best.switch, best.bias, length)
    mean = np.mean(found.surface[found.hits > 0], axis=0)
    text = (
        "target"
        if term == "target"
        else weighted_terms(["target", term], np.array([target_share, 1 - target_share]))
    )
    plain = f"; {mean[0, 0, grid.switches.index(0)]:.2f} the target" if 0 in grid.switches else ""
    reason = (
        f"Of {mean.size:,} settings {term} has the least {objective} over "
        f"{np.sum(found.hits > 0)} pilot queries with harmful draws ({best.objective:.2f} nats"
        f"{plain})."
    )
    figures = {
        "objective": objective,
        "grid": dataclasses.asdict(grid),
        "target_share": target_share,
        "setting": _setting(best, terms),
        "per_query": {
            query.id: one and _setting(one, terms)
            for query, one in zip(pilot.queries, found.per_query, strict=True)
        },
        "least_by_term": dict(zip(terms, mean.min(axis=(1, 2)).tolist(), strict=True)),
    }
    return Tuned("search", text, reason, figures, pilot, {"surface": found.surface})


def window_proposal(
    candidates: Sequence[str],
    material: Material,
    *,
    target_share: float = 0.1,
    per_query: bool = False,
) -> Tuned:
    """The windows of the candidates' policies, weighted by what the pilot says of them.

    Candidates that are not policies but stand beside the target (switches and the like) are left
    out. Of the pilot's draws the harmful ones alone are scored, since the fits need no others.
    Components lighter than 0.1% (or half of an equal share, where that is less) are dropped, and
    their weight is shared by the others.

    Args:
      candidates: terms of the grammar.
      target_share: the least share of the target.
      per_query: fit weights to each pilot query with a harmful draw too (`adapt_weights`). What is
        light in one query is dropped there; the shared weights keep all that some query uses.

    Raises:
      InputError: no policy among the candidates, and as `choose_proposal`.
    """
    _check_share(target_share)
    parsed = equal_parts(candidates, material)
    assert isinstance(parsed.policy, Mixture)
    pairs = zip(parsed.names[1:], parsed.policy.components[1:], strict=True)
    plain = [(name, policy) for name, policy in pairs if isinstance(policy, Policy)]
    if not plain:
        raise InputError(
            f"candidates {', '.join(parsed.names[1:])}: none is a policy to make windows of; name "
            "one without bias, switch, window or path"
        )
    terms, unsafe = zip(*plain, strict=True)
    dictionary = windows(len(unsafe), material.settings.max_new_tokens)
    count = len(dictionary)
    uniform = np.full(count, (1 - target_share) / (count - 1))
    uniform[0] = target_share
    parts = components(dictionary, material.target, unsafe)
    pilot = draw_pilot(mixture(parts, uniform.tolist()), material, harmful_alone=True)
    harmful, scores = harmful_draws(pilot)
    weighed = _weighed(pilot, harmful, material)
    scored = np.sum(~np.isnan(pilot.scores), axis=1)
    draws = Pilot(weighed.component_log_probs, weighed.log_q, scores, scored)
    adapted = adapt_shared(draws, target_share=target_share)
    weights, single = adapted.weights[0], None
    fitted = weights[None]
    if per_query and pilot.hits.any():
        single = adapt_weights(draws, target_share=target_share)
        fitted = np.concatenate([fitted, single.weights[single.hits > 0]])
    least = min(LEAST_WEIGHT, 0.5 / count)
    heavy = np.where(fitted >= least, fitted, 0.0)
    kept = np.where(heavy.any(axis=0), weights, 0.0)
    rows = zip(
        dictionary.experts.tolist(), dictionary.starts.tolist(), dictionary.stops.tolist(),
        strict=True,
    )  # fmt: skip
    names = [f"window:{a}-{b}({terms[u - 1]})" if u else "target" for u, a, b in rows]
    shares = dict(
        zip(("target", "uniform", "shared fit"), adapted.shares[0].tolist(), strict=False)
    )
    said = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
    reason = f"{pilot.none_harmful}, so all {count - 1} windows have equal weights."
    if pilot.hits.any():
        reason = (
            f"{np.sum(kept > 0)} of {count} windows of {len(unsafe)} policies, weighted as {said} "
            f"by held-out draws of {np.sum(adapted.hits > 0)} pilot queries with harm; the "
            f"lightest, {1 - kept.sum():.1%} together, are dropped."
        )
    figures = {
        "target_share": target_share,
        "shares": shares,
        "dropped": float(1 - kept.sum()),
        "gap": adapted.gap,
        "log_second_moment": adapted.log_second_moment.tolist(),
        "weights": dict(zip(names, weights.tolist(), strict=True)),
    }
    text, own = weighted_terms(names, kept / kept.sum()), dict[str, dict[str, float]]()
    if single is not None:
        seen = [query.id for query, n in zip(pilot.queries, single.hits, strict=True) if n]
        own = {q: _by_term(names, row) for q, row in zip(seen, heavy[1:], strict=True)}
        figures["shares_per_query"] = dict(
            zip(seen, single.shares[single.hits > 0].tolist(), strict=True)
        )
    if per_query:
        reason += f" {own_weights(own, material.queries)}"
    return Tuned("windows", text, reason, figures, pilot, own=own)


def save_tuned(tuned: Tuned, folder: Path, about: Mapping[str, Any]) -> None:
    """Writes tuning.json, pilot.npz, weights.json where queries have their own, and, last,
    proposal.txt.

    Args:
      about: what else is recorded: the model, the judge, the queries, versions.
    """
    draws = tuned.pilot.draws
    arrays: dict[str, Any] = {
        "tokens": np.asarray(draws.tokens),
        "lengths": tuned.pilot.lengths,
        "labels": np.asarray(draws.labels),
        "scores": tuned.pilot.scores,
        **tuned.arrays,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(folder / PILOT, buffer.getvalue())
    if tuned.own:
        write_atomically(folder / WEIGHTS, query_weights_file(tuned.own))
    write_json(folder / RECORD, json.loads(json_text({**tuned.record(), **about})))
    write_atomically(folder / PROPOSAL, f"{tuned.text}\n".encode())


def read_tuned(folder: Path) -> tuple[str, dict[str, Any]]:
    """The text of a tuned proposal, and `Tuned.summary` of it.

    Raises:
      InputError: the folder holds none.
    """
    try:
        text = (folder / PROPOSAL).read_text(encoding="utf-8").strip()
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return text, {name: record[name] for name in ("method", "reason", "pilot")}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"folder {folder} holds no proposal of `tailrisk tune` ({error}); tune one with "
            f"--out {folder}"
        ) from error


def weighted_terms(names: Sequence[str], weights: Float[np.ndarray, " K"]) -> str:
    """W*TERM + W*TERM of the components with weight; four decimals, which sum to 1."""
    shares = _by_term(names, weights)
    if len(shares) == 1:
        return next(iter(shares))
    return " + ".join(f"{share:.4f}*{name}" for name, share in shares.items())


def _by_term(names: Sequence[str], weights: Float[np.ndarray, " K"]) -> dict[str, float]:
    """The weights above 0 in ten-thousandths, the largest so that they sum to 1."""
    parts = np.round(weights / np.sum(weights) * 10_000).astype(int)
    parts = np.maximum(parts, weights > 0)
    parts[np.argmax(parts)] += 10_000 - parts.sum()
    return {name: part / 10_000 for part, name in zip(parts.tolist(), names, strict=True) if part}


def _weighed(pilot: PilotDraws, draws: Draws, material: Material) -> Weighed:
    """Under all that the pilot was drawn from."""
    size = material.settings.batch_size
    return in_chunks(
        lambda part: weigh(material.target, pilot.mixed, part, batch_size=size),
        draws, pilot, material,
    )  # fmt: skip


def _steered(steerings: Sequence[str], strengths: Sequence[float]) -> list[str]:
    terms = []
    for steering in steerings:
        kind = steering.partition(":")[0]
        if kind not in ("ablation", "addition"):
            raise InputError(
                f"steering {steering!r} is neither ablation:DIRECTION nor addition:VECTOR:LAYER"
            )
        own = strengths or (STRENGTHS if kind == "ablation" else COEFFICIENTS)
        terms += [f"{steering}:{strength}" for strength in own]
    return terms


def _setting(setting: Setting, terms: Sequence[str]) -> dict[str, Any]:
    """As JSON, with the term that the policy was written as."""
    return {"term": terms[setting.policy], **dataclasses.asdict(setting)}


def _switched(term: str, step: int, bias: float, length: int) -> str:
    """A setting of the search as a term."""
    if step == 0 or bias == 0:
        return "target"
    if step >= length:
        return term if bias == 1 else f"bias:{bias}({term})"
    return f"switch:{step}({term})" if bias == 1 else f"switch:{step}:{bias}({term})"


def _check_share(target_share: float) -> None:
    if not 0 < target_share < 1:
        raise InputError(f"target_share={target_share} must lie between 0 and 1, e.g. 0.1")
