"""The grammar of proposals: what each text means, and what isn't understood."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import save_adapter, save_model
from tailrisk_jax.models.adapters import LowRank, scaled
from tailrisk_jax.policies import (
    Policy,
    ablate,
    at_temperature,
    in_context,
    in_int8,
    intensity_for,
    interpolate,
    logit_path,
    steer,
    switch,
    token_mixture,
    window,
    with_adapter,
)
from tailrisk_jax.rollouts.network import sharing
from tailrisk_jax.studies import parse_proposal, weighting_of
from tests.oracles import random_model, tiny_config, unit_vector
from tests.policies.word_tokenizer import WORDS, word_tokenizer

CONFIG = tiny_config(vocab_size=len(WORDS))
MODEL = dataclasses.replace(random_model(CONFIG), tokenizer=word_tokenizer())
TARGET, OTHER = Policy(MODEL), random_model(CONFIG, seed=1)
D, V = unit_vector(CONFIG, 0), unit_vector(CONFIG, 1)
ADAPTER = {
    "layers": {"mlp": {"up": {"kernel": LowRank(*map(jnp.ones, ((2, 1, 8), (2, 12, 1), 2)))}}}
}
EXAMPLE = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "fine"}]
TRICKY = "be + kind (@2 & it's: 0.5*"
HALF = ablate(TARGET, D, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the texts name, in a folder that is the working one."""
    folder = tmp_path_factory.mktemp("proposal")
    for name, vector in (("d", D), ("v", V)):
        save_file({"direction": vector}, folder / f"{name}.safetensors")
    save_model(OTHER, folder / "other")
    save_adapter(ADAPTER, MODEL, folder / "adapter")
    (folder / "system.txt").write_text("be kind")
    (folder / "messages.json").write_text(json.dumps(EXAMPLE))
    (folder / "object.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


# Text, what it means, and the files that it reads.
TERMS = {
    "target": (TARGET, []),
    "target@2": (at_temperature(TARGET, 2.0), []),
    "checkpoint:other": (Policy(OTHER), ["other"]),
    "checkpoint:named": (Policy(OTHER), []),
    "interpolation:other:-0.5": (interpolate(TARGET, OTHER, -0.5), ["other"]),
    "interpolation:named:0.5@2": (
        at_temperature(interpolate(TARGET, OTHER, 0.5), 2.0), [],
    ),
    "ablation:d.safetensors:0.5": (HALF, ["d.safetensors"]),
    "ablation:d:0.9total": (ablate(TARGET, D, intensity_for(0.9, 2)), []),
    "addition:v.safetensors:1:2.5": (steer(TARGET, V, 1, 2.5), ["v.safetensors"]),
    "ablation:d:0.5 & addition:v:1:2@1.5": (
        at_temperature(steer(HALF, V, 1, 2.0), 1.5), [],
    ),
    "adapter:adapter": (with_adapter(TARGET, ADAPTER), ["adapter"]),
    "adapter:adapter:0.5": (with_adapter(TARGET, scaled(ADAPTER, 0.5)), ["adapter"]),
    "checkpoint:named & adapter:adapter:2": (
        with_adapter(Policy(OTHER), ADAPTER, 2.0), ["adapter"],
    ),
    "int8": (in_int8(TARGET), []),
    "checkpoint:other & int8 & ablation:d:0.5@2": (
        at_temperature(ablate(in_int8(Policy(OTHER)), D, 0.5), 2.0), ["other"],
    ),
    "system:system.txt": (in_context(TARGET, system="be kind"), ["system.txt"]),
    f'system:"{TRICKY}"': (in_context(TARGET, system=TRICKY), []),
    "messages:messages.json & prefix:'how to ' & suffix:' a cake'": (
        in_context(TARGET, before=EXAMPLE, prefix="how to ", suffix=" a cake"), ["messages.json"],
    ),
    "bias:0.3(ablation:d:0.5)": (token_mixture([HALF, TARGET], [0.3, 0.7]), []),
    "switch:3(ablation:d:0.5)": (switch(HALF, TARGET, 3), []),
    "switch:3:0.9( ablation:d:0.5 )": (switch(HALF, TARGET, 3, 0.9), []),
    "window:2-5(ablation:d:0.5@2)": (window(at_temperature(HALF, 2.0), TARGET, 2, 5), []),
    "path:1.5(system:'(kind')": (
        logit_path([in_context(TARGET, system="(kind"), TARGET], [1.5, -0.5]), [],
    ),
}  # fmt: skip


def parse(text):
    return parse_proposal(text, TARGET, vectors={"d": D, "v": V}, checkpoints={"named": NAMED})


NAMED = Policy(OTHER)


def assert_same(ours, wanted):
    assert jax.tree.structure(ours.experts, is_leaf=is_model) == jax.tree.structure(
        wanted.experts, is_leaf=is_model
    )
    assert type(ours) is type(wanted)
    for one, other in zip(ours.experts, wanted.experts, strict=True):
        assert one.context == other.context
    leaves = (jax.tree.leaves(policy) for policy in (ours, wanted))
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def is_model(x):
    return type(x) is type(MODEL)


@pytest.mark.parametrize("text", TERMS)
def test_terms(folder, text):
    wanted, files = TERMS[text]
    parsed = parse(text)
    assert_same(parsed.policy, wanted)
    assert parsed.names == [text]
    assert sorted(parsed.files) == files


def test_a_weighted_sum_of_all_terms(folder):
    share = 1 / len(TERMS)
    parsed = parse(" + ".join(f"{share}*{text}" for text in TERMS))
    assert parsed.names == list(TERMS)
    assert set(parsed.files) == {name for _, files in TERMS.values() for name in files}
    for ours, (wanted, _) in zip(parsed.policy.components, TERMS.values(), strict=True):
        assert_same(ours, wanted)


def test_components_that_mix_their_tokens_with_the_target_are_known():
    terms = {
        "target": False, "target@2": False, "window:2-3(ablation:d:1)": False,
        "switch:3(ablation:d:1)": False, "switch:3:0.9(ablation:d:1)": True,
        "switch:0:0.5(ablation:d:1)": False, "bias:1(ablation:d:1)": False,
        "bias:0.5(ablation:d:1)": True,
    }  # fmt: skip
    mixed = parse(" + ".join(f"{1 / len(terms)}*{text}" for text in terms)).policy
    weighting = weighting_of(TARGET, mixed)
    assert weighting.diluted == [k for k, diluted in enumerate(terms.values()) if diluted]
    assert weighting_of(TARGET, parse("bias:0.5(ablation:d:1)").policy).diluted == [0]
    assert weighting_of(TARGET, TARGET).diluted == []


def test_what_is_named_twice_is_one_policy(folder):
    parsed = parse(
        "0.2*target + 0.2*checkpoint:named + 0.2*switch:1(ablation:d:1) + "
        "0.2*window:2-3(ablation:d:1) + 0.2*ablation:d:1"
    )
    target, named, first, second, whole = parsed.policy.components
    assert target is TARGET and named is NAMED
    assert first.experts[0] is second.experts[0] is whole
    assert first.experts[1] is second.experts[1] is TARGET


def test_a_checkpoint_and_its_int8_are_made_once(folder):
    """So that policies that are changes of one share a pass."""
    parsed = parse(
        "0.2*checkpoint:other + 0.2*checkpoint:other@2 + 0.2*checkpoint:other & int8 + "
        "0.2*checkpoint:other & int8 & ablation:d:1 + 0.2*int8"
    )
    assert sharing(parsed.policy.components) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("jailbreak", "isn't understood"),
        ("target:1", "'target:1'"),
        ("0.5*target + target", "weight before each"),
        ("x*target", "weight 'x'"),
        ("0.5*target + 0.4*target@2", "sum to 1"),
        ("target@x", "temperature 'x'"),
        ("target@0", "above 0"),
        ("ablation:d:0.5 & target", "'target'"),
        ("ablation:d:0.5 & checkpoint:other", "'checkpoint:other'"),
        ("checkpoint:nowhere", "nowhere"),
        ("interpolation:other", "isn't understood"),
        ("int8 & int8", "int8 already"),
        ("int8 & interpolation:other:0.5", "interpolate first"),
        ("int8:4", "isn't understood"),
        ("adapter:other", "adapter_config.json"),
        ("adapter:adapter & adapter:adapter", "an adapter already"),
        ("system:missing.txt", "missing.txt"),
        ("system:'be' & system:'kind'", "already"),
        ("system:'be' kind", "nothing may follow"),
        ("system:'be kind", "doesn't end"),
        ("messages:system.txt", "system.txt"),
        ("messages:object.json", "no list of messages"),
        ("switch:3(target", "without"),
        ("switch:3)target(", "without"),
        ("switch:3", "isn't understood"),
        ("switch:1.5(target)", "no whole number"),
        ("switch:-1(target)", "step=-1"),
        ("switch:3:1.5(target)", "bias=1.5"),
        ("switch:3(target)@2", "isn't understood"),
        ("switch:3(switch:2(target))", "'switch:2"),
        ("window:3(target)", "isn't understood"),
        ("window:5-3(target)", "5-3"),
        ("bias:2(target)", r"\[0, 1\]"),
        ("path:nan(target)", "finite"),
        ("addition:v:1.5:1", "no whole number"),
        ("addition:v:7:1", "layer=7"),
    ],
)
def test_what_is_not_understood(folder, text, named):
    with pytest.raises(InputError, match=named) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
