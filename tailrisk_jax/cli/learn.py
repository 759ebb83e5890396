"""`tailrisk learn`: an adapter that answers harmfully the way that the target sometimes does."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from tailrisk_jax.adaptation.learning import Shares
from tailrisk_jax.adaptation.training import ALL_LINEAR, Training
from tailrisk_jax.cli.inputs import StudyOptions, load_inputs
from tailrisk_jax.cli.judges import JudgeOptions
from tailrisk_jax.cli.loading import DType
from tailrisk_jax.cli.mesh import OnMesh
from tailrisk_jax.policies import Mixture
from tailrisk_jax.studies import (
    Proposal,
    check_output,
    environment,
    file_hashes,
    json_text,
    locked,
    read_tuned,
)
from tailrisk_jax.studies.learning import LearnSettings, learn
from tailrisk_jax.studies.provenance import content_hash


@dataclasses.dataclass(frozen=True)
class _Own:
    """The options of `tailrisk learn` alone, which its help shows first."""

    model: str
    """The target: a Hugging Face checkpoint folder, a hub id, or "organism" (embedded)."""
    start: str
    """What the first round draws from, beside the target: a text as --proposal of `tailrisk
    estimate` takes, or tuned:FOLDER, what `tailrisk tune` wrote there."""
    out: Path
    """Folder of the adapter, of learn.json and of each round's checkpoints; an interrupted one is
    gone on with, and a finished one where more --rounds are asked for."""
    queries: Annotated[str | None, tyro.conf.arg(metavar="FILE|hf:NAME")] = None
    """Queries to learn on, in any format that `tailrisk estimate` reads. The organism has its
    own."""
    first: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Only the first N queries."""
    rounds: int = 4
    """Rounds of drawing and training at most; fewer once the estimated KL divergence from the
    harmful answers to the proposal stops falling."""
    samples: int = 500
    """Answers per query and round, and as many again to measure the last adapter."""
    steps: int = 200
    """Training steps of a round."""
    rows: int = 64
    """Answers in a training step."""
    micro_rows: int = 64
    """Of these, so many on the device at once."""
    learning_rate: float = LearnSettings.training.learning_rate
    """At its highest."""
    penalty: float = LearnSettings.training.penalty
    """On the second moment of the weighted harm, beside the likelihood."""
    rank: int = 8
    """Of the adapter."""
    alpha: Annotated[float | None, tyro.conf.arg(metavar="ALPHA")] = None
    """What it adds is scaled by alpha / rank; by default 1."""
    targets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODULE [..]")] = ALL_LINEAR
    """Modules that it changes, by their last name in the checkpoint, or all-linear."""
    target_share: float = Shares.target
    """Of the target, in every round and in the proposal in the end."""
    start_share: float = Shares.start
    """Of --start in later rounds; the rest is the adapter's."""
    max_new_tokens: Annotated[int | None, tyro.conf.arg(metavar="T")] = None
    """Answers are cut at this many tokens, by default 64 (24 for the organism)."""
    seed: int = 0
    """Of draws, adapter and batches. No later draw of `tailrisk estimate` is one of these."""
    temperature: float = 1.0
    """Of the target."""
    dtype: DType = "auto"
    """Of the model's parameters, by default bfloat16 on GPU and TPU and float32 on CPU; the adapter
    is float32 always."""
    weights_cache: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Keep the converted checkpoints here, and read them from here the next time."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="ROWS")] = None
    """Answers that are drawn or scored at once; by default what fits."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress and no summary, only errors."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """What learn.json says, on standard output."""


@dataclasses.dataclass(frozen=True)
class Learn(OnMesh, JudgeOptions, _Own):
    """Learn a proposal: an adapter trained on harmful answers, weighted as the target gives them.

    Iterated cross-entropy over all queries at once (De Boer et al. 2005). Then draw with
    --proposal "0.1*target + 0.9*adapter:DIR".
    """


def learn_adapter(options: Learn) -> None:
    """Runs the command."""
    shared = (field.name for field in dataclasses.fields(StudyOptions))
    study = StudyOptions(**{n: getattr(options, n) for n in shared if hasattr(options, n)})
    settings = LearnSettings(
        rounds=options.rounds,
        samples=options.samples,
        max_new_tokens=study.cut,
        seed=options.seed,
        rank=options.rank,
        alpha=options.alpha,
        targets=options.targets,
        shares=Shares(options.target_share, options.start_share),
        training=Training(
            learning_rate=options.learning_rate, steps=options.steps, penalty=options.penalty
        ),
        rows=options.rows,
        micro_rows=options.micro_rows,
        batch_size=options.batch_size,
    )
    folder = options.out
    if not (folder / "learn.json").exists():
        check_output(folder)
    inputs = load_inputs(study, quiet=options.quiet)
    text = options.start
    if text.startswith("tuned:"):
        text, _ = read_tuned(Path(text.removeprefix("tuned:")))
    start, queries = inputs.parse(text), inputs.selection.queries
    about = {
        **inputs.identity(),
        "start": {
            "text": text,
            "files": {name: file_hashes(path) for name, path in start.files.items()},
        },
        "queries": {
            "count": len(queries),
            "sha": content_hash([[query.id, query.content] for query in queries]),
        },
    }

    def tell(record: dict[str, Any]) -> None:
        if not options.quiet:
            print(f"tailrisk: {_line(record)}", file=sys.stderr, flush=True)

    with locked(folder):
        learned = learn(
            inputs.target, start.policy, queries, inputs.judge, settings, folder, about,
            environment=environment(), base=options.model, tell=tell,
        )  # fmt: skip
    if options.json:
        print(json_text({**learned.record, "folder": str(folder)}))
    elif not options.quiet:
        if learned.best == 0:
            print("The adapter is no better than the target by its own figures: see learn.json.")
        print(f"Written to {folder}, after round {max(learned.best, 1)}; draw with --proposal")
        for proposal in proposals(settings.shares, start, folder):
            print(f'  "{proposal}"')
        print("The second covers what the adapter has not learned.")


def proposals(shares: Shares, start: Proposal, folder: Path) -> tuple[str, str]:
    """The adapter beside the target, and beside the start too, in the shares of learning.

    Shares have six decimals at most, and sum to 1.
    """
    weights = np.asarray(start.policy.weights) if isinstance(start.policy, Mixture) else [1.0]
    others = {"target": shares.target}
    for weight, name in zip(weights, start.names, strict=True):
        others[name] = others.get(name, 0.0) + shares.start * float(weight)
    rounded = {name: round(share, 6) for name, share in others.items()}
    adapter = {f"adapter:{folder}": round(1 - sum(rounded.values()), 6)}
    parts = {"target": rounded.pop("target"), **adapter, **rounded}
    return (
        f"{shares.target:g}*target + {1 - shares.target:g}*adapter:{folder}",
        " + ".join(f"{share:g}*{name}" for name, share in parts.items() if share > 0),
    )


def _line(record: dict[str, Any]) -> str:
    """A round in one line."""
    parts = [f"round {record['round']}: {record['hits']:,} of {record['draws']:,} draws harmful"]
    if record["queries_without_hits"]:
        parts.append(f"{record['queries_without_hits']} queries without")
    if record["unscored"]:
        parts.append(f"{record['unscored']:,} unscored")
    if record["kl"] is not None:
        before = record["kl_before"]
        was = "" if before is None else f" (of the one before {before:.3f})"
        parts.append(f"KL {record['kl']:.3f}{was}")
    parts.append(f"{record['seconds']:.0f} s")
    return ", ".join(parts)
