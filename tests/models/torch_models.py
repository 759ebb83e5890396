"""Random tiny models of transformers on PyTorch, of every family; Llamas are in torch_llama."""

import functools

from transformers import GemmaConfig, GemmaForCausalLM

from tests.models import torch_llama


def gemma_config(**overrides) -> GemmaConfig:
    fields = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 10, "rms_norm_eps": 1e-6,
        "eos_token_id": [2, 7, 11], "bos_token_id": 1, "max_position_embeddings": 256,
    }  # fmt: skip
    return GemmaConfig(**(fields | overrides))


def gemma(seed: int = 0, **overrides) -> GemmaForCausalLM:
    """A random Gemma; its norms multiply by one more than their weights."""
    config = gemma_config(**overrides)
    # Embeddings are scaled up by sqrt(width), and would drown what the layers add.
    return torch_llama.randomised(GemmaForCausalLM, config, seed, norms=(-0.5, 0.5), embeddings=0.2)


# Name -> what makes the model.
MODELS = {
    **{
        name: functools.partial(torch_llama.llama, **fields)
        for name, fields in torch_llama.CONFIGS.items()
    },
    "gemma-multi-query": gemma,
    "gemma-multi-head": functools.partial(
        gemma, num_key_value_heads=4, head_dim=16, tie_word_embeddings=False
    ),
}
