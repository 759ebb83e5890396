"""`tailrisk learn` as a user runs it, and learning that is killed."""

import dataclasses
import json
import re

import numpy as np
import pytest

from tailrisk_jax import load_model, read_adapter
from tailrisk_jax.adaptation import Shares, Training
from tailrisk_jax.cli import main
from tailrisk_jax.cli.learn import proposals
from tailrisk_jax.judges import RegexEvent
from tailrisk_jax.policies import Policy, at_temperature, mixture
from tailrisk_jax.studies import Proposal, StudyQuery, parse_proposal
from tailrisk_jax.studies.learning import LearnSettings, learn
from tests.oracles import random_model, tiny_config
from tests.studies.runs import QUERIES, refused, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))
    (folder / "judges.py").write_text(
        "def silent(responses):\n    return [None] * len(responses)\n"
    )
    return folder


def command(tiny, out, *words):
    return [
        "learn", "--model", str(tiny / "model"), "--queries", str(tiny / "queries.jsonl"),
        "--start", "target@2", "--out", str(out), "--samples", "32", "--max-new-tokens", "6",
        "--rounds", "2", "--steps", "12", "--rows", "16", "--rank", "2", "--learning-rate", "0.03",
        *words,
    ]  # fmt: skip


class Killed(BaseException):
    pass


class Counting(RegexEvent):
    """Dies at its n-th call."""

    left = 10**6

    def __call__(self, responses):
        self.__class__.left -= 1
        if self.left < 0:
            raise Killed
        return super().__call__(responses)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_adapter(tiny, tmp_path, capsys):
    """In its second round, with a torn checkpoint left; so does a finished one, with another round;
    and what is learned is used."""
    whole = tmp_path / "whole"
    main([*command(tiny, whole, "--event", "cake|kind"), "--json"])
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert [one["round"] for one in record["rounds"]] == [0, 1, 2] and "round 2: " in err
    kl = [(one["kl_before"], one["kl"]) for one in record["rounds"]]
    assert kl[1][1] < kl[1][0] and record["best_round"] >= 1
    assert record["rounds"][0]["draws"] == 96 and 0 < record["rounds"][0]["hits"] < 96
    assert record["rounds"][0]["tokens"] > 96 and record["rounds"][0]["trained_tokens"] > 0
    assert "seconds" in record["rounds"][0] and len(record["rounds"][0]["kl_by_query"]) == 3

    target = Policy(load_model(tiny / "model"))
    queries = [StudyQuery(name, text) for name, text in QUERIES.items()]
    settings = LearnSettings(
        rounds=2, samples=32, max_new_tokens=6, rank=2, rows=16,
        training=Training(learning_rate=0.03, steps=12), shares=Shares(),
    )  # fmt: skip
    rest = target, at_temperature(target, 2.0), queries
    killed = tmp_path / "killed"
    Counting.left = 1
    with pytest.raises(Killed):
        learn(*rest, Counting("cake|kind"), settings, killed, {})
    assert {path.name for path in killed.iterdir()} == {"learn.json", "rounds"}
    (killed / "rounds" / "1" / "draws.orbax-checkpoint-tmp").mkdir(parents=True)
    Counting.left = 2  # the first round isn't judged again
    learned = learn(*rest, Counting("cake|kind"), settings, killed, {})
    longer = tmp_path / "longer"
    Counting.left = 3  # rounds 0 and 1, and the figures of the second adapter
    for rounds in (1, 2):
        learn(
            *rest, Counting("cake|kind"), dataclasses.replace(settings, rounds=rounds), longer, {}
        )
    folders = whole, killed, longer
    weights = {(folder / "adapter_model.safetensors").read_bytes() for folder in folders}
    assert len(weights) == 1
    both = [json.loads((folder / "learn.json").read_text()) for folder in (whole, killed)]
    rounds = [[{**one, "seconds": 0} for one in kept["rounds"]] for kept in both]
    assert rounds[0] == rounds[1]
    assert learned.best == both[0]["best_round"]

    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "proposal.txt").write_text("target@2\n")
    (tuned / "tuning.json").write_text('{"method": "choose", "reason": "", "pilot": {}}')
    again = command(tiny, whole, "--event", "cake|kind")
    main([word.replace("target@2", f"tuned:{tuned}") for word in again])  # all is there
    texts = re.findall(r'  "(.*)"', capsys.readouterr().out)
    assert texts == [
        f"0.1*target + 0.9*adapter:{whole}",
        f"0.1*target + 0.6*adapter:{whole} + 0.3*target@2",
    ]
    parse_proposal(texts[1], target)
    proposal = parse_proposal(texts[0], target)
    assert proposal.policy.components[0] is target
    again = read_adapter(target.model, whole)
    np.testing.assert_array_equal(
        again["layers"]["mlp"]["down"]["kernel"].b,
        proposal.policy.components[1].adapter["layers"]["mlp"]["down"]["kernel"].b,
    )
    line = refused(command(tiny, whole, "--event", "cake", "--quiet"), capsys)
    assert "learned with other options" in line


def test_shares_of_what_to_draw_from_sum_to_one(tmp_path):
    """Also where the start has many parts, and the target is one of them."""
    rng, policy = np.random.default_rng(0), Policy(random_model(tiny_config()))
    for count in (1, 2, 7, 100):
        weights = rng.dirichlet(np.ones(count))
        names = ["target", *(f"target@{k}" for k in range(2, count + 1))]
        start = Proposal(mixture([policy] * count, weights.tolist()), names, {})
        alone, beside = (
            {name: float(share) for share, name in (term.split("*") for term in text.split(" + "))}
            for text in proposals(Shares(0.1, 0.3), start, tmp_path)
        )
        assert alone == {"target": 0.1, f"adapter:{tmp_path}": 0.9}
        assert abs(sum(beside.values()) - 1) < 1e-9
        wanted = {"target": 0.1 + 0.3 * weights[0], f"adapter:{tmp_path}": 0.6}
        wanted |= {name: 0.3 * w for name, w in zip(names[1:], weights[1:], strict=True)}
        assert beside == pytest.approx(wanted, abs=1e-4)


REFUSED = {
    "nothing harmful": (["--event", "oven"], "none of 96 draws .* stronger --start or more"),
    "nothing scored": (["--judge", "python:{t}/judges.py:silent"], "scored none of 96 answers"),
    "rank": (["--event", "cake", "--rank", "0"], "rank=0 must be at least 1"),
    "rounds": (["--event", "cake", "--rounds", "0"], "rounds=0 must be at least 1"),
    "start": (["--event", "cake", "--start", "tuned:{t}"], "holds no proposal of `tailrisk tune`"),
    "no judge": ([], "--judge or --event is needed"),
    "samples": (["--event", "cake", "--samples", "0"], "num_samples=0 must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_learned_from_is_one_line(tiny, tmp_path, capsys, name):

    words, said = REFUSED[name]
    words = [word.format(t=tiny) for word in words]
    line = refused(command(tiny, tmp_path / "out", *words, "--quiet"), capsys)
    assert re.search(said, line), line
    assert not (tmp_path / "out" / "learn.json").exists()
