"""`tailrisk estimate`: how likely is an event in a model's answers, query by query."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from tailrisk_jax.cli.config import config_file
from tailrisk_jax.cli.inputs import InputOptions, Inputs, StudyOptions, load_inputs
from tailrisk_jax.cli.mesh import OnMesh
from tailrisk_jax.cli.outcome import finish, recompute
from tailrisk_jax.cli.processes import Processes
from tailrisk_jax.cli.progress import follow
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge
from tailrisk_jax.policies import Component, Mixture, Policy
from tailrisk_jax.studies import (
    Settings,
    Study,
    check_output,
    check_study,
    choose_proposal,
    draw_study,
    estimand,
    file_hashes,
    locked,
    open_run,
    read_study,
    read_tuned,
    weighting_of,
)
from tailrisk_jax.studies.query_weights import (
    WEIGHTS,
    QueryWeights,
    own_weights,
    query_weights_file,
    read_query_weights,
    weights_hash,
    with_query_weights,
)
from tailrisk_jax.studies.store import is_run


@dataclasses.dataclass(frozen=True)
class _Own(InputOptions):
    """The options of `tailrisk estimate` alone."""

    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    """A run whose statistics are computed anew from what it holds; needs no other option."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="STUDY.YAML")] = None
    """Options as a YAML file, by their names here; flags win over it."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the run: a new one, or one to go on with."""
    proposal: Annotated[str | None, tyro.conf.arg(metavar="TERM [+ ..]")] = None
    """What to draw from. A policy: target, checkpoint:FOLDER_OR_HUB_ID,
    interpolation:FOLDER_OR_HUB_ID:SHARE, or changes of the target joined by " & ":
    ablation:DIRECTION:INTENSITY (or 0.9total, an effect), addition:VECTOR:LAYER:COEFFICIENT,
    adapter:FOLDER_OR_HUB_ID[:STRENGTH], system:FILE_OR_'TEXT', messages:FILE (few-shot, JSON),
    prefix: and suffix:FILE_OR_'TEXT', int8 (weights of 8 bits); with @T for a temperature of its
    own (target@2). Or a policy beside the target, token by token: bias:SHARE(POLICY),
    switch:STEP[:SHARE](POLICY), window:START-STOP(POLICY), path:SHARE(POLICY). Or a weighted
    mixture of all these such as
    "0.1*target + 0.5*ablation:direction.safetensors:0.5 + 0.4*switch:20(system:'be rude')".
    Or tuned:FOLDER, what `tailrisk tune` wrote there, with each query's own weights where it has
    some; or auto, a mixture of --candidates that a pilot chooses."""
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
    level: float = 0.95
    """Of the intervals."""
    chunk_size: Annotated[int, tyro.conf.arg(metavar="ANSWERS")] = 2000
    """Answers that are drawn, judged and kept together: what a kill can cost. Changes no figure."""
    score_batch_size: Annotated[int | None, tyro.conf.arg(metavar="ROWS")] = None
    """Answers scored at once; by default --batch-size, or what fits. Changes no figure."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no table, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output, in place of the table."""


@dataclasses.dataclass(frozen=True)
class Estimate(Processes, OnMesh, StudyOptions, _Own):
    """Estimate how likely an event is in a model's answers to each query.

    Draws answers from the proposal, an unsafe version of the model, and reweights them by
    p(answer) / q(answer): the estimate is unbiased for the model itself. Everything is kept in the
    run's folder (--out) as it is made: the same command again goes on where it was stopped, and
    `tailrisk estimate RUN` computes the statistics of a run anew.
    """


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
    check_output(options.out)
    _settings(options)
    estimate_from(load_inputs(options, quiet=options.quiet), options)


def estimate_from(inputs: Inputs, options: Estimate, *, show: bool = True) -> None:
    """`tailrisk estimate` for inputs that are loaded: several runs can share a model.

    The options must be those that the inputs were loaded by, or the run's record is wrong.

    Args:
      show: the table too, unless the options are quiet or ask for JSON.

    Raises:
      InputError: as the command.
    """
    assert options.out is not None
    folder, settings = check_output(options.out), _settings(options)
    resolved = _resolved(options, inputs)
    prepared = _prepare(resolved, inputs, settings)
    options = dataclasses.replace(  # as the run's config keeps it
        options, max_new_tokens=options.cut, proposal=resolved.text, candidates=(), pilot=None,
        pilot_share=None, dtype=inputs.options.dtype,
    )  # fmt: skip
    kept = {WEIGHTS: query_weights_file(resolved.own)} if resolved.own else {}
    kept |= config_file("estimate", options)
    with locked(folder, jax.process_index()):
        store, study = open_run(folder, prepared.study, kept, dataclasses.asdict(options))
        if resolved.own and not options.quiet and jax.process_index() == 0:
            print(own_weights(resolved.own, study.queries), file=sys.stderr)
        with follow(options.quiet or jax.process_index() > 0) as tell:
            samples = draw_study(
                prepared.target, prepared.proposal, study.queries, prepared.judge, study.settings,
                store, tell,
            )  # fmt: skip
        quiet = options.quiet or not show
        finish(samples, study, folder, quiet=quiet, as_json=options.json)


@dataclasses.dataclass(frozen=True)
class _Resolved:
    """A proposal in plain terms, what chose it, where something did, and queries' own weights."""

    text: str
    tuning: Mapping[str, Any] | None = None
    own: QueryWeights = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """Everything that a run needs, loaded and checked."""

    target: Policy
    proposal: Component | Mixture
    judge: Judge
    study: Study


def _settings(options: Estimate) -> Settings:
    return Settings(
        num_samples=options.samples,
        max_new_tokens=options.cut,
        seed=options.seed,
        level=options.level,
        until=None if options.until is None else _relative(options.until),
        max_samples=options.max_samples,
        allocation=options.allocation,
        replicates=options.replicates,
        chunk_size=options.chunk_size,
        batch_size=options.batch_size,
        score_batch_size=options.score_batch_size,
    )


def _prepare(resolved: _Resolved, inputs: Inputs, settings: Settings) -> _Prepared:
    target, selection, tuning = inputs.target, inputs.selection, resolved.tuning
    proposal = inputs.parse(resolved.text)
    drawn_from: dict[str, Any] = {
        "text": resolved.text,
        "files": {name: file_hashes(path) for name, path in proposal.files.items()},
    }
    if resolved.own:
        drawn_from["weights"] = weights_hash(proposal, resolved.own)
        proposal = with_query_weights(proposal, resolved.own, selection.queries)
    check_study(target, proposal.policy, selection.queries, settings)
    identity = {**inputs.identity(), "proposal": drawn_from}
    study = Study(
        estimand=estimand(identity, settings),
        identity=identity,
        settings=settings,
        weighting=weighting_of(target, proposal.policy, proposal.names),
        queries=selection.queries,
        selection=selection.record() | ({} if tuning is None else {"proposal": tuning}),
    )
    return _Prepared(target, proposal.policy, inputs.judge, study)


def _resolved(options: Estimate, inputs: Inputs) -> _Resolved:
    """What is drawn from.

    A run that goes on keeps what was chosen for it: no pilot is drawn again.
    """
    given, out = options.proposal, options.out
    assert given is not None and out is not None
    if given != "auto":
        for name in ("candidates", "pilot", "pilot_share"):
            if getattr(options, name) not in (None, ()):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} is for --proposal auto; give that, or leave it out")
    if given.startswith("tuned:"):
        folder = Path(given.removeprefix("tuned:"))
        text, tuning = read_tuned(folder)
        own = read_query_weights(folder / WEIGHTS)
        return _Resolved(text, {"given": given, **tuning}, own)
    own = read_query_weights(out / WEIGHTS)
    if is_run(out):
        run = read_study(out)
        text, tuning = run.identity["proposal"]["text"], run.selection.get("proposal")
        if given == "auto" and (tuning is None or tuning["given"] != "auto"):
            raise InputError(f"run {out} has a proposal that no pilot chose; give {text!r} again")
        if given in ("auto", text):
            return _Resolved(text, tuning, own)
    return _Resolved(given, None, own) if given != "auto" else _chosen(options, inputs)


def _chosen(options: Estimate, inputs: Inputs) -> _Resolved:
    """What the pilot of --proposal auto chooses."""
    if jax.process_count() > 1:
        raise InputError(
            "--proposal auto is for one process; choose with `tailrisk tune` first, and give "
            "--proposal tuned:FOLDER"
        )
    embedded = None if options.candidates else inputs.embedded
    fallback = embedded.fallback if embedded else None
    with follow(options.quiet) as tell:
        material = dataclasses.replace(inputs.material(), tell=tell)
        tuned = choose_proposal(inputs.candidates(), material, fallback=fallback)
    pilot = tuned.pilot
    if not options.quiet or not pilot.hits.any():
        print(
            f"Pilot: {pilot.scores.shape[1]:,} answers to each of {len(pilot.queries)} queries, "
            f"{pilot.tokens:,} tokens, not used again.\n{tuned.reason}",
            file=sys.stderr,
        )
    return _Resolved(tuned.text, {"given": "auto", **tuned.summary()})


def _relative(until: str) -> float:
    """The share in rel=SHARE."""
    name, _, share = until.partition("=")
    try:
        if name != "rel":
            raise ValueError
        return float(share)
    except ValueError:
        raise InputError(f"--until {until!r} is not rel=SHARE; give e.g. rel=0.2") from None
