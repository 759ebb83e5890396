"""Two sides, query by query: what is paired, what is said of it, and the total."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import explain, importance, in_float64, monte_carlo, verdict
from tailrisk_jax.studies import baseline_side, compare, read_baseline, run_side
from tailrisk_jax.studies.comparison import Side
from tests.studies.test_baselines import line

RNG = np.random.default_rng(0)
Q, N = 4, 300
LOG_WEIGHTS = RNG.normal(-0.32, 0.8, (Q, N))  # mean weight 1
HARM = (RNG.random((Q, N)) < np.array([[0.3], [0.2], [0.1], [0.0]])).astype(float)
STRICTER = HARM * (RNG.random((Q, N)) < 0.6)
TOKENS = np.arange(Q * N).reshape(Q, N)


def side(name="one", scores=HARM, log_weights=LOG_WEIGHTS, tokens=TOKENS, **changes):
    """A side of these draws; None for log_weights is Monte Carlo."""
    plain = log_weights is None
    if plain:
        log_weights = np.zeros_like(scores)
        found = in_float64(monte_carlo, scores)
    else:
        found = in_float64(importance, scores, log_weights)
    said = explain(in_float64(verdict, found))
    figures = {
        n: np.asarray(getattr(found, n), float) for n in ("value", "lower", "num_samples", "hits")
    }
    made = Side(
        name=name,
        estimand="E[score]",
        level=0.95,
        about={"model": name},
        keys=list("abcd"),
        ids=list("abcd"),
        texts=list("ABCD"),
        figures={**figures, "upper": np.minimum(found.upper, 1)},
        words=[one.word for one in said],
        reasons=[one.sentence for one in said],
        scores=scores,
        log_weights=log_weights,
        present=np.ones(scores.shape, bool),
        tokens=tokens,
    )
    return dataclasses.replace(made, **changes)


def test_the_same_draws_are_compared_draw_by_draw():
    found = compare(side(), side("two", STRICTER))
    rows = found.rows.to_pydict()
    terms = np.exp(LOG_WEIGHTS) * (HARM - STRICTER)
    np.testing.assert_allclose(rows["difference"], terms.mean(1))
    assert rows["method"] == ["paired"] * 4 and rows["shared"] == [N] * 4
    half = stats.t.ppf(0.975, 50) * stats.sem(terms, axis=1)
    widths = np.subtract(rows["difference_upper"], rows["difference_lower"])
    np.testing.assert_array_less(0.9 * 2 * half[:3], widths[:3])
    np.testing.assert_array_less(widths[:3], 1.6 * 2 * half[:3])
    assert rows["finding"] == ["higher", "higher", "higher", "not shown"]
    assert (rows["difference_lower"][3], rows["difference_upper"][3]) == (-1, 1)
    ratios = np.divide(rows["a_value"][:3], rows["b_value"][:3])
    np.testing.assert_allclose(rows["log_ratio"][:3], np.log(ratios))
    assert rows["verdict"][3] == "unusable"
    assert rows["why"][3].startswith("A is unusable: No draw scored above 0")
    assert " B is unusable: " in rows["why"][3]
    assert found.differing == {"model": ("one", "two")}
    total = found.total
    assert total is not None and (total.queries, total.silent, total.method) == (4, 1, "pooled")
    np.testing.assert_allclose(total.difference, terms.mean())
    error = np.linalg.norm(stats.sem(terms, axis=1)) / Q
    assert 1.9 * error < total.upper - total.difference < 2.8 * error


def test_sides_swapped_say_the_same_the_other_way_round():
    for other in (side("two", STRICTER), side("two", STRICTER, tokens=TOKENS + 1)):
        there, back = compare(side(), other), compare(other, side())
        for name in ("difference", "log_ratio"):
            upper = there.rows[f"{name}_upper"].to_numpy()
            np.testing.assert_allclose(upper, -back.rows[f"{name}_lower"].to_numpy())
        assert there.total and back.total
        np.testing.assert_allclose(there.total.upper, -back.total.lower)


@pytest.mark.parametrize(
    "changes, method, shared",
    [
        ({"tokens": TOKENS + 1}, "independent", 0),
        ({"tokens": None}, "independent", 0),
        ({"stopped": True}, "overlapping", N),
        ({"tokens": np.where(np.arange(N) < 100, TOKENS, -1)}, "overlapping", 100),
    ],
    ids=["other draws", "unknown draws", "stopped", "some"],
)
def test_other_draws_are_independent_and_wider(changes, method, shared):
    paired = compare(side(), side("two", STRICTER))
    found = compare(side(), side("two", STRICTER, **changes))
    assert found.rows["method"].to_pylist() == [method] * 4
    assert found.rows["shared"].to_pylist() == [shared] * 4
    for end in ("lower", "upper"):
        margins = [
            np.abs(one.rows[f"difference_{end}"].to_numpy() - one.rows["difference"].to_numpy())
            for one in (found, paired)
        ]
        assert np.all(margins[0][:3] > margins[1][:3])
    assert found.total and found.total.method == ("combined" if "stopped" in changes else "pooled")


def test_more_draws_and_other_queries_on_one_side():
    fewer = side("two", STRICTER[:, :200], LOG_WEIGHTS[:, :200], TOKENS[:, :200])
    fewer = dataclasses.replace(fewer, keys=["b", "a", "x", "d"], ids=["b", "a", "x", "d"])
    found = compare(side(), fewer)
    assert found.rows["query_id"].to_pylist() == ["a", "b", "d"]
    assert found.only_a == ["c"] and found.only_b == ["x"]
    weights = np.exp(LOG_WEIGHTS)
    wanted = (weights * HARM).mean(1)[:2] - (weights * STRICTER)[:, :200].mean(1)[[1, 0]]
    np.testing.assert_allclose(found.rows["difference"].to_numpy()[:2], wanted)
    with pytest.raises(InputError, match="no query in common"):
        compare(side(), side(keys=list("vwxy"), ids=list("vwxy")))
    with pytest.raises(InputError, match=r"of level 0\.95, two of 0\.9"):
        compare(side(), side("two", level=0.9))


def test_a_baseline_without_hits_still_bounds_the_difference(tmp_path):
    path = tmp_path / "baseline.jsonl"
    path.write_text("\n".join([line("A", [0.0] * 500), line("D", [0.0] * 500), line("E")]))
    run = side()
    matched = read_baseline(path).match(run.texts)
    found = compare(run, baseline_side(matched, run))
    rows = found.rows.to_pydict()
    assert rows["query_id"] == ["a", "d"] and found.only_a == ["b", "c"]
    exact = stats.binomtest(0, 500).proportion_ci(method="exact").high
    np.testing.assert_allclose(rows["b_upper"], exact)
    own = rows["a_value"][0] - rows["a_lower"][0]
    np.testing.assert_allclose(
        rows["difference_lower"][0], rows["a_value"][0] - np.hypot(own, exact)
    )
    assert rows["finding"][0] == "higher" and rows["method"][0] == "independent"
    assert rows["log_ratio"][0] == np.inf and np.isnan(rows["log_ratio"][1])
    np.testing.assert_allclose(rows["log_ratio_lower"][0], np.log(rows["a_lower"][0] / exact))


def test_nothing_scored_leaves_no_total():
    nothing = side("two", np.full((Q, N), np.nan))
    found = compare(side(), nothing)
    assert found.total is None and np.isnan(found.rows["difference"].to_numpy()).all()
    assert set(found.rows["finding"].to_pylist()) == {"not shown"}


def test_runs_share_the_draws_of_one_seed(whole, second):
    one, other = run_side(whole), run_side(second)
    assert compare(one, one).rows["method"].to_pylist() == ["paired"] * 3
    rows = compare(one, other).rows
    assert rows["method"].to_pylist() == ["independent"] * 3
    np.testing.assert_allclose(
        rows["difference"], rows["a_value"].to_numpy() - rows["b_value"].to_numpy()
    )
    assert max(rows["a_upper"].to_pylist()) <= 1
