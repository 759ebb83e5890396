"""Learning a proposal, round by round: draw, judge, measure, train, keep.

    DIR/adapter_config.json, adapter_model.safetensors    the adapter, as peft reads it
    DIR/learn.json, DIR/rounds/N/    what was drawn, seen and trained; see learning_folder.py

A killed run goes on from what it has kept, and a finished one goes on when more rounds are asked
for, both to the same adapter as one run. A response is scored once under each policy: what a new
round adds is its own responses under all proposals so far, and those before it under the latest
adapter, so that the cost of a round's scoring grows with its number, not with the square of it.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tailrisk_jax.adaptation.learning import (
    Harmful,
    Shares,
    coefficients,
    divergences,
    effective_hits,
    harmful_responses,
    joined,
    log_balance,
    log_contributions,
    log_mixture,
)
from tailrisk_jax.adaptation.training import (
    ALL_LINEAR,
    Training,
    examples,
    fit,
    init_adapter,
)
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge, Response
from tailrisk_jax.models import save_adapter
from tailrisk_jax.policies import Component, Mixture, Policy, Prompts, mixture, with_adapter
from tailrisk_jax.rollouts import Draws, draw
from tailrisk_jax.rollouts.network import network
from tailrisk_jax.rollouts.score import sequence_log_probs
from tailrisk_jax.studies.learning_folder import Drawn, LearningFolder, Trained
from tailrisk_jax.studies.provenance import content_hash
from tailrisk_jax.studies.queries import StudyQuery
from tailrisk_jax.studies.run import check_study
from tailrisk_jax.studies.settings import Settings

_INIT, _DRAW = 0, 1  # folded into the seed's key; a round's number is folded into the second


@dataclasses.dataclass(frozen=True)
class LearnSettings:
    """How a proposal is learned.

    Attributes:
      rounds: trainings at most; fewer once the estimated KL stops falling.
      samples: N, responses per query and round, and once more for the last adapter's figures.
      max_new_tokens: T.
      seed: of draws, adapter and batches.
      rank, alpha, targets: of the adapter; see `init_adapter`.
      shares: of the draws and the proposal.
      training: of one round; its adapter_share is set from the shares.
      rows: responses in a step, and `micro_rows` of them on the device at once.
      batch_size: responses that are drawn or scored at once, None for what fits.
    """

    rounds: int = 4
    samples: int = 500
    max_new_tokens: int = 64
    seed: int = 0
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ALL_LINEAR
    shares: Shares = Shares()  # noqa: RUF009
    training: Training = Training()  # noqa: RUF009
    rows: int = 64
    micro_rows: int = 64
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("rounds", "rank", "rows", "micro_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        self.study  # noqa: B018  (checks the rest)

    @property
    def study(self) -> Settings:
        """The part that studies have too."""
        return Settings(
            num_samples=self.samples, max_new_tokens=self.max_new_tokens, seed=self.seed,
            batch_size=self.batch_size,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Learned:
    """What was learned.

    Attributes:
      adapter: of the round that was best on draws of the next.
      best: how many rounds it was trained for; 0 if even the first was no better than the target
        by its figures, though its adapter is what there is.
      record: as learn.json has it.
    """

    adapter: dict[str, Any]
    best: int
    record: dict[str, Any]


def learn(
    target: Policy,
    start: Component | Mixture,
    queries: Sequence[StudyQuery],
    judge: Judge,
    settings: LearnSettings,
    folder: Path,
    about: Mapping[str, Any],
    *,
    environment: Mapping[str, Any] | None = None,
    base: str | None = None,
    tell: Callable[[dict[str, Any]], Any] = lambda record: None,
) -> Learned:
    """Trains an adapter of the target on harmful draws by iterated cross-entropy.

    The keys of its draws are none that a study draws with, whatever the seed of either.

    Args:
      start: the proposal that the first round draws from, beside the target.
      folder: holds what is learned; a folder of the same learning is gone on with, with more
        rounds too.
      about: of model, queries, judge and start, for learn.json; another can't be gone on with.
      environment: for learn.json too.
      base: the model's name, as peft notes it.
      tell: told each round's record.

    Raises:
      InputError: as `check_study`; a start with weights per query; no score or no harmful response
        in the first round; a folder of another learning.
    """
    if isinstance(start, Mixture) and start.per_query:
        raise InputError(
            "the start has weights per query, and an adapter is learned from all queries together; "
            "give a mixture whose weights they share"
        )
    prompts = check_study(target, start, queries, settings.study)
    own = dataclasses.asdict(dataclasses.replace(settings, rounds=1, batch_size=None))
    kept = LearningFolder(
        folder,
        content_hash([own, dict(about)]),  # more rounds can be asked for later
        {**about, "settings": dataclasses.asdict(settings), "environment": dict(environment or {})},
    )
    learned = _Learner(target, start, queries, judge, settings, prompts).run(kept, tell)
    save_adapter(learned.adapter, target.model, folder, base=base)
    return learned


class _Learner:
    """What all rounds share, and what those before have found.

    Attributes:
      found: the harmful responses of each round.
      log_q: of these, under the target, the parts of the start, and the adapters that were needed
        so far.
      adapters: of each round.
    """

    def __init__(
        self,
        target: Policy,
        start: Component | Mixture,
        queries: Sequence[StudyQuery],
        judge: Judge,
        settings: LearnSettings,
        prompts: Prompts,
    ):
        self.target, self.queries, self.judge = target, queries, judge
        self.settings, self.prompts = settings, prompts
        if isinstance(start, Mixture):
            self.parts, self.part_weights = start.components, np.asarray(start.weights)
        else:
            self.parts, self.part_weights = (start,), np.ones(1)
        self.key = jax.random.key(settings.seed)
        self.found: list[Harmful] = []
        self.log_q: list[np.ndarray] = []
        self.adapters: list[Any] = []

    def run(self, folder: LearningFolder, tell: Callable[[dict[str, Any]], Any]) -> Learned:
        """All rounds that are still missing, and the figures of the last adapter."""
        records, best, content = [], 0, {}
        for number in range(self.settings.rounds + 1):
            kept = folder.read_drawn(number)
            drawn = kept or self._draw(number)
            record = drawn.record
            best = number if record["falls"] else best
            folder.log([*records, record], best)  # before all else, so that it says whose this is
            if kept is None:
                folder.write_drawn(number, drawn)
            self.found.append(drawn.hits)
            self.log_q.append(drawn.log_q)
            goes_on = record["falls"] and number < self.settings.rounds
            if goes_on:
                trained = folder.read_trained(number)
                if trained is None:
                    trained = self._train(number)
                    folder.write_trained(number, trained)
                seconds = round(record["seconds"] + trained.record["seconds"], 1)
                record = record | trained.record | {"seconds": seconds}
                self.log_q = self._with(trained.earlier)
                self.adapters.append(trained.adapter)
            records.append(record)
            content = folder.log(records, best)
            tell(record)
            if not goes_on:
                break
        return Learned(self.adapters[max(best, 1) - 1], best, content)

    def _draw(self, number: int) -> Drawn:
        """Harmful responses of a fresh draw, scored under all there is, and what they say."""
        began = time.monotonic()
        adapted = [with_adapter(self.target, one) for one in self.adapters]
        components: list[Component] = [self.target, *self.parts, *adapted]
        hits, record = self._drawn(number, components)
        log_q = self._scored(hits, components)
        record |= self._measure(number, hits, log_q)
        return Drawn(hits, log_q, record | {"seconds": round(time.monotonic() - began, 1)})

    def _drawn(
        self, number: int, components: Sequence[Component]
    ) -> tuple[Harmful, dict[str, Any]]:
        settings, shares = self.settings, self._shares(number)
        used = np.flatnonzero(shares).tolist()
        key = jax.random.fold_in(jax.random.fold_in(self.key, _DRAW), number)
        draws = draw(
            key, mixture([components[k] for k in used], shares[used].tolist()), self.prompts,
            settings.samples, settings.max_new_tokens, batch_size=settings.batch_size,
        )  # fmt: skip
        scores = self._judged(draws)
        hits = harmful_responses(draws.tokens, draws.mask, scores)
        counts = np.asarray(hits.scores > 0).sum(axis=1)
        if number == 0 and not counts.any():
            raise InputError(
                f"none of {scores.size} draws of the start proposal and the target is harmful, so "
                "there is nothing to learn from; give a stronger --start or more --samples"
            )
        return hits, {
            "round": number,
            "draws": int(scores.size),
            "unscored": int(np.isnan(scores).sum()),
            "hits": int(counts.sum()),
            "queries_without_hits": int((counts == 0).sum()),
            "tokens": int(np.asarray(draws.mask).sum()),
        }

    def _judged(self, draws: Draws) -> Float[np.ndarray, "Q N"]:
        tokens, mask, ended = (np.asarray(x) for x in (draws.tokens, draws.mask, draws.ended))
        responses = [
            Response(
                query.id, query.content, text, tuple(tokens[q, n][mask[q, n]].tolist()),
                bool(ended[q, n]), query.metadata,
            )
            for q, (query, texts) in enumerate(zip(self.queries, draws.text, strict=True))
            for n, text in enumerate(texts)
        ]  # fmt: skip
        judged = self.judge(responses)
        if np.isnan(judged.scores).all():
            raise InputError(
                f"judge {self.judge.name} scored none of {len(responses)} answers; the first for "
                f"this reason: {judged.errors[0]}; mend that"
            )
        return np.asarray(judged.scores).reshape(ended.shape)

    def _shares(self, number: int) -> Float[np.ndarray, " K"]:
        return self.settings.shares.of_round(number, self.part_weights)

    def _scored(self, hits: Harmful, components: Sequence[Component]) -> Float[np.ndarray, "K Q H"]:
        shape = np.shape(hits.scores)
        draws = Draws(
            tokens=jnp.asarray(hits.tokens),
            mask=jnp.asarray(hits.mask),
            ended=jnp.zeros(shape, bool),
            labels=jnp.zeros(shape, jnp.int32),
            drawn_log_probs=jnp.zeros(hits.mask.shape, jnp.float32),
            prompts=self.prompts,
            end_ids=self.target.model.config.end_ids,
        )
        return sequence_log_probs(components, draws, batch_size=self.settings.batch_size)

    def _with(self, earlier: Float[np.ndarray, "Q H"] | None) -> list[np.ndarray]:
        """`log_q` of every round, of those before the last under the latest adapter too."""
        if earlier is None:
            return self.log_q
        ends = np.cumsum([hits.scores.shape[1] for hits in self.found[:-1]])
        parts = np.split(earlier, ends[:-1], axis=1)
        before = zip(self.log_q[:-1], parts, strict=True)
        return [*(np.concatenate([one, part[None]]) for one, part in before), self.log_q[-1]]

    def _proposals(self, log_q: Float[np.ndarray, "K Q H"]) -> Float[np.ndarray, "A Q H"]:
        """What each adapter is for: the target's share beside it; log_q is of the adapters."""
        share = self.settings.shares.target
        return np.stack([log_mixture(np.stack([log_q[0], one]), np.array([share, 1 - share]))
                         for one in log_q[1:]])  # fmt: skip

    def _measure(
        self, number: int, hits: Harmful, log_q: Float[np.ndarray, "K Q H"]
    ) -> dict[str, Any]:
        """Of this round's draws, which no adapter was trained on."""
        log_m = log_mixture(log_q, self._shares(number))
        terms = log_contributions(log_q[0], log_m, hits.scores)
        log_p_h = log_contributions(log_q[0], np.zeros_like(log_m), hits.scores)
        judged = np.concatenate([log_q[:1], log_q[:1], log_q[1 + len(self.parts) :]])
        kl = divergences(terms, log_p_h, self._proposals(judged), hits.drawn)
        means = [float(np.nanmean(row)) if np.isfinite(row).any() else None for row in kl]
        falls = number == 0 or (
            None not in means and means[-1] < means[-2]  # type: ignore[operator]
        )
        return {
            "kl": means[-1],  # of the latest adapter
            "kl_before": means[-2] if number else None,
            "kl_by_query": [None if np.isnan(x) else round(float(x), 4) for x in kl[-1]],
            "ess": float(np.median(effective_hits(terms))),
            "falls": bool(falls),
        }

    def _train(self, number: int) -> Trained:
        """On the responses of all rounds."""
        began, settings, adapters, earlier = time.monotonic(), self.settings, self.adapters, None
        scored = self.log_q
        if adapters:
            latest = [with_adapter(self.target, adapters[-1])]
            earlier = self._scored(joined(self.found[:-1]), latest)[0]
            scored = self._with(earlier)
        pool, log_q = joined(self.found), np.concatenate(scored, axis=2)
        shares = [self._shares(r) for r in range(number + 1)]
        log_m = log_balance(log_q, shares, np.stack([hits.drawn for hits in self.found]))
        log_p, scores = log_q[0], pool.scores
        terms = log_contributions(log_p, log_m, scores)
        start = log_q[0] if not adapters else log_q[-1]
        log_start = self._proposals(np.stack([log_p, start]))[0]
        weights = coefficients(terms)
        moments = coefficients(terms + log_contributions(log_p, log_start, scores))
        share = settings.shares.target
        rows = np.nonzero(weights + moments > 0)
        data = examples(
            self.prompts[rows[0]], np.asarray(pool.tokens)[rows], np.asarray(pool.mask)[rows],
            weights[rows], moments=moments[rows], log_rest=np.log(share) + log_p[rows],
            log_start=log_start[rows],
        )  # fmt: skip
        training = dataclasses.replace(settings.training, adapter_share=1 - share)
        adapter = adapters[-1] if adapters else init_adapter(
            jax.random.fold_in(self.key, _INIT), self.target.model.config, rank=settings.rank,
            alpha=settings.alpha, targets=settings.targets,
        )  # fmt: skip
        adapter, log = fit(
            training, network(self.target), adapter, data,
            odds=(weights + training.penalty * moments)[rows], rows=settings.rows,
            micro_rows=settings.micro_rows, seed=(settings.seed, number),
        )  # fmt: skip
        tenths = np.array_split(np.arange(training.steps), min(10, training.steps))
        means = {
            name: [round(float(np.mean(values[part])), 4) for part in tenths]
            for name, values in log.items()
            if name != "tokens"
        }
        record = {
            "training": means,
            "trained_tokens": int(log["tokens"].sum()),
            "seconds": round(time.monotonic() - began, 1),
        }
        return Trained(adapter, earlier, record)
