"""The peers: how target and proposal are run with PyTorch and transformers, on public APIs alone.

`LockStep` follows the paper's reference code: target and proposal both run for every token,
each with a cache of its own, and every sample prefills its prompt. `Generate` draws with
transformers' `generate` and scores both models teacher-forced afterwards.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from setting import Setting
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

INIT_STD = 0.06  # wider than usual, so that the random model's next tokens are not all alike


class Checkpoint:
    """Makes the random Llama that everybody loads."""

    def __init__(self, setting: Setting, folder: Path, device: str = "cpu"):
        self.setting, self.folder = setting, folder

    def save(self) -> int:
        """Saves it, without end tokens; returns its number of parameters."""
        torch.manual_seed(self.setting.seed)
        model = LlamaForCausalLM(llama_config(self.setting))
        model.save_pretrained(self.folder)
        return sum(leaf.numel() for leaf in model.parameters())


def llama_config(setting: Setting) -> LlamaConfig:
    """The setting as transformers says it."""
    return LlamaConfig(
        num_hidden_layers=setting.layers,
        hidden_size=setting.width,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        intermediate_size=setting.mlp,
        vocab_size=setting.vocab,
        max_position_embeddings=max(2048, setting.prompt + setting.new_tokens),
        tie_word_embeddings=False,
        initializer_range=INIT_STD,
        bos_token_id=None,
        eos_token_id=None,
    )


def ablate_with_hooks(model: Any, direction: torch.Tensor, intensity: float) -> None:
    """x <- x - a (x . d) d on every layer's input and every attention and MLP output."""
    scaled = intensity * direction

    def ablate(x: torch.Tensor) -> torch.Tensor:
        return x - (x @ direction).unsqueeze(-1) * scaled

    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: (ablate(args[0]), *args[1:]))
        layer.self_attn.register_forward_hook(lambda _, __, out: (ablate(out[0]), *out[1:]))
        layer.mlp.register_forward_hook(lambda _, __, out: ablate(out))


class Peer:
    """Target and hooked proposal, loaded from the checkpoint."""

    def __init__(self, setting: Setting, folder: Path, device: str = "cpu"):
        torch.set_num_threads(setting.threads)
        self.setting, self.device = setting, torch.device(device)
        dtype = getattr(torch, setting.dtype)
        self.target: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        self.proposal: Any = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        for model in (self.target, self.proposal):
            model.to(self.device).eval()
        direction = torch.from_numpy(np.load(folder / "direction.npy")).to(self.device, dtype)
        ablate_with_hooks(self.proposal, direction, setting.intensity)
        self.prompt = torch.from_numpy(np.load(folder / "prompt.npy")).to(self.device)[None]

    def about(self) -> dict[str, Any]:
        """Versions and device."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"versions": versions, "device": name}

    def matmul(self, seconds: float) -> dict[str, float]:
        """Measured rate of each of the setting's matrix products, FLOP/s."""
        rates = {}
        dtype = getattr(torch, self.setting.dtype)
        with torch.inference_mode():
            for name, (m, k, n) in self.setting.matrices.items():
                x, w = (torch.randn(s, device=self.device, dtype=dtype) for s in ((m, k), (k, n)))
                best, until = np.inf, time.perf_counter() + seconds
                while time.perf_counter() < until:
                    start = self.now()
                    for _ in range(4):
                        torch.matmul(x, w)
                    best = min(best, (self.now() - start) / 4)
                rates[name] = 2 * m * k * n / best
        return rates

    def now(self) -> float:
        """The clock, after the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def reply(self, seconds: dict[str, float], tokens, log_p, log_q) -> dict[str, Any]:
        """What a run hands back: seconds by part, tokens [N, T], log p and log q [N]."""
        return {
            "seconds": seconds,
            "tokens": tokens.tolist(),
            "log_p": log_p.sum(-1).tolist(),
            "log_q": log_q.sum(-1).tolist(),
        }


class LockStep(Peer):
    """Target and proposal forward for every token."""

    @torch.inference_mode()
    def run(self, seed: int) -> dict[str, Any]:
        """Draws N responses and records both log-probabilities of every token."""
        torch.manual_seed(seed)
        start = self.now()
        tokens, log_p, log_q = self._roll(None)
        return self.reply({"total": self.now() - start}, tokens, log_p, log_q)

    @torch.inference_mode()
    def score(self, tokens: list[list[int]]) -> dict[str, Any]:
        """The same loop on given tokens."""
        forced = torch.tensor(tokens, device=self.device)
        return self.reply({}, *self._roll(forced))

    def _roll(self, forced: torch.Tensor | None):
        setting = self.setting
        caches = [self._cache(model) for model in (self.target, self.proposal)]
        inputs = self.prompt.expand(setting.samples, -1)
        tokens, log_p, log_q = [], [], []
        for step in range(setting.new_tokens):
            p, q = (
                torch.log_softmax(self._logits(model, inputs, cache), dim=-1)
                for model, cache in zip((self.target, self.proposal), caches, strict=True)
            )
            inputs = torch.multinomial(q.exp(), 1) if forced is None else forced[:, step, None]
            tokens.append(inputs)
            log_p.append(p.gather(-1, inputs))
            log_q.append(q.gather(-1, inputs))
        return (torch.cat(x, dim=-1) for x in (tokens, log_p, log_q))

    def _logits(self, model, inputs, cache):
        out = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float()

    def _cache(self, model):
        if self.setting.peer_cache == "dynamic":
            return DynamicCache(config=model.config)
        length = self.setting.prompt + self.setting.new_tokens
        return StaticCache(config=model.config, max_cache_len=length)


class Generate(Peer):
    """transformers' `generate` under the proposal, then scoring passes under both."""

    @torch.inference_mode()
    def run(self, seed: int) -> dict[str, Any]:
        """Draws N responses, then scores them under proposal and target."""
        setting = self.setting
        torch.manual_seed(seed)
        start = self.now()
        sequences = self.proposal.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=setting.samples,
            max_new_tokens=setting.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=None if setting.peer_cache == "dynamic" else setting.peer_cache,
        )
        drawn = self.now()
        tokens = sequences[:, setting.prompt :]
        log_q = self._score(self.proposal, sequences)
        middle = self.now()
        log_p = self._score(self.target, sequences)
        end = self.now()
        seconds = {
            "total": end - start,
            "draw": drawn - start,
            "score proposal": middle - drawn,
            "score target": end - middle,
        }
        return self.reply(seconds, tokens, log_p, log_q)

    @torch.inference_mode()
    def score(self, tokens: list[list[int]]) -> dict[str, Any]:
        """The scoring passes on given tokens."""
        given = torch.tensor(tokens, device=self.device)
        sequences = torch.cat([self.prompt.expand(given.shape[0], -1), given], dim=-1)
        log_p, log_q = (self._score(model, sequences) for model in (self.target, self.proposal))
        return self.reply({}, given, log_p, log_q)

    def _score(self, model, sequences):
        """Log-probabilities of the new tokens, a few rows at a time: all logits would be 0.5 GB."""
        new = self.setting.new_tokens
        out = []
        for rows in sequences.split(self.setting.peer_score_batch):
            logits = model(rows[:, :-1], use_cache=False, logits_to_keep=new).logits.float()
            log_probs = torch.log_softmax(logits, dim=-1)
            out.append(log_probs.gather(-1, rows[:, -new:, None])[..., 0])
        return torch.cat(out)
