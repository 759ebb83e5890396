"""What is measured: the shapes of the model and of the rollouts, and the work they need."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One model and one call on it; the defaults are the published measurement.

    8 layers of width 512 with untied embeddings of 32,000 tokens are 41.2M parameters without
    the MLP; an MLP of 1,216 brings them to 56.1M.
    """

    layers: int = 8
    width: int = 512
    heads: int = 8
    kv_heads: int = 8
    mlp: int = 1216
    vocab: int = 32_000
    samples: int = 64
    prompt: int = 64
    new_tokens: int = 64
    dtype: str = "float32"
    threads: int = 2
    seed: int = 0
    intensity: float = 1.0
    peer_cache: str = "dynamic"
    peer_score_batch: int = 16

    @property
    def layer_parameters(self) -> int:
        """Parameters of all matrices inside the layers."""
        attention = 2 * self.width**2 * (1 + self.kv_heads / self.heads)
        return int(self.layers * (attention + 3 * self.width * self.mlp))

    @property
    def parameters(self) -> int:
        """All parameters: layers, embeddings, head and norms."""
        norms = (2 * self.layers + 1) * self.width
        return self.layer_parameters + 2 * self.vocab * self.width + norms

    @property
    def matrices(self) -> dict[str, tuple[int, int, int]]:
        """The matrix products [m, k] x [k, n] whose rate is measured."""
        scored = self.samples * self.new_tokens
        return {
            "decode MLP": (self.samples, self.width, self.mlp),
            "decode head": (self.samples, self.width, self.vocab),
            "score MLP": (scored, self.width, self.mlp),
        }


def flops(setting: Setting, system: str) -> float:
    """Floating-point operations of a system's own algorithm: matrices and attention products.

    `rows` sequences run through the layers from position `start` to `stop`; the head runs on
    the positions that need logits.
    """
    prompt, new, samples = setting.prompt, setting.new_tokens, setting.samples
    end = prompt + new - 1  # the last token is predicted, never an input

    def layers(rows: int, start: int, stop: int) -> float:
        contexts = sum(range(start + 1, stop + 1))
        attention = 4 * setting.layers * setting.width * contexts
        return rows * (2 * setting.layer_parameters * (stop - start) + attention)

    def head(positions: int) -> float:
        return 2.0 * setting.vocab * setting.width * positions

    shared = layers(1, 0, prompt) + layers(samples, prompt, end)
    per_sample = layers(samples, 0, end) + head(samples * new)
    return {
        "ours": 2 * shared + head(samples * (new - 1) + 1) + head(samples * new),
        "ours, both scored": 3 * shared + head(samples * (new - 1) + 1) + 2 * head(samples * new),
        "lock-step": 2 * per_sample,
        "generate": 3 * per_sample,
    }[system]


def decode_bytes(setting: Setting) -> float:
    """Bytes that one decoding step must move, on average over the steps.

    Parameters of layers and head once, the shared prompt's keys and values once, the filled part
    of the samples' keys and values, and one new position written.
    """
    kv = 2 * setting.layers * setting.kv_heads * (setting.width // setting.heads)
    caches = kv * (setting.prompt + setting.samples * (setting.new_tokens / 2 + 1))
    parameters = setting.layer_parameters + setting.vocab * setting.width
    return BYTES[setting.dtype] * (parameters + caches)


def write_inputs(setting: Setting, folder: Path) -> None:
    """The prompt [P] and the direction [D] that every system loads."""
    rng = np.random.default_rng(setting.seed)
    np.save(folder / "prompt.npy", rng.integers(0, setting.vocab, setting.prompt))
    direction = rng.normal(size=setting.width).astype(np.float32)
    np.save(folder / "direction.npy", direction / np.linalg.norm(direction))
