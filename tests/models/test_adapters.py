"""PEFT adapters, folded in and beside the parameters, against PyTorch models with them merged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import load_adapter, load_model, read_adapter, save_adapter
from tailrisk_jax.models.adapters import LowRank, from_peft, stack
from tailrisk_jax.policies import Policy, logits, with_adapter
from tests.models import torch_llama
from tests.models.torch_adapters import SETTINGS, write_adapter
from tests.models.torch_models import MODELS
from tests.oracles import random_model, tiny_config

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def modules(layers, names) -> list[str]:
    return [f"model.layers.{layer}.{name}" for layer in layers for name in names]


# Name -> (base, changes to adapter_config.json, {module: (rank, scale)} that it means).
ADAPTERS = {
    "list": (
        "grouped",
        {"target_modules": ["v_proj", "self_attn.q_proj"], "r": 2, "lora_alpha": 4},
        dict.fromkeys(modules((0, 1, 2), ("self_attn.q_proj", "self_attn.v_proj")), (2, 2.0)),
    ),
    "expression": (
        "multi-query-tied",
        {
            "target_modules": r".*\.[12]\.mlp\.(up|down)_proj",
            "r": 4, "lora_alpha": 8, "use_rslora": True,
        },
        dict.fromkeys(modules((1, 2), ("mlp.up_proj", "mlp.down_proj")), (4, 4.0)),
    ),
    "all-linear": (
        "gemma-multi-query",
        {"target_modules": "all-linear", "r": 3, "lora_alpha": 1, "fan_in_fan_out": True},
        dict.fromkeys(modules((0, 1, 2), ATTENTION + MLP), (3, 1 / 3)),
    ),
    "patterns": (
        "gemma-multi-head",
        {
            "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2],
            "r": 2, "rank_pattern": {"q_proj": 5}, "lora_alpha": 4,
            "alpha_pattern": {r"model\.layers\.2\..*": 1, "o_proj": 8},
        },
        {
            "model.layers.0.self_attn.q_proj": (5, 4 / 5),
            "model.layers.0.self_attn.o_proj": (2, 8 / 2),
            "model.layers.2.self_attn.q_proj": (5, 1 / 5),
            "model.layers.2.self_attn.o_proj": (2, 1 / 2),
        },
    ),
    "one-layer": (
        "grouped",
        {
            "target_modules": ["mlp.up_proj", "gate_proj", "model.layers.0.self_attn.k_proj"],
            "layers_to_transform": 1, "layers_pattern": "layers", "exclude_modules": ["up_proj"],
            "rank_pattern": {"k_proj": 1},
        },
        {"model.layers.0.self_attn.k_proj": (1, 8.0), "model.layers.1.mlp.gate_proj": (8, 1.0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "infix"), [*((name, "") for name in ADAPTERS), ("all-linear", ".default")]
)
def test_logits_are_those_of_the_merged_model(tmp_path, name, infix):
    base, settings, adapted = ADAPTERS[name]
    theirs = MODELS[base]()
    theirs.save_pretrained(tmp_path / "base")
    merged = write_adapter(tmp_path / "adapter", theirs, settings, adapted, infix=infix)
    model = load_model(tmp_path / "base")
    before = jax.tree.map(np.array, model.params)
    ours = load_adapter(model, tmp_path / "adapter")

    rows = torch_llama.texts(0, 61, [9, 9])
    tokens, mask = torch_llama.padded(rows, "left")
    wanted, plain = (np.stack(torch_llama.logits(one, rows)) for one in (merged, theirs))
    scale = np.abs(wanted).max()
    beside = with_adapter(Policy(model), read_adapter(model, tmp_path / "adapter"))
    for policy in (Policy(ours), beside):
        got = np.asarray(logits(policy, tokens, mask))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * scale)
    assert np.abs(wanted - plain).max() > 0.1 * scale

    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    assert ours.params["embedding"] is model.params["embedding"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_saved_is_read_again_bit_for_bit(tmp_path, name):
    """And by peft: `PeftModel.from_pretrained` of peft 0.21.2, which the tests do without, gave the
    logits of a 3-layer Llama with a saved adapter of all linear layers (rank 3) to 6e-6, and with
    one of two modules (rank 2, alpha 5) to 9e-6, where the adapters changed them by up to 7.9."""
    base, settings, adapted = ADAPTERS[name]
    theirs = MODELS[base]()
    theirs.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "theirs", theirs, settings, adapted)
    model = load_model(tmp_path / "base")
    tree = read_adapter(model, tmp_path / "theirs")
    save_adapter(tree, model, tmp_path / "ours", base="org/base")
    again = read_adapter(model, tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, again, tree)

    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(written) <= {*SETTINGS, "target_modules"}
    ours, wanted = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs")
    )
    assert set(ours) == set(wanted)
    if name != "patterns":  # where ranks differ between layers, zeros fill the smaller ones
        jax.tree.map(np.testing.assert_array_equal, ours, wanted)
    if name == "list":
        assert written["target_modules"] == ["q_proj", "v_proj"]
        assert (written["r"], written["lora_alpha"]) == (2, 4)
        assert not written["rank_pattern"] and not written["alpha_pattern"]


def test_an_adapter_of_zeros_is_not_written(tmp_path):
    model = random_model(tiny_config())
    one = LowRank(np.zeros((2, 1, 8)), np.zeros((2, 12, 1)), np.zeros(2))
    with pytest.raises(InputError, match="zero in every layer"):
        save_adapter({"layers": {"attention": {"query": {"kernel": one}}}}, model, tmp_path)


def test_stacked_adapters_are_filled_with_zeros():
    def low_rank(rank):
        return LowRank(jnp.ones((2, rank, 8)), jnp.ones((2, 12, rank)), jnp.ones(2))

    def tree(**ranks):
        return {"layers": {name: {"kernel": low_rank(rank)} for name, rank in ranks.items()}}

    both = stack([tree(q=1), None, tree(q=3, k=2)])["layers"]
    assert both["q"]["kernel"].a.shape == (3, 2, 3, 8)
    assert both["q"]["kernel"].b.shape == (3, 2, 12, 3)
    np.testing.assert_array_equal(both["q"]["kernel"].a.sum(axis=(1, 2, 3)), [16, 0, 48])
    np.testing.assert_array_equal(both["q"]["kernel"].b.sum(axis=(1, 2, 3)), [24, 0, 72])
    np.testing.assert_array_equal(both["k"]["kernel"].scale, [[0, 0], [0, 0], [1, 1]])
    assert stack([None, None]) is None


def test_the_parsed_form_is_stacked_over_layers():
    config = tiny_config(num_layers=3)
    module = "base_model.model.model.layers.{}.self_attn.v_proj.lora_{}.weight"
    rng = np.random.default_rng(0)
    tensors = {
        module.format(layer, factor): rng.normal(size=shape).astype(np.float32)
        for layer, rank in ((0, 2), (2, 3))
        for factor, shape in (("A", (rank, 8)), ("B", (6, rank)))
    }
    settings = SETTINGS | {
        "target_modules": ["v_proj"], "layers_to_transform": [0, 2], "r": 2, "lora_alpha": 6,
        "rank_pattern": {r"2\.self_attn\.v_proj": 3},
    }  # fmt: skip
    tree = from_peft(settings, tensors, config)
    assert list(tree) == ["layers"]
    assert list(tree["layers"]) == ["attention"]
    assert list(tree["layers"]["attention"]) == ["value"]
    one = tree["layers"]["attention"]["value"]["kernel"]
    assert (one.a.shape, one.b.shape) == ((3, 3, 8), (3, 6, 3))
    np.testing.assert_array_equal(one.scale, [3, 0, 2])
    np.testing.assert_array_equal(one.a[0, :2], tensors[module.format(0, "A")])
    np.testing.assert_array_equal(one.b[2], tensors[module.format(2, "B")])
    assert not np.any(one.a[0, 2]) and not np.any(one.b[0, :, 2]) and not np.any(one.a[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("init_lora_weights", "pissa_niter_16"),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("trainable_token_indices", [0]),
        ("target_parameters", ["mlp.experts"]),
        ("brand_new_feature", "on"),
        ("target_modules", None),
        ("target_modules", ["lm_head"]),
        ("target_modules", ".*norm"),
        ("target_modules", ["no_such_module"]),
        ("target_modules", "(q_proj"),
        ("layers_to_transform", [7]),
        ("layers_pattern", "h"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(field, value):
    settings = SETTINGS | {"target_modules": ["q_proj"], field: value}
    with pytest.raises(InputError) as caught:
        from_peft(settings, {}, tiny_config())
    message = str(caught.value)
    assert str(value) in message and "\n" not in message
    assert field in message or value == "(q_proj"


def test_layers_to_transform_needs_a_list():
    settings = SETTINGS | {"target_modules": ".*q_proj", "layers_to_transform": [0]}
    with pytest.raises(InputError, match="layers_to_transform"):
        from_peft(settings, {}, tiny_config())


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(KEY), KEY),
        (lambda tensors: tensors.update({KEY: np.ones((3, 8), np.float32)}), KEY),
        (lambda tensors: tensors.update({KEY: np.ones((2, 8), np.int8)}), KEY),
        (lambda t: t.update({KEY.replace("A.w", "A.default.w"): t[KEY].copy()}), KEY[:-7]),
        (lambda t: t.update({KEY.replace("q_proj", "k_proj"): t[KEY].copy()}), "k_proj"),
        (lambda t: t.update({KEY.replace("layers.1", "layers.2"): t[KEY].copy()}), "layers.2"),
        (lambda t: t.update({"base_model.model.lm_head.weight": t[KEY].copy()}), "lm_head.weight"),
    ],
    ids=["missing", "rank", "integers", "twice", "not-targeted", "no-such-layer", "whole-module"],
)
def test_tensors_and_targets_must_agree(tmp_path, change, named):
    base = random_model(tiny_config())
    theirs = torch_llama.llama(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    settings = {"target_modules": ["q_proj"], "r": 2}
    adapted = dict.fromkeys(modules((0, 1), ["self_attn.q_proj"]), (2, 4.0))
    write_adapter(tmp_path, theirs, settings, adapted)
    load_adapter(base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError) as caught:
        load_adapter(base, tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_adapter_or_no_model(tmp_path):
    base = random_model(tiny_config())
    with pytest.raises(InputError, match=r"adapter_config\.json is missing"):
        load_adapter(base, tmp_path)
    content = json.dumps(SETTINGS | {"target_modules": ["q_proj"]})
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(InputError, match="finish the download"):
        load_adapter(base, tmp_path)
    with pytest.raises(InputError, match="adapter of the model 'org/base'"):
        load_model(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"convert adapter_model\.bin to safetensors"):
        load_adapter(base, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is cut off or damaged"):
        load_adapter(base, tmp_path)
