"""Commands that make one run from others without drawing: `judge`, `score`, `merge`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import pyarrow as pa
import tyro

from tailrisk_jax.cli.config import config_file
from tailrisk_jax.cli.embedded import FOLDERS
from tailrisk_jax.cli.judges import JudgeOptions, make_judge
from tailrisk_jax.cli.loading import load
from tailrisk_jax.cli.mesh import OnMesh
from tailrisk_jax.cli.outcome import finish
from tailrisk_jax.cli.processes import Processes
from tailrisk_jax.cli.progress import follow
from tailrisk_jax.errors import InputError
from tailrisk_jax.models import locate
from tailrisk_jax.policies import Policy, at_temperature
from tailrisk_jax.studies import (
    Progress,
    Store,
    Study,
    check_finished,
    check_output,
    estimand,
    judge_identity,
    keep_merged,
    locked,
    merge,
    model_identity,
    open_run,
    open_store,
    read_study,
    rejudge,
    rescore,
    tokens_identity,
)


@dataclasses.dataclass(frozen=True)
class Judge(JudgeOptions, Processes, OnMesh):
    """Judge the answers of a run anew, in a run of its own; nothing is drawn.

    A run that was stopped goes on with the same command, or with `tailrisk resume`.
    """

    run: tyro.conf.Positional[Path]
    """The run whose answers are judged."""
    out: Path
    """Folder of the new run."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no table, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output, in place of the table."""


@dataclasses.dataclass(frozen=True)
class Score(Processes, OnMesh):
    """Estimate for another model from the answers of a run; nothing is drawn or judged.

    The answers are weighed by the other model's probability over that of the proposal that drew
    them; how well that proposal reaches the other model's harm, the diagnostics say.
    """

    run: tyro.conf.Positional[Path]
    """The run whose answers are scored."""
    model: str
    """The other target: a checkpoint folder, a hub id, or "organism"; of the same tokenizer."""
    out: Path
    """Folder of the new run."""
    temperature: float | None = None
    """Of the target; by default the run's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the parameters; by default the run's."""
    batch_size: int | None = None
    """Answers on the device at once; by default what fits."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no table, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output, in place of the table."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """Join runs of one study: over other queries, or over the same under other seeds."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Finished runs, two or more."""
    out: Path
    """Folder of the new run."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No table, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output, in place of the table."""


def judge(options: Judge) -> None:
    """Runs `tailrisk judge`."""
    source = read_study(options.run)
    chosen = make_judge(options, source.queries, reach=True)
    if chosen is None:
        raise InputError("--judge or --event is needed; give one")
    check_finished(open_store(options.run), source.queries, source.settings, ["samples"])
    identity = {**source.identity, "judge": judge_identity(chosen)}
    study = _derived("judge", source, identity)

    def make(store: Store, tell: Callable[[Progress], Any]) -> pa.Table:
        kept = open_store(options.run)
        return rejudge(kept, study.queries, chosen, study.settings, store, tell)

    _run("judge", options, study, make)


def score(options: Score) -> None:
    """Runs `tailrisk score`."""
    source = read_study(options.run)
    check_output(options.out)
    check_finished(open_store(options.run), source.queries, source.settings)
    before = source.identity
    dtype = options.dtype or before["dtype"]
    temperature = before["temperature"] if options.temperature is None else options.temperature
    folder = FOLDERS.get(options.model) or locate(options.model)
    target = at_temperature(Policy(load(folder, dtype, quiet=options.quiet)), temperature)
    tokens = tokens_identity(target.model)
    for name in ("end_ids", "vocabulary"):
        if tokens[name] != before["tokens"][name]:
            raise InputError(
                f"model {options.model} has other {name} than the model of run {options.run}; "
                "score with models of one tokenizer"
            )
    identity = {
        **before,
        "model": model_identity(options.model, folder),
        "tokens": tokens,
        "dtype": dtype,
        "temperature": temperature,
        "drawn_for": before["model"],
    }
    study = _derived("score", source, identity)
    same = identity["model"]["files"] == before["model"]["files"]
    if not same or (dtype, temperature) != (before["dtype"], before["temperature"]):
        weighting = dataclasses.replace(source.weighting, target_index=None)
        study = dataclasses.replace(study, weighting=weighting)
    settings = dataclasses.replace(study.settings, batch_size=options.batch_size)

    def make(store: Store, tell: Callable[[Progress], Any]) -> pa.Table:
        kept = open_store(options.run)
        return rescore(kept, study.queries, target, settings, store, tell)

    _run("score", options, study, make)


def join(options: Merge) -> None:
    """Runs `tailrisk merge`."""
    merged = merge(options.runs)
    _run("merge", options, merged.study, lambda store, _: keep_merged(merged, store))


def _derived(command: str, source: Study, identity: dict[str, Any]) -> Study:
    return dataclasses.replace(
        source,
        estimand=estimand(identity, source.settings),
        identity=identity,
        origin={"command": command, "judge": source.identity["judge"], "origin": source.origin},
    )


def _run(
    command: str,
    options: Any,
    study: Study,
    make: Callable[[Store, Callable[[Progress], Any]], pa.Table],
) -> None:
    folder = check_output(options.out)
    with locked(folder, jax.process_index()):
        store, study = open_run(
            folder, study, config_file(command, options), dataclasses.asdict(options)
        )
        with follow(options.quiet or jax.process_index() > 0) as tell:
            samples = make(store, tell)
        finish(samples, study, folder, quiet=options.quiet, as_json=options.json)
