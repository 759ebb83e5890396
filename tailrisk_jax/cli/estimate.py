"""`tailrisk estimate`: how likely is an event in a model's answers, query by query."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from tailrisk_jax.cli.config import config_file
from tailrisk_jax.cli.judges import JudgeOptions, make_judge
from tailrisk_jax.cli.outcome import finish, recompute
from tailrisk_jax.cli.processes import Processes, join_processes
from tailrisk_jax.cli.progress import follow
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge
from tailrisk_jax.models import load_model, locate
from tailrisk_jax.organisms import Organism, OrganismHarm, load_organism
from tailrisk_jax.organisms.organism import DATA
from tailrisk_jax.policies import Component, Mixture, Policy, at_temperature
from tailrisk_jax.studies import (
    Selection,
    Settings,
    Study,
    StudyQuery,
    check_output,
    check_study,
    draw_study,
    estimand,
    file_hashes,
    judge_identity,
    locked,
    model_identity,
    open_run,
    parse_proposal,
    read_queries,
    tokens_identity,
    weighting_of,
)

_Words = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]


@dataclasses.dataclass(frozen=True)
class _Own:
    """The options of `tailrisk estimate` alone, which its help shows first."""

    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    """A run whose statistics are computed anew from what it holds; needs no other option."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="STUDY.YAML")] = None
    """Options as a YAML file, by their names here; flags win over it."""
    model: Annotated[str | None, tyro.conf.arg(metavar="FOLDER|HUB_ID|organism")] = None
    """The target: a Hugging Face checkpoint folder, a hub id, or "organism" (embedded)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the run: a new one, or one to go on with."""
    proposal: Annotated[str | None, tyro.conf.arg(metavar="TERM [+ ..]")] = None
    """What to draw from. A policy: target, checkpoint:FOLDER_OR_HUB_ID,
    interpolation:FOLDER_OR_HUB_ID:SHARE, or changes of the target joined by " & ":
    ablation:DIRECTION:INTENSITY (or 0.9total, an effect), addition:VECTOR:LAYER:COEFFICIENT,
    adapter:FOLDER_OR_HUB_ID[:STRENGTH], system:FILE_OR_'TEXT', messages:FILE (few-shot, JSON),
    prefix: and suffix:FILE_OR_'TEXT'; with @T for a temperature of its own (target@2). Or a policy
    beside the target, token by token: bias:SHARE(POLICY), switch:STEP[:SHARE](POLICY),
    window:START-STOP(POLICY), path:SHARE(POLICY). Or a weighted mixture of all these such as
    "0.1*target + 0.5*ablation:direction.safetensors:0.5 + 0.4*switch:20(system:'be rude')"."""
    queries: Annotated[str | None, tyro.conf.arg(metavar="FILE|hf:NAME")] = None
    """A file, told by its columns: StrongREJECT, HarmBench, JailbreakBench, AdvBench or XSTest CSV,
    a persona trait's JSON, or JSON lines of {"prompt": ..} or {"messages": [..]} with an optional
    "id"; or hf:OWNER/NAME[:CONFIG][:SPLIT][:COLUMN] from the hub. The organism has its own."""
    query_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The prompt's column in any other CSV or data set."""
    exclude: Annotated[
        tuple[str, ...], tyro.conf.arg(constructor=_Words, metavar="FILE_OR_ID [..]")
    ] = ()
    """Queries to leave out: ids, or files of ids, one a line."""
    where: Annotated[
        tuple[str, ...], tyro.conf.arg(constructor=_Words, metavar="COLUMN=VALUE [..]")
    ] = ()
    """Only queries that their file says this of; several values of one column are alternatives,
    and several columns must all fit."""
    max_prompt_tokens: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Leave out queries whose prompt, chat template included, is longer; none is cut."""
    first: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Only the first N queries of those that the options above leave."""
    samples: int = 500
    """Answers per query; with --until, per query and round. A run can be gone on with for more."""
    until: Annotated[str | None, tyro.conf.arg(metavar="rel=SHARE")] = None
    """Go on, round by round, until a query's interval is this share of its estimate to either
    side, such as rel=0.2; other queries go on alone."""
    max_samples: int = 20_000
    """Answers per query at most, with --until."""
    allocation: Literal["equal", "variance"] = "equal"
    """How the rounds of --until are shared among the queries that need more: equally, or as the
    variance of each asks for."""
    replicates: int = 1
    """Repeat with independent draws so many times; all count, and the spread between repeats is
    shown beside the error that they claim."""
    max_new_tokens: Annotated[int | None, tyro.conf.arg(metavar="T")] = None
    """Answers are cut at this many tokens, by default 64 (24 for the organism); part of what is
    estimated."""
    seed: int = 0
    """Of all draws; the same seed gives the same answers."""
    temperature: float = 1.0
    """Of the target; part of what is estimated."""
    level: float = 0.95
    """Of the intervals."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the parameters; probabilities are float32 always."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="ROWS")] = None
    """Answers on the device at once; by default what fits. Changes no figure."""
    chunk_size: Annotated[int, tyro.conf.arg(metavar="ANSWERS")] = 2000
    """Answers that are drawn, judged and kept together: what a kill can cost. Changes no figure."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no table, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output, in place of the table."""


@dataclasses.dataclass(frozen=True)
class Estimate(Processes, JudgeOptions, _Own):
    """Estimate how likely an event is in a model's answers to each query.

    Draws answers from the proposal, an unsafe version of the model, and reweights them by
    p(answer) / q(answer): the estimate is unbiased for the model itself. Everything is kept in the
    run's folder (--out) as it is made: the same command again goes on where it was stopped, and
    `tailrisk estimate RUN` computes the statistics of a run anew.
    """

    def __post_init__(self) -> None:
        """Flat, whether given as `--where A B` or as `--where A --where B`."""
        for name in ("exclude", "where"):
            parts = [[part] if isinstance(part, str) else part for part in getattr(self, name)]
            object.__setattr__(self, name, tuple(word for part in parts for word in part))


def estimate(options: Estimate) -> None:
    """Runs the command."""
    if options.run is not None:
        plain = Estimate(run=options.run, quiet=options.quiet, json=options.json)
        changed = [name for name, value in vars(options).items() if value != vars(plain)[name]]
        if changed:
            raise InputError(
                f"run {options.run} is computed anew from what it holds, so it takes no other "
                f"option such as --{changed[0].replace('_', '-')}; to draw more, give all options "
                f"and --out {options.run}"
            )
        recompute(options.run, quiet=options.quiet, as_json=options.json)
        return
    for name in ("model", "out", "proposal"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is needed to draw answers; give it, or a RUN to recompute")
    assert options.out is not None
    join_processes(options.processes)
    folder = check_output(options.out)
    prepared = _prepare(options)
    cut = prepared.study.settings.max_new_tokens
    options = dataclasses.replace(options, max_new_tokens=cut)  # as the run's config keeps it
    with locked(folder, jax.process_index()):
        store, study = open_run(
            folder, prepared.study, config_file("estimate", options), dataclasses.asdict(options)
        )
        with follow(options.quiet or jax.process_index() > 0) as tell:
            samples = draw_study(
                prepared.target, prepared.proposal, study.queries, prepared.judge, study.settings,
                store, tell,
            )  # fmt: skip
        finish(samples, study, folder, quiet=options.quiet, as_json=options.json)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """Everything that a run needs, loaded and checked."""

    target: Policy
    proposal: Component | Mixture
    judge: Judge
    study: Study


def _prepare(options: Estimate) -> _Prepared:
    assert options.model is not None and options.proposal is not None
    organism = load_organism() if options.model == "organism" else None
    cut = Settings.max_new_tokens if organism is None else organism.max_new_tokens
    settings = Settings(
        num_samples=options.samples,
        max_new_tokens=cut if options.max_new_tokens is None else options.max_new_tokens,
        seed=options.seed,
        level=options.level,
        until=None if options.until is None else _relative(options.until),
        max_samples=options.max_samples,
        allocation=options.allocation,
        replicates=options.replicates,
        chunk_size=options.chunk_size,
        batch_size=options.batch_size,
    )
    selection = _selection(options, organism)
    judge = make_judge(options, selection.queries, reach=True)
    vectors, checkpoints = {}, {}
    if organism is not None:
        target, folder, judge = organism.target, DATA / "target", judge or OrganismHarm()
        vectors, checkpoints = organism.directions, {"unsafe": organism.unsafe}
    else:
        if judge is None:
            raise InputError(f"--judge or --event is needed with --model {options.model}; give one")
        folder = locate(options.model)
        target = Policy(load_model(folder, dtype=jnp.dtype(options.dtype)))
    selection = selection.within(options.max_prompt_tokens, target.model).first(options.first)
    shown = not options.quiet and jax.process_index() == 0
    if shown and len(selection.queries) != selection.read:
        print(f"Queries of {selection}", file=sys.stderr)
    target = at_temperature(target, options.temperature)
    proposal = parse_proposal(
        options.proposal, target, vectors=vectors, checkpoints=checkpoints, dtype=options.dtype
    )
    check_study(target, proposal.policy, selection.queries, settings)
    identity: dict[str, Any] = {
        "model": model_identity(options.model, folder),
        "tokens": tokens_identity(target.model),
        "dtype": options.dtype,
        "temperature": options.temperature,
        "proposal": {
            "text": options.proposal,
            "files": {name: file_hashes(path) for name, path in proposal.files.items()},
        },
        "judge": judge_identity(judge),
    }
    study = Study(
        estimand=estimand(identity, settings),
        identity=identity,
        settings=settings,
        weighting=weighting_of(target, proposal.policy, proposal.names),
        queries=selection.queries,
        selection=selection.record(),
    )
    return _Prepared(target, proposal.policy, judge, study)


def _selection(options: Estimate, organism: Organism | None) -> Selection:
    """The queries, but for those that the model's tokenizer will find too long."""
    if options.queries is not None:
        read = read_queries(options.queries, options.query_column)
    elif organism is not None:
        own = [StudyQuery(query.id, str(query)) for query in organism.forbidden]
        read = Selection(own, own, "organism", "organism", "", read=len(own))
    else:
        raise InputError(f"--queries is needed with --model {options.model}; give a file")
    return read.exclude(options.exclude).where(options.where)


def _relative(until: str) -> float:
    """The share in rel=SHARE."""
    name, _, share = until.partition("=")
    try:
        if name != "rel":
            raise ValueError
        return float(share)
    except ValueError:
        raise InputError(f"--until {until!r} is not rel=SHARE; give e.g. rel=0.2") from None
