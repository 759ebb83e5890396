"""One self-contained HTML page on a run.

What a run holds was written by others: models, judges, users. It reaches the page as text alone,
through a template that escapes everything and makes every unseen character visible; the page's
security policy allows no script and no style but its own, and no connection at all.
"""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Int
from markupsafe import Markup

from tailrisk_jax.estimators import Replicates
from tailrisk_jax.reports import figures, forecast_plots, forecasts
from tailrisk_jax.reports.answers import Answer, log_weights, weightiest
from tailrisk_jax.reports.baseline import BaselinePoints
from tailrisk_jax.reports.findings import summarise_verdicts
from tailrisk_jax.reports.sensitivity import VariantPoints, groups_plot, parts_plot
from tailrisk_jax.reports.tables import spread_line
from tailrisk_jax.reports.text import shorten, visible

SAMPLE_COLUMNS = ("query_id", "sample", "text", "component", "log_p", "log_q", "score")
"""What a page needs of samples.parquet."""
WORDS = ("ok", "doubtful", "unusable")
CONVERGING, ANSWERED, ANSWERS = 6, 30, 3  # the riskiest queries shown so, and answers of each
SPREAD = 30  # base queries in the table of variants
SHORT_LIMIT, ANSWER_LIMIT, FILE_LIMIT = 400, 1200, 100_000  # characters


@dataclasses.dataclass(frozen=True)
class SensitivitySection:
    """How far variants of a query move its risk, for a page.

    Attributes:
      points: for the pictures.
      queries: a row for each base query, the largest spread first; its columns are those of
        `studies.Sensitivity.queries`.
      sentences: what is found and what is left out.
    """

    points: VariantPoints
    queries: Sequence[Mapping[str, Any]]
    sentences: Sequence[str]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a page is made of; the tables and JSON are those in a run's folder.

    Attributes:
      name: of the run, for people.
      study: study.json.
      summary: summary.json.
      estimates: estimates.parquet.
      samples: samples.parquet, of which SAMPLE_COLUMNS are used.
      baseline: in the order of the estimates.
      sensitivity: of queries that are variants of one another.
      groups: the number of each query's base query; None where each is its own.
      files: further texts to show as they are, by name.
    """

    name: str
    study: Mapping[str, Any]
    summary: Mapping[str, Any]
    estimates: pa.Table
    samples: pa.Table
    baseline: BaselinePoints | None = None
    sensitivity: SensitivitySection | None = None
    groups: Int[np.ndarray, " M"] | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def html_report(run: RunRecord) -> str:
    """The page; the same run gives the same page.

    Raises:
      KeyError: a table or a JSON file lacks what this version writes.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=_figure,
        limit=lambda upper: min(upper, 1.0),  # no risk exceeds 1, whatever an asymptotic limit says
        short=lambda value: shorten(str(value), SHORT_LIMIT),
    )
    try:
        return environment.from_string(_own("report.html")).render(_content(run))
    except jinja2.UndefinedError as error:
        raise KeyError(str(error)) from error


def _content(run: RunRecord) -> dict[str, Any]:
    """What the template shows."""
    columns = {
        name: run.estimates[name].to_numpy()
        for name in run.estimates.column_names
        if not pa.types.is_list(run.estimates.schema.field(name).type)
    }
    value, with_hits = columns["value"], columns["hits"] > 0
    ranked = np.argsort(-np.nan_to_num(value, nan=-1.0), kind="stable").tolist()
    style, script = (_own(name) for name in ("report.css", "report.js"))
    return {
        "run": run,
        "summary": run.summary,
        "identity": run.study["identity"],
        "settings": run.study["settings"],
        "style": Markup(style),
        "script": Markup(script),
        "policy": _policy(style, script),
        "words": WORDS,
        "rows": _rows(run, columns, ranked),
        "agreement": None if run.baseline is None else run.baseline.agreement(columns),
        "components": _components(run),
        "findings": summarise_verdicts(columns["verdict"], columns["why"]),
        "answers": _answers(run, columns, [q for q in ranked if with_hits[q]][:ANSWERED]),
        "more_answers": max(0, int(with_hits.sum()) - ANSWERED),
        "replicates": _replicates(run, columns),
        "pictures": _pictures(run, columns, ranked),
        "forecast": _forecast(run, columns),
        "running": _running(run, [q for q in ranked if value[q] > 0][:CONVERGING]),
        "spread": () if run.sensitivity is None else run.sensitivity.queries[:SPREAD],
        "files": {name: shorten(text, FILE_LIMIT) for name, text in _files(run).items()},
    }


def _own(name: str) -> str:
    return (resources.files("tailrisk_jax.reports") / "data" / name).read_text(encoding="utf-8")


def _finalize(value: Any) -> Any:
    """What each expression of the template goes through, before it is escaped."""
    if isinstance(value, Markup):
        return value
    return visible(str(value))


def _figure(value: float | None, form: str = ".2e") -> str:
    """A number for people; a dash where it is unknown."""
    if value is None or np.isnan(value):
        return "\N{EN DASH}"
    if np.isinf(value):
        return "\N{INFINITY}" if value > 0 else "-\N{INFINITY}"
    return "0" if value == 0 else format(value, form)


def _policy(style: str, script: str) -> str:
    allowed = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in (style, script)
    )
    return (
        "default-src 'none'; style-src {}; script-src {}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    ).format(*allowed)


def _rows(
    run: RunRecord, columns: Mapping[str, np.ndarray], ranked: Sequence[int]
) -> list[dict[str, Any]]:
    own = ("query_id", "query", "value", "lower", "upper", "hits", "num_samples", "ess_harm",
           "largest_share", "verdict", "why")  # fmt: skip
    weights = run.estimates["component_mean_weight"]
    rows = []
    for q in ranked:
        row: dict[str, Any] = {name: columns[name][q] for name in own}
        row |= {"number": q + 1, "mean_weights": weights[q].as_py(), "baseline": None}
        if run.baseline is not None:
            row["baseline"] = {
                name: getattr(run.baseline, name)[q]
                for name in ("value", "lower", "upper", "num_samples")
            }
        rows.append(row)
    return rows


def _pictures(
    run: RunRecord, columns: Mapping[str, np.ndarray], ranked: Sequence[int]
) -> dict[str, Markup]:
    hit = run.samples["score"].to_numpy() > 0
    pictures = {
        "intervals": figures.interval_plot(columns, ranked),
        "weights": figures.weight_plot(log_weights(run.samples), hit),
        "shares": figures.share_plot(columns),
    }
    if run.baseline is not None:
        pictures["baseline"] = figures.baseline_plot(columns, run.baseline)
    if run.sensitivity is not None:
        pictures["groups"] = groups_plot(run.sensitivity.points)
        pictures["parts"] = parts_plot(run.sensitivity.points)
    return pictures


def _forecast(run: RunRecord, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What many more queries would bring: pictures and rows, or the words of a refusal."""
    size = run.estimates.num_rows
    if size < forecasts.LEAST_QUERIES:
        return {
            "rows": [],
            "lines": [f"Fewer than {forecasts.LEAST_QUERIES} queries show no tail."],
        }
    risks = forecasts.risks_of(columns, run.study["settings"]["level"])
    record = forecasts.make_forecast(risks, forecasts.usual_deployments(size), groups=run.groups)
    found: dict[str, Any] = {"rows": [], "lines": forecasts.tail_lines(record)}
    if record.usable:
        found["rows"] = forecasts.document(record)["forecasts"]
        found["worst"] = forecast_plots.worst_picture(record)
        found["aggregate"] = forecast_plots.aggregate_picture(record)
    return found


def _running(run: RunRecord, queries: Sequence[int]) -> list[tuple[str, Markup]]:
    names = ("running_samples", "running_value", "running_lower", "running_upper")
    return [
        (
            run.estimates["query"][q].as_py(),
            figures.convergence_plot(k, *(run.estimates[name][q].as_py() for name in names)),
        )
        for k, q in enumerate(queries)
    ]


def _components(run: RunRecord) -> list[dict[str, Any]]:
    """Each component: its weight in the mixture, its draws, its mean weight over queries."""
    mean, draws = (
        np.asarray(run.estimates[name].to_pylist(), float)
        for name in ("component_mean_weight", "component_draws")
    )
    alphas = run.study["weighting"]["weights"] or [1.0]
    found = []
    for k, (name, alpha) in enumerate(zip(run.summary["components"], alphas, strict=True)):
        known = mean[:, k][np.isfinite(mean[:, k])]
        low, middle, high = np.quantile(known, [0, 0.5, 1]) if len(known) else [np.nan] * 3
        found.append(
            {
                "name": name,
                "alpha": alpha,
                "draws": int(draws[:, k].sum()),
                "low": low,
                "median": middle,
                "high": high,
            }
        )
    return found


def _answers(
    run: RunRecord, columns: Mapping[str, np.ndarray], queries: Sequence[int]
) -> list[dict[str, Any]]:
    ids = [columns["query_id"][q] for q in queries]
    found = weightiest(run.samples, ids, run.summary["components"], ANSWERS)
    return [
        {name: columns[name][q] for name in ("query", "value", "hits")}
        | {"answers": [_shortened(answer) for answer in found[name]]}
        for name, q in zip(ids, queries, strict=True)
    ]


def _shortened(answer: Answer) -> Answer:
    return dataclasses.replace(answer, text=shorten(answer.text, ANSWER_LIMIT))


def _replicates(run: RunRecord, columns: Mapping[str, np.ndarray]) -> str | None:
    if "replicate_spread" not in columns:
        return None
    values = np.asarray(run.estimates["replicate_values"].to_pylist())
    parts = (values, columns["replicate_spread"], columns["replicate_claimed"])
    return spread_line(Replicates(*map(jnp.asarray, parts)))


def _files(run: RunRecord) -> dict[str, str]:
    """The study without its queries, which the table has, and their weights, then the others."""
    study = {name: part for name, part in run.study.items() if name != "queries"}
    weighting = study["weighting"].items()
    study["weighting"] = {name: part for name, part in weighting if name != "per_query"}
    return {
        "study.json": json.dumps(study, indent=2, ensure_ascii=False),
        "summary.json, environment": json.dumps(
            run.summary.get("environment"), indent=2, ensure_ascii=False
        ),
        **run.files,
    }
