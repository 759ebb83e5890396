"""Commands that make one run from others without drawing: `judge`, `score`, `merge`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import pyarrow as pa
import tyro

from tailrisk_jax.cli.config import save_config
from tailrisk_jax.cli.judges import make_judge
from tailrisk_jax.cli.outcome import finish
from tailrisk_jax.cli.progress import follow
from tailrisk_jax.errors import InputError
from tailrisk_jax.models import load_model, locate
from tailrisk_jax.organisms.organism import DATA
from tailrisk_jax.policies import Policy, at_temperature
from tailrisk_jax.studies import (
    Progress,
    Store,
    Study,
    analyse,
    append_session,
    check_output,
    estimand,
    file_hashes,
    judge_identity,
    keep_merged,
    locked,
    merge,
    observations,
    open_run,
    open_store,
    read_study,
    rejudge,
    rescore,
    session,
    tokens_identity,
)


@dataclasses.dataclass(frozen=True)
class Judge:
    """Judge the answers of a run anew, in a run of its own; nothing is drawn.

    A run that was stopped goes on with the same command, or with `tailrisk resume`.
    """

    run: tyro.conf.Positional[Path]
    """The run whose answers are judged."""
    out: Path
    """Folder of the new run."""
    judge: str | None = None
    """Who scores the answers; see `tailrisk estimate --help`."""
    event: str | None = None
    """Regular expression; short for --judge regex:.."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no table, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output, in place of the table."""


@dataclasses.dataclass(frozen=True)
class Score:
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
    temperature: float = 1.0
    """Of the target."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the parameters."""
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
    chosen = make_judge(options.judge, options.event)
    if chosen is None:
        raise InputError("--judge or --event is needed; give one")
    identity = {**source.identity, "judge": judge_identity(chosen)}
    study = _derived("judge", source, identity)

    def make(store: Store, tell: Callable[[Progress], Any]) -> pa.Table:
        kept = open_store(options.run, source)
        return rejudge(kept, study.queries, chosen, study.settings, store, tell)

    _run("judge", options, study, make)


def score(options: Score) -> None:
    """Runs `tailrisk score`."""
    source = read_study(options.run)
    folder = DATA / "target" if options.model == "organism" else locate(options.model)
    target = Policy(load_model(folder, dtype=jnp.dtype(options.dtype)))
    target = at_temperature(target, options.temperature)
    tokens = tokens_identity(target.model)
    for name in ("end_ids", "vocabulary"):
        if tokens[name] != source.identity["tokens"][name]:
            raise InputError(
                f"model {options.model} has other {name} than the model of run {options.run}; "
                "score with models of one tokenizer"
            )
    identity = {
        **source.identity,
        "model": {"name": options.model, "files": file_hashes(folder)},
        "tokens": tokens,
        "dtype": options.dtype,
        "temperature": options.temperature,
        "drawn_for": source.identity["model"],
    }
    study = _derived("score", source, identity)
    study = dataclasses.replace(
        study, weighting=dataclasses.replace(source.weighting, target_index=None)
    )
    settings = dataclasses.replace(study.settings, batch_size=options.batch_size)

    def make(store: Store, tell: Callable[[Progress], Any]) -> pa.Table:
        kept = open_store(options.run, source)
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
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        store, study = open_run(folder, study)
        save_config(folder, command, options)
        append_session(folder, session(dataclasses.asdict(options)))
        with follow(options.quiet) as tell:
            samples = make(store, tell)
        observed = observations(study.queries, samples)
        results = analyse(observed, samples, study.weighting, study.settings)
        finish(results, study, folder, quiet=options.quiet, as_json=options.json)
