"""`tailrisk estimate`: how likely is an event in a model's answers, query by query."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from tailrisk_jax.cli.progress import table_console, track
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge, RegexEvent
from tailrisk_jax.models import load_model
from tailrisk_jax.organisms import OrganismHarm, load_organism
from tailrisk_jax.policies import Policy, at_temperature
from tailrisk_jax.reports import estimates_table
from tailrisk_jax.studies import (
    Results,
    Settings,
    StudyQuery,
    check_output,
    parse_proposal,
    read_queries,
    run_study,
    save_results,
)
from tailrisk_jax.studies import results as files


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimate how likely an event is in a model's answers to each query.

    Draws answers from the proposal, an unsafe version of the model, and reweights them by
    p(answer) / q(answer): the estimate is unbiased for the model itself. Writes
    estimates.parquet, samples.parquet and summary.json.
    """

    model: str
    """The target: a Hugging Face checkpoint folder, a hub id, or "organism" (embedded)."""
    out: Path
    """Folder for the results; it must not exist yet, or be empty."""
    proposal: str
    """What to draw from: target, ablation:DIRECTION:INTENSITY,
    addition:VECTOR:LAYER:COEFFICIENT or checkpoint:FOLDER_OR_HUB_ID, each with @T for a temperature
    of its own (target@2); or a weighted mixture of these such as
    "0.1*target + 0.9*ablation:direction.safetensors:0.5"."""
    queries: Path | None = None
    """JSON lines, {"prompt": ..} or {"messages": [..]}, with an optional "id"; the organism has
    its own."""
    event: str | None = None
    """Regular expression: an answer in which it is found counts; the organism has its own."""
    samples: int = 500
    """Answers per query; with --until, per query and round."""
    until: Annotated[str | None, tyro.conf.arg(metavar="rel=SHARE")] = None
    """Go on, round by round, until a query's interval is this share of its estimate to either
    side, such as rel=0.2; other queries go on alone."""
    max_samples: int = 20_000
    """Answers per query at most, with --until."""
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


def estimate(options: Estimate) -> None:
    """Runs the command."""
    settings = Settings(
        num_samples=options.samples,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        level=options.level,
        until=None if options.until is None else _relative(options.until),
        max_samples=options.max_samples,
        replicates=options.replicates,
        batch_size=options.batch_size,
    )
    out = check_output(options.out)
    queries = None if options.queries is None else read_queries(options.queries)
    judge: Judge | None = None if options.event is None else RegexEvent(options.event)
    vectors, checkpoints = {}, {}
    if options.model == "organism":
        organism = load_organism()
        target, judge = organism.target, judge or OrganismHarm()
        vectors, checkpoints = organism.directions, {"unsafe": organism.unsafe}
        queries = queries or [StudyQuery(q.id, str(q)) for q in organism.queries if q.forbidden]
    else:
        for name in ("queries", "event"):
            if getattr(options, name) is None:
                raise InputError(f"--{name} is needed with --model {options.model}; give one")
        target = Policy(load_model(options.model, dtype=jnp.dtype(options.dtype)))
    assert queries is not None and judge is not None
    target = at_temperature(target, options.temperature)
    proposal, names = parse_proposal(
        options.proposal, target, vectors=vectors, checkpoints=checkpoints, dtype=options.dtype
    )
    console = table_console()
    with track(len(queries), "queries") as [advance]:
        results = run_study(target, proposal, queries, judge, settings, advance)
    event = options.event or "organism harm"
    summary = {
        "estimand": f"P({event}) in answers of at most {options.max_new_tokens} tokens "
        f"at temperature {options.temperature:g}",
        "settings": {
            **dataclasses.asdict(options),
            "out": str(out),
            "queries": str(options.queries),
        },
        "components": names,
        "num_queries": len(queries),
        "rescore_noise": float(results.weighed.rescore_noise.max()),
    }
    save_results(results, out, summary)
    table = files.estimates_table(results).to_pydict()
    console.print(estimates_table(table))
    console.print(
        f"Components (mean weights in this order): {', '.join(names)}. Seed {options.seed}."
    )
    for line in _convergence(results):
        console.print(line, highlight=False)
    for query, word, why in zip(table["query_id"], table["verdict"], table["why"], strict=True):
        if word != "ok":
            console.print(f"{query}: {why}", highlight=False)
    console.print(f"Written to {out}", highlight=False)


def _relative(until: str) -> float:
    """The share in rel=SHARE."""
    name, _, share = until.partition("=")
    try:
        if name != "rel":
            raise ValueError
        return float(share)
    except ValueError:
        raise InputError(f"--until {until!r} is not rel=SHARE; give e.g. rel=0.2") from None


def _convergence(results: Results) -> list[str]:
    """What rounds and repeats showed, in a line each."""
    lines = []
    counts = results.present.sum(axis=1)
    if counts.min() != counts.max():
        lines.append(
            f"Answers per query: {counts.min():,} to {counts.max():,}, {counts.sum():,} in all."
        )
    if results.replicates is not None:
        ratios = results.replicates.spread / results.replicates.claimed
        known = ratios[np.isfinite(ratios)]
        if known.size:
            lines.append(
                f"Spread between {results.replicates.values.shape[1]} repeats over the error they "
                f"claim: median {np.median(known):.2f}, {known.min():.2f} to {known.max():.2f} "
                f"over {known.size} queries."
            )
    return lines
