"""Random tiny Llamas of transformers on PyTorch: the outside implementation to agree with."""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

# Wavelengths from 6 to 350 positions: some above, some below, some in the blend.
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip

torch.set_num_threads(1)  # threads only wait for each other on models as small as these

# The width over the number of heads is 6.
CONFIGS = {
    "multi-head": {},
    "grouped": {"num_key_value_heads": 2, "head_dim": 10},
    "multi-query-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama3-rope": {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": LLAMA3_ROPE},
}


def config(**overrides) -> LlamaConfig:
    fields = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6,
        "rms_norm_eps": 1e-5, "eos_token_id": [2, 7, 11], "bos_token_id": 1,
        "max_position_embeddings": 256,
    }  # fmt: skip
    return LlamaConfig(**(fields | overrides))


def llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A random model whose logits spread over several nats and whose norms are not all one."""
    return randomised(LlamaForCausalLM, config(**overrides), seed, norms=(0.5, 1.5), embeddings=0.5)


def randomised(architecture, config, seed: int, *, norms: tuple[float, float], embeddings: float):
    """A random model of any family: its norms' range, its embeddings' standard deviation."""
    torch.manual_seed(seed)
    model = architecture._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name or "ln_" in name:
                parameter.uniform_(*norms)
            elif any(part in name for part in ("embed_tokens", "lm_head", "wte", "wpe")):
                parameter.normal_(std=embeddings)
            else:
                inputs = 0 if isinstance(model.get_submodule(name[:-7]), Conv1D) else 1
                parameter.normal_(std=parameter.shape[inputs] ** -0.5)
    return model.eval()


def texts(seed: int, vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """Random token rows without the end tokens of `config`."""
    rng = np.random.default_rng(seed)
    return [rng.integers(12, vocab_size, length).tolist() for length in lengths]


def padded(rows: Sequence[Sequence[int]], side: str, extra: int = 0):
    """Rows as one batch, tokens [B, T] and mask [B, T], padded on one side with token 0."""
    length = max(map(len, rows)) + extra
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        tokens[i, where], mask[i, where] = row, True
    return tokens, mask


@torch.no_grad()
def logits(model, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The logits of each row on its own, without padding."""
    return [model(torch.tensor([row])).logits[0].float().numpy() for row in rows]


def greedy(model, prompt: Sequence[int], length: int) -> list[int]:
    """The greedy response, its end token included."""
    inputs = torch.tensor([prompt])
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=length,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def layers_of(model):
    """The blocks of any family."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def writers_of(layer):
    """The modules whose outputs a block adds to the residual stream: attention's and the MLP's."""
    if hasattr(layer, "post_feedforward_layernorm"):
        return layer.post_attention_layernorm, layer.post_feedforward_layernorm
    return (layer.attn if hasattr(layer, "attn") else layer.self_attn), layer.mlp


@torch.no_grad()
def steered_logits(model, prompt, response, *, ablation=None, additions=()) -> np.ndarray:
    """Logits of prompt and response, with forward hooks at the sites of Arditi et al. 2024.

    Args:
      ablation: (direction [D] or [L, D], intensity or [L] of them, where), on every layer's
        input and on each attention and MLP output.
      additions: (vector [D], layer, coefficient, where) each, on that layer's output.
      where: "all", "prompt" or "response".
    """
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    in_response = torch.arange(len(prompt) + len(response)) >= len(prompt)
    selected = {
        "all": torch.ones_like(in_response), "prompt": ~in_response, "response": in_response
    }  # fmt: skip

    def ablated(x, layer):
        if ablation is None:
            return x
        directions, intensities, where = ablation
        direction = torch.tensor(np.broadcast_to(directions, (layers, width))[layer])
        intensity = np.broadcast_to(intensities, (layers,))[layer]
        unit = direction / direction.norm()
        share = float(intensity) * selected[where][:, None]
        return x - share * (x @ unit)[..., None] * unit

    def on_input(layer):
        return lambda _, args: (ablated(args[0], layer), *args[1:])

    def on_output(layer):
        def hook(_, __, out):
            if isinstance(out, tuple):
                return (ablated(out[0], layer), *out[1:])
            return ablated(out, layer)

        return hook

    def add_to(layer):
        def hook(_, __, out):
            for vector, at, coefficient, where in additions:
                if at == layer and isinstance(out, tuple):
                    added = coefficient * selected[where][:, None] * torch.tensor(vector)
                    out = (out[0] + added, *out[1:])
                elif at == layer:
                    out = out + coefficient * selected[where][:, None] * torch.tensor(vector)
            return out

        return hook

    with ExitStack() as stack:
        for number, layer in enumerate(layers_of(model)):
            attention, mlp = writers_of(layer)
            for handle in (
                layer.register_forward_pre_hook(on_input(number)),
                attention.register_forward_hook(on_output(number)),
                mlp.register_forward_hook(on_output(number)),
                layer.register_forward_hook(add_to(number)),
            ):
                stack.callback(handle.remove)
        return model(torch.tensor([[*prompt, *response]])).logits[0].numpy()
