"""`tailrisk report`: one self-contained HTML page on a run."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from tailrisk_jax.cli.config import FILE
from tailrisk_jax.cli.sensitivity import section
from tailrisk_jax.errors import InputError
from tailrisk_jax.reports import (
    SAMPLE_COLUMNS,
    BaselinePoints,
    RunRecord,
    SensitivitySection,
    html_report,
)
from tailrisk_jax.studies import (
    base_groups,
    find_variants,
    read_baseline,
    read_estimates,
    read_samples,
    read_study,
    sensitivity,
    store,
)


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one HTML page on a run: table, pictures, diagnostics, answers and provenance.

    The page stands alone: it needs no network and no other file. The answers that count most are
    in it, closed until they are opened.
    """

    run: tyro.conf.Positional[Path]
    """Its folder."""
    baseline: Path | None = None
    """Monte Carlo draws to compare with: JSON lines {"forbidden_prompt", "response": [..],
    "score": [..]}, or a run with --proposal target."""
    threshold: float | None = None
    """A baseline's answer counts as 1 from this score on, such as 0.75, and as 0 below; by default
    its scores are averaged."""
    perturbations: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Which query is a variant of which, as `tailrisk perturb` writes it, for a section on how far
    variants move the risk; not needed where the run's own query file said it."""
    out: Path | None = None
    """The page; by default report.html in the run's folder."""


def report(options: Report) -> None:
    """Runs the command."""
    out = options.run / "report.html" if options.out is None else options.out
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give a file, such as {out / 'report.html'}")
    run = read_run(options.run)
    if options.baseline is not None:
        points = _points(options.baseline, options.threshold, run)
        run = dataclasses.replace(run, baseline=points)
    variants, _ = find_variants(read_study(options.run).queries, options.perturbations, options.run)
    run = dataclasses.replace(
        run,
        groups=base_groups(run.estimates["query_id"].to_pylist(), variants),
        sensitivity=_sensitivity(options) if variants else None,
    )
    try:
        page = html_report(run)
    except KeyError as error:
        raise InputError(
            f"the results of run {options.run} lack {error}, as another version wrote them; make "
            f"them anew: tailrisk estimate {options.run}"
        ) from error
    store.write_atomically(out, page.encode())
    print(f"Written to {out}")


def read_run(folder: Path) -> RunRecord:
    """What a run's folder holds, as a page needs it.

    Raises:
      InputError: no run, one without results, or a damaged one.
    """
    study = store.read_study(folder)
    estimates = read_estimates(folder)
    absent = f"run {folder} has no results; finish it with: tailrisk resume {folder}"
    return RunRecord(
        name=folder.resolve().name,
        study=study,
        summary=store.read_json(folder / "summary.json", absent),
        estimates=estimates,
        samples=read_samples(folder, SAMPLE_COLUMNS),
        files={
            name: _text(folder / name)
            for name in (FILE, "sessions.jsonl")
            if (folder / name).is_file()
        },
    )


def _sensitivity(options: Report) -> SensitivitySection | None:
    """The section on variants; None where too few can be used."""
    try:
        return section(sensitivity(options.run, options.perturbations))
    except InputError:
        if options.perturbations is not None:
            raise
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise store.unreadable(path, error) from error


def _points(path: Path, threshold: float | None, run: RunRecord) -> BaselinePoints:
    """A baseline in the order of a run's queries."""
    baseline = read_baseline(path, threshold=threshold, level=run.study["settings"]["level"])
    matched = baseline.match(run.estimates["query"].to_pylist())
    if len(matched.without) == run.estimates.num_rows:
        raise InputError(
            f"baseline {path} has none of the queries of the run, such as "
            f"{run.estimates['query'][0].as_py()[:60]!r}; give one of the same queries"
        )
    return BaselinePoints(
        name=f"{baseline.name}, {baseline.estimand}",
        **{name: matched.figures(name) for name in ("value", "lower", "upper", "num_samples")},
    )
