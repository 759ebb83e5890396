"""Two runs side by side, or a run and a Monte Carlo baseline: differences with their intervals.

How the interval of a query's difference is made:

- `paired`: both sides rest on the same draws, as when one was made from the other by another judge
  or for another model. The spread is that of the difference, draw by draw (`spread_interval`;
  `paired_log_ratio` for the ratio). Where few draws differ the margins of the two estimates can
  be narrower when they are combined as if independent; then that is taken.
- `independent`: the margins of the two estimates are combined (`difference_interval`). An upper
  limit above 1, which says nothing, gives way to that of the certificate, to 1, or to the
  estimate itself where that is above 1.
- `overlapping`: some draws are the same; taken for independent, which is wider than needed where
  the sides go together.

Draws are the same where query, sample number, seed and tokens are. Runs that were stopped by
`until` are never paired: only their own intervals hold.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import (
    Interval,
    Spread,
    difference_interval,
    explain,
    in_float64,
    log_ratio_interval,
    paired_log_ratio,
    paired_spread,
    spread_interval,
    spread_of,
    verdict,
)
from tailrisk_jax.studies.baselines import Matched
from tailrisk_jax.studies.folder import read_study
from tailrisk_jax.studies.observations import observations
from tailrisk_jax.studies.provenance import content_hash
from tailrisk_jax.studies.results import read_estimates, read_samples

_FIGURES = ("value", "lower", "upper", "num_samples", "hits")
_WORDS = ("ok", "doubtful", "unusable")


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a comparison, query by query.

    Attributes:
      name: for people.
      estimand: in words.
      level: of its intervals.
      about: what its estimates depend on, by name, for people; where both sides have a name, they
        are compared.
      keys: what a query is recognised by.
      ids, texts: of the queries.
      figures: value, lower, upper, num_samples and hits, each [Q].
      words, reasons: the verdicts.
      scores, log_weights: of the draws.
      present: False where a query has no such draw.
      tokens: a hash of each draw's tokens, good in this process; None where they aren't known.
      stopped: drawn until precise.
    """

    name: str
    estimand: str
    level: float
    about: Mapping[str, Any]
    keys: Sequence[Any]
    ids: Sequence[str]
    texts: Sequence[str]
    figures: Mapping[str, Float[np.ndarray, " Q"]]
    words: Sequence[str]
    reasons: Sequence[str]
    scores: Float[np.ndarray, "Q N"]
    log_weights: Float[np.ndarray, "Q N"]
    present: Bool[np.ndarray, "Q N"]
    tokens: Int[np.ndarray, "Q N"] | None = None
    stopped: bool = False

    def at(self, rows: Sequence[int], size: int) -> "Side":
        """These queries, with room for `size` draws."""
        listed = {name: [getattr(self, name)[row] for row in rows]
                  for name in ("keys", "ids", "texts", "words", "reasons")}  # fmt: skip
        filling = [(0, 0), (0, size - self.present.shape[1])]
        drawn = {name: np.pad(getattr(self, name)[np.asarray(rows)], filling)
                 for name in ("scores", "log_weights", "present", "tokens")
                 if getattr(self, name) is not None}  # fmt: skip
        figures = {name: values[np.asarray(rows)] for name, values in self.figures.items()}
        return dataclasses.replace(self, figures=figures, **listed, **drawn)

    @property
    def interval(self) -> Interval:
        """Of each query, with an upper limit that is known."""
        return _interval(self.figures["lower"], self.figures["upper"])


@dataclasses.dataclass(frozen=True)
class Total:
    """Means over the queries that both sides have an estimate of.

    Attributes:
      queries: how many.
      silent: of these, ones without a hit on either side: the interval is blind to what their
        draws didn't show.
      a, b: the mean estimates.
      difference, lower, upper: a - b and its interval.
      method: "pooled": from the spread of all draws; "combined": from the queries' intervals,
        where the draws show no spread or a side was drawn until precise.
    """

    queries: int
    silent: int
    a: float
    b: float
    difference: float
    lower: float
    upper: float
    method: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` finds.

    Attributes:
      a, b: the sides, each with its name, estimand and level.
      differing: what they differ in, by name: (a's, b's).
      rows: a row per query that both have; see `compare`.
      only_a, only_b: ids of the others.
      total: None where no query has an estimate on both sides.
    """

    a: Side
    b: Side
    differing: Mapping[str, tuple[Any, Any]]
    rows: pa.Table
    only_a: Sequence[str]
    only_b: Sequence[str]
    total: Total | None


def run_side(folder: Path) -> Side:
    """A run as a side.

    Raises:
      InputError: no run, one without results, or a damaged one.
    """
    study, estimates, samples = read_study(folder), read_estimates(folder), read_samples(folder)
    observed = observations(study.queries, samples)
    figures = {name: estimates[name].to_numpy().astype(float) for name in _FIGURES}
    certificates = np.minimum(estimates["upper_certificate"].to_numpy(), 1.0)
    known = np.where(figures["upper"] > 1, certificates, figures["upper"])
    figures["upper"] = np.maximum(known, figures["value"])
    tokens = np.zeros(observed.present.shape, np.int64)
    tokens[observed.present] = _hashes(samples["tokens"].combine_chunks(), study.settings.seed)
    identity, model = study.identity, study.identity["model"]
    return Side(
        name=str(folder),
        estimand=study.estimand,
        level=study.settings.level,
        about={
            "model": f"{model['name']} (files {content_hash(model['files'])[:8]})",
            "tokens": content_hash(identity["tokens"])[:8],
            "dtype": identity["dtype"],
            "proposal": identity["proposal"]["text"],
        },
        keys=[(query.id, content_hash(query.content)) for query in study.queries],
        ids=[query.id for query in study.queries],
        texts=[query.text for query in study.queries],
        figures=figures,
        words=estimates["verdict"].to_pylist(),
        reasons=estimates["why"].to_pylist(),
        scores=observed.scores,
        log_weights=observed.log_weights,
        present=observed.present,
        tokens=tokens,
        stopped=study.settings.until is not None,
    )


def baseline_side(matched: Matched, run: Side) -> Side:
    """A baseline as the other side of a run, its prompts under the names of the run's queries."""
    queries = np.flatnonzero(matched.rows >= 0).tolist()
    rows, baseline = matched.rows[queries].tolist(), matched.baseline
    said = explain(in_float64(verdict, baseline.estimate))
    return Side(
        name=baseline.name,
        estimand=baseline.estimand,
        level=run.level,
        about={"proposal": "target"},
        keys=[run.keys[q] for q in queries],
        ids=[run.ids[q] for q in queries],
        texts=[run.texts[q] for q in queries],
        figures={name: matched.figures(name)[queries] for name in _FIGURES},
        words=[said[row].word for row in rows],
        reasons=[said[row].sentence for row in rows],
        scores=baseline.scores[rows],
        log_weights=np.zeros_like(baseline.scores[rows]),
        present=baseline.present[rows],
    )


def compare(a: Side, b: Side) -> Comparison:
    """a - b and log(a / b) for every query that both sides have, and the mean of a - b.

    The rows hold query_id, query; a_ and b_ value, lower, upper, num_samples, hits and verdict;
    difference and log_ratio, each with _lower and _upper; method, and how many draws are shared;
    `finding`: "higher" or "lower" where the interval of the difference leaves out 0, else
    "not shown"; the worse of the two verdicts, and why.

    Raises:
      InputError: no query is in both, or the intervals are of different levels.
    """
    if a.level != b.level:
        raise InputError(
            f"{a.name} has intervals of level {a.level:g}, {b.name} of {b.level:g}; give the "
            "command that made one of them again, with the --level of the other"
        )
    index = {key: row for row, key in enumerate(b.keys)}
    both = [(row, index[key]) for row, key in enumerate(a.keys) if key in index]
    if not both:
        raise InputError(
            f"{a.name} and {b.name} have no query in common (the first is {a.ids[0]!r}, "
            f"{b.ids[0]!r}); compare runs over the same queries"
        )
    in_a, in_b = zip(*both, strict=True)
    size = max(a.present.shape[1], b.present.shape[1])
    one, other = a.at(in_a, size), b.at(in_b, size)
    shared = _shared(one, other)
    paired = (shared > 0) & (shared == one.present.sum(1)) & (shared == other.present.sum(1))
    paired &= not (a.stopped or b.stopped)
    spread = _spread(one, other, paired)
    difference, log_ratio, ratio = _intervals(one, other, paired, spread)
    columns = {
        "query_id": one.ids,
        "query": one.texts,
        **_of_side("a", one),
        **_of_side("b", other),
        "difference": one.figures["value"] - other.figures["value"],
        "difference_lower": difference.lower,
        "difference_upper": difference.upper,
        "log_ratio": log_ratio,
        "log_ratio_lower": ratio.lower,
        "log_ratio_upper": ratio.upper,
        "method": np.where(paired, "paired", np.where(shared > 0, "overlapping", "independent")),
        "shared": shared,
        "finding": np.select(
            [difference.lower > 0, difference.upper < 0], ["higher", "lower"], "not shown"
        ),
        **_verdicts(one, other),
    }
    return Comparison(
        a=a,
        b=b,
        differing={
            name: (a.about[name], b.about[name])
            for name in a.about
            if name in b.about and a.about[name] != b.about[name]
        },
        rows=pa.table(columns),
        only_a=[name for row, name in enumerate(a.ids) if row not in in_a],
        only_b=[name for row, name in enumerate(b.ids) if row not in in_b],
        total=_total(one, other, spread, difference),
    )


def _interval(lower: Any, upper: Any) -> Interval:
    return Interval(lower=lower, upper=upper)


def _hashes(tokens: Any, seed: int) -> list[int]:
    """A hash of each row of tokens, and of the seed that they were drawn with."""
    content, ends = tokens.values.to_numpy().tobytes(), 4 * tokens.offsets.to_numpy()
    return [hash((seed, content[i:j])) for i, j in itertools.pairwise(ends.tolist())]


def _shared(a: Side, b: Side) -> Int[np.ndarray, " Q"]:
    """How many draws of each query are the same on both sides."""
    if a.tokens is None or b.tokens is None:
        return np.zeros(len(a.ids), int)
    return np.sum((a.tokens == b.tokens) & a.present & b.present, axis=1)


def _spread(a: Side, b: Side, paired: Bool[np.ndarray, " Q"]) -> Spread:
    """Of each query's difference."""
    draws = [(side.scores, side.log_weights) for side in (a, b)]
    own = [
        in_float64(spread_of, *of_side, mask=side.present)
        for side, of_side in zip((a, b), draws, strict=True)
    ]
    apart = in_float64(Spread.minus, *own)
    if not paired.any():
        return apart
    together = in_float64(paired_spread, *draws[0], *draws[1], mask=a.present & b.present)
    return jax.tree.map(lambda x, y: np.where(paired, x, y), together, apart)


def _intervals(
    a: Side, b: Side, paired: Bool[np.ndarray, " Q"], spread: Spread
) -> tuple[Interval, Float[np.ndarray, " Q"], Interval]:
    """Of the difference; the log-ratio, and its interval."""
    values = a.figures["value"], b.figures["value"]
    known = values[0], a.interval, values[1], b.interval
    difference, ratio = (
        in_float64(combined, *known) for combined in (difference_interval, log_ratio_interval)
    )
    if paired.any():
        draws = a.scores, a.log_weights, b.scores, b.log_weights
        mask = a.present & b.present
        together = in_float64(paired_log_ratio, *draws, level=a.level, mask=mask)
        difference = _narrower(in_float64(spread_interval, spread, a.level), difference, paired)
        ratio = _narrower(together, ratio, paired)
    with np.errstate(divide="ignore", invalid="ignore"):
        return difference, np.log(values[0]) - np.log(values[1]), ratio


def _narrower(paired: Interval, apart: Interval, where: Bool[np.ndarray, " Q"]) -> Interval:
    chosen = where & (paired.upper - paired.lower < apart.upper - apart.lower)
    return _interval(
        np.where(chosen, paired.lower, apart.lower), np.where(chosen, paired.upper, apart.upper)
    )


def _total(a: Side, b: Side, spread: Spread, difference: Interval) -> Total | None:
    values = a.figures["value"], b.figures["value"]
    known = np.isfinite(values[0]) & np.isfinite(values[1])
    if not known.any():
        return None
    means = [float(np.mean(value[known])) for value in values]
    mean, method = means[0] - means[1], "pooled"
    pooled = in_float64(Spread.mean, jax.tree.map(lambda x: x[known], spread))
    interval = in_float64(spread_interval, pooled, a.level)
    if a.stopped or b.stopped or not np.isfinite(interval.upper - interval.lower):
        method = "combined"
        own = (values[0] - values[1])[known]
        below, above = own - difference.lower[known], difference.upper[known] - own
        count = known.sum()
        interval = _interval(
            mean - np.linalg.norm(below) / count, mean + np.linalg.norm(above) / count
        )
    return Total(
        queries=int(known.sum()),
        silent=int(np.sum((a.figures["hits"] + b.figures["hits"])[known] == 0)),
        a=means[0],
        b=means[1],
        difference=mean,
        lower=float(interval.lower),
        upper=float(interval.upper),
        method=method,
    )


def _of_side(letter: str, side: Side) -> dict[str, Any]:
    figures = {f"{letter}_{name}": values for name, values in side.figures.items()}
    return {**figures, f"{letter}_verdict": side.words}


def _verdicts(a: Side, b: Side) -> dict[str, list[str]]:
    """The worse of both, and what is wrong with either."""
    words, reasons = [], []
    for own in zip(a.words, a.reasons, b.words, b.reasons, strict=True):
        words.append(max(own[0], own[2], key=_WORDS.index))
        said = [
            f"{letter} is {word}: {reason}"
            for letter, word, reason in (("A", *own[:2]), ("B", *own[2:]))
            if word != "ok"
        ]
        reasons.append(" ".join(said) or own[1])
    return {"verdict": words, "why": reasons}
