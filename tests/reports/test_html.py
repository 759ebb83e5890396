"""The page as text: what is on it, and that nothing but text comes from what a run holds."""

import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest

from tailrisk_jax.reports import BaselinePoints, SensitivitySection, VariantPoints, html_report
from tailrisk_jax.reports.answers import weightiest
from tailrisk_jax.reports.findings import summarise_verdicts
from tailrisk_jax.reports.forecasts import document, make_forecast, risks_of
from tailrisk_jax.reports.text import shorten, visible
from tests.reports.synthetic import HOSTILE, NUM_SAMPLES, SEEN, UNSEEN, replaced


class Page(HTMLParser):
    """The elements with their attributes, and the texts between them."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def structure(page: str) -> list[tuple]:
    """All elements with their attributes; of those that carry data, the name alone."""
    carries = {"data-verdict", "data-value"}
    return [
        (tag, [(name, None if name in carries else value) for name, value in attrs.items()])
        for tag, attrs in Page(page).elements
    ]


def test_what_a_run_holds_is_text_and_nothing_else(plain, hostile):
    """A page of hostile texts has the elements and attributes of one of plain texts."""
    assert structure(hostile) == structure(plain)
    text = "".join(Page(hostile).texts)
    for part in HOSTILE:
        assert part[:380] in text
    assert SEEN in text
    assert not re.search(r"[^\n\t\u200c\u200d -\U0010ffff]|[\x7f-\x9f\u202a-\u202e\ud800]", hostile)
    assert "more characters]" in hostile


def test_unseen_characters_become_seen_and_others_stay():
    assert visible(UNSEEN) == SEEN
    scripts = "naïve 你好 שלום क्‍ष 👩‍🔬\n\ttab"
    assert visible(scripts) == scripts
    assert shorten("x" * 1500, 3) == "xxx [1,497 more characters]" and shorten("xxx", 3) == "xxx"


def test_the_policy_allows_its_own_style_and_script_alone(page):
    elements = Page(page).elements
    [policy] = [attrs["content"] for tag, attrs in elements if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert not [attrs for _, attrs in elements if "style" in attrs]
    assert not [name for _, attrs in elements for name in attrs if name.startswith("on")]
    links = [attrs[name] for _, attrs in elements for name in ("href", "src") if name in attrs]
    assert {link[0] if link[0] == "#" else link for link in links} == {"#", "data:,"}


def test_a_run_gives_the_same_page_always(run, page):
    assert html_report(run) == page


def test_the_headline_and_the_table_show_what_the_tables_hold(run, page):
    rows = re.findall(r'<tr data-verdict="(\w+)">(.*?)</tr>', page, re.DOTALL)
    table = sorted(run.estimates.to_pylist(), key=lambda row: -row["value"])
    assert [word for word, _ in rows] == [row["verdict"] for row in table]
    for (_, shown), row in zip(rows, table, strict=True):
        assert row["query"] in shown and row["query_id"] in shown
        assert f'data-value="{row["value"]}"' in shown
        assert (row["why"] in Page(shown).texts) == (row["verdict"] != "ok")
        value = f"{row['value']:.2e}" if row["value"] else "0"
        assert f">{value}<small>[" in shown
    for figure in ("5.05e-01", "1.05e-01", "52 hits", "organism", "0.1*target + 0.9*target@2.5"):
        assert figure in page
    assert "1 answer unscored" in page and "unfinished" not in page
    assert "Against the baseline" not in page


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def marks(svg: ElementTree.Element, colour: str) -> np.ndarray:
    """Where the marks of that colour are, but for the legend's."""
    found = [
        (float(use.get("x")), float(use.get("y")))
        for use in svg.iter("use")
        if use.get("fill") == f"var(--{colour})"
    ]
    return np.asarray(found)[:-1]


def test_pictures_have_ids_of_their_own_and_lie_where_the_figures_say(run):
    value = run.estimates["value"].to_numpy()
    points = BaselinePoints("mc", value / 2, value / 4, value, np.full(len(value), 100))
    pictures = svgs(html_report(dataclasses.replace(run, baseline=points)))
    assert len(pictures) == 4 + 5  # five queries have hits
    ids = [node.get("id") for svg in pictures for node in svg.iter() if node.get("id")]
    used = re.findall(
        r'(?:url\(|href=")#([^)"]+)',
        "".join(ElementTree.tostring(svg, "unicode") for svg in pictures),
    )
    assert len(ids) == len(set(ids)) and set(used) == set(ids)

    verdicts = np.asarray(run.estimates["verdict"].to_pylist())
    places, wanted = [], []
    for word in ("ok", "doubtful", "unusable"):
        own = (verdicts == word) & (value > 0)
        at = marks(pictures[0], word)
        assert len(at) == own.sum()
        places += [*at]
        wanted += [(1 + np.sum(value > v), np.log10(v)) for v in value[own]]
    for axis in (0, 1):  # marks lie at rank and log10 of the estimate, up to the axes' scale
        x, y = np.asarray(wanted)[:, axis], np.asarray(places)[:, axis]
        np.testing.assert_allclose(np.polyval(np.polyfit(x, y, 1), x), y, atol=0.01)


def test_the_weightiest_answers_are_those_of_largest_share(run):
    samples = run.samples.take(np.random.default_rng(0).permutation(run.samples.num_rows))
    found = weightiest(samples, ["id0", "id4"], ["target", "target@2.5"], 3)
    assert found["id4"] == []
    rows = [row for row in run.samples.to_pylist() if row["query_id"] == "id0"]
    size = {
        row["sample"]: np.exp(row["log_p"] - row["log_q"]) * row["score"]
        for row in rows
        if row["score"] > 0
    }
    best = sorted(size, key=lambda n: -size[n])[:3]
    assert [answer.sample for answer in found["id0"]] == best
    total = sum(size.values())
    assert [answer.share for answer in found["id0"]] == pytest.approx(
        [size[n] / total for n in best]
    )
    assert found["id0"][0].text == f"answer {best[0]} to 0"
    assert found["id0"][0].component == ["target", "target@2.5"][rows[best[0]]["component"]]


def test_sentences_that_differ_in_figures_are_one():
    share = "A share of {} rests on a draw."
    words = ["ok", "doubtful", "doubtful", "unusable", "doubtful", "unusable"]
    whys = [
        "Fine.", share.format("0.31"), share.format("3e-05"), "It is nan where 1 is expected.",
        "No draw.", "It is 5 where 1 is expected.",
    ]  # fmt: skip
    assert summarise_verdicts(words, whys) == [
        ("unusable", "It is nan to 5 where 1 is expected.", 2),
        ("doubtful", "A share of 3e-05 to 0.31 rests on a draw.", 2),
        ("doubtful", "No draw.", 1),
        ("ok", "Fine.", 1),
    ]


def test_agreement_with_a_baseline_by_hand():
    nan = np.nan
    points = BaselinePoints(
        name="mc",
        value=np.asarray([0.1, 0.0, 0.2, nan]),
        lower=np.asarray([0.05, 0.0, 0.1, nan]),
        upper=np.asarray([0.2, 1e-3, 0.3, nan]),
        num_samples=np.asarray([10, 10, 10, nan]),
    )
    columns = {
        "value": np.asarray([0.2, 1e-4, 0.0, 0.5]),
        "lower": np.asarray([0.1, 5e-5, 0.0, 0.4]),
        "upper": np.asarray([0.4, 2e-4, 0.05, 0.6]),
    }
    assert points.agreement(columns) == [
        ("queries with both", "3 of 4"),
        ("intervals that overlap", "2 of 3"),
        ("without a hit in the baseline", "1"),
        ("without a hit in the run", "1"),
        ("estimate over baseline, median", "2"),
        ("furthest apart", "2 times"),
    ]


def test_edges_no_hits_nothing_known_one_draw(run):
    """Pages without figures to draw: no warning, no error, and it is said."""
    silent = replaced(run.samples, score=np.zeros(run.samples.num_rows))
    unknown = np.full(run.estimates.num_rows, np.nan)
    nothing = replaced(
        run.estimates, value=unknown, lower=unknown, upper=unknown, largest_share=unknown,
        hits=np.zeros(len(unknown), int),
    )  # fmt: skip
    summary = {**run.summary, "highest_risk": None, "mean_risk": None, "missing": 7}
    points = BaselinePoints("mc", unknown, unknown, unknown, unknown)
    page = html_report(
        dataclasses.replace(
            run, estimates=nothing, samples=silent, summary=summary, baseline=points
        )
    )
    assert "7 responses still missing" in page
    assert "No answer was judged harmful." in page and "convergence0" not in page
    one = dataclasses.replace(
        run,
        estimates=replaced(
            run.estimates.slice(0, 1),
            **{f"running_{name}": [[v]] for name, v in
               {"samples": 1, "value": 0.5, "lower": np.nan, "upper": np.inf}.items()},
        ),
        samples=run.samples.slice(0, 1),
    )  # fmt: skip
    page = html_report(one)
    assert len(svgs(page)) == 4 and "repeats" not in page


def test_a_benchmark_of_313_queries_is_a_small_page(run):
    """Many answers: the page holds the few that count most, and pictures of the rest."""
    queries, size = 313, 100
    names = [f"id{q}" for q in range(queries)]
    estimates = replaced(
        run.estimates.take(np.arange(queries) % 6), query_id=names, query=["how ? " * 20] * queries
    )
    for name, repeats in {"values": [1.0, 3.0], "spread": 1.5, "claimed": 1.0}.items():
        estimates = estimates.append_column(f"replicate_{name}", pa.array([repeats] * queries))
    long = pa.array(["sure , mix hulo & rasp . " * 60] * NUM_SAMPLES)
    samples = replaced(
        run.samples.take(np.arange(queries * size) % run.samples.num_rows),
        query_id=np.repeat(names, size),
        text=pa.DictionaryArray.from_arrays(np.arange(queries * size) % NUM_SAMPLES, long).cast(
            pa.string()
        ),
    )
    page = html_report(dataclasses.replace(run, estimates=estimates, samples=samples))
    assert len(page.encode()) < 1_500_000
    assert page.count("<article>") <= 30 * 3 and page.count("<tr data-verdict") == queries
    assert "supports no forecast" in page and "repeats another estimate" in page
    assert "Spread between 2 repeats over the error they claim: median 1.50" in page


def test_a_tail_has_a_forecast_and_none_has_words(run, page):
    value = np.exp(-np.exp(2.6 - 0.3 * np.random.default_rng(0).exponential(size=60)))
    names = [f"id{q}" for q in range(60)]
    estimates = replaced(
        run.estimates.take(np.arange(60) % 6), query_id=names, value=value, lower=value * 0.9,
        upper=value / 0.9, stderr=value / 20, verdict=["ok"] * 60,
    )  # fmt: skip
    found = html_report(dataclasses.replace(run, estimates=estimates))
    columns = {name: estimates[name].to_numpy() for name in ("value", "stderr", "lower", "upper",
               "truncated", "verdict")}  # fmt: skip
    record = make_forecast(risks_of(columns, 0.95), [1e2, 1e3, 1e4, 1e5])
    text = " ".join(Page(found).texts)
    for row in document(record)["forecasts"]:
        assert f"{row['queries']:,.0f}" in text and row["verdict"] in text
        assert f"{row['worst']['value']:.2g} [{row['worst']['lower']:.2g}" in text
    assert "the 10 riskiest of 60 queries" in text and len(svgs(found)) == len(svgs(page)) + 3
    assert "supports no forecast" in page and "Fewer than 20 queries show no tail." in page


def test_results_of_another_version_are_named(run):
    del_missing = {name: part for name, part in run.summary.items() if name != "missing"}
    with pytest.raises(KeyError, match="missing"):
        html_report(dataclasses.replace(run, summary=del_missing))
    with pytest.raises(KeyError, match="largest_share"):
        html_report(dataclasses.replace(run, estimates=run.estimates.drop_columns("largest_share")))


def test_a_page_shows_the_groups_and_kinds_are_text_and_nothing_else(run, page):
    """A kind's name comes from a file: it may hold mark-up, formulas, letters no font has."""
    kinds = ("original", "<b>$x$</b>", "_\N{RIGHT-TO-LEFT OVERRIDE}\N{HANGUL SYLLABLE GA}")
    part = {"variance": 0.1, "lower": -0.1, "upper": 0.2}
    points = VariantPoints(
        group=np.array([0, 0, 1, 1]), kind=np.array([0, 1, 0, 2]),
        value=np.array([0.1, 0.2, 0.01, 0.02]), zero=np.array([False, False, False, True]),
        kinds=kinds, means=np.array([0.15, np.nan]),
        parts={name: part for name in ("queries", "kinds", "variants", "error")},
    )  # fmt: skip
    names = ("sd", "sd_lower", "sd_upper", "range", "range_lower", "range_upper", "over_original",
             "over_lower", "over_upper")  # fmt: skip
    row = {"query": "<i>asked</i>", "riskiest": kinds[1], "variants": 2}
    row |= {"zero": 1, "left_out": 0, "doubtful": 1}
    shown = SensitivitySection(points, [{**row, **dict.fromkeys(names, 0.25)}], ["Found <this>."])
    assert "Variants of one query" not in page
    page = html_report(dataclasses.replace(run, sensitivity=shown))
    assert "Variants of one query" in page
    for text in (
        "&lt;i&gt;asked",
        "Found &lt;this&gt;.",
        "&lt;b&gt;$x$&lt;/b&gt;",
        "_\\u202e\\uac00",
    ):
        assert text in page
    assert "<b>$x$" not in page and "\N{RIGHT-TO-LEFT OVERRIDE}" not in page
    assert "1 without a hit" in page and "1 doubtful" in page and "[0.25, 0.25]" in page
