"""Oracles that know nothing of caches, blocks or keys: tiny models and all of their responses."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from tailrisk_jax.models import Model, ModelConfig
from tailrisk_jax.models.transformer import parameter_shapes
from tailrisk_jax.policies import Policy, Prompts, logits
from tailrisk_jax.rollouts import Draws


def tiny_config(**overrides) -> ModelConfig:
    """Two layers, grouped heads, a head size that is not width / heads, four tokens."""
    fields = {
        "family": "llama", "vocab_size": 4, "num_layers": 2, "width": 8, "num_heads": 2,
        "num_kv_heads": 1, "head_dim": 6, "mlp_width": 12,
    }  # fmt: skip
    return ModelConfig(**(fields | overrides))


def random_model(config: ModelConfig, seed: int = 0, dtype=jnp.float32) -> Model:
    """Weights large enough that next tokens differ much and depend on everything before."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        if path[-1].key == "scale":
            return jnp.asarray(rng.uniform(0.5, 1.5, shape.shape), dtype)
        fan_in = shape.shape[-2] if path[-1].key == "kernel" else 1 / config.width
        gain = 0.5 if path[-1].key == "lm_head" else 1.0
        if path[-1].key == "lm_head":
            fan_in = config.width / 4
        return jnp.asarray(rng.normal(size=shape.shape) * gain / np.sqrt(fan_in), dtype)

    shapes = nn.meta.unbox(parameter_shapes(config))
    return Model(config, jax.tree_util.tree_map_with_path(leaf, shapes))


def unit_vector(config: ModelConfig, seed: int = 0) -> np.ndarray:
    """A random direction of the residual stream."""
    vector = np.random.default_rng(seed).normal(size=config.width)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def responses(vocab_size: int, length: int, end_ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Every complete response: up to its first end token, or `length` tokens without one."""
    complete, growing = [], [()]
    for _ in range(length):
        growing = [(*row, token) for row in growing for token in range(vocab_size)]
        complete += [row for row in growing if row[-1] in end_ids]
        growing = [row for row in growing if row[-1] not in end_ids]
    return complete + growing


def as_draws(rows: Sequence[Sequence[int]], prompts: Prompts, config: ModelConfig, length: int):
    """The same responses to every query, in the form that scoring takes."""
    queries, samples = len(prompts), len(rows)
    tokens = np.zeros((queries, samples, length), np.int32)
    mask = np.zeros((queries, samples, length), bool)
    ended = np.zeros((queries, samples), bool)
    for n, row in enumerate(rows):
        tokens[:, n, : len(row)] = row
        mask[:, n, : len(row)] = True
        ended[:, n] = row[-1] in config.end_ids
    return Draws(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(mask),
        ended=jnp.asarray(ended),
        labels=jnp.zeros((queries, samples), jnp.int32),
        drawn_log_probs=jnp.zeros(tokens.shape, jnp.float32),
        prompts=prompts,
        end_ids=config.end_ids,
    )


def exact_token_log_probs(
    policy: Policy, prompt: Sequence[int], rows: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """log p(y_t | x, y_<t) in float64, from the logits of prompt and response as one text."""
    start, longest = len(prompt), max(map(len, rows))
    # Rounded up, so that calls share a compilation.
    tokens = np.zeros((-(-len(rows) // 64) * 64, -(-(start + longest) // 16) * 16), np.int32)
    mask = np.zeros(tokens.shape, bool)
    mask[:, 0] = True
    for i, row in enumerate(rows):
        tokens[i, : start + len(row)] = [*prompt, *row]
        mask[i, : start + len(row)] = True
    response = np.broadcast_to(np.arange(tokens.shape[1]) >= start, tokens.shape)
    scores = np.asarray(logits(policy, tokens, mask, response=response), np.float64)
    log_probs = scipy.special.log_softmax(scores / float(policy.temperature), axis=-1)
    return [log_probs[i, start - 1 + np.arange(len(row)), row] for i, row in enumerate(rows)]


def exact_log_probs(policy: Policy, prompt: Sequence[int], rows: Sequence[Sequence[int]]):
    """log p(y | x) of each response in float64, [len(rows)]."""
    return np.array([row.sum() for row in exact_token_log_probs(policy, prompt, rows)])


def as_rows(draws: Draws, query: int = 0) -> list[tuple[int, ...]]:
    """The responses to one query as tuples of tokens."""
    tokens, mask = np.asarray(draws.tokens)[query], np.asarray(draws.mask)[query]
    return [tuple(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)]


def frequency_p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's chi-square p-value; cells that expect fewer than 5 are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    keep = expected > 0
    assert counts[~keep].sum() == 0
    statistic = np.sum((counts[keep] - expected[keep]) ** 2 / expected[keep])
    return float(scipy.stats.chi2.sf(statistic, keep.sum() - 1))
