"""`tailrisk tune`: a proposal for a model, its queries and a judge, from a pilot."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tailrisk_jax.adaptation import Grid, default_grid
from tailrisk_jax.cli.inputs import InputOptions, Inputs, StudyOptions, load_inputs
from tailrisk_jax.cli.mesh import OnMesh
from tailrisk_jax.cli.progress import follow
from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import (
    Material,
    Tuned,
    check_output,
    choose_proposal,
    environment,
    json_text,
    save_tuned,
    search_proposal,
    window_proposal,
)


@dataclasses.dataclass(frozen=True)
class _Own(InputOptions):
    """The options of `tailrisk tune` alone."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A new folder: proposal.txt, tuning.json with every figure, and the pilot's draws."""
    method: Literal["choose", "search", "windows"] = "choose"
    """choose: a mixture of --candidates. search: one strength, switch step and bias of --steer, as
    Angell et al. 2026 tune theirs. windows: the candidates' policies, each inside windows of steps,
    with fitted weights."""
    steer: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STEERING [..]")] = ()
    """What is searched over: ablation:DIRECTION or addition:VECTOR:LAYER, several for several
    vectors or layers. The organism has its own."""
    strengths: tuple[float, ...] = ()
    """Of each, by default 0.1 to 1 for ablations and 1 to 3 for additions."""
    switches: tuple[int, ...] = ()
    """Steps from which the target takes over, by default 30 of them and the end."""
    biases: tuple[float, ...] = ()
    """Weights of the steered policy before that, by default 0.04 to 1."""
    objective: Literal["cross-entropy", "second-moment"] = "cross-entropy"
    """What the search minimises."""
    per_query: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --method windows: weights of its own for each query with a harmful pilot answer, in
    weights.json. The pilot then takes all queries, or the --pilot-share that is given."""
    target_share: float = 0.1
    """Of the target in the proposal, at least; its inverse bounds the weights."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no summary, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output."""


@dataclasses.dataclass(frozen=True)
class Tune(OnMesh, StudyOptions, _Own):
    """Find what to draw from, by a pilot on a few of the queries.

    Then draw with --proposal tuned:FOLDER. The answers of the pilot are not used again.
    """


def tune(options: Tune) -> None:
    """Runs the command."""
    for name in ("model", "out"):
        if getattr(options, name) is None:
            raise InputError(f"--{name} is needed to tune a proposal; give it")
    assert options.out is not None
    _check_options(options)
    if options.out.is_dir() and any(options.out.iterdir()):
        raise InputError(f"output {options.out} exists and is not empty; give a new --out folder")
    check_output(options.out)
    tune_from(load_inputs(options, quiet=options.quiet), options)


def tune_from(inputs: Inputs, options: Tune) -> None:
    """`tailrisk tune` for inputs that are loaded, by these options, into a new folder.

    Raises:
      InputError: as the command.
    """
    folder, material = options.out, inputs.material()
    assert folder is not None
    if options.per_query and options.pilot_share is None:
        material = dataclasses.replace(material, share=1.0)
    with follow(options.quiet) as tell:
        tuned = _tuned(options, inputs, dataclasses.replace(material, tell=tell))
    about = {
        "settings": dataclasses.asdict(material.settings),
        "share": material.share,
        "identity": inputs.identity(),
        "selection": inputs.selection.record(),
        "environment": environment(),
    }
    save_tuned(tuned, folder, about)
    if options.json:
        print(json_text({**tuned.record(), **about, "folder": str(folder)}))
    elif not options.quiet:
        print(_summary(tuned))
        print(f"Written to {folder}; draw with --proposal tuned:{folder}")


def _check_options(options: Tune) -> None:
    """Refuses options of another method."""
    search = ("steer", "strengths", "switches", "biases")
    for name in ("candidates",) if options.method == "search" else search:
        if getattr(options, name):
            other = "choose or windows" if options.method == "search" else "search"
            raise InputError(f"--{name} is for --method {other}; give that, or leave it out")
    if options.per_query and options.method != "windows":
        raise InputError("--per-query is for --method windows; give that, or leave it out")


def _tuned(options: Tune, inputs: Inputs, material: Material) -> Tuned:
    share = options.target_share
    if options.method == "choose":
        return choose_proposal(inputs.candidates(), material, target_share=share)
    if options.method == "windows":
        return window_proposal(
            inputs.candidates(), material, target_share=share, per_query=options.per_query
        )
    steering = options.steer or (inputs.embedded.steering if inputs.embedded else ())
    if not steering:
        raise InputError(
            f"--steer is needed with --method search and --model {options.model}; give "
            "ablation:DIRECTION or addition:VECTOR:LAYER"
        )
    default = default_grid(options.cut)
    grid = Grid(options.switches or default.switches, options.biases or default.biases)
    return search_proposal(
        steering,
        material,
        strengths=options.strengths,
        grid=grid,
        objective=options.objective,
        target_share=share,
    )


def _summary(tuned: Tuned) -> str:
    pilot = tuned.pilot.record()
    lines = [
        f"Proposal: {tuned.text}",
        tuned.reason,
        f"Pilot: {pilot['samples']:,} answers to each of {len(pilot['queries'])} queries, "
        f"{sum(pilot['hits']):,} harmful, {pilot['tokens']:,} tokens through the network.",
    ]
    if pilot["without_hits"]:
        lines.append(f"Queries without a harmful pilot answer: {', '.join(pilot['without_hits'])}.")
    if pilot["unscored"]:
        lines.append(f"{pilot['unscored']:,} answers have no score and say nothing.")
    return "\n".join(lines)
