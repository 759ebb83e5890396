"""`tailrisk forecast`: the risk of many more queries than were run."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from tailrisk_jax.cli.progress import table_console
from tailrisk_jax.errors import InputError
from tailrisk_jax.forecasting import Fit
from tailrisk_jax.reports.forecast_plots import forecast_picture
from tailrisk_jax.reports.forecasts import (
    LEAST_QUERIES,
    document,
    forecast_table,
    make_forecast,
    risks_of,
    tail_lines,
    threshold_table,
)
from tailrisk_jax.studies import (
    base_groups,
    find_variants,
    json_text,
    read_estimates,
    read_study,
    store,
)

_FORMS = {".png": "png", ".svg": "svg"}


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Forecast the risk of many queries from the estimates of a run.

    The run's queries must be a random draw of those to come. "worst query" is the risk that one of
    n queries exceeds on average; "any harm" the chance that at least one of n answers is harmful,
    one answer to each query. Bands hold the draw of the queries and the error of their estimates.
    They don't hold kinds of queries that the run has none of.
    """

    run: tyro.conf.Positional[Path]
    """Its folder."""
    deployment: tuple[float, ...]
    """Numbers of queries, such as 1e5 1e6; not fewer than the run has."""
    threshold: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    """Also how many queries have a risk above this, and whether the worst one has; may be
    repeated."""
    top: int | None = None
    """How many of the riskiest queries are fitted; by default a tenth, but at least 10."""
    fit: Fit = "peaks"
    """peaks: maximum likelihood; ols: Jones et al.'s (2025), which forecasts too high; midpoint and
    digamma: least squares with other plotting positions."""
    perturbations: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Which query is a variant of which, as `tailrisk perturb` writes it; not needed where the
    run's own query file said it. Variants of one query are drawn together in the bands."""
    level: float = 0.95
    """Of the bands."""
    seed: int = 0
    """Of the bands' resamples."""
    out: Path | None = None
    """A picture, .png or .svg."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The result as JSON on standard output, in place of the tables."""


def forecast(options: Forecast) -> None:
    """Runs the command."""
    if options.out is not None and options.out.suffix not in _FORMS:
        raise InputError(f"--out {options.out} must end in .png or .svg")
    if not options.deployment:
        raise InputError("--deployment holds no number of queries; give some, such as 1e5 1e6")
    estimates = read_estimates(options.run)
    columns = estimates.to_pydict()
    study = read_study(options.run)
    if estimates.num_rows < LEAST_QUERIES:
        raise InputError(
            f"run {options.run} has {estimates.num_rows} queries, too few to show a tail; run at "
            f"least {LEAST_QUERIES}"
        )
    variants, _ = find_variants(study.queries, options.perturbations, options.run)
    record = make_forecast(
        risks_of(columns, study.settings.level), options.deployment, thresholds=options.threshold,
        top=options.top, fit=options.fit, groups=base_groups(columns["query_id"], variants),
        level=options.level, seed=options.seed,
    )  # fmt: skip
    if options.out is not None:
        form = _FORMS[options.out.suffix]
        store.write_atomically(options.out, forecast_picture(record, form))
    if options.json:
        estimand = columns["estimand"][0]
        print(json_text({"run": str(options.run), "estimand": estimand, **document(record)}))
        return
    console = table_console()
    console.print(columns["estimand"][0], highlight=False, markup=False)
    console.print(forecast_table(record))
    if options.threshold:
        console.print(threshold_table(record))
    for line in tail_lines(record):
        console.print(line, highlight=False, markup=False)
    if options.out is not None:
        console.print(f"Written to {options.out}", highlight=False, markup=False)
