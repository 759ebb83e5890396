"""Configs: every field that would change the computation is read or refused by name."""

import json

import pytest
from transformers import AutoConfig

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import ModelConfig, Rope, load_config
from tailrisk_jax.models.hf_config import from_hf, to_hf
from tests.models import torch_llama
from tests.oracles import tiny_config


def written(folder, **changes):
    """A sound config.json with some fields changed, as a user would find it."""
    torch_llama.config().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("model_type", "bloom"),
        ("model_type", "no_such_family"),
        ("sliding_window", 4096),
        ("attn_logit_softcapping", 50.0),
        ("brand_new_field", 3),
    ],
)
def test_fields_that_change_the_maths_are_refused_by_name(tmp_path, field, value):
    with pytest.raises(InputError) as caught:
        load_config(written(tmp_path, **{field: value}))
    assert field in str(caught.value)
    assert (value if isinstance(value, str) else str(value)) in str(caught.value)


# As google/gemma-2b has it.
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
    "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
    "torch_dtype": "bfloat16", "transformers_version": "4.38.0.dev0", "use_cache": True,
    "vocab_size": 256000,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden_activation": None}, {"hidden_act": "gelu_pytorch_tanh"}],
    ids=["released", "earliest", "later"],
)
def test_gemma_2b(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_2B | changes))
    ours = load_config(tmp_path)
    assert ours == ModelConfig(
        family="gemma", vocab_size=256000, num_layers=18, width=2048, num_heads=8, num_kv_heads=1,
        head_dim=256, mlp_width=16384, norm_eps=1e-6, tie_embeddings=True, max_positions=8192,
        end_ids=(1,), activation="gelu_tanh", norm="rms_offset", embedding_multiplier=2048**0.5,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(to_hf(ours)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.model_type, theirs.hidden_act) == ("gemma", "gelu_pytorch_tanh")
    assert load_config(tmp_path) == ours


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "silu"),
        ("hidden_activation", "gelu"),
        ("attention_bias", True),
        ("use_bidirectional_attention", True),
        ("final_logit_softcapping", 30.0),
    ],
)
def test_gemma_fields_that_change_the_maths_are_refused_by_name(tmp_path, field, value):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_2B | {field: value}))
    with pytest.raises(InputError, match=f"{field}={value!r}"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_other_ropes_are_refused_by_name(tmp_path, spelling, rope, named):
    changes = {"rope_parameters": {**rope, "rope_theta": 1e4}}
    if spelling == "rope_scaling":
        changes = {"rope_parameters": None, "rope_scaling": rope, "rope_theta": 1e4}
    with pytest.raises(InputError, match=named):
        load_config(written(tmp_path, **changes))


def test_rope_parameters_in_both_spellings(tmp_path):
    llama3 = torch_llama.LLAMA3_ROPE
    wanted = Rope(
        theta=100.0, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_positions=32,
    )  # fmt: skip
    assert load_config(written(tmp_path, rope_parameters=llama3)).rope == wanted
    older = {name: value for name, value in llama3.items() if name != "rope_theta"}
    folder = written(tmp_path, rope_parameters=None, rope_scaling=older, rope_theta=100.0)
    assert load_config(folder).rope == wanted
    folder = written(tmp_path, rope_parameters=None, rope_scaling=None, rope_theta=100.0)
    assert load_config(folder).rope == Rope(theta=100.0)


@pytest.mark.parametrize("missing", sorted(set(torch_llama.LLAMA3_ROPE) - {"rope_type"}))
def test_an_incomplete_llama3_rope_is_refused(missing):
    rope = {name: value for name, value in torch_llama.LLAMA3_ROPE.items() if name != missing}
    with pytest.raises(InputError, match=missing):
        from_hf(torch_llama.config().to_dict() | {"rope_parameters": rope})


@pytest.mark.parametrize(
    ("field", "value"), [("num_kv_heads", 3), ("head_dim", 5)], ids=["heads", "odd"]
)
def test_impossible_shapes_are_refused(field, value):
    with pytest.raises(InputError, match=str(value)):
        tiny_config(num_heads=4, **{field: value})


@pytest.mark.parametrize("name", torch_llama.CONFIGS)
def test_config_round_trip(tmp_path, name):
    torch_llama.config(**torch_llama.CONFIGS[name]).save_pretrained(tmp_path)
    ours = load_config(tmp_path)
    assert ours.end_ids == (2, 7, 11)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(ours)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert load_config(tmp_path) == ours
    wanted = torch_llama.config(**torch_llama.CONFIGS[name])
    for field in ("head_dim", "num_key_value_heads", "rope_parameters", "tie_word_embeddings"):
        assert getattr(theirs, field) == getattr(wanted, field), field
