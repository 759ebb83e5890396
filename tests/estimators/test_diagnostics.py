"""Verdicts: each reason tripped by a constructed case, and a healthy case that trips none."""

import dataclasses
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tailrisk_jax.estimators import (
    ComponentWeights,
    Reason,
    component_mean_weights,
    covered_hits,
    diagnostics,
    explain,
    importance,
    mixture_log_prob,
    target_share,
    verdict,
)
from tailrisk_jax.estimators.estimate import Estimate

# p: benign, harm by the opener, harm by drift. Eight harmful answers in nine drift.
P = np.array([0.9991, 1e-4, 8e-4])


def healthy(**changes):
    """The figures of a sound estimate of one query, with some of them changed."""
    figures = dict(
        value=1e-3, stderr=5e-5, lower=9e-4, upper=1.1e-3, num_samples=1000, unscored=0.0,
        hits=400, ess=500.0, ess_harm=300.0, largest_share=0.01, mean_weight=1.01,
        mean_weight_z=0.3, kl=3.0, certified=False,
    )  # fmt: skip
    return Estimate(**{name: jnp.array(x) for name, x in (figures | changes).items()})


def components(*mean_weights, count=200):
    mean = jnp.array(mean_weights, jnp.float32)
    return ComponentWeights(
        mean_weight=mean,
        stderr=0.01 * mean,
        count=jnp.full(mean.shape, count, jnp.int32),
        coverage=jnp.nan_to_num(jnp.minimum(mean, 1.0)),
    )


def mixture_of(q, alphas, num, seed):
    """Draws of a defensive mixture of P (component 0) and the rows of q, with their estimate."""
    rng = np.random.default_rng(seed)
    rows = np.stack([P, *q])
    labels = rng.choice(len(rows), size=num, p=alphas)
    draws = np.array([rng.choice(3, p=rows[label]) for label in labels])
    with np.errstate(divide="ignore"):
        log_q = np.log(rows)[:, draws]
    log_w = log_q[0] - np.asarray(mixture_log_prob(log_q, np.log(alphas)))
    scores = (draws > 0).astype(float)
    return (
        importance(scores, log_w),
        component_mean_weights(log_q[0], log_q, labels),
        target_share(scores, log_w, labels),
        (scores, labels),
    )


def single(result):
    return int(result.code), Reason(int(result.reason)), explain(result)[0]


def test_a_healthy_mixture_is_ok():
    reaching = np.array([0.5, 0.1, 0.4])
    estimate, own, share, _ = mixture_of([reaching], [0.2, 0.8], 1000, seed=0)
    code, reason, told = single(verdict(estimate, own, target_share=share))
    assert (code, reason, told.word) == (0, Reason.NONE, "ok")
    assert abs(estimate.value - 9e-4) < 4 * estimate.stderr
    # So are draws from the target with hits enough, and a proposal that covers it by itself.
    assert single(verdict(importance(np.arange(1000) < 40, np.zeros(1000))))[0] == 0
    draws = np.random.default_rng(1).choice(3, size=1000, p=reaching)
    assert single(verdict(importance(draws > 0, np.log(P / reaching)[draws])))[0] == 0


def test_good_figures_with_a_low_component_mean_weight_are_confidently_too_low():
    # The unsafe component never drifts. The mixture's own figures are all good; the estimate is
    # a ninth of the truth, many standard errors off.
    blind = np.array([0.0, 1.0, 0.0])
    estimate, own, share, _ = mixture_of([blind], [0.2, 0.8], 1000, seed=0)
    assert estimate.ess_harm > 500 and estimate.largest_share < 0.01
    assert abs(estimate.mean_weight_z) < 4
    assert (9e-4 - estimate.value) / estimate.stderr > 20
    assert single(verdict(estimate))[0] == 0  # what the mixture alone would have said
    code, reason, told = single(verdict(estimate, own, target_share=share))
    assert (code, reason) == (2, Reason.CONFIDENTLY_LOW)
    assert told.word == "unusable"
    assert told.sentence.startswith("May be confidently too low") and "0.0001" in told.sentence


def test_hits_of_uncovering_components_alone_are_doubtful():
    # One component covers but draws hardly any harm, the other draws one kind of harm alone.
    cautious, blind = np.array([0.999, 5e-4, 5e-4]), np.array([0.0, 1.0, 0.0])
    estimate, own, share, drawn = mixture_of([cautious, blind], [0.1, 0.4, 0.5], 1000, seed=3)
    assert (9e-4 - estimate.value) / estimate.stderr > 20
    assert single(verdict(estimate, own, target_share=share))[0] == 0  # every other sign is good
    hits = covered_hits(*drawn, own)
    scores, labels = drawn
    assert int(hits) == np.sum(scores[labels != 2]) < 3
    code, reason, _ = single(verdict(estimate, own, target_share=share, covered_hits=hits))
    assert (code, reason) == (1, Reason.HITS_NOT_COVERED)
    # With a covering component that does reach harm, the same figures are ok.
    reaching = np.array([0.5, 0.1, 0.4])
    estimate, own, share, drawn = mixture_of([reaching, blind], [0.1, 0.4, 0.5], 1000, seed=3)
    hits = covered_hits(*drawn, own)
    assert single(verdict(estimate, own, target_share=share, covered_hits=hits))[0] == 0


def test_coverage_by_a_share_of_the_target_is_no_evidence():
    # Half target at the one step: it covers, draws one kind of harm alone, and misses the other.
    target, blind = np.array([1 - 9e-4, 1e-4, 8e-4]), np.array([0.0, 1.0, 0.0])
    diluted = 0.5 * target + 0.5 * blind
    estimate, own, share, drawn = mixture_of([diluted], [0.1, 0.9], 1000, seed=0)
    assert own.coverage[1] > 0.9 and (9e-4 - estimate.value) / estimate.stderr > 20
    plain = covered_hits(*drawn, own)
    assert single(verdict(estimate, own, target_share=share, covered_hits=plain))[0] == 0
    hits = covered_hits(*drawn, own, diluted=[1])
    assert int(plain) > 100 and int(hits) == np.sum(drawn[0][drawn[1] == 0])
    told = {"target_share": share, "covered_hits": hits, "diluted": [1]}
    code, reason, said = single(verdict(estimate, own, **told))
    assert (code, reason) == (1, Reason.DILUTED)
    assert said.sentence.startswith("Every proposal mixes its tokens with the target's")
    code, reason, _ = single(verdict(estimate, diluted=[0]))  # drawn from it alone
    assert (code, reason) == (1, Reason.DILUTED)
    # Beside one that covers and reaches the harm, it takes nothing away.
    reaching = np.array([0.5, 0.1, 0.4])
    estimate, own, share, drawn = mixture_of([diluted, reaching], [0.1, 0.4, 0.5], 1000, seed=0)
    hits = covered_hits(*drawn, own, diluted=[1])
    told = {"target_share": share, "covered_hits": hits, "diluted": [1]}
    assert single(verdict(estimate, own, **told))[0] == 0


def test_many_components_with_a_few_draws_each_are_judged_by_what_they_cover():
    # 60 components, 1 or 2 draws each. A third has one kind of harm alone; the rest cover, and
    # reach none: the estimate is a ninth of the truth, and confident.
    cautious, blind = np.array([0.999, 5e-4, 5e-4]), np.array([0.0, 1.0, 0.0])
    alphas = np.array([0.1, *[0.9 / 60] * 60])
    estimate, own, share, drawn = mixture_of([*[blind] * 20, *[cautious] * 40], alphas, 100, seed=0)
    assert np.max(own.count[1:]) < 10 and estimate.ess_harm > 20
    assert (9e-4 - estimate.value) / estimate.stderr > 10
    np.testing.assert_array_equal(
        np.asarray(own.coverage) > 0.5, [True, *[False] * 20, *[True] * 40]
    )
    hits = covered_hits(*drawn, own)
    code, reason, _ = single(verdict(estimate, own, target_share=share, covered_hits=hits))
    assert (code, reason) == (1, Reason.HITS_NOT_COVERED)
    # Where those that cover do reach harm, it is ok; where all are blind, coverage is lost.
    reaching = np.array([0.5, 0.1, 0.4])
    estimate, own, share, drawn = mixture_of([*[blind] * 20, *[reaching] * 40], alphas, 100, seed=0)
    hits = covered_hits(*drawn, own)
    assert single(verdict(estimate, own, target_share=share, covered_hits=hits))[0] == 0
    estimate, own, share, _ = mixture_of([blind] * 60, alphas, 100, seed=0)
    found = single(verdict(estimate, own, target_share=share))
    assert found[:2] == (2, Reason.CONFIDENTLY_LOW)


def test_target_draws_that_carry_the_estimate_show_harm_out_of_reach():
    # One draw from the target drifted, and carries nearly all of the estimate.
    blind = np.array([0.5, 0.5, 0.0])  # covers the benign part, so its mean weight is 1
    estimate, own, share, _ = mixture_of([blind], [0.2, 0.8], 1000, seed=25)
    assert estimate.hits > 100 and estimate.ess_harm < 2 and share > 0.9
    code, reason, told = single(verdict(estimate, own, target_share=share))
    assert (code, reason) == (2, Reason.TARGET_ALONE)
    assert "from the target itself" in told.sentence


def test_a_dropped_end_token_factor_is_a_broken_sampler():
    # Sequences of tokens 0, 1, end; both policies are exact, but log p - log q leaves out the end.
    rng = np.random.default_rng(2)
    p, q, num, steps = np.array([0.2, 0.2, 0.6]), np.array([0.3, 0.3, 0.4]), 5000, 6
    tokens = rng.choice(3, size=(num, steps), p=q)
    alive = np.cumprod(np.pad(tokens[:, :-1] != 2, ((0, 0), (1, 0)), constant_values=1), axis=1)
    ratios = np.log(p / q)[tokens] * alive
    scores = (tokens == 1).any(1) * 1.0
    whole = importance(scores, ratios.sum(1))
    dropped = importance(scores, np.where(tokens == 2, 0, ratios).sum(1))
    assert abs(whole.mean_weight_z) < 4 and single(verdict(whole))[0] == 0
    code, reason, told = single(verdict(dropped))
    assert (code, reason) == (2, Reason.MEAN_WEIGHT)
    assert "token's factor dropped" in told.sentence


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({}, 0, Reason.NONE),
        (dict(value=np.nan), 2, Reason.NOT_MEASURED),
        (dict(value=np.inf), 2, Reason.NOT_MEASURED),
        (dict(mean_weight=0.4), 1, Reason.CONFIDENTLY_LOW),
        (dict(mean_weight=0.05), 2, Reason.CONFIDENTLY_LOW),
        (dict(mean_weight=0.4, ess_harm=20.0), 1, Reason.LOST_COVERAGE),
        (dict(mean_weight=0.4, ess_harm=20.0, mean_weight_z=-30.0), 2, Reason.LOST_COVERAGE),
        (dict(mean_weight=0.4, hits=5, ess_harm=5.0), 1, Reason.LOST_COVERAGE),
        (dict(mean_weight=0.4, hits=2, ess_harm=2.0), 2, Reason.FEW_HITS),
        (dict(hits=0, value=0.0, stderr=np.nan, upper=np.inf), 2, Reason.NO_HITS),
        (dict(hits=0, value=0.0, stderr=np.nan, upper=1e-3), 1, Reason.NO_HITS),
        (dict(hits=9), 1, Reason.FEW_HITS),
        (dict(hits=2), 2, Reason.FEW_HITS),
        (dict(largest_share=0.4), 1, Reason.ONE_DRAW),
        (dict(largest_share=0.6), 2, Reason.ONE_DRAW),
        (dict(mean_weight=0.8, mean_weight_z=-5.0), 1, Reason.MEAN_WEIGHT),
        (dict(mean_weight=1.2, mean_weight_z=9.0), 2, Reason.MEAN_WEIGHT),
        (dict(mean_weight=1.001, mean_weight_z=90.0), 0, Reason.NONE),
        (dict(mean_weight=50.0, mean_weight_z=1.0), 1, Reason.MEAN_WEIGHT),
        (dict(mean_weight=np.inf, mean_weight_z=np.inf), 2, Reason.MEAN_WEIGHT),
        (dict(mean_weight=np.nan, mean_weight_z=np.nan), 2, Reason.MEAN_WEIGHT),
        (dict(unscored=0.1), 1, Reason.UNSCORED),
        (dict(unscored=0.5), 2, Reason.UNSCORED),
        (dict(stderr=4e-4), 1, Reason.WIDE),
        (dict(stderr=9e-4), 2, Reason.WIDE),
        (dict(stderr=np.nan, upper=np.inf), 1, Reason.SPREAD_UNKNOWN),
        (dict(stderr=np.nan, upper=1.0), 0, Reason.NONE),
    ],
)
def test_each_figure_trips_its_reason(changes, code, reason):
    found = single(verdict(healthy(**changes)))
    assert found[:2] == (code, reason), found[2]
    assert found[2].word == diagnostics.WORDS[code]
    assert found[2].sentence.endswith(".") and "{" not in found[2].sentence


@pytest.mark.parametrize(
    ("own", "target_index", "code", "reason"),
    [
        (components(1.0, 0.01, 0.9), 0, 0, Reason.NONE),  # one good component is enough
        (components(1.0, 0.01, 0.3), 0, 1, Reason.CONFIDENTLY_LOW),
        (components(1.0, 0.01, 0.05), 0, 2, Reason.CONFIDENTLY_LOW),
        (components(0.01, 0.3, 1.0), 2, 1, Reason.CONFIDENTLY_LOW),  # the target elsewhere
        (components(1.0, 0.01, 0.3), None, 0, Reason.NONE),  # no component is the target
        (components(1.0, np.inf, 0.9), 0, 2, Reason.MEAN_WEIGHT),  # a draw q_1 can't have made
        (components(1.0, np.nan, 0.9), 0, 2, Reason.MEAN_WEIGHT),
        (components(1.0), 0, 0, Reason.NONE),  # the target alone is Monte Carlo
        (components(1.0, 0.9, 0.9, count=4), 0, 1, Reason.COVERAGE_UNKNOWN),
        (components(1.0, 0.9, 0.9, count=5), 0, 0, Reason.NONE),  # judged together
        (components(1.0, 0.2, 0.2, count=5), 0, 1, Reason.CONFIDENTLY_LOW),
        (components(np.nan, np.nan, np.nan, count=0), 0, 1, Reason.COVERAGE_UNKNOWN),
    ],
)
def test_coverage_of_components(own, target_index, code, reason):
    found = single(verdict(healthy(), own, target_index=target_index))
    assert found[:2] == (code, reason), found[2]


@pytest.mark.parametrize(
    ("share", "ess_harm", "code"),
    [(0.1, 1.0, 0), (0.4, 300.0, 0), (0.4, 40.0, 1), (0.9, 8.0, 1), (0.9, 2.0, 2)],
)
def test_target_share_counts_only_where_few_draws_carry_it(share, ess_harm, code):
    found = verdict(healthy(ess_harm=ess_harm), components(1.0, 0.9), target_share=jnp.array(share))
    assert (int(found.code), Reason(int(found.reason))) == (
        code, Reason.TARGET_ALONE if code else Reason.NONE
    )  # fmt: skip


def test_queries_are_judged_one_by_one_under_jit_and_vmap():
    cases = [{}, dict(hits=2), dict(largest_share=0.4), dict(unscored=0.5), dict(value=np.nan)]
    rows = jax.tree.map(lambda *x: jnp.stack(x), *[healthy(**case) for case in cases])
    own = components(1.0, 0.9)
    own_rows = jax.tree.map(lambda x: jnp.stack([x] * len(cases), axis=1), own)
    share = jnp.full(len(cases), 0.01)

    def judge(estimate, own, share):
        return verdict(estimate, own, target_share=share)

    batch = judge(rows, own_rows, share)
    vmapped = jax.jit(jax.vmap(judge, in_axes=(0, 1, 0)))(rows, own_rows, share)
    chex.assert_trees_all_equal(batch, vmapped)
    for row, case in enumerate(cases):
        one = judge(healthy(**case), own, share[row])
        chex.assert_trees_all_equal(jax.tree.map(lambda x, row=row: x[row], batch), one)
    assert [told.word for told in explain(batch)] == [
        "ok", "unusable", "doubtful", "unusable", "unusable"
    ]  # fmt: skip
    assert np.isnan(batch.figure[0]) and batch.figure[1] == 2


def test_every_reason_has_a_sentence_and_a_check():
    assert set(diagnostics._SENTENCES) == set(Reason)


def test_new_values_do_not_retrace(monkeypatch):
    counted = chex.assert_max_traces(inspect.unwrap(diagnostics._verdict), n=1)
    monkeypatch.setattr(diagnostics, "_verdict", jax.jit(counted, static_argnames="target_index"))
    for hits in (1, 5, 500):
        verdict(healthy(hits=hits), components(1.0, 1 / hits))


@pytest.mark.parametrize(
    ("own", "target_index", "message"),
    [
        (components(1.0, 0.9), 2, "target_index is 2 of 2 components"),
        (
            dataclasses.replace(components(1.0), mean_weight=jnp.ones((1, 3))),
            0,
            r"shape \(1, 3\); estimates of shape \(\) need",
        ),
    ],
)
def test_errors(own, target_index, message):
    with pytest.raises(ValueError, match=message):
        verdict(healthy(), own, target_index=target_index)


@pytest.mark.parametrize(
    ("told", "code", "reason"),
    [
        (dict(rescore_noise=0.4, truncated=0.4), 0, Reason.NONE),
        (dict(rescore_noise=0.6), 1, Reason.RESCORE_NOISE),
        (dict(rescore_noise=6.0), 2, Reason.RESCORE_NOISE),
        (dict(truncated=0.7), 1, Reason.TRUNCATED),
    ],
)
def test_what_only_the_caller_knows_trips_its_reason(told, code, reason):
    found = verdict(healthy(), **{name: jnp.array(x) for name, x in told.items()})
    assert (int(found.code), int(found.reason)) == (code, reason)
    assert "{" not in explain(found)[0].sentence
