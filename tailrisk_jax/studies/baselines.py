"""Monte Carlo baselines: the paper code's files, and runs whose proposal is the target."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import Estimate, in_float64, monte_carlo
from tailrisk_jax.studies.folder import read_study
from tailrisk_jax.studies.results import read_samples


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Monte Carlo estimates of B prompts.

    Attributes:
      name: where they are from, for people.
      estimand: what is averaged, in words.
      prompts: what was asked; all different.
      scores: of each draw, NaN where it has none.
      present: False where a prompt has no such draw.
      estimate: `monte_carlo` of each prompt: exact intervals where all scores are 0 or 1.
    """

    name: str
    estimand: str
    prompts: list[str]
    scores: Float[np.ndarray, "B N"]
    present: Bool[np.ndarray, "B N"]
    estimate: Estimate

    def match(self, texts: Sequence[str]) -> "Matched":
        """Pairs it with a run's queries, by their text without the blanks around it."""
        rows = {prompt: row for row, prompt in enumerate(self.prompts)}
        own = [rows.get(text.strip(), -1) for text in texts]
        return Matched(
            baseline=self,
            rows=np.asarray(own, int),
            without=[q for q, row in enumerate(own) if row < 0],
            unused=[self.prompts[row] for row in sorted(set(rows.values()) - set(own))],
        )


@dataclasses.dataclass(frozen=True)
class Matched:
    """A baseline in the order of a run's Q queries.

    Attributes:
      rows: the prompt of each query, -1 where there is none.
      without: the queries without one.
      unused: prompts that no query asks.
    """

    baseline: Baseline
    rows: Int[np.ndarray, " Q"]
    without: list[int]
    unused: list[str]

    def figures(self, name: str) -> Float[np.ndarray, " Q"]:
        """A field of the baseline's estimate, such as "value" or "num_samples"; NaN for none."""
        values = np.asarray(getattr(self.baseline.estimate, name), float)
        return np.where(self.rows < 0, np.nan, values[self.rows])


def read_baseline(
    path: str | Path, *, threshold: float | None = None, level: float = 0.95
) -> Baseline:
    """Reads Monte Carlo draws, and estimates from them.

    A file has JSON lines {"forbidden_prompt": text, "response": [..], "score": [..]}, as the code
    of the paper (Angell et al. 2026, arXiv 2604.22167) writes them: a score in [0, 1] per response,
    NaN or null where there is none. A folder is a run of ours with the proposal `target`.

    Args:
      threshold: estimates the chance of a score of at least this much, in place of the mean score;
        the paper's is 0.75.
      level: of the intervals.

    Raises:
      InputError: no such file, a line, named by its number, that isn't of this form, a prompt that
        stands there twice, a run of something else.
    """
    path = Path(path)
    if threshold is not None and not 0 < threshold <= 1:
        raise InputError(f"threshold={threshold} must lie above 0 and at most at 1, e.g. 0.75")
    estimand, by_prompt = _of_run(path) if path.is_dir() else ("E[score]", _of_file(path))
    if not by_prompt:
        raise InputError(f"baseline {path} holds no draws; give JSON lines, or a run")
    shape = len(by_prompt), max(map(len, by_prompt.values()))
    scores, present = np.full(shape, np.nan), np.zeros(shape, bool)
    for row, own in enumerate(by_prompt.values()):
        scores[row, : len(own)], present[row, : len(own)] = own, True
    if threshold is not None:
        estimand = f"P(score >= {threshold:g}) of {estimand}"
        scores = np.where(np.isnan(scores), np.nan, scores >= threshold)
    return Baseline(
        name=str(path),
        estimand=estimand,
        prompts=list(by_prompt),
        scores=scores,
        present=present,
        estimate=in_float64(monte_carlo, scores, level=level, mask=present),
    )


def _of_file(path: Path) -> dict[str, list[float]]:
    """Scores by prompt; the responses, which can be gigabytes, are let go line by line."""
    found: dict[str, list[float]] = {}
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"baseline {path} line {number}"
                    prompt, scores = _record(line, where)
                    if prompt in found:
                        raise InputError(f"{where} repeats a prompt: {prompt[:60]!r}; keep one")
                    found[prompt] = scores
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"baseline {path} can't be read ({error}); check the path") from error
    return found


def _record(line: str, where: str) -> tuple[str, list[float]]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON ({error}); mend the line") from error
    names = ("forbidden_prompt", "response", "score")
    absent = [n for n in names if not isinstance(record, dict) or n not in record]
    if absent:
        raise InputError(f"{where} has no {absent[0]!r}; a line has {', '.join(names)}")
    prompt, responses, scores = (record[name] for name in names)
    if not isinstance(prompt, str) or not isinstance(responses, list | tuple):
        raise InputError(f"{where}: forbidden_prompt must be text and response a list; mend it")
    if not isinstance(scores, list) or not scores or len(scores) != len(responses):
        count = len(scores) if isinstance(scores, list) else 1
        raise InputError(
            f"{where} has {count} scores for {len(responses)} responses; give one for each"
        )
    return prompt.strip(), list(_scores(scores, where))


def _scores(values: list[Any], where: str) -> Iterator[float]:
    for value in values:
        score = math.nan if value is None else value
        if isinstance(score, bool | int | float) and not (score < 0 or score > 1):
            yield float(score)
        else:
            raise InputError(f"{where} has the score {value!r}; scores lie in [0, 1], or are NaN")


def _of_run(folder: Path) -> tuple[str, dict[str, list[float]]]:
    study = read_study(folder)
    if study.weighting.weights is not None or study.weighting.target_index is None:
        names = ", ".join(study.weighting.names)
        raise InputError(
            f"run {folder} drew from {names}, not from the target itself; compare it as a run"
        )
    if study.settings.until is not None:
        raise InputError(
            f"run {folder} was stopped by --until, under which no Monte Carlo interval holds; "
            "compare it as a run"
        )
    texts: dict[str, str] = {}
    for query in study.queries:
        if query.text.strip() in texts.values():
            raise InputError(
                f"run {folder} asks {query.text[:60]!r} in two queries; compare it as a run"
            )
        texts[query.id] = query.text.strip()
    samples = read_samples(folder, ["query_id", "score"])
    found: dict[str, list[float]] = {}
    pairs = zip(samples["query_id"].to_pylist(), samples["score"].to_pylist(), strict=True)
    for name, score in pairs:
        found.setdefault(texts[name], []).append(score)
    return study.estimand, found
