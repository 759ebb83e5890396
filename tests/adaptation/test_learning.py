"""Learning an adapter, against enumeration and differences of an independent loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from tailrisk_jax import InputError
from tailrisk_jax.adaptation import Shares, Training, init_adapter
from tailrisk_jax.adaptation.learning import (
    coefficients,
    divergences,
    effective_hits,
    harmful_responses,
    log_balance,
    log_contributions,
)
from tailrisk_jax.adaptation.training import examples, loss, start_training, step
from tailrisk_jax.models import LowRank
from tailrisk_jax.policies import Policy, at_temperature, from_tokens, with_adapter
from tailrisk_jax.rollouts.network import network
from tailrisk_jax.rollouts.score import sequence_log_probs
from tests.adaptation.enumerated import LENGTH, tiny
from tests.oracles import as_draws, random_model, responses, tiny_config

PROMPTS = from_tokens([[1, 2, 0], [2, 1]])  # the second is padded


@dataclasses.dataclass(frozen=True)
class Case:
    """A model at a temperature, an adapter that does something, all responses to two queries."""

    target: Policy
    adapter: dict
    draws: object
    weights: np.ndarray
    moments: np.ndarray
    log_rest: np.ndarray
    log_start: np.ndarray

    def examples(self):
        shape = self.weights.shape
        rows = np.indices(shape).reshape(2, -1)
        tokens, mask = (np.asarray(x)[tuple(rows)] for x in (self.draws.tokens, self.draws.mask))
        return examples(
            PROMPTS[rows[0]], tokens, mask, self.weights.ravel(), moments=self.moments.ravel(),
            log_rest=self.log_rest.ravel(), log_start=self.log_start.ravel(),
        )  # fmt: skip


@pytest.fixture(scope="module")
def case():
    config, rng = tiny_config(end_ids=(3,)), np.random.default_rng(1)
    target = at_temperature(Policy(random_model(config, seed=3)), 1.5)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32),
        init_adapter(jax.random.key(0), config, rank=2, targets=("q_proj", "v_proj", "down_proj")),
    )
    draws = as_draws(responses(4, LENGTH, config.end_ids), PROMPTS, config, LENGTH)
    shape = draws.mask.shape[:2]
    parts = [rng.uniform(size=shape) for _ in range(2)] + [rng.normal(-5, 1, shape)] * 2
    parts = [x / x.sum() if k < 2 else x for k, x in enumerate(parts)]
    return Case(target, adapter, draws, *parts)


def test_the_gradient_is_that_of_the_scored_log_probs(case):
    """Against differences of a loss made of what scoring says, a prompt with padding included."""
    training = Training(penalty=0.7, adapter_share=0.8)

    def oracle(adapter):
        log_q = sequence_log_probs([with_adapter(case.target, adapter)], case.draws)[0]
        log_q = log_q.astype(np.float64)
        whole = np.logaddexp(case.log_rest, np.log(0.8) + log_q)
        moment = np.sum(case.moments * np.exp(case.log_start - whole))
        return -np.sum(case.weights * log_q) + 0.7 * moment

    value = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (ours, parts), gradient = value(case.adapter, training, network(case.target), case.examples())
    assert float(ours) == pytest.approx(oracle(case.adapter), rel=1e-5)
    assert float(parts["nll"]) + 0.7 * float(parts["moment"]) == pytest.approx(float(ours))
    rng = np.random.default_rng(2)
    low_ranks = jax.tree.leaves(gradient, is_leaf=lambda x: isinstance(x, LowRank))
    assert len(low_ranks) == 3 and all(not np.any(one.scale) for one in low_ranks)
    for k, leaf in enumerate(x for one in low_ranks for x in (one.a, one.b)):
        assert np.abs(leaf).max() > 1e-3, k
    for _ in range(3):
        direction = jax.tree.map(
            lambda x: rng.normal(size=x.shape).astype(np.float32) * (x.ndim > 1), gradient
        )
        slope = sum(
            float(jnp.vdot(a, b))
            for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        ends = [
            oracle(jax.tree.map(lambda x, d, e=e: x + e * d, case.adapter, direction))
            for e in (3e-3, -3e-3)
        ]
        assert (ends[0] - ends[1]) / 6e-3 == pytest.approx(slope, rel=0.01, abs=2e-3)


@pytest.mark.slow
def test_a_bfloat16_model_trains_float32_factors(case):
    """A step beside the same model, with the same parameters, in float32.

    A parameter in bfloat16 computation meets about 8 roundings: of its input (twice: norm and
    scale), of the product and of what it is added to or multiplied with, and of the same again on
    the way back. Each is a relative error of at most u = 2^-8. If x is how far the gradient moves
    (RMS over the entries of a factor) when every parameter gets an independent error, uniform in
    +-u, once, then independent roundings move it by sqrt(8) x (Higham & Mary 2019, doi
    10.1137/18M1226312), and hardly any entry by more than 5 times that. Adam's first step is the
    sign of the gradient, so all entries beyond that move as they do in float32: by 1e-5, which
    bfloat16 factors of this size (spaced by 2^-9 and more) would lose.
    """
    training = Training(learning_rate=1e-4, clip=1e6, penalty=0.7, adapter_share=0.8)
    batch, rate = case.examples().split(1), training.learning_rate / 10  # as it warms up
    model = case.target.model
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    full = jax.tree.map(lambda x: x.astype(jnp.float32), half)

    def factors(tree):
        low_ranks = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, LowRank))
        return [np.asarray(x) for one in low_ranks for x in (one.a, one.b)]

    def stepped(params):
        """Gradients and moves of the factors."""
        target = dataclasses.replace(case.target, model=dataclasses.replace(model, params=params))
        state, _ = step(training, network(target), start_training(training, case.adapter), batch)
        for leaf in jax.tree.leaves(state):
            assert leaf.dtype in (jnp.float32, jnp.int32)  # int32: the number of steps
        gradients = factors(optax.tree_utils.tree_get(state.optimizer, "mu"))  # (1 - 0.9) g
        pairs = zip(factors(state.adapter), factors(case.adapter), strict=True)
        return [10 * g for g in gradients], [after - before for after, before in pairs]

    def jittered(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda x: x * (1 + rng.uniform(-(2.0**-8), 2.0**-8, x.shape).astype(np.float32)), full
        )

    def rms(x):
        return np.sqrt(np.mean(np.square(x)))

    (wanted, exact), (gradients, moves) = stepped(full), stepped(half)
    others, shares = [stepped(jittered(seed))[0] for seed in range(6)], []
    for k, (g32, g16) in enumerate(zip(wanted, gradients, strict=True)):
        x = rms([other[k] - g32 for other in others])
        assert x / 10 < rms(g16 - g32) < np.sqrt(8) * x, k
        clear = np.abs(g32) > 5 * np.sqrt(8) * x
        shares.append(clear.ravel())
        np.testing.assert_allclose(moves[k][clear], exact[k][clear], rtol=0, atol=2e-7)
        np.testing.assert_allclose(np.abs(moves[k][clear]), rate, rtol=0, atol=2e-7)
        assert np.abs(factors(case.adapter)[k]).max() > 0.25 > 2.0**-9 > 100 * rate
    assert np.concatenate(shares).mean() > 0.5


@pytest.mark.slow
def test_micro_batches_are_the_whole_batch(case):
    """Also where they don't divide it."""
    training, net, rows = Training(penalty=0.5, steps=3), network(case.target), case.examples()[:23]
    ends = []
    for count in (1, 4):
        state = start_training(training, case.adapter)
        for _ in range(2):
            state, metrics = step(training, net, state, rows.split(count))
        ends.append((state.adapter, metrics))
    for adapter, metrics in ends[1:]:
        assert float(metrics["gradient"]) == pytest.approx(float(ends[0][1]["gradient"]), rel=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), adapter, ends[0][0])
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), ends[0][0], case.adapter)
    for one in jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, LowRank)):
        assert one.a > 1e-4 and one.b > 1e-4 and one.scale == 0


@pytest.mark.slow
def test_exact_weights_bring_q_to_the_harmful_responses():
    """Enumerated: KL(p h / P || q) falls by more than 85% (its minimum isn't 0: the final norm
    bounds the logits), the second moment too, and estimates from all responses are exact."""
    case, share = tiny(), 0.9
    log_p = case.scored[0].sum(-1)
    number = log_p.shape[1]
    log_m = np.full(log_p.shape, -np.log(number))
    terms = log_contributions(log_p, log_m, case.harm)
    log_p_h = log_contributions(log_p, np.zeros_like(log_m), case.harm)
    weights = coefficients(terms)
    wanted = np.exp(log_p) * case.harm
    wanted /= wanted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, wanted / 2, atol=1e-12)
    rows = np.nonzero(weights)
    tokens, mask = (np.asarray(x)[rows] for x in (case.draws.tokens, case.draws.mask))
    data = examples(
        case.draws.prompts[rows[0]], tokens, mask, weights[rows],
        moments=coefficients(terms + np.log(np.where(case.harm > 0, case.harm, 1)))[rows],
        log_rest=np.log(1 - share) + log_p[rows], log_start=log_p[rows],
    )  # fmt: skip
    training = Training(learning_rate=0.05, steps=200, penalty=0.3, adapter_share=share)
    net = network(case.target)
    adapter = init_adapter(jax.random.key(1), case.target.model.config, rank=4)
    state = start_training(training, adapter)
    for _ in range(training.steps):
        state, _ = step(training, net, state, data.split(1))
    policies = [with_adapter(case.target, one) for one in (adapter, state.adapter)]
    log_q = sequence_log_probs(policies, case.draws).astype(np.float64)
    np.testing.assert_allclose(log_q[0], log_p, atol=1e-5)  # B is zero at the start
    exact = [scipy.special.rel_entr(wanted, np.exp(one)).sum(axis=1) for one in log_q]
    drawn = np.full(len(log_p), number)
    np.testing.assert_allclose(divergences(terms, log_p_h, log_q, drawn), exact, atol=1e-5)
    assert np.all(exact[0] > 0.5) and np.all(exact[1] < 0.15 * exact[0]) and np.all(exact[1] > 0)
    whole = np.logaddexp(np.log(1 - share) + log_p, np.log(share) + log_q)
    moment = (np.exp(2 * log_p - whole) * case.harm**2).sum(axis=-1)
    assert np.all(moment[1] < 0.8 * moment[0])


def test_rounds_share_their_draws():
    shares = Shares(0.2, 0.3)
    np.testing.assert_allclose(shares.of_round(0, [0.5, 0.5]), [0.2, 0.4, 0.4])
    np.testing.assert_allclose(shares.of_round(2, [0.5, 0.5]), [0.2, 0.15, 0.15, 0, 0.5])
    log_q = np.log(np.random.default_rng(0).uniform(size=(5, 2, 3)))
    rounds = [shares.of_round(r, [0.5, 0.5]) for r in range(3)]
    drawn = np.array([[4, 0], [2, 1], [2, 3]])
    each = np.stack([np.einsum("k,kqh->qh", s, np.exp(log_q[: len(s)])) for s in rounds])
    wanted = np.einsum("rq,rqh->qh", drawn / drawn.sum(axis=0), each)
    np.testing.assert_allclose(np.exp(log_balance(log_q, rounds, drawn)), wanted)
    drawn[:, 1] = 0  # a query of which nothing could be scored
    log_m = log_balance(log_q, rounds, drawn)
    scores = np.array([[1, 0, 0.5], [0, 0, 0]])
    hit = log_contributions(log_q[0], log_m, scores) > -np.inf
    assert hit.tolist() == [[True, False, True], [False] * 3]


def test_harmful_responses_and_their_coefficients():
    """Unscored draws don't count as drawn; each query with a hit counts as much as another."""
    scores = np.array([[0, 0.5, np.nan, 1], [0, 0, 0, 0], [np.nan, 0, 1, np.nan]])
    tokens = np.arange(24).reshape(3, 4, 2)
    hits = harmful_responses(tokens, np.ones((3, 4, 2), bool), scores)
    assert hits.drawn.tolist() == [3, 4, 2] and hits.scores.tolist() == [[0.5, 1], [0, 0], [1, 0]]
    assert hits.tokens[0].tolist() == [[2, 3], [6, 7]] and not hits.mask[1].any()
    log_w = np.array([[-1.0, -9.0], [0, 0], [50.0, 0]])
    terms = log_contributions(log_w, np.zeros((3, 2)), hits.scores)
    weights = coefficients(terms)
    np.testing.assert_allclose(weights.sum(axis=1), [0.5, 0, 0.5])
    assert weights[0, 0] / weights[0, 1] == pytest.approx(0.5 * np.exp(8))
    assert effective_hits(terms)[1:].tolist() == [0, 1]
    assert effective_hits(terms)[0] == pytest.approx(1.0013, abs=1e-4)
    kl = divergences(terms, terms, np.zeros((1, 3, 2)), hits.drawn)
    assert np.isfinite(kl[0, [0, 2]]).all() and np.isnan(kl[0, 1])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda c: init_adapter(jax.random.key(0), c, rank=0), "rank=0 must be at least 1"),
        (lambda c: init_adapter(jax.random.key(0), c, alpha=0), "alpha=0 must be above 0"),
        (lambda c: init_adapter(jax.random.key(0), c, targets=("w",)), r"\['w'\] .* q_proj"),
        (lambda c: init_adapter(jax.random.key(0), c, targets=()), "q_proj, k_proj"),
        (lambda c: Training(steps=0), "steps=0 must be at least 1"),
        (lambda c: Training(learning_rate=-1), "learning_rate=-1 must be above 0"),
        (lambda c: Training(penalty=-1), "penalty=-1 must be 0 or more"),
        (lambda c: Shares(0, 0.5), "above 0"),
        (lambda c: Shares(0.5, 0.5), "leave some for the adapter"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(InputError, match=said):
        make(tiny_config())
