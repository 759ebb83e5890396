"""Llama's logits in float64, in plain numpy: what the float32 forward pass approximates."""

import numpy as np


def logits(tensors, config, tokens):
    """Next-token logits [S, V] of one sequence, from Hugging Face tensors by key."""
    heads, eps = config.num_heads, config.norm_eps
    get = lambda key: np.asarray(tensors[key], np.float64)  # noqa: E731

    def norm(x, key):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * get(key)

    x = get("model.embed_tokens.weight")[tokens]
    size, width = x.shape
    dim = width // heads
    angle = np.arange(size)[:, None] / config.rope.theta ** (np.arange(0, dim, 2) / dim)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def turn(y):
        a, b = np.split(y, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    for i in range(config.num_layers):
        block = f"model.layers.{i}."

        def linear(y, name, block=block):
            return y @ get(f"{block}{name}.weight").T

        h = norm(x, block + "input_layernorm.weight")
        q, k, v = (
            linear(h, f"self_attn.{n}_proj").reshape(size, heads, dim) for n in ("q", "k", "v")
        )
        scores = np.einsum("shd,thd->hst", turn(q), turn(k)) / np.sqrt(dim)
        scores = np.where(np.tri(size, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hst,thd->shd", weights, v).reshape(size, width)
        x = x + linear(mixed, "self_attn.o_proj")
        h = norm(x, block + "post_attention_layernorm.weight")
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "model.norm.weight") @ get("model.embed_tokens.weight").T
