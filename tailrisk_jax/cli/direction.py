"""`tailrisk direction`: the direction in a model's residual stream that its refusals rest on."""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import tyro

from tailrisk_jax.cli.loading import DType, load, resolved_dtype
from tailrisk_jax.cli.mesh import OnMesh
from tailrisk_jax.cli.progress import track
from tailrisk_jax.errors import InputError
from tailrisk_jax.models import locate
from tailrisk_jax.organisms import world
from tailrisk_jax.organisms.organism import DATA
from tailrisk_jax.policies import REFUSAL_OPENERS, Policy, refusal_tokens
from tailrisk_jax.studies import (
    Selection,
    StudyQuery,
    check_output,
    environment,
    json_text,
    model_identity,
    read_queries,
)
from tailrisk_jax.studies.directions import (
    DirectionSettings,
    RefusalDirection,
    find_refusal_direction,
    save_direction,
)


@dataclasses.dataclass(frozen=True)
class Direction(OnMesh):
    """Find the direction that a model's refusals rest on, for proposals that ablate it.

    Differences in means at the tokens after the instruction, chosen by what ablating and adding
    them does (Arditi et al. 2024, arXiv 2406.11717). Then draw with
    --proposal ablation:DIR:INTENSITY.
    """

    model: str
    """A Hugging Face checkpoint folder, a hub id, or "organism" (embedded)."""
    out: Path
    """A new folder: direction.safetensors, direction.json with all scores, and their picture."""
    harmful: str | None = None
    """Queries that the model refuses, in any format that `tailrisk estimate` reads. The organism
    has its own."""
    harmless: str | None = None
    """Queries that it answers."""
    train: int = 128
    """Queries of each set that directions are formed from."""
    validation: int = 32
    """Further queries of each set that they are scored on."""
    seed: int = 0
    """Of the choice of queries."""
    refusal_tokens: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT_OR_ID [..]")] = ()
    """How the model's refusals begin: texts, whose first token counts, or token ids. By default
    I, As and Sorry, where the tokenizer has them."""
    max_kl: float = 0.1
    """Ablation may change the first token on harmless queries by so much, in nats."""
    min_induced: float = 0.0
    """Addition must bring the log-odds of refusal on harmless queries up to this."""
    drop_last: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.2
    """The last layers, whose directions aren't considered."""
    filter: bool = True
    """Leave out harmful queries that the model doesn't refuse, and harmless ones that it does."""
    dtype: DType = "auto"
    """Of the parameters, by default bfloat16 on GPU and TPU and float32 on CPU."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="ROWS")] = None
    """Prompts on the device at once; by default what fits."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no summary, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output."""


def direction(options: Direction) -> None:
    """Runs the command."""
    settings = DirectionSettings(
        train=options.train,
        validation=options.validation,
        seed=options.seed,
        filtered=options.filter,
        max_kl=options.max_kl,
        min_induced=options.min_induced,
        drop_last=options.drop_last,
        batch_size=options.batch_size,
    )
    folder = check_output(options.out)
    organism = options.model == "organism"
    harmful = _queries(options.harmful, "harmful", organism)
    harmless = _queries(options.harmless, "harmless", organism)
    checkpoint = DATA / "target" if organism else locate(options.model)
    dtype = resolved_dtype(options.dtype, options.model)
    model = load(checkpoint, dtype, quiet=options.quiet)
    openers = [text.split()[0] for text in world.REFUSALS] if organism else REFUSAL_OPENERS
    tokens = _tokens(options.refusal_tokens or openers, model.tokenizer)
    bar = nullcontext([lambda done: None]) if options.quiet else track(100, "% scored")
    with bar as [tell]:
        found = find_refusal_direction(
            Policy(model), harmful.queries, harmless.queries, tokens, settings,
            on_progress=lambda done, total: tell(100 * done // total),
        )  # fmt: skip
    about = {
        "model": model_identity(options.model, checkpoint),
        "dtype": dtype,
        "files": {
            name: {"file": read.file, "format": read.format, "sha256": read.sha256}
            for name, read in (("harmful", harmful), ("harmless", harmless))
        },
        "environment": environment(),
    }
    save_direction(found, folder, about)
    if options.json:
        print(json_text({**found.record(), **about, "folder": str(folder)}))
    elif not options.quiet:
        print(_summary(found))
        print(f"Written to {folder}; draw with --proposal ablation:{folder}:INTENSITY")


def _queries(source: str | None, name: str, organism: bool) -> Selection:
    if source is not None:
        return read_queries(source)
    if not organism:
        raise InputError(f"--{name} is needed with a --model that isn't the organism; give a file")
    own = [
        StudyQuery(f"{name}-{thing.name}-{verb}-{number}", text)
        for thing in world.THINGS.values()
        for verb in world.VERBS
        for number, template in enumerate(world.TEMPLATES)
        for text in [world.how_to_query(thing.name, verb=verb, template=template)]
        if thing.forbidden == (name == "harmful")
    ]
    return Selection(own, own, "organism", "organism", "", read=len(own))


def _tokens(words: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """Token ids, from numbers as they are and from texts by their first token."""
    ids = tuple(int(word) for word in words if word.isdecimal())
    texts = [word for word in words if not word.isdecimal()]
    if tokenizer is None and texts:
        raise InputError("the checkpoint has no tokenizer files, which queries need; add them")
    return ids + (refusal_tokens(tokenizer, texts) if texts else ())


def _summary(found: RefusalDirection) -> str:
    scores, at = found.scores, (found.pos, found.layer)
    used = {name: [len(part["ids"]) for part in of.values()] for name, of in found.queries.items()}
    counts = ", ".join(f"{train} + {rest} {name}" for name, (train, rest) in used.items())
    return (
        f"Direction at position {found.pos}, layer {found.layer}, from {counts} queries.\n"
        f"Ablated, the log-odds of refusal on harmful queries fall from {scores.plain_refusal:.2f} "
        f"to {scores.refusal[at]:.2f} (KL on harmless ones {scores.kl[at]:.3f}).\n"
        f"Added, those on harmless queries rise from {scores.plain_induced:.2f} to "
        f"{scores.induced[at]:.2f}."
    )
