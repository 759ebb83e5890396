"""The process that draws and scores on this machine; `experiments.workers` says how it is asked.

python -m experiments.scaling.worker SETTING-AS-JSON
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.scaling.setting import OnCpu, Point
from experiments.workers import Failed, serve
from tailrisk_jax.models import Model
from tailrisk_jax.models.transformer import parameter_shapes
from tailrisk_jax.policies import Policy, Prompts, ablate, from_tokens
from tailrisk_jax.rollouts import draw, weigh
from tailrisk_jax.rollouts.blocks import (
    TURNS,
    Block,
    blocks,
    decode_row_bytes,
    rows_that_fit,
    score_row_bytes,
)
from tailrisk_jax.rollouts.network import network, prefill_one

ITEM = 4  # bytes of a float32
POLICIES = 2  # scored side by side
PROGRAMS = {"draw": "jit_decode", "score": "jit_score_rows"}


class Measured:
    """Draws from the proposal, and scores target and proposal side by side, at any point."""

    def __init__(self, setting: OnCpu):
        self.setting = setting
        self.policies: dict[int, tuple[Policy, Policy]] = {}
        self.programs: dict[tuple, int] = {}

    def warm(self, point: dict[str, Any]) -> dict[str, Any]:
        """Compiles a point's programs, and returns what XLA's analysis says that they need.

        Returns: by part, the bytes of one block of rows, temporaries and results, and how many
        such blocks there are.
        """
        at = Point(**point)
        before = set(map(id, _executables()))
        for call in self._calls(at, seed=0).values():
            call()
        fresh = [one for one in _executables() if id(one) not in before]
        found = {}
        for part, cut in self._blocks(at).items():
            rows = len(cut[0].queries), cut[0].slots, len(cut[0].samples)
            shape = part, *rows, at.prompt, at.new_tokens, at.layers
            if shape not in self.programs:
                self.programs[shape] = _program_bytes(fresh, PROGRAMS[part])
            found[part] = {"bytes": self.programs[shape], "blocks": len(cut)}
        return found

    def seconds(self, point: dict[str, Any], seed: int) -> dict[str, float]:
        """Of each part, once."""
        found = {}
        for part, call in self._calls(Point(**point), seed).items():
            start = time.perf_counter()
            call()
            found[part] = time.perf_counter() - start
        return found

    def peaks(self, point: dict[str, Any]) -> dict[str, int | None]:
        """The process's peak memory during each part, above what it held before, in bytes."""
        for call in self._calls(Point(**point), seed=0).values():
            call()
        return {
            part: peak_bytes(call) for part, call in self._calls(Point(**point), seed=0).items()
        }

    def compiling(self, point: dict[str, Any]) -> dict[str, float]:
        """Seconds that first calls take beyond second ones, with nothing compiled before."""
        self._policies(Point(**point).layers)
        jax.clear_caches()
        first, second = self.seconds(point, 0), self.seconds(point, 0)
        return {part: first[part] - second[part] for part in first}

    def _calls(self, point: Point, seed: int) -> dict[str, Callable[[], Any]]:
        """Prefilling the prompts alone, drawing (which prefills too), scoring what was drawn."""
        target, proposal = self._policies(point.layers)
        prompts, key = self._prompts(point), jax.random.key(seed)
        drawn: dict[str, Any] = {}

        def fill():
            net = network(proposal)
            jax.block_until_ready(prefill_one(net, prompts.tokens, prompts.mask))

        def sample():
            drawn["draws"] = draw(key, proposal, prompts, point.samples, point.new_tokens)
            jax.block_until_ready(drawn["draws"].tokens)

        def score():
            weighed = weigh(target, proposal, drawn["draws"])
            if not np.isfinite(np.asarray(weighed.log_weights)).all():
                raise Failed(f"log-weights at {point} are not finite")

        return {"prefill": fill, "draw": sample, "score": score}

    def _blocks(self, point: Point) -> dict[str, list[Block]]:
        """How drawing and scoring cut their rows."""
        config, sizes = self.setting.config(point.layers), (point.queries, point.samples)
        drawn = decode_row_bytes(config, point.new_tokens, ITEM)
        scored = POLICIES * score_row_bytes(config, point.prompt, point.new_tokens, ITEM)
        return {
            "draw": blocks(*sizes, rows_that_fit(drawn), turns=TURNS),
            "score": blocks(*sizes, rows_that_fit(scored)),
        }

    def _policies(self, layers: int) -> tuple[Policy, Policy]:
        if layers not in self.policies:
            config, rng = self.setting.config(layers), np.random.default_rng(self.setting.seed)

            def leaf(shape):
                values = rng.normal(scale=config.width**-0.5, size=shape.shape)
                return jnp.asarray(values, jnp.float32)

            params = jax.tree.map(leaf, nn.meta.unbox(parameter_shapes(config)))
            target = Policy(Model(config, params))
            direction = rng.normal(size=config.width)
            self.policies[layers] = target, ablate(target, direction, self.setting.intensity)
        return self.policies[layers]

    def _prompts(self, point: Point) -> Prompts:
        rng = np.random.default_rng(self.setting.seed)
        shape = point.queries, point.prompt
        return from_tokens(rng.integers(0, self.setting.vocab, shape).tolist())


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """How far a call lifts the process's resident memory; None where it can't be told.

    Linux only. The process runs with MALLOC_MMAP_THRESHOLD_, so that large arrays go back to the
    system when they are freed, and are not taken for held before.
    """
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and clear.exists()):
        return None

    def kilobytes(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])

    gc.collect()
    clear.write_text("5")  # the peak is now what is resident
    before = kilobytes("VmRSS")
    call()
    return max(0, kilobytes("VmHWM") - before) * 1024


def _executables() -> list[Any]:
    """All compiled programs that the process holds."""
    return jax.devices()[0].client.live_executables()


def _program_bytes(executables: list[Any], name: str) -> int:
    """What the one program of this name needs beside its arguments."""
    [stats] = [
        one.get_compiled_memory_stats() for one in executables if one.hlo_modules()[0].name == name
    ]
    return stats.temp_size_in_bytes + stats.output_size_in_bytes


if __name__ == "__main__":
    serve(lambda: Measured(OnCpu.of(json.loads(sys.argv[1]))))
