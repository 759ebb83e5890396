"""The rounds of learning, with an engine of arithmetic in place of the network: what is done once,
what is kept, and where a run goes on. tests/cli/test_learn.py has the same with the network."""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tailrisk_jax.adaptation.learning import log_balance
from tailrisk_jax.judges import Judgements
from tailrisk_jax.models import LowRank
from tailrisk_jax.policies import Policy, at_temperature
from tailrisk_jax.rollouts import Draws
from tailrisk_jax.studies import StudyQuery, learning
from tailrisk_jax.studies.learning import LearnSettings, learn
from tests.oracles import random_model, tiny_config
from tests.policies.word_tokenizer import IDS, WORDS, word_tokenizer

QUERIES = [StudyQuery("cake", "how to bake a cake"), StudyQuery("kind", "how to be kind")]
N, T = 12, 4


class Killed(BaseException):
    pass


def level(policy):
    """What the adapter has learned: one more in each round."""
    return (
        float(policy.adapter["layers"]["mlp"]["down"]["kernel"].b.mean()) if policy.adapter else 0
    )


class Engine:
    """Draws by the key, log-probabilities that rise with the adapter's level, and a training whose
    outcome depends on every number that it is given. Counts calls, and dies at a given one."""

    def __init__(self, target, *, peak=10**6):
        self.target, self.peak = target, peak
        self.calls, self.pairs, self.dies_at = collections.Counter(), collections.Counter(), None

    def __call__(self, responses):
        self.count("judge")
        return Judgements.of(np.array([float(sum(r.tokens) % 3 == 0) for r in responses]))

    def count(self, name):
        if self.dies_at is not None and self.calls.total() == self.dies_at:
            raise Killed
        self.calls[name] += 1

    def draw(self, key, proposal, prompts, num_samples, max_new_tokens, *, batch_size):
        self.count("draw")
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        shape = (len(prompts), num_samples, max_new_tokens)
        model = self.target.model
        return Draws(
            tokens=jnp.asarray(rng.integers(4, len(WORDS), shape), jnp.int32),
            mask=jnp.ones(shape, bool),
            ended=jnp.zeros(shape[:2], bool),
            labels=jnp.zeros(shape[:2], jnp.int32),
            drawn_log_probs=jnp.zeros(shape),
            prompts=prompts,
            tokenizer=model.tokenizer,
            end_ids=model.config.end_ids,
        )

    def sequence_log_probs(self, components, draws, *, batch_size):
        self.count("score")
        tokens, mask = np.asarray(draws.tokens), np.asarray(draws.mask)
        for query, n in np.argwhere(mask.any(axis=-1)):
            for one in components:
                self.pairs[one.temperature, level(one), query, tokens[query, n].tobytes()] += 1
        base = -8 - np.sin(tokens.sum(axis=-1))
        out = [
            base * one.temperature + min(level(one), self.peak - level(one)) for one in components
        ]
        return np.array(out, np.float32)

    def log_balance(self, log_q, rounds, drawn):
        """Every column belongs to the responses beside it: an adapter's is the target's, raised."""
        assert np.ptp(log_q[0]) > 1 and len(log_q) == 1 + 1 + len(rounds) - 1
        assert np.all(np.ptp(log_q[2:] - log_q[0], axis=(1, 2)) < 1e-5)
        return log_balance(log_q, rounds, drawn)

    def fit(self, training, net, adapter, data, *, odds, rows, micro_rows, seed):
        self.count("fit")
        parts = jax.tree.leaves(data)
        seen = sum(float(np.sum(np.sin(1 + k) * np.asarray(x))) for k, x in enumerate(parts))
        seen = 1e-4 * np.tanh(seen + odds.sum())
        moved = jax.tree.map(
            lambda one: one.replace(b=np.asarray(one.b) + np.float32(1 + seen)), adapter,
            is_leaf=lambda x: isinstance(x, LowRank),
        )  # fmt: skip
        names = ("nll", "moment", "gradient", "tokens")
        return moved, {name: np.zeros(training.steps) for name in names}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(name of a folder, rounds) -> what was learned, and the engine that did it."""
    config = tiny_config(vocab_size=len(WORDS), end_ids=(IDS["</s>"],), max_positions=64)
    model = random_model(config)
    model = type(model)(config, model.params, word_tokenizer())
    target = Policy(model)
    start = at_temperature(target, 2.0)

    def learned(name, rounds, *, dies_at=None, peak=10**6):
        engine = Engine(target, peak=peak)
        engine.dies_at = dies_at
        for function in ("draw", "sequence_log_probs", "log_balance", "fit"):
            monkeypatch.setattr(learning, function, getattr(engine, function))
        settings = LearnSettings(rounds=rounds, samples=N, max_new_tokens=T, rank=1)
        try:
            return learn(target, start, QUERIES, engine, settings, tmp_path / name, {}), engine
        except Killed:
            return None, engine

    learned.folder = tmp_path
    return learned


def outcome(folder):
    """Of a folder, but for how long it took and how many rounds were asked for last."""
    record = json.loads((folder / "learn.json").read_text())
    record["rounds"] = [{**one, "seconds": 0} for one in record["rounds"]]
    return (
        (folder / "adapter_model.safetensors").read_bytes(),
        record["rounds"],
        record["best_round"],
    )


def test_each_response_is_scored_once_under_each_policy(run):
    """Rounds 0 to 3 draw; responses of rounds 0 and 1 meet the adapters that were trained later."""
    whole, engine = run("whole", 3)
    assert whole.best == 3 and engine.calls == dict(draw=4, judge=4, score=4 + 2, fit=3)
    assert set(engine.pairs.values()) == {1}
    hits = [one["hits"] for one in whole.record["rounds"]]
    assert len(engine.pairs) == sum(h * c for h, c in zip(hits, (4, 4, 4, 5), strict=True))


def test_a_finished_folder_goes_on_with_more_rounds(run):
    """As one run with so many, with nothing drawn, judged, scored or trained twice; also where it
    is killed on the way, and with fewer rounds than there are."""
    _, all_calls = run("whole", 3)
    _, first = run("parts", 1)
    killed, second = run("parts", 3, dies_at=3)
    assert killed is None and second.calls == dict(score=1, fit=1, draw=1)
    ended, third = run("parts", 3)
    assert ended.best == 3 and outcome(run.folder / "parts") == outcome(run.folder / "whole")
    repeated = first.calls + second.calls + third.calls - all_calls.calls
    assert repeated == dict(draw=1)  # whose answers were not judged yet
    again, nothing = run("parts", 3)
    assert not nothing.calls and again.best == 3
    run("short", 1)
    _, nothing = run("parts", 1)
    assert not nothing.calls and outcome(run.folder / "parts") == outcome(run.folder / "short")


def test_learning_that_stopped_by_itself_stays_so(run):
    """The second adapter is no better than the first, whatever number of rounds is asked for."""
    stopped, _ = run("parts", 4, peak=2)
    more, nothing = run("parts", 6, peak=2)
    whole, _ = run("whole", 6, peak=2)
    assert [one["falls"] for one in whole.record["rounds"]] == [True, True, False]
    assert stopped.best == more.best == whole.best == 1 and not nothing.calls
    assert outcome(run.folder / "parts") == outcome(run.folder / "whole")
