"""`tailrisk persona`: vectors that bring out a persona trait when they are added."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tailrisk_jax.cli.embedded import CUTS, FOLDERS, Embedded, load_embedded
from tailrisk_jax.cli.judges import JudgeOptions, make_judge
from tailrisk_jax.cli.loading import DType, load, resolved_dtype
from tailrisk_jax.cli.mesh import OnMesh
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge
from tailrisk_jax.models import locate
from tailrisk_jax.policies import Policy
from tailrisk_jax.studies import (
    check_output,
    environment,
    file_hashes,
    json_text,
    model_identity,
    read_trait,
)
from tailrisk_jax.studies.personas import (
    PersonaSettings,
    SearchPoint,
    best_point,
    extract_persona,
    persona_record,
    save_persona,
    search_persona,
)

CUT = PersonaSettings.max_new_tokens
_OF_KIND = {
    "rubric": ("rubric", "judge_model", "judge_url"),
    "finetuned": ("judge_adapter", "judge_base"),
}


@dataclasses.dataclass(frozen=True)
class Persona(OnMesh, JudgeOptions):
    """Make a trait's persona vectors, for proposals that add them.

    Differences of mean activations between answers that show the trait and answers that don't,
    drawn under system prompts for it and against it (Chen et al. 2025, arXiv 2507.21509). Then
    draw with --proposal addition:DIR:LAYER:COEFFICIENT.
    """

    model: str
    """A Hugging Face checkpoint folder, a hub id, or "organism:persona" (embedded)."""
    out: Path
    """A new folder: persona.safetensors, persona.json, and the answers."""
    trait: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The trait: JSON of {"instruction": [{"pos", "neg"}], "questions": [..], "eval_prompt"}; the
    last is the wording of --judge rubric:trait. The embedded model has its own, and its judges."""
    coherence_judge: Annotated[str | None, tyro.conf.arg(metavar="KIND[:..]")] = None
    """Who scores coherence, as --judge does the trait, such as rubric:coherence."""
    samples: int = 10
    """Answers to each question under each system prompt."""
    max_new_tokens: Annotated[int | None, tyro.conf.arg(metavar="T")] = None
    """Answers are cut at this many tokens, by default 256 (24 for the embedded model)."""
    seed: int = 0
    """Of all draws."""
    min_trait: float = 0.5
    """Answers show the trait where their score is at least this."""
    min_coherence: float = 0.5
    """Answers are coherent where their score is at least this."""
    search: Annotated[int, tyro.conf.arg(metavar="ANSWERS")] = 0
    """Then try layers and coefficients, with so many answers to each question; 0 for not."""
    layers: Annotated[tuple[int, ...], tyro.conf.arg(metavar="LAYER [..]")] = ()
    """To try: the block whose output is changed. By default those from 35% to 60% of the depth."""
    coefficients: Annotated[tuple[float, ...], tyro.conf.arg(metavar="COEFFICIENT [..]")] = (
        1.0, 2.0, 3.0,
    )  # fmt: skip
    """To try, times the vector of response_avg."""
    positions: Literal["all", "prompt", "response"] = "response"
    """Where it is added while trying."""
    dtype: DType = "auto"
    """Of the parameters, by default bfloat16 on GPU and TPU and float32 on CPU."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="ROWS")] = None
    """Answers on the device at once; by default what fits."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no summary, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output."""


def persona(options: Persona) -> None:
    """Runs the command."""
    folder = check_output(options.out)
    embedded = load_embedded(options.model)
    file = options.trait or (embedded.trait if embedded else None)
    if file is None:
        raise InputError(f"--trait is needed with --model {options.model}; give a file")
    trait = read_trait(file)
    judge, coherence = _judges(options, file, embedded)
    checkpoint = FOLDERS.get(options.model) or locate(options.model)
    dtype = resolved_dtype(options.dtype, options.model)
    policy = Policy(load(checkpoint, dtype, quiet=options.quiet))
    layers = _layers(options.layers, policy.model.config.num_layers)
    cut = options.max_new_tokens
    settings = PersonaSettings(
        samples=options.samples,
        max_new_tokens=CUTS.get(options.model, CUT) if cut is None else cut,
        seed=options.seed,
        min_trait=options.min_trait,
        min_coherence=options.min_coherence,
        batch_size=options.batch_size,
    )

    def tell(stage: str) -> None:
        if not options.quiet:
            print(f"tailrisk: {stage}", file=sys.stderr, flush=True)

    found = extract_persona(policy, trait, judge, settings, coherence=coherence, tell=tell)
    points: list[SearchPoint] = []
    if options.search:
        points = search_persona(
            policy, found.vectors.response_avg, trait, judge,
            dataclasses.replace(settings, samples=options.search),
            layers=layers, coefficients=options.coefficients, positions=options.positions,
            coherence=coherence, tell=tell,
        )  # fmt: skip
    about = {
        "trait": {"name": trait.name, "files": file_hashes(file)},
        "model": model_identity(options.model, checkpoint),
        "dtype": dtype,
        "positions": options.positions,
        "environment": environment(),
    }
    save_persona(found, points, folder, about)
    if options.json:
        print(json_text({**persona_record(found, points), **about, "folder": str(folder)}))
    elif not options.quiet:
        counts = found.counts
        print(f"Persona vectors of {trait.name!r} from {counts['kept']} of {counts['pairs']} pairs")
        for line in _table(points, settings.min_coherence):
            print(line)
        print(f"Written to {folder}; draw with --proposal addition:{folder}:LAYER:COEFFICIENT")


def _judges(options: Persona, file: Path, embedded: Embedded | None) -> tuple[Judge, Judge | None]:
    """Of the trait in the file, and of coherence if there is one."""
    first, second = options.judge, options.coherence_judge
    own = _without_those_of(second, first, options)
    if first is not None and first.startswith("rubric:trait") and options.rubric is None:
        own = dataclasses.replace(own, rubric=file)
    judge = make_judge(own, reach=True) or (embedded.judge if embedded else None)
    if judge is None:
        raise InputError("--judge or --event is needed; give one, e.g. --judge rubric:trait")
    if second is None:
        return judge, embedded.coherence if embedded else None
    own = _without_those_of(first, second, options)
    own = dataclasses.replace(own, judge=second, event=None, threshold=None, rubric=None)
    return judge, make_judge(own, reach=True)


def _without_those_of(other: str | None, judge: str | None, options: Persona) -> Persona:
    """The options, but for those that are of the other judge's kind and not of this one's."""
    others, kind = (str(spec).partition(":")[0] for spec in (other, judge))
    unused = () if others == kind else _OF_KIND.get(others, ())
    return dataclasses.replace(options, **dict.fromkeys(unused))


def _layers(chosen: Sequence[int], num_layers: int) -> Sequence[int]:
    """To try; by default those from 35% to 60% of the depth."""
    for layer in chosen:
        if not 0 <= layer < num_layers:
            raise InputError(
                f"--layers {layer} is out of range; this model has 0 to {num_layers - 1}"
            )
    return chosen or range(math.ceil(0.35 * num_layers), math.floor(0.6 * num_layers) + 1)


def _table(points: list[SearchPoint], min_coherence: float) -> list[str]:
    if not points:
        return []
    best = best_point(points, min_coherence)
    lines = ["layer  coefficient  trait  coherence  unscored"]
    for point in points:
        mark = "  best" if point is best else ""
        lines.append(
            f"{point.layer:5d}  {point.coefficient:11g}  {point.trait:5.2f}  "
            f"{point.coherence:9.2f}  {point.unscored:8d}{mark}"
        )
    return lines
