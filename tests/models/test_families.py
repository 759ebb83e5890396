"""Every family but Llama and Gemma 1 (test_parity) against transformers on PyTorch, float32."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.special
from safetensors.numpy import load_file, save_file

from tailrisk_jax.adaptation.training import init_adapter
from tailrisk_jax.errors import InputError
from tailrisk_jax.models import (
    LowRank,
    load_adapter,
    load_model,
    mapping,
    no_steering,
    read_adapter,
    save_adapter,
    save_model,
)
from tailrisk_jax.models.hf_config import from_hf
from tailrisk_jax.models.transformer import forward, leaf_shapes, parameter_shapes
from tailrisk_jax.policies import Policy, ablate, from_tokens, logits, steer
from tailrisk_jax.rollouts import sample, token_log_probs
from tests.models import torch_llama
from tests.models.torch_adapters import write_adapter
from tests.models.torch_models import FAMILIES, YARN, config_of, make
from tests.oracles import as_draws, as_rows

# Longer than every window; the second has no token to attend to but itself.
TEXTS = torch_llama.texts(0, 61, [20, 1, 9])
TOKENS, MASK = torch_llama.padded(TEXTS, "left", 2)
PROMPTS = torch_llama.texts(1, 61, [11, 3])


def mostly_slow(*quick):
    """All families; quick are some, and one for each way in which layers differ."""
    quick = (*quick, "olmo3", "gemma3_text", "gpt_neo")
    return [one if one in quick else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(transformers model, its folder, our model)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make(request.param)
    theirs.save_pretrained(folder)
    return theirs, folder, load_model(folder)


def assert_parity(policy, wanted) -> float:
    """Our logits of `TEXTS`, padded on the left, are those of each alone; returns their scale."""
    ours = np.asarray(logits(policy, TOKENS, MASK))
    scale = max(np.abs(one).max() for one in wanted)
    assert scale > 1
    for got, kept, one in zip(ours, MASK, wanted, strict=True):
        np.testing.assert_allclose(got[kept], one, rtol=0, atol=1e-4 * scale)
    return scale


def test_logits_of_a_padded_batch(case):
    theirs, _, model = case
    assert_parity(Policy(model), torch_llama.logits(theirs, TEXTS))
    assert model.config.end_ids == (2, 7, 11)


def assert_log_probs_of_the_full_pass(theirs, rollouts, log_probs):
    """log p of every drawn token is what transformers gives for prompt and response as one text."""
    for q, prompt in enumerate(PROMPTS):
        for n, row in enumerate(as_rows(rollouts, q)):
            (whole,) = torch_llama.logits(theirs, [[*prompt, *row]])
            wanted = scipy.special.log_softmax(whole[len(prompt) - 1 : -1], axis=-1)
            np.testing.assert_allclose(
                np.asarray(log_probs)[q, n, : len(row)],
                wanted[np.arange(len(row)), row],
                rtol=0,
                atol=1e-4 * np.abs(whole).max(),
            )


@pytest.mark.parametrize("case", mostly_slow("smollm3", "phi3", "granite"), indirect=True)
def test_decoding_step_by_step_is_the_full_pass(case):
    """Rows draw several samples one after another, so that the suffix's ring goes round."""
    theirs, _, model = case
    rollouts = sample(jax.random.key(0), Policy(model), from_tokens(PROMPTS), 6, 12, batch_size=4)
    assert_log_probs_of_the_full_pass(theirs, rollouts, rollouts.drawn_log_probs)
    lengths = np.asarray(rollouts.mask).sum(axis=-1)
    assert lengths.max() == 12 and lengths.min() < 12


@pytest.mark.parametrize("family", mostly_slow())
def test_scoring_is_the_full_pass(family, tmp_path):
    theirs = make(family)
    theirs.save_pretrained(tmp_path)
    policy = Policy(load_model(tmp_path))
    rows = torch_llama.texts(2, 61, [12, 9, 12])
    draws = as_draws(rows, from_tokens(PROMPTS), policy.model.config, 12)
    assert_log_probs_of_the_full_pass(theirs, draws, token_log_probs([policy], draws)[0])


def test_steering_acts_on_what_is_written_to_the_residual_stream(case):
    theirs, _, model = case
    rng = np.random.default_rng(3)
    direction, vector = rng.normal(size=(2, model.config.width)).astype(np.float32)
    policy = steer(ablate(Policy(model), direction, 0.7), vector, 1, 0.5)
    wanted = [
        torch_llama.steered_logits(
            theirs, text, [], ablation=(direction, 0.7, "all"), additions=[(vector, 1, 0.5, "all")]
        )
        for text in TEXTS
    ]
    scale = assert_parity(policy, wanted)
    plain = torch_llama.logits(theirs, TEXTS[:1])[0]
    assert np.abs(wanted[0] - plain).max() > 0.05 * scale


def test_export_is_bit_identical(case, tmp_path):
    theirs, folder, model = case
    save_model(model, tmp_path)
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    assert load_model(tmp_path).config == model.config
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager")
    assert_parity(Policy(model), torch_llama.logits(again, TEXTS))


def test_mapping_is_a_bijection(case):
    _, folder, model = case
    entries = mapping.entries(model.config)
    leaves = [leaf for entry in entries for leaf in entry.leaves]
    assert sorted(leaves) == sorted(leaf_shapes(model.config))
    keys = [key for entry in entries for key in mapping.checkpoint_keys(entry, model.config)]
    assert sorted(keys) == sorted(load_file(folder / "model.safetensors"))


def test_unknown_and_missing_tensors_are_refused_by_name(case, tmp_path):
    _, folder, model = case
    tensors = load_file(folder / "model.safetensors")
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    key = mapping.checkpoint_keys(mapping.entries(model.config)[-1], model.config)[1]
    extra = key.replace(".1.", ".3.")
    for changed, named in (
        ({k: v for k, v in tensors.items() if k != key}, f"lacks the tensor {key}"),
        (tensors | {extra: tensors[key]}, f"holds the tensor {extra}"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=named.replace(".", r"\.")):
            load_model(tmp_path)


def test_adapters_are_folded_in_and_saved_again(case, tmp_path):
    """peft's all-linear: fused modules and transposed ones too."""
    theirs, _, model = case
    linear = [entry for entry in mapping.entries(model.config) if mapping.is_linear(entry)]
    modules = [
        key.removesuffix(".weight")
        for entry in linear
        for key in mapping.checkpoint_keys(entry, model.config)
    ]
    settings = {"target_modules": "all-linear", "r": 2, "lora_alpha": 3}
    merged = write_adapter(tmp_path / "in", theirs, settings, dict.fromkeys(modules, (2, 1.5)))
    assert_parity(Policy(load_adapter(model, tmp_path / "in")), torch_llama.logits(merged, TEXTS))

    adapter = read_adapter(model, tmp_path / "in")
    save_adapter(adapter, model, tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, read_adapter(model, tmp_path / "out"), adapter)
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("in", "out")
    )
    jax.tree.map(np.testing.assert_array_equal, after, before)
    started = init_adapter(jax.random.key(0), model.config, rank=2)
    assert jax.tree.map(np.shape, started) == jax.tree.map(np.shape, adapter)


@pytest.mark.parametrize("family", ["olmo3", "smollm3", "gpt_neo"])
def test_the_program_does_not_grow_with_depth(family):
    def lines(layers):
        changes = {"num_hidden_layers": layers}
        if family == "olmo3":
            changes["layer_types"] = ["full_attention", "sliding_attention"] * (layers // 2)
        if family == "smollm3":
            changes["no_rope_layers"] = [1, 0] * (layers // 2)
        if family == "gpt_neo":
            kinds = [[["global", "local"], layers // 2]]
            changes = {"num_layers": layers, "attention_types": kinds}
        config = from_hf(config_of(family, **changes).to_dict())
        tokens = jax.ShapeDtypeStruct((1, 1, 8), np.int32)

        def one_pass(params, tokens):
            response = np.zeros((1, 1, 1), bool)
            return forward(config, params, tokens, tokens, no_steering(config), response=response)

        params = nn.meta.unbox(parameter_shapes(config))
        return str(jax.make_jaxpr(one_pass)(params, tokens)).count("\n")

    assert lines(2) == lines(8)


_HEADS = {
    "multi-head": {"num_key_value_heads": 4, "tie_word_embeddings": True, "vocab_size": 67},
    "grouped": {"num_key_value_heads": 2, "tie_word_embeddings": False, "intermediate_size": 33},
    "multi-query": {"num_key_value_heads": 1, "tie_word_embeddings": False, "hidden_size": 40},
}
_GPT = {
    "one-head": {"tie_word_embeddings": False, "n_head": 1, "num_heads": 1, "vocab_size": 67},
    "wide": {"n_embd": 20, "hidden_size": 20, "n_head": 4, "num_heads": 4, "n_inner": None},
}
_LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.3, 2.5, 3.0],
    "long_factor": [2.0] * 4, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
_ROPES = {
    "default": {"rope_type": "default", "rope_theta": 30.0},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    "llama3": torch_llama.LLAMA3_ROPE,
    "yarn": YARN,
    "yarn-scaled": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "longrope": _LONG,
}


def _grid():
    for family in FAMILIES:
        if family.startswith("gpt"):
            names = ({"n_head", "n_embd", "n_inner"}, {"num_heads", "hidden_size"})
            foreign = names[family == "gpt2"]
            for name, changes in _GPT.items():
                kept = {key: one for key, one in changes.items() if key not in foreign}
                yield pytest.param(family, kept, id=f"{family}-{name}")
            continue
        for name, changes in _HEADS.items():
            if family == "phi3" and "hidden_size" in changes:
                changes = changes | {"hidden_size": 32, "sliding_window": None}
            yield pytest.param(family, changes, id=f"{family}-{name}")
    for family in ("mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2"):
        for name, rope in _ROPES.items():
            changes = {"rope_parameters": rope, "head_dim": 8}
            changes |= {"sliding_window": 3} if family in ("mistral", "qwen2", "smollm3") else {}
            yield pytest.param(family, changes, id=f"{family}-{name}")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), list(_grid()))
@pytest.mark.parametrize("seed", [1, 2])
def test_logits_over_a_grid_of_configs(tmp_path, family, changes, seed):
    theirs = make(family, seed, **changes)
    theirs.save_pretrained(tmp_path / "in")
    model = load_model(tmp_path / "in")
    assert_parity(Policy(model), torch_llama.logits(theirs, TEXTS))
    save_model(model, tmp_path / "out")
    before, after = (load_file(tmp_path / one / "model.safetensors") for one in ("in", "out"))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert load_model(tmp_path / "out").config == model.config


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_texts_beyond_learned_positions_or_short_factors_are_refused(tmp_path, family):
    """A longer text would be computed with other factors, or with no position at all."""
    make(family).save_pretrained(tmp_path)
    policy = Policy(load_model(tmp_path))
    limit = {"phi3": 32, "gpt2": 64}[family]
    assert policy.model.config.max_positions == limit
    prompts = from_tokens(torch_llama.texts(1, 61, [20, 3]))
    with pytest.raises(InputError, match=f"{family} model can compute texts of {limit} tokens"):
        sample(jax.random.key(0), policy, prompts, 2, limit - 19)
    draws = as_draws([[5] * (limit - 19)], prompts, policy.model.config, limit - 19)
    with pytest.raises(InputError, match=f"a prompt has 20 tokens, max_new_tokens is {limit - 19}"):
        token_log_probs([policy], draws)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "qwen2"])
def test_files_of_the_bare_model_are_read(tmp_path, family):
    """As openai-community/gpt2 has them: no prefix, and masks that are computed."""
    theirs = make(family)
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    prefix = "model." if family == "qwen2" else "transformer."
    tensors = {
        key.removeprefix(prefix): tensor
        for key, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    if family != "qwen2":
        inner = "attention." if family == "gpt_neo" else ""
        tensors[f"h.1.attn.{inner}bias"] = np.ones((1, 1, 64, 64), np.uint8)
        tensors[f"h.1.attn.{inner}masked_bias"] = np.full((), -1e9, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path).params, model.params)


def test_parts_of_a_fused_module_that_were_adapted_apart_are_saved_as_one(tmp_path):
    """Of the sum of their ranks; the change is the same, up to rounding."""
    make("phi3").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    shapes, rng = leaf_shapes(model.config), np.random.default_rng(0)

    def low_rank(rank, *path):
        layers, inputs, outputs = shapes["layers", *path, "kernel"]
        a, b = rng.normal(size=(layers, rank, inputs)), rng.normal(size=(layers, outputs, rank))
        return LowRank(a.astype(np.float32), b.astype(np.float32), np.full(layers, 0.5, np.float32))

    tree = {
        "attention": {
            "query": {"kernel": low_rank(2, "attention", "query")},
            "value": {"kernel": low_rank(1, "attention", "value")},
        }
    }
    save_adapter({"layers": tree}, model, tmp_path / "out")
    again = read_adapter(model, tmp_path / "out")["layers"]["attention"]
    assert set(again) == {"query", "key", "value"}

    def change(one):
        return one.scale[:, None, None] * np.einsum("lri,lor->lio", one.a, one.b)

    for name, one in again.items():
        wanted = change(tree["attention"][name]["kernel"]) if name != "key" else 0.0
        np.testing.assert_allclose(change(one["kernel"]), wanted, atol=1e-6)
    apart = tree["attention"]["value"]["kernel"].replace(scale=np.ones(3, np.float32))
    tree["attention"]["value"]["kernel"] = apart
    with pytest.raises(InputError, match=r"qkv_proj\.weight differently"):
        save_adapter({"layers": tree}, model, tmp_path / "out")
