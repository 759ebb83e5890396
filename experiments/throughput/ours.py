"""tailrisk_jax on the same inputs, whole and in parts; and what XLA says of its compiled loops.

The whole is measured through the public API. Compile times and memory need the jitted loops
themselves, `decode` and `score_rows`; `Shapes` is the one place that knows their arguments.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from setting import BYTES, Setting

from tailrisk_jax.models import (
    ModelConfig,
    Suffix,
    empty_suffix,
    forward,
    load_model,
    next_logits,
    no_steering,
    prefill,
    write_suffix,
)
from tailrisk_jax.models.transformer import parameter_shapes
from tailrisk_jax.policies import Policy, ablate, from_tokens, token_log_prob
from tailrisk_jax.policies import draw as draw_token
from tailrisk_jax.rollouts import Draws, draw, token_log_probs, weigh
from tailrisk_jax.rollouts.blocks import blocks, rows_that_fit, score_row_bytes
from tailrisk_jax.rollouts.decode import decode
from tailrisk_jax.rollouts.network import Network
from tailrisk_jax.rollouts.score import HEAD_CHUNK, score_rows


def about() -> dict[str, Any]:
    """Versions and device."""
    versions = {module.__name__: module.__version__ for module in (jax, flax)}
    backend, device = jax.default_backend(), jax.devices()[0].device_kind
    return {"versions": versions, "backend": backend, "device": device}


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


class Ours:
    """Target and ablated proposal of one loaded model."""

    def __init__(self, setting: Setting, folder: Path):
        self.setting = setting
        model = load_model(folder, dtype=setting.dtype)
        self.target = Policy(model)
        self.proposal = ablate(self.target, np.load(folder / "direction.npy"), setting.intensity)
        self.prompts = from_tokens([np.load(folder / "prompt.npy").tolist()])
        self.compile_seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.compile_seconds += duration_secs

    def about(self) -> dict[str, Any]:
        """Versions and device."""
        return about()

    def run(self, seed: int, both: bool) -> dict[str, Any]:
        """Draws N responses from the proposal and weighs them.

        Args:
          both: score target and proposal in one pass; otherwise the target alone, with log q as
            it was recorded while decoding.
        """
        setting, compiled = self.setting, self.compile_seconds
        start = time.perf_counter()
        key = jax.random.key(seed)
        draws = draw(key, self.proposal, self.prompts, setting.samples, setting.new_tokens)
        drawn = time.perf_counter()
        if both:
            weighed = weigh(self.target, self.proposal, draws)
            log_p, log_q = weighed.log_p, weighed.log_q
        else:
            log_p = jnp.sum(token_log_probs([self.target], draws)[0], axis=-1)
            log_q = jnp.sum(draws.drawn_log_probs, axis=-1)
        log_p, log_q = np.asarray(log_p)[0], np.asarray(log_q)[0]
        end = time.perf_counter()
        return {
            "seconds": {"total": end - start, "draw": drawn - start, "score": end - drawn},
            "compile_seconds": self.compile_seconds - compiled,
            "tokens": np.asarray(draws.tokens[0]).tolist(),
            "log_p": log_p.tolist(),
            "log_q": log_q.tolist(),
        }

    def score(self, tokens: list[list[int]]) -> dict[str, Any]:
        """log p and log q of given tokens."""
        array = jnp.asarray(tokens, jnp.int32)[None]
        draws = Draws(
            tokens=array,
            mask=jnp.ones(array.shape, bool),
            ended=jnp.zeros(array.shape[:2], bool),
            labels=jnp.zeros(array.shape[:2], jnp.int32),
            drawn_log_probs=jnp.zeros(array.shape),
            prompts=self.prompts,
        )
        log_p, log_q = np.asarray(token_log_probs([self.target, self.proposal], draws).sum(-1))
        return {"log_p": log_p[0].tolist(), "log_q": log_q[0].tolist()}

    def matmul(self, seconds: float) -> dict[str, float]:
        """Measured rate of each of the setting's matrix products, FLOP/s."""
        multiply = jax.jit(jnp.matmul)
        rates = {}
        for name, (m, k, n) in self.setting.matrices.items():
            x, w = (jnp.ones(shape, self.setting.dtype) for shape in ((m, k), (k, n)))
            rates[name] = 2 * m * k * n / _best_seconds(lambda: multiply(x, w), seconds)  # noqa: B023
        return rates

    def bandwidth(self, seconds: float) -> float:
        """Measured rate of memory, bytes read and written per second."""
        size, passes = 1 << (28 if jax.default_backend() == "cpu" else 31), 8

        @functools.partial(jax.jit, donate_argnums=0)
        def copy(x):  # in one buffer, so that no time goes into new pages
            return jax.lax.fori_loop(0, passes, lambda _, x: x + 1, x)

        state = {"x": jnp.ones(size // 4, jnp.float32)}

        def call():
            state["x"] = copy(state["x"])
            return state["x"]

        return 2 * size * passes / _best_seconds(call, seconds, calls=1)

    def parts(self, repeats: int) -> dict[str, float]:
        """Seconds of each part of a run, each jitted and timed alone.

        One step's layers, head and token draw are multiplied by the number of steps; "loop" is
        the rest of the decoding call.
        """
        setting, policy = self.setting, self.proposal
        config, params = policy.model.config, policy.model.params
        samples, new = setting.samples, setting.new_tokens
        steering = policy.steering_or_zero
        tokens, mask = self.prompts.tokens, self.prompts.mask
        fill = jax.jit(prefill, static_argnums=0)
        prefix = fill(config, params, steering, tokens, mask)
        timed = functools.partial(median_seconds, repeats=repeats)

        @functools.partial(jax.jit, donate_argnums=2)
        def layers(params, token, suffix, step):
            hidden, kv = forward(
                config,
                params,
                token,
                (prefix.lengths + step)[:, None, None],
                steering,
                response=jnp.ones((1, 1, 1), bool),
                prefix=prefix,
                suffix=Suffix(
                    kv=suffix,
                    mask=jnp.arange(new - 1) < jnp.full((1, samples, 1), step),
                    positions=jnp.broadcast_to(
                        prefix.lengths[:, None, None] + jnp.arange(new - 1), (1, samples, new - 1)
                    ),
                ),
            )
            return hidden[:, :, 0], write_suffix(suffix, kv, step)

        @jax.jit
        def pick(logits, step):
            keys = jax.random.split(jax.random.key(0), (1, samples))
            fold = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, step)))
            uniforms = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(fold(keys))
            return draw_token(uniforms, logits, jnp.float32(1.0))

        @jax.jit
        def score_head(params, hidden, tokens):
            def chunk(inputs):
                logits = next_logits(config, params, inputs[0])
                return token_log_prob(logits, inputs[1], jnp.float32(1.0))

            return jax.lax.map(chunk, (hidden, tokens))

        empty = jax.jit(lambda: empty_suffix(config, 1, samples, new - 1, setting.dtype))
        state = {"suffix": empty()}
        token = jnp.zeros((1, samples, 1), jnp.int32)

        def one_step():
            hidden, state["suffix"] = layers(params, token, state["suffix"], new // 2)
            return hidden

        head = jax.jit(functools.partial(next_logits, config))
        hidden = one_step()
        logits = head(params, hidden)
        count = -(-samples * new // HEAD_CHUNK)
        chunks = jnp.ones((count, HEAD_CHUNK, setting.width), setting.dtype)
        key = jax.random.key(0)
        draws = draw(key, policy, self.prompts, samples, new)
        seconds = {
            "prefill": timed(lambda: fill(config, params, steering, tokens, mask)),
            "layers": timed(one_step) * (new - 1),
            "head": timed(lambda: head(params, hidden)) * new,
            "token draw": timed(lambda: pick(logits, 3)) * new,
        }
        whole = timed(lambda: draw(key, policy, self.prompts, samples, new).tokens)
        seconds["loop"] = whole - sum(seconds.values())
        seconds["draw, whole"] = whole
        targets = jnp.zeros(chunks.shape[:2], jnp.int32)
        seconds["scoring head"] = timed(lambda: score_head(params, chunks, targets))
        whole = timed(lambda: token_log_probs([self.target], draws))
        seconds["scoring layers"] = whole - seconds["scoring head"]
        seconds["score, whole"] = whole
        return seconds


def _best_seconds(call: Callable[[], Any], seconds: float, calls: int = 4) -> float:
    """The shortest time of a call, over rounds of several."""
    jax.block_until_ready(call())
    best, until = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        best = min(best, (time.perf_counter() - start) / calls)
    return best


class Shapes:
    """The compiled loops, from shapes alone: nothing is loaded or run."""

    def __init__(self, setting: Setting, folder: Path):
        self.setting = setting
        jax.config.update("jax_enable_compilation_cache", False)

    def about(self) -> dict[str, Any]:
        """Versions and device."""
        return about()

    def _config(self, layers: int) -> ModelConfig:
        setting = self.setting
        return ModelConfig(
            family="llama",
            vocab_size=setting.vocab,
            num_layers=layers,
            width=setting.width,
            num_heads=setting.heads,
            num_kv_heads=setting.kv_heads,
            head_dim=setting.width // setting.heads,
            mlp_width=setting.mlp,
        )

    def _abstract(self, layers: int):
        """Config, and parameters, steering and prefix of one query as shapes."""
        config, shape = self._config(layers), jax.ShapeDtypeStruct
        params = jax.tree.map(
            lambda leaf: shape(leaf.shape, self.setting.dtype),
            nn.meta.unbox(parameter_shapes(config)),
        )
        steering = jax.eval_shape(lambda: no_steering(config))
        prompt = (1, self.setting.prompt)
        tokens, mask = shape(prompt, jnp.int32), shape(prompt, jnp.bool_)
        prefix = jax.eval_shape(functools.partial(prefill, config), params, steering, tokens, mask)
        return config, params, steering, prefix

    def _lower_decode(self, layers: int, samples: int, length: int):
        config, params, steering, prefix = self._abstract(layers)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        queue = jax.ShapeDtypeStruct((1, samples, 1), jnp.int32)
        sizes = jax.ShapeDtypeStruct((1, samples), jnp.int32)
        network = Network(config, params, steering, None, scalar)
        arguments = (length, network, prefix, keys, queue, sizes)
        return lambda: decode.lower(*arguments)

    def _lower_score(self, layers: int, samples: int, length: int):
        config, params, steering, prefix = self._abstract(layers)
        one = lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype)  # noqa: E731
        steering, prefix = jax.tree.map(one, (steering, prefix))
        temperature = jax.ShapeDtypeStruct((1,), jnp.float32)
        tokens, mask = (
            jax.ShapeDtypeStruct((1, samples, length), dtype) for dtype in (jnp.int32, jnp.bool_)
        )
        network = Network(config, params, steering, None, temperature)
        arguments = (network, prefix, tokens, mask)
        return lambda: score_rows.lower(*arguments)

    def prefix_memory(self, counts: list[int]) -> list[dict[str, int]]:
        """Bytes of the prompt's cache and of the compiled decoding loop, per number of samples."""
        setting, rows = self.setting, []
        for samples in counts:
            *_, prefix = self._abstract(setting.layers)
            memory: Any = (
                self._lower_decode(setting.layers, samples, setting.new_tokens)()
                .compile()
                .memory_analysis()
            )
            suffix = jax.eval_shape(
                lambda n=samples: empty_suffix(
                    self._config(setting.layers), 1, n, setting.new_tokens - 1, setting.dtype
                )
            )
            rows.append(
                {
                    "samples": samples,
                    "prefix_bytes": _bytes(prefix.kv),
                    "suffix_bytes": _bytes(suffix),
                    "argument_bytes": memory.argument_size_in_bytes,
                    "temp_bytes": memory.temp_size_in_bytes,
                    "copied_prefix_bytes": samples * _bytes(prefix.kv),
                }
            )
        return rows

    def compile_seconds(self, layers: int) -> dict[str, float]:
        """Seconds to trace and to compile the two loops, from nothing."""
        setting, out = self.setting, {}
        for name, make in (("decode", self._lower_decode), ("score", self._lower_score)):
            lower = make(layers, setting.samples, setting.new_tokens)
            jax.clear_caches()
            start = time.perf_counter()
            lowered = lower()
            middle = time.perf_counter()
            lowered.compile()
            out[f"{name}: trace"] = middle - start
            out[f"{name}: compile"] = time.perf_counter() - middle
        return out

    def score_memory(self, lengths: list[int]) -> list[dict[str, int]]:
        """Temporary bytes of the scoring pass, for all samples and for one block of them."""
        setting, rows = self.setting, []
        for length in lengths:
            row_bytes = score_row_bytes(
                self._config(setting.layers), setting.prompt, length, BYTES[setting.dtype]
            )
            fitting = rows_that_fit(row_bytes)
            block = blocks(1, setting.samples, fitting)[0].slots
            row = {"length": length, "block_samples": block}
            for name, samples in (("block", block), ("all", setting.samples)):
                compiled = self._lower_score(setting.layers, samples, length)().compile()
                memory: Any = compiled.memory_analysis()
                row[f"{name}_temp_bytes"] = memory.temp_size_in_bytes
                row[f"{name}_logit_bytes"] = 4 * samples * length * setting.vocab
            rows.append(row)
        return rows


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
