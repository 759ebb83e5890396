"""`tailrisk estimate`: how likely is an event in a model's answers, query by query."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro

from tailrisk_jax.cli.config import save_config
from tailrisk_jax.cli.judges import make_judge
from tailrisk_jax.cli.outcome import finish, recompute
from tailrisk_jax.cli.progress import follow
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge
from tailrisk_jax.models import load_model, locate
from tailrisk_jax.organisms import OrganismHarm, load_organism
from tailrisk_jax.organisms.organism import DATA
from tailrisk_jax.policies import Mixture, Policy, at_temperature
from tailrisk_jax.studies import (
    Settings,
    Study,
    StudyQuery,
    append_session,
    check_output,
    check_study,
    estimand,
    file_hashes,
    judge_identity,
    locked,
    open_run,
    parse_proposal,
    read_queries,
    run_study,
    session,
    tokens_identity,
    weighting_of,
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate how likely an event is in a model's answers to each query.

    Draws answers from the proposal, an unsafe version of the model, and reweights them by
    p(answer) / q(answer): the estimate is unbiased for the model itself. Everything is kept in the
    run's folder (--out) as it is made: the same command again goes on where it was stopped, and
    `tailrisk estimate RUN` computes the statistics of a run anew.
    """

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """A run whose statistics are computed anew from what it holds; needs no other option."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="STUDY.YAML")] = None
    """Options as a YAML file, by their names here; flags win over it."""
    model: str | None = None
    """The target: a Hugging Face checkpoint folder, a hub id, or "organism" (embedded)."""
    out: Path | None = None
    """Folder of the run: a new one, or one to go on with."""
    proposal: str | None = None
    """What to draw from: target, ablation:DIRECTION:INTENSITY,
    addition:VECTOR:LAYER:COEFFICIENT or checkpoint:FOLDER_OR_HUB_ID, each with @T for a temperature
    of its own (target@2); or a weighted mixture of these such as
    "0.1*target + 0.9*ablation:direction.safetensors:0.5"."""
    queries: Path | None = None
    """JSON lines, {"prompt": ..} or {"messages": [..]}, with an optional "id"; the organism has
    its own."""
    judge: str | None = None
    """Who scores the answers; the organism has its own."""
    event: str | None = None
    """Regular expression: an answer in which it is found counts; short for --judge regex:.."""
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
    max_new_tokens: int = 64
    """Answers are cut at this many tokens; part of what is estimated."""
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


def estimate(options: Estimate) -> None:
    """Runs the command."""
    if options.run is not None:
        recompute(options.run, quiet=options.quiet, as_json=options.json)
        return
    for name in ("model", "out", "proposal"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is needed to draw answers; give it, or a RUN to recompute")
    assert options.out is not None
    folder = check_output(options.out)
    prepared = _prepare(options)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        store, study = open_run(folder, prepared.study)
        save_config(folder, "estimate", options)
        append_session(folder, session(dataclasses.asdict(options)))
        with follow(options.quiet) as tell:
            results = run_study(
                prepared.target, prepared.proposal, study.queries, prepared.judge, study.settings,
                names=study.weighting.names, store=store, on_progress=tell,
            )  # fmt: skip
        finish(results, study, folder, quiet=options.quiet, as_json=options.json)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """Everything that a run needs, loaded and checked."""

    target: Policy
    proposal: Policy | Mixture
    judge: Judge
    study: Study


def _prepare(options: Estimate) -> _Prepared:
    assert options.model is not None and options.proposal is not None
    settings = Settings(
        num_samples=options.samples,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        level=options.level,
        until=None if options.until is None else _relative(options.until),
        max_samples=options.max_samples,
        allocation=options.allocation,
        replicates=options.replicates,
        chunk_size=options.chunk_size,
        batch_size=options.batch_size,
    )
    queries = None if options.queries is None else read_queries(options.queries)
    judge = make_judge(options.judge, options.event)
    vectors, checkpoints = {}, {}
    if options.model == "organism":
        organism, folder = load_organism(), DATA / "target"
        target, judge = organism.target, judge or OrganismHarm()
        vectors, checkpoints = organism.directions, {"unsafe": organism.unsafe}
        queries = queries or [StudyQuery(q.id, str(q)) for q in organism.queries if q.forbidden]
    else:
        if queries is None:
            raise InputError(f"--queries is needed with --model {options.model}; give a file")
        if judge is None:
            raise InputError(f"--judge or --event is needed with --model {options.model}; give one")
        folder = locate(options.model)
        target = Policy(load_model(folder, dtype=jnp.dtype(options.dtype)))
    assert queries is not None and judge is not None
    target = at_temperature(target, options.temperature)
    proposal = parse_proposal(
        options.proposal, target, vectors=vectors, checkpoints=checkpoints, dtype=options.dtype
    )
    check_study(target, proposal.policy, queries, settings)
    identity: dict[str, Any] = {
        "model": {"name": options.model, "files": file_hashes(folder)},
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
        queries=queries,
        selection={"read": len(queries)},
    )
    return _Prepared(target, proposal.policy, judge, study)


def _relative(until: str) -> float:
    """The share in rel=SHARE."""
    name, _, share = until.partition("=")
    try:
        if name != "rel":
            raise ValueError
        return float(share)
    except ValueError:
        raise InputError(f"--until {until!r} is not rel=SHARE; give e.g. rel=0.2") from None
