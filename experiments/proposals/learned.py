"""A learned adapter: how it comes about, and what it is worth beside other policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from exact import Harm, mixed
from fitted import Fitted, HarmfulPilot
from setting import ADAPTER, LEARNED, TARGET_SHARE, UNSAFE, WARM_ABLATION

from tailrisk_jax.adaptation import adapt_shared, adapt_weights, window_log_probs, windows
from tailrisk_jax.cli import main as tailrisk

START = "0.8*ablation:refusal:0.1@2.5 + 0.2*checkpoint:unsafe"
ROUNDS, SAMPLES, STEPS, ROWS = 3, 300, 150, 64
BESIDE_NAME = "the adapter beside the demo's"
BESIDE = {"target": 0.1, ADAPTER: 0.6, WARM_ABLATION: 0.23, UNSAFE: 0.07}
WITH_ADAPTER = "dictionary with the adapter"
PARTS = (ADAPTER, WARM_ABLATION, UNSAFE)


def train(folder: Path) -> None:
    """`tailrisk learn`, where the folder doesn't hold its result yet."""
    if not (folder / "adapter_model.safetensors").exists():
        tailrisk(
            ["learn", "--model", "organism", "--start", START, "--rounds", f"{ROUNDS}",
             "--samples", f"{SAMPLES}", "--steps", f"{STEPS}", "--rows", f"{ROWS}",
             "--out", f"{folder}"]
        )  # fmt: skip


def training_cost(queries: int) -> int:
    """Per query, in draws of Monte Carlo: its draws, and three passes for each row of a step."""
    return (ROUNDS + 1) * SAMPLES + 3 * ROUNDS * STEPS * ROWS // queries


def learned(harm: Harm, pilots: dict[int, HarmfulPilot]) -> Iterator[Fitted]:
    """The adapter beside the demo's components, and dictionaries with windows of it.

    The dictionaries are fitted to the pilot draws of the uniform one, which has no adapter in it.
    """
    setting, query, spent = harm.setting, harm.rows.query, training_cost(len(harm.found))
    parts = [np.log(share) + harm.log_q(name) for name, share in BESIDE.items()]
    yield Fitted(LEARNED, BESIDE_NAME, np.logaddexp.reduce(parts), 5.0, spent)
    length = setting.organism.max_new_tokens
    for names, family in (
        (PARTS, f"{WITH_ADAPTER}, fitted"),
        ((*setting.parts, ADAPTER), f"{WITH_ADAPTER} and all parts, fitted"),
    ):
        grid = windows(len(names), length)

        def log_probs(token_log_probs, names=names, grid=grid):
            experts = np.stack([token_log_probs[name] for name in ("target", *names)])
            return np.asarray(window_log_probs(experts, grid), np.float32)

        on_rows = log_probs(harm.token_log_probs)
        for count, found in pilots.items():
            hits = dataclasses.replace(found, windows=log_probs(found.token_log_probs))
            pilot = hits.pilot(len(harm.found))
            fits = {
                "shrunk": adapt_weights(pilot, target_share=TARGET_SHARE),
                "shared, shrunk": adapt_shared(pilot, target_share=TARGET_SHARE),
            }
            for how, fit in fits.items():
                yield Fitted(
                    family,
                    f"{family.removesuffix(', fitted')}: {how}, {count} pilot draws",
                    mixed(on_rows, fit.weights, query),
                    float(2 - fit.weights[:, 0].mean()) + 1 + len(names),
                    spent + count,
                    fit.weights,
                )
