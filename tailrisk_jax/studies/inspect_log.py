"""A run as a log of Inspect AI, made by Inspect's own classes.

Each query is a sample, each draw of it an epoch. A draw has its score, NaN where it has none, as
Inspect has it for unscored; its metadata hold sample, log_p, log_q, log_weight, component and
ended. The estimates are under results: the mean and the highest risk as metrics, the row of each
query in the metadata. Inspect's own mean over epochs would be that of the proposal, so none is
written: the score of a draw counts by its weight.

Needs the extra `inspect`.
"""

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tailrisk_jax.errors import InputError
from tailrisk_jax.policies import Query
from tailrisk_jax.studies.folder import Study, read_study
from tailrisk_jax.studies.provenance import content_hash
from tailrisk_jax.studies.results import read_estimates, read_samples
from tailrisk_jax.studies.store import read_json, write_atomically

SCORER = "tailrisk"


def write_inspect_log(folder: Path, path: Path, samples: int | None = None) -> int:
    """Writes a run's results as an Inspect log, and returns how many draws are in it.

    Args:
      samples: the first so many draws of each query; None for all. Inspect takes some
        milliseconds for each.

    Raises:
      InputError: Inspect isn't installed, no run, one without results, a path that doesn't end in
        .eval or can't be written.
    """
    if path.suffix != ".eval":
        raise InputError(f"--out {path} must end in .eval, by which Inspect knows its logs")
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: there is no folder {path.parent}; make it first")
    log = inspect_log(folder, samples)
    from inspect_ai.log import write_eval_log

    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "log.eval"
        write_eval_log(log, str(whole))
        write_atomically(path, whole.read_bytes())
    return len(log.samples)


def inspect_log(folder: Path, samples: int | None = None) -> Any:
    """The EvalLog of a run's results; `samples` as in `write_inspect_log`.

    Raises:
      InputError: as `write_inspect_log`.
    """
    try:
        from inspect_ai.log import (
            EvalConfig,
            EvalDataset,
            EvalLog,
            EvalResults,
            EvalSpec,
            EvalStats,
        )
        from inspect_ai.model import GenerateConfig
    except ImportError as error:
        raise InputError(
            f"Inspect AI can't be imported ({error}); pip install 'tailrisk-jax[inspect]'"
        ) from error
    study = read_study(folder)
    absent = f"run {folder} has no results yet; finish it with: tailrisk resume {folder}"
    summary = read_json(folder / "summary.json", absent)
    estimates = read_estimates(folder).to_pylist()
    table = read_samples(folder)
    total = table.num_rows
    if samples is not None:
        table = table.filter(pc.field("sample") < samples)
    draws = _draws(study, table)
    first, last = _times(folder)
    settings, identity = study.settings, study.identity
    results = EvalResults(
        total_samples=total,
        completed_samples=len(draws),
        scores=[_scores(summary, draws)],
        metadata={
            "estimates": {row["query_id"]: row for row in estimates},
            "summary": summary,
        },
    )
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=first,
            run_id=content_hash(study.fixed),
            task_id=content_hash(study.fixed),
            task=f"tailrisk/{folder.resolve().name}",
            task_args={"estimand": study.estimand, "proposal": identity["proposal"]["text"]},
            dataset=EvalDataset(
                name=str(study.selection.get("file") or "queries"),
                samples=len(study.queries),
                sample_ids=[query.id for query in study.queries],
            ),
            model=f"tailrisk/{identity['model']['name']}",
            model_generate_config=GenerateConfig(
                temperature=identity["temperature"],
                max_tokens=settings.max_new_tokens,
                seed=settings.seed,
            ),
            config=EvalConfig(epochs=max((draw.epoch for draw in draws), default=0)),
            packages=summary["environment"]["packages"],
            metadata={"study": study.record()},
        ),
        results=results,
        stats=EvalStats(started_at=first, completed_at=last),
        samples=draws,
    )


def _draws(study: Study, table: pa.Table) -> list[Any]:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput

    queries = {query.id: _messages(query.content) for query in study.queries}
    model, names = study.identity["model"]["name"], study.weighting.names
    draws = []
    for row in table.to_pylist():
        answer = ChatMessageAssistant(content=row["text"], model=model, source="generate")
        stop = "stop" if row["ended"] else "max_tokens"
        draws.append(
            EvalSample(
                id=row["query_id"],
                epoch=row["sample"] + 1,
                input=queries[row["query_id"]],
                target="",
                messages=[*queries[row["query_id"]], answer],
                output=ModelOutput(
                    model=model, choices=[ChatCompletionChoice(message=answer, stop_reason=stop)]
                ),
                scores={SCORER: _score(row)},
                metadata={
                    "sample": row["sample"],
                    "log_p": row["log_p"],
                    "log_q": row["log_q"],
                    "log_weight": row["log_p"] - row["log_q"],
                    "component": names[row["component"]],
                    "ended": row["ended"],
                },
            )
        )
    return draws


def _times(folder: Path) -> tuple[str, str]:
    """When a run was begun and when its results were written."""
    ends = (folder / name for name in ("study.json", "summary.json"))
    first, last = (datetime.fromtimestamp(end.stat().st_mtime, UTC).isoformat() for end in ends)
    sessions = folder / "sessions.jsonl"
    if sessions.exists():
        with open(sessions) as lines:
            first = json.loads(next(lines))["started"]
    return first, last


def _messages(content: Query) -> list[Any]:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    if isinstance(content, str):
        return [ChatMessageUser(content=content)]
    kinds = {
        "system": ChatMessageSystem,
        "user": ChatMessageUser,
        "assistant": ChatMessageAssistant,
    }
    return [kinds.get(m["role"], ChatMessageUser)(content=m["content"]) for m in content]


def _score(row: dict[str, Any]) -> Any:
    from inspect_ai.scorer import Score

    missing = np.isnan(row["score"])
    return Score(
        value=row["score"],
        answer=row["text"],
        explanation=row["error"] if missing else row["raw"],
        reason="scoring_failed" if missing else None,
    )


def _scores(summary: dict[str, Any], draws: list[Any]) -> Any:
    from inspect_ai.log import EvalMetric, EvalScore

    metrics = {
        name: EvalMetric(name=name, value=np.nan if summary[name] is None else summary[name])
        for name in ("mean_risk", "highest_risk")
    }
    unscored = sum(bool(np.isnan(draw.scores[SCORER].value)) for draw in draws)
    return EvalScore(
        name=SCORER,
        scorer=SCORER,
        scored_samples=len(draws) - unscored,
        unscored_samples=unscored,
        params={"estimand": summary["estimand"]},
        metrics=metrics,
    )
