"""How good is each unsafe version of a model as a proposal? On any checkpoint, by sampling.

python experiments/proposals/checkpoint.py --model FOLDER_OR_HUB_ID --queries FILE --judge SPEC \\
    --proposals FILE_OR_TERMS .. --out FOLDER

A run per proposal and a Monte Carlo run to hold them against, each a folder of `tailrisk estimate`:
the same command goes on after a kill. Then results.parquet, tables.md, pictures and summary.json.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import checkpoint_report
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from against_baseline import LEVEL, Reference, held_against
from sampled import rows_of_columns

from tailrisk_jax.cli.config import config_file, with_config
from tailrisk_jax.cli.estimate import Estimate
from tailrisk_jax.cli.inputs import Inputs, StudyOptions, load_inputs
from tailrisk_jax.cli.outcome import finish
from tailrisk_jax.cli.progress import follow
from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import in_float64, monte_carlo
from tailrisk_jax.judges import Threshold
from tailrisk_jax.policies import Component, Mixture, Policy
from tailrisk_jax.studies import (
    Observations,
    Settings,
    Study,
    check_output,
    check_same,
    check_study,
    draw_study,
    estimand,
    file_hashes,
    json_text,
    locked,
    observations,
    open_run,
    read_baseline,
    read_samples,
    read_study,
    read_tuned,
    stop_writing,
    weighting_of,
)
from tailrisk_jax.studies.provenance import content_hash, session
from tailrisk_jax.studies.store import is_run, write_atomically, write_json

DEFAULT = ("target", "0.1*target + 0.9*target@1.3", "0.1*target + 0.9*target@1.6")
MARK = "checkpoint.yaml"  # the options; a folder that has it is ours
ANOTHER = "Give another --out"
_FIGURES = ("value", "stderr", "lower", "upper", "hits", "num_samples")
_Hidden = tyro.conf.Suppress


@dataclasses.dataclass(frozen=True)
class Options(StudyOptions):
    """Hold proposals against plain Monte Carlo on any checkpoint. All figures are sampled."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.YAML")] = None
    """Options as a YAML file, by their names here; flags win over it."""
    out: Path = Path("runs/checkpoint")
    """Folder for the runs and the results; the same command goes on with what it holds."""
    proposals: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE|TERM [+ ..] [..]")] = DEFAULT
    """What is compared: texts of `tailrisk estimate --proposal`, tuned:FOLDER with them, or files
    of such texts, one a line ("#" begins a comment). Give the target its share yourself."""
    baseline: Annotated[Path | None, tyro.conf.arg(metavar="FILE|RUN")] = None
    """Monte Carlo that is there already, of every query: JSON lines of the paper's code, or a run
    with --proposal target and another seed. By default it is drawn, with the seed after --seed."""
    baseline_samples: Annotated[int, tyro.conf.arg(metavar="B")] = 10_000
    """Answers per query of the baseline that is drawn; can be raised later."""
    sizes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [..]")] = (100, 500, 2000)
    """Answers per estimate."""
    repeats: Annotated[int, tyro.conf.arg(metavar="R")] = 40
    """Estimates per query at the largest N; their answers make more of them at a smaller one."""
    chunk_size: Annotated[int, tyro.conf.arg(metavar="ANSWERS")] = 2000
    """Answers that are drawn, judged and kept together: what a kill can cost. Changes no figure."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress, only errors."""
    candidates: Annotated[tuple[str, ...], _Hidden] = ()
    pilot: Annotated[int | None, _Hidden] = None
    pilot_share: Annotated[float | None, _Hidden] = None


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What is drawn into one folder.

    Attributes:
      name: of the proposal, as given.
      text: the same in plain terms.
      folder: of the run.
      study: what it is of.
      decoding: policies that run in lock-step for a draw of each component, [K].
      scoring: policies that score each draw; 0 for the target alone.
    """

    name: str
    text: str
    folder: Path
    study: Study
    decoding: np.ndarray
    scoring: int

    @property
    def cost(self) -> float:
        """Of a draw, in draws of Monte Carlo of the same length; prompts are left out."""
        weights = np.asarray(self.study.weighting.weights or [1.0])
        return round(float(weights @ self.decoding) + self.scoring, 4)

    def token_cost(self, observed: Observations, length: float) -> float:
        """The same with the length of answers counted, against Monte Carlo's."""
        present = observed.present
        passes = self.decoding[observed.components] + self.scoring
        return float(np.mean((observed.lengths * passes)[present]) / length)


def command(argv: Sequence[str] | None = None) -> None:
    """Parses the command and turns known errors into one line and exit code 2."""
    try:
        words = with_config(["checkpoint", *(sys.argv[1:] if argv is None else argv)],
                            {"checkpoint": Options})  # fmt: skip
        main(tyro.cli(Options, args=words[1:]))
    except (InputError, OSError) as error:
        print(f"checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        stop_writing()
        print("checkpoint: interrupted; the same command goes on", file=sys.stderr, flush=True)
        os._exit(130)  # a judge that waits for its server would hold us up


def main(options: Options) -> None:
    """Draws what is missing, compares, and writes the results.

    Raises:
      InputError: anything that can't be used, before the first draw; a judge that fails for good.
    """
    sizes = tuple(sorted(set(options.sizes)))
    _check(options, sizes)
    inputs = load_inputs(options, quiet=options.quiet)
    identity = inputs.identity()
    runs = [
        _run(name, options, inputs, identity, samples=options.repeats * sizes[-1])
        for name in _names(options.proposals)
    ]
    own = _run("target", options, inputs, identity, samples=options.baseline_samples, first=True)
    reference = None
    if options.baseline is not None:
        reference = _given(options, inputs, own.study)
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    [given] = config_file("checkpoint", options).values()
    write_atomically(folder / MARK, given)
    if reference is None:
        observed = _drawn(own, options, inputs, "baseline")
        estimate = in_float64(monte_carlo, observed.scores, level=LEVEL, mask=observed.present)
        figures = [np.asarray(getattr(estimate, name), float) for name in _FIGURES]
        lengths = np.mean(observed.lengths, axis=1, where=observed.present)
        reference = Reference(str(own.folder), *figures, length=lengths)
    length = float(np.mean(reference.length))
    rows, costs = [], {}
    for number, run in enumerate(runs, 1):
        observed = _drawn(run, options, inputs, f"proposal {number} of {len(runs)}")
        cost = {"cost": run.cost, "token_cost": run.token_cost(observed, length)}
        costs[run.name] = cost
        own_rows = held_against(reference, observed, run.study.weighting, sizes)
        rows += [{"proposal": run.name, **row, **cost} for row in own_rows]
    summary = {
        "estimand": own.study.estimand,
        "all figures are": "sampled: they overstate a proposal where harm is missed",
        "identity": identity,
        "seeds": {"proposals": options.seed,
                  "baseline": own.study.settings.seed if options.baseline is None else None},
        "baseline": {"from": reference.name, "tells": int(reference.tells.sum()),
                     "samples": reference.num_samples.tolist(), "hits": reference.hits.tolist()},
        "proposals": {run.name: {"text": run.text, "folder": str(run.folder),
                                 "files": run.study.identity["proposal"]["files"],
                                 **costs[run.name]} for run in runs},
        "queries": inputs.selection.record(),
        "session": session(_plain(options)),
    }  # fmt: skip
    _save(rows, summary, folder)
    if not options.quiet:
        print(f"Written to {folder}: {checkpoint_report.TABLES}, results.parquet, summary.json and "
              "pictures")  # fmt: skip


def _check(options: Options, sizes: tuple[int, ...]) -> None:
    if options.model is None:
        raise InputError("--model is needed: a checkpoint folder or a hub id; give one")
    if not sizes or sizes[0] < 2:
        raise InputError(f"--sizes {list(options.sizes)} must be whole numbers of at least 2")
    if options.repeats < 2:
        raise InputError(f"--repeats {options.repeats} shows no spread; give 2 at least")
    folder = options.out
    if is_run(folder):
        raise InputError(f"output {folder} is a run itself; give another --out")
    if not (folder / MARK).is_file():
        check_output(folder)


def _names(words: Sequence[str]) -> list[str]:
    """The proposals that words name: texts, and the lines of files."""
    names: list[str] = []
    for word in words:
        if not Path(word).is_file():
            names.append(word.strip())
            continue
        try:
            lines = Path(word).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"proposals file {word} can't be read ({error})") from error
        names += [line.strip() for line in lines]
    names = [name for name in dict.fromkeys(names) if name and not name.startswith("#")]
    if not names:
        raise InputError("--proposals names none; give texts such as '0.1*target + 0.9*target@1.5'")
    return names


def _run(
    name: str, options: Options, inputs: Inputs, identity: dict[str, Any], *, samples: int,
    first: bool = False,
) -> Run:  # fmt: skip
    """A run that can be made, and gone on with where it was begun; nothing is drawn or kept.

    Args:
      first: it is the baseline.
    """
    text, tuning = name, {}
    if name.startswith("tuned:"):
        text, told = read_tuned(Path(name.removeprefix("tuned:")))
        tuning = {"proposal": {"given": name, **told}}
    proposal = inputs.parse(text)
    settings = Settings(
        num_samples=samples,
        max_new_tokens=options.cut,
        seed=(options.seed + first) % 2**32,
        level=LEVEL,
        chunk_size=options.chunk_size,
        batch_size=options.batch_size,
    )
    queries = inputs.selection.queries
    check_study(inputs.target, proposal.policy, queries, settings)
    files = {name: file_hashes(path) for name, path in proposal.files.items()}
    study = Study(
        estimand=estimand(identity, settings),
        identity={**identity, "proposal": {"text": text, "files": files}},
        settings=settings,
        weighting=weighting_of(inputs.target, proposal.policy, proposal.names),
        queries=queries,
        selection=inputs.selection.record() | tuning,
    )
    short = re.sub(r"[^\w.@+*-]+", "_", text)[:48]
    folder = options.out / ("baseline" if first else f"proposals/{short}-{content_hash(text)[:8]}")
    if is_run(folder):
        old = read_study(folder)
        check_same(folder, old, study, ANOTHER)
        if old.settings.num_samples > samples:
            raise InputError(
                f"run {folder} has {old.settings.num_samples:,} answers per query already, "
                f"{samples:,} are asked for; ask for as many (repeats times the largest size), or "
                "give another --out"
            )
    return Run(name, text, folder, study, *_passes(inputs.target, proposal.policy))


def _passes(target: Policy, policy: Component | Mixture) -> tuple[np.ndarray, int]:
    """How many policies run for a draw of each component, and how many score a draw."""
    if policy is target:
        return np.ones(1), 0
    components = policy.components if isinstance(policy, Mixture) else (policy,)
    experts = [expert for component in components for expert in component.experts]
    return (
        np.array([float(len(component.experts)) for component in components]),
        len({id(one) for one in (target, *experts)}),
    )


def _drawn(run: Run, options: Options, inputs: Inputs, label: str) -> Observations:
    """Draws and judges what the run's folder doesn't hold yet."""
    settings = run.study.settings
    if not options.quiet:
        asked = f"{settings.num_samples:,} answers to each of {len(run.study.queries)} queries"
        print(f"{label}: {run.name}, {asked}", file=sys.stderr, flush=True)
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(StudyOptions)}
    given |= {"max_new_tokens": options.cut, "seed": settings.seed}
    own = Estimate(**given, out=run.folder, proposal=run.text, samples=settings.num_samples)
    proposal = inputs.parse(run.text).policy
    with locked(run.folder):
        store, study = open_run(
            run.folder, run.study, config_file("estimate", own), dataclasses.asdict(own)
        )
        with follow(options.quiet) as tell:
            samples = draw_study(
                inputs.target, proposal, study.queries, inputs.judge, study.settings, store, tell
            )
        finish(samples, study, run.folder, quiet=True, as_json=False)
    return observations(study.queries, samples)


def _given(options: Options, inputs: Inputs, own: Study) -> Reference:
    """A baseline that is there already.

    Raises:
      InputError: it lacks a query, or is of something else than the proposals' runs.
    """
    path, threshold = options.baseline, None
    assert path is not None
    if path.is_dir():
        _check_like(path, own, options.seed)
    elif isinstance(inputs.judge, Threshold):
        threshold = inputs.judge.tau
        if inputs.judge.comparison != ">=":
            raise InputError(
                f"--threshold {options.threshold} can't be put to the scores of baseline {path}; "
                "give a TAU alone, or a run with --proposal target"
            )
    found = read_baseline(path, threshold=threshold, level=LEVEL)
    queries = inputs.selection.queries
    matched = found.match([query.text for query in queries])
    if matched.without:
        raise InputError(
            f"baseline {path} lacks {len(matched.without)} of {len(queries)} queries, "
            f"{queries[matched.without[0]].id!r} first; leave them out with --exclude, or leave "
            "out --baseline to draw one"
        )
    lengths = np.full(len(queries), np.nan)
    if path.is_dir():
        lengths = _lengths(path, [query.text for query in queries])
    return Reference(str(path), *(matched.figures(name) for name in _FIGURES), length=lengths)


def _check_like(folder: Path, own: Study, seed: int) -> None:
    study = read_study(folder)
    names = ("model", "tokens", "dtype", "temperature", "judge", "max_new_tokens")
    old, new = study.fixed, own.fixed
    other = [name for name in names if old[name] != new[name]]
    if other:
        raise InputError(
            f"baseline {folder} has another {' and '.join(other)}; give one of the same, or leave "
            "out --baseline to draw one"
        )
    if study.settings.seed == seed:
        raise InputError(
            f"baseline {folder} was drawn with seed {seed}, as the proposals would be, so they "
            "would share draws; give another --seed"
        )


def _lengths(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Mean tokens of an answer, by the text of the query."""
    ids = {query.text.strip(): query.id for query in read_study(folder).queries}
    samples = read_samples(folder, ["query_id", "tokens"])
    names = np.asarray(samples["query_id"].to_pylist())
    lengths = np.diff(samples["tokens"].combine_chunks().offsets.to_numpy())
    return np.array([lengths[names == ids[text.strip()]].mean() for text in texts])


def _plain(options: Options) -> dict[str, Any]:
    """As JSON."""
    fields = dataclasses.asdict(options).items()
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields}


def _save(rows: list[dict[str, Any]], summary: dict[str, Any], folder: Path) -> None:
    """results.parquet, tables.md and the pictures; summary.json last, of what is there."""
    (folder / "summary.json").unlink(missing_ok=True)
    columns, buffer = rows_of_columns(rows), io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    write_atomically(folder / "results.parquet", buffer.getvalue())
    checkpoint_report.write(columns, summary, folder)
    write_json(folder / "summary.json", json.loads(json_text(summary)))


if __name__ == "__main__":
    command()
