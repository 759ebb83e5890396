"""The config.json of published checkpoints, as they are on the hub, and what we read in them."""

import json

import pytest
from transformers import AutoConfig

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import Rope, load_config
from tailrisk_jax.models.hf_config import is_complete, to_hf
from tests.models.torch_models import FAMILIES, config_of

COMMON = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0", "use_cache": True,
}  # fmt: skip
LLAMA = COMMON | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
    "mlp_bias": False, "pretraining_tp": 1, "rope_scaling": None, "hidden_size": 4096,
    "num_attention_heads": 32, "num_hidden_layers": 32,
}  # fmt: skip
LLAMA3_SCALING = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
QWEN = COMMON | {
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False,
    "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
GEMMA = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "cache_implementation": "hybrid", "eos_token_id": [1, 107], "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16",
    "transformers_version": "4.42.4", "use_cache": True,
}  # fmt: skip
PHI = COMMON | {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "embd_pdrop": 0.0,
    "resid_pdrop": 0.0, "attention_bias": False, "pad_token_id": 32000,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
}  # fmt: skip
GPT_NEO_LAYERS = ["global", "local"] * 2

# Name -> (config.json, fields of ours that it must give).
CONFIGS = {
    "Llama-2-7b-chat": (
        LLAMA | {"intermediate_size": 11008, "max_position_embeddings": 4096,
                 "num_key_value_heads": 32, "vocab_size": 32000},
        {"head_dim": 128, "rope": Rope(theta=10_000.0), "max_positions": 4096},
    ),
    "Meta-Llama-3-8B-Instruct": (
        LLAMA | {"intermediate_size": 14336, "max_position_embeddings": 8192, "vocab_size": 128256,
                 "num_key_value_heads": 8, "rope_theta": 500000.0, "eos_token_id": 128009},
        {"num_kv_heads": 8, "rope": Rope(theta=500_000.0), "end_ids": (128009,)},
    ),
    "Llama-3.1-8B-Instruct": (
        LLAMA | {"intermediate_size": 14336, "max_position_embeddings": 131072,
                 "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
                 "rope_scaling": LLAMA3_SCALING, "eos_token_id": [128001, 128008, 128009]},
        {"rope": Rope(theta=500_000.0, scaling="llama3", factor=8.0, original_max_positions=8192)},
    ),
    "Llama-3.2-1B-Instruct": (
        LLAMA | {"hidden_size": 2048, "head_dim": 64, "intermediate_size": 8192,
                 "max_position_embeddings": 131072, "num_hidden_layers": 16,
                 "num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": True,
                 "rope_scaling": LLAMA3_SCALING | {"factor": 32.0}, "vocab_size": 128256},
        {"tie_embeddings": True, "head_dim": 64},
    ),
    "Yi-6B-Chat": (
        LLAMA | {"intermediate_size": 11008, "max_position_embeddings": 4096, "vocab_size": 64000,
                 "num_key_value_heads": 4, "rope_theta": 5000000.0},
        {"num_kv_heads": 4, "rope": Rope(theta=5e6)},
    ),
    "Mistral-7B-Instruct-v0.3": (
        COMMON | {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                  "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                  "max_position_embeddings": 32768, "num_hidden_layers": 32,
                  "num_key_value_heads": 8, "rope_theta": 1000000.0, "sliding_window": None,
                  "vocab_size": 32768},
        {"window": None, "windowed": (), "head_dim": 128},
    ),
    "Mistral-7B-v0.1": (
        COMMON | {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                  "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                  "max_position_embeddings": 32768, "num_hidden_layers": 32,
                  "num_key_value_heads": 8, "rope_theta": 10000.0, "sliding_window": 4096,
                  "vocab_size": 32000},
        {"window": 4096, "windowed": tuple(range(32))},
    ),
    "Qwen2.5-7B-Instruct": (
        QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
                "intermediate_size": 18944, "max_position_embeddings": 32768,
                "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
                "num_key_value_heads": 4, "sliding_window": 131072, "vocab_size": 152064},
        {"qkv_bias": True, "out_bias": False, "window": None, "head_dim": 128},
    ),
    "Qwen3-4B": (
        QWEN | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560,
                "attention_bias": False, "head_dim": 128, "intermediate_size": 9728,
                "max_position_embeddings": 40960, "max_window_layers": 36, "rope_scaling": None,
                "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
                "sliding_window": None, "tie_word_embeddings": True, "vocab_size": 151936},
        {"qk_norm": "head", "head_dim": 128, "width": 2560, "tie_embeddings": True},
    ),
    "OLMo-2-1124-7B-Instruct": (
        COMMON | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2",
                  "attention_bias": False, "hidden_size": 4096, "intermediate_size": 11008,
                  "max_position_embeddings": 4096, "num_attention_heads": 32,
                  "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277,
                  "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
                  "vocab_size": 100352},
        {"pre_norm": False, "post_norm": True, "qk_norm": "all", "norm": "rms_float32"},
    ),
    "Olmo-3-7B-Instruct": (
        COMMON | {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3",
                  "attention_bias": False, "hidden_size": 4096, "intermediate_size": 11008,
                  "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
                  "max_position_embeddings": 65536, "num_attention_heads": 32,
                  "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277,
                  "rms_norm_eps": 1e-06, "rope_theta": 500000, "sliding_window": 4096,
                  "vocab_size": 100278,
                  "rope_scaling": {
                      "attention_factor": 1.2079441541679836, "beta_fast": 32.0,
                      "beta_slow": 1.0, "factor": 8.0, "rope_type": "yarn",
                      "original_max_position_embeddings": 8192}},
        {"window": 4096, "windowed": tuple(i for i in range(32) if i % 4 != 3),
         "rope": Rope(theta=500_000, scaling="yarn", factor=8.0, original_max_positions=8192,
                      attention_factor=1.2079441541679836),
         "local_rope": Rope(theta=500_000)},
    ),
    "gemma-2-9b-it": (
        GEMMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
                 "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                 "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3584,
                 "intermediate_size": 14336, "max_position_embeddings": 8192,
                 "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8,
                 "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
                 "vocab_size": 256000},
        {"attention_cap": 50.0, "logit_cap": 30.0, "windowed": tuple(range(0, 42, 2)),
         "attention_scale": 1 / 16, "post_norm": True, "tie_embeddings": True,
         "end_ids": (1, 107)},
    ),
    "gemma-3-1b-it": (
        GEMMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
                 "attn_logit_softcapping": None, "final_logit_softcapping": None,
                 "hidden_size": 1152, "intermediate_size": 6912,
                 "max_position_embeddings": 32768, "num_attention_heads": 4,
                 "num_hidden_layers": 26, "num_key_value_heads": 1, "rope_scaling": None,
                 "rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 512,
                 "sliding_window_pattern": 6, "vocab_size": 262144},
        {"window": 512, "windowed": tuple(i for i in range(26) if i % 6 != 5), "qk_norm": "head",
         "rope": Rope(theta=1e6), "local_rope": Rope(theta=1e4)},
    ),
    "Phi-3-mini-4k-instruct": (
        PHI | {"hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
               "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
               "original_max_position_embeddings": 4096, "rope_scaling": None,
               "rope_theta": 10000.0, "sliding_window": 2047, "vocab_size": 32064},
        {"window": 2047, "head_dim": 96, "max_positions": 4096},
    ),
    "Phi-3.5-mini-instruct": (
        PHI | {"hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131072,
               "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
               "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
               "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.5] * 48,
                                "type": "longrope"},
               "sliding_window": 262144, "vocab_size": 32064},
        {"max_positions": 4096,
         "rope": Rope(scaling="longrope", short_factors=(1.5,) * 48, long_factors=(2.0,) * 48,
                      original_max_positions=4096, extended_positions=131072,
                      attention_factor=1.1902380714238083)},
    ),
    "phi-4": (
        PHI | {"hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384,
               "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
               "original_max_position_embeddings": 16384, "rope_scaling": None,
               "rope_theta": 250000, "sliding_window": None, "vocab_size": 100352,
               "bos_token_id": 100257, "eos_token_id": 100265, "pad_token_id": 100349},
        {"head_dim": 128, "rope": Rope(theta=250_000), "max_positions": 16384},
    ),
    "Phi-4-mini-instruct": (
        PHI | {"full_attn_mod": 1, "hidden_size": 3072, "interpolate_factor": 1,
               "intermediate_size": 8192, "lm_head_bias": False, "mlp_bias": False,
               "max_position_embeddings": 131072, "num_attention_heads": 24,
               "num_hidden_layers": 32, "num_key_value_heads": 8,
               "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
               "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
               "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48,
                                "type": "longrope"},
               "vocab_size": 200064, "bos_token_id": 199999, "eos_token_id": 199999,
               "pad_token_id": 199999},
        {"head_dim": 128, "max_positions": 4096, "tie_embeddings": True},
    ),
    "SmolLM3-3B": (
        COMMON | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3",
                  "attention_bias": False, "bos_token_id": None, "eos_token_id": 128012,
                  "hidden_size": 2048, "intermediate_size": 11008,
                  "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
                  "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
                  "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
                  "pad_token_id": 128004, "pretraining_tp": 2, "rope_scaling": None,
                  "rope_theta": 5000000.0, "sliding_window": None, "tie_word_embeddings": True,
                  "use_sliding_window": False, "vocab_size": 128256},
        {"unrotated": tuple(range(3, 36, 4)), "head_dim": 128, "rope": Rope(theta=5e6)},
    ),
    "granite-3.1-2b-instruct": (
        COMMON | {"architectures": ["GraniteForCausalLM"], "model_type": "granite",
                  "attention_bias": False, "attention_multiplier": 0.015625,
                  "embedding_multiplier": 12.0, "hidden_size": 2048, "intermediate_size": 8192,
                  "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False,
                  "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
                  "residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 5000000.0,
                  "tie_word_embeddings": True, "vocab_size": 49155},
        {"attention_scale": 0.015625, "embedding_multiplier": 12.0, "logit_divisor": 8.0,
         "residual_multiplier": 0.22, "head_dim": 64},
    ),
    "gpt2": (
        {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
         "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
         "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
         "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
         "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
         "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
         "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
         "vocab_size": 50257},
        {"rope": None, "mlp_width": 3072, "norm": "layer", "qkv_bias": True, "gated": False,
         "tie_embeddings": True, "max_positions": 1024},
    ),
    "TinyStories-33M": (
        {"activation_function": "gelu_new", "architectures": ["GPTNeoForCausalLM"],
         "attention_dropout": 0, "attention_layers": GPT_NEO_LAYERS,
         "attention_types": [[["global", "local"], 2]], "bos_token_id": 50256,
         "embed_dropout": 0, "eos_token_id": 50256, "gradient_checkpointing": False,
         "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": None,
         "layer_norm_epsilon": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neo",
         "num_heads": 16, "num_layers": 4, "resid_dropout": 0, "summary_activation": None,
         "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
         "summary_type": "cls_index", "summary_use_proj": True, "torch_dtype": "float32",
         "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 50257,
         "window_size": 256},
        {"window": 256, "windowed": (1, 3), "attention_scale": 1.0, "qkv_bias": False,
         "out_bias": True, "mlp_width": 3072},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_read_and_written_again(tmp_path, name):
    fields, wanted = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = load_config(tmp_path)
    assert {field: getattr(ours, field) for field in wanted} == wanted
    (tmp_path / "config.json").write_text(json.dumps(written := to_hf(ours)))
    assert is_complete(written)
    assert load_config(tmp_path) == ours
    assert AutoConfig.from_pretrained(tmp_path).architectures == fields["architectures"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_refuses_what_it_does_not_know(tmp_path, family):
    config_of(family).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for change in ({"brand_new_field": 3}, {"quantization_config": {"bits": 4}}):
        ((name, value),) = change.items()
        path.write_text(json.dumps(fields | change))
        with pytest.raises(InputError) as caught:
            load_config(tmp_path)
        message = str(caught.value)
        assert f"{name}={value!r}" in message and family in message and "\n" not in message


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("mistral", "attention_bias", True),
        ("qwen2", "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
        ("qwen2", "use_sliding_window", False),
        ("qwen3", "hidden_act", "gelu"),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "hidden_activation", "silu"),
        ("phi3", "lm_head_bias", True),
        ("phi3", "full_attn_mod", 2),
        ("granite", "mlp_bias", True),
        ("smollm3", "attention_bias", True),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "add_cross_attention", True),
        ("gpt_neo", "activation_function", "relu"),
    ],
)
def test_fields_that_change_the_maths_are_refused_by_name(tmp_path, family, field, value):
    config_of(family).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text()) | {field: value}
    if field == "use_sliding_window":
        fields["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError) as caught:
        load_config(tmp_path)
    assert field in str(caught.value)
    assert str(value[1] if isinstance(value, list) else value) in str(caught.value)


def test_an_unsupported_family_hears_of_those_that_are(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(InputError) as caught:
        load_config(tmp_path)
    assert all(f"'{family}'" in str(caught.value) for family in [*FAMILIES, "llama", "gemma"])
