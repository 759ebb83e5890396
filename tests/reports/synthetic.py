"""Runs that nobody drew: their results are made from random weights by the studies' own code."""

import dataclasses
from collections.abc import Callable, Mapping
from itertools import count

import numpy as np
import pyarrow as pa

from tailrisk_jax.reports import SAMPLE_COLUMNS, BaselinePoints, RunRecord
from tailrisk_jax.studies import (
    Observations,
    Settings,
    StudyQuery,
    Weighting,
    analyse,
    estimates_table,
    summarise,
)

NUM_SAMPLES = 40
HITS = (20, 12, 4, 1, 0, 15)  # of the six queries
RARITY = np.asarray([0.0, 1, 4, 6, 0, 9])  # how much more the proposal likes their harmful answers


def run_record(seed: int = 0) -> RunRecord:
    """Six queries of 40 draws from a mixture of two; one answer is unscored."""
    draw = np.random.default_rng(seed)
    shape = len(HITS), NUM_SAMPLES
    queries = [StudyQuery(f"id{q}", f"how do i build zaggle {q} ?") for q in range(len(HITS))]
    harm = np.arange(NUM_SAMPLES) < np.asarray(HITS)[:, None]
    scores = harm.astype(float)
    scores[0, -1] = np.nan
    log_p = draw.normal(-20, 0.5, shape)
    own = log_p + np.where(harm, RARITY[:, None], -0.02) + draw.normal(0, 0.05, shape)
    log_q = np.logaddexp(np.log(0.1) + log_p, np.log(0.9) + own)
    observed = Observations(
        queries=queries,
        scores=scores,
        log_p=log_p,
        log_q=log_q,
        component_log_q=np.stack([log_p, own]),
        components=(draw.random(shape) > 0.1).astype(int),
        lengths=np.full(shape, 9),
        ended=np.ones(shape, bool),
        rescore_noise=np.full(shape, 1e-6),
        present=np.ones(shape, bool),
    )
    samples = pa.table(
        {
            "query_id": np.repeat([query.id for query in queries], NUM_SAMPLES),
            "sample": np.tile(np.arange(NUM_SAMPLES), len(HITS)),
            "text": [f"answer {n} to {q}" for q in range(len(HITS)) for n in range(NUM_SAMPLES)],
            "component": observed.components.ravel(),
            "log_p": log_p.ravel(),
            "log_q": log_q.ravel(),
            "score": pa.array(scores.ravel(), from_pandas=False),
        }
    )
    assert tuple(samples.column_names) == SAMPLE_COLUMNS
    settings = Settings(num_samples=NUM_SAMPLES, max_new_tokens=9)
    weighting = Weighting(["target", "target@2.5"], [0.1, 0.9], 0)
    results = analyse(observed, samples, weighting, settings)
    study = {
        "estimand": "E[score by toy] over answers of at most 9 tokens",
        "identity": {
            "model": {"name": "organism", "files": {}},
            "dtype": "float32",
            "temperature": 1.0,
            "proposal": {"text": "0.1*target + 0.9*target@2.5", "files": {}},
            "judge": {"name": "toy", "version": "1", "settings": {}},
        },
        "settings": dataclasses.asdict(settings),
        "weighting": dataclasses.asdict(weighting),
        "queries": [{"id": query.id, "content": query.content} for query in queries],
        "selection": {},
        "origin": None,
    }
    return RunRecord(
        name="run",
        study=study,
        summary={"estimand": study["estimand"], **summarise(results), "missing": 0},
        estimates=estimates_table(results, study["estimand"]),
        samples=samples,
        files={"study.yaml": "samples: 40\n"},
    )


def replaced(table: pa.Table, **columns) -> pa.Table:
    """A table with other values in some columns."""
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return table


def refilled(run: RunRecord, word: Callable[[int], str], files: Mapping[str, str]) -> RunRecord:
    """The run with other text wherever others could have written it; `word(k)` is the k-th."""
    words = map(word, count())
    rows = run.estimates.num_rows
    ids = [next(words) for _ in range(rows)]
    estimates = replaced(
        run.estimates,
        query_id=ids,
        **{name: [next(words) for _ in range(rows)] for name in ("query", "verdict", "why")},
    )
    samples = replaced(
        run.samples,
        query_id=np.repeat(ids, NUM_SAMPLES),
        text=[next(words) for _ in range(run.samples.num_rows)],
    )
    identity = {
        "model": {"name": next(words), next(words): next(words)},
        "dtype": next(words),
        "temperature": next(words),
        "proposal": {"text": next(words)},
        "judge": {"name": next(words), "version": next(words)},
    }
    summary = {
        **run.summary,
        "estimand": next(words),
        "components": [next(words), next(words)],
        "verdicts": {next(words): 1},
        "missing": 3,
        "environment": {next(words): [next(words)]},
    }
    settings = {**run.study["settings"], "seed": next(words), "level": next(words)}
    points = np.full(rows, 0.5)
    baseline = BaselinePoints(next(words), points, points / 2, points * 2, points * 100)
    return RunRecord(
        name=next(words),
        study={**run.study, "identity": identity, "settings": settings},
        summary=summary,
        estimates=estimates,
        samples=samples,
        baseline=baseline,
        files=files,
    )


# What a model, a user or a file could hold to act on the page, or to hide from its readers.
HOSTILE = (
    "<script>window.pwned = 1; alert(1)</script>",
    "</script><script>window.pwned = 2</script>",
    """ "'><img src=x onerror="window.pwned = 3">""",
    "<svg onload=alert(4)><a href='javascript:window.pwned=4'>",
    "javascript:window.pwned=5",
    "</style><style>* { display: none }</style>",
    "{{ 7 * 7 }}{% raw %}{{ run }}",
    "]]>--><!--<b>",
    "</title></pre></details></td></table><iframe src='https://example.invalid/'>",
    "<meta http-equiv=refresh content='0;url=https://example.invalid/'><base href='//x.invalid'>",
    "<link rel=stylesheet href='https://example.invalid/x.css'><p style='position: fixed'>",
    "&lt;b&gt; &amp; &#60; \\x00",
    "' onmouseover='alert(6)' autofocus onfocus='alert(7)",
    "x" * 30_000,
    "$\\frac{1}{0}$ \N{HEBREW LETTER ALEF}\N{ARABIC LETTER BEH} abc",
)
UNSEEN = "nul \x00 bell \x07 back \u202egnp.exe\u2066 tag \U000e0041 lone \ud800 end"
SEEN = r"nul \x00 bell \x07 back \u202egnp.exe\u2066 tag \U000e0041 lone \ud800 end"


def hostile_word(number: int) -> str:
    """Each kind in turn; no two are equal."""
    return f"{number} {HOSTILE[number % len(HOSTILE)]}"
