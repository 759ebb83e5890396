"""Does stopping when the interval is narrow enough break its coverage? On chains.

python experiments/calibration/stopping.py       # prints a table; about 4 minutes
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import tyro
from run import HEIGHT, STEPS, chain_with

from tailrisk_jax.estimators import (
    Interval,
    importance,
    in_float64,
    relative_width,
    wald_interval,
    watched_interval,
)
from tailrisk_jax.organisms.markov import ladder
from tailrisk_jax.studies.rounds import next_round
from tailrisk_jax.studies.settings import ALLOCATIONS, Settings

PROPOSALS = {"good": 0.75, "too timid": 0.55}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    repeats: int = 200
    truths: tuple[float, ...] = (1e-2, 1e-4, 1e-6)
    rel: float = 0.2
    chunk: int = 400
    most: int = 4000
    seed: int = 0


def main(options: Options) -> None:
    """Prints the table."""
    print(
        f"{options.repeats} repeats, until rel={options.rel}, rounds of {options.chunk} draws (or "
        f"by variance), {options.most} at most; coverage in %, at the nominal 95%\n"
    )
    print(
        "| proposal | truth | in time | equal: draws | rounds | covers | variance: draws | rounds "
        "| covers | Wald, same rule | fixed N |"
    )
    print("| :-- " + "| --: " * 10 + "|")
    for wanted in options.truths:
        target = chain_with(wanted)
        truth = target.event_prob()
        for name, up in PROPOSALS.items():
            policy = ladder(up, HEIGHT, STEPS)
            rng = np.random.default_rng(options.seed)
            paths = policy.sample(rng, options.repeats * options.most)
            shape = (options.repeats, options.most)
            scores = target.event(paths).reshape(shape)
            log_w = (target.log_prob(paths) - policy.log_prob(paths)).reshape(shape)
            fixed = in_float64(importance, scores[:, :1000], log_w[:, :1000])
            cells = [name, f"{truth:.0e}"]
            for allocation in ALLOCATIONS:
                stop = _stopped(_watched, allocation, scores, log_w, truth, options)
                if allocation == "equal":
                    cells.append(f"{100 * (stop.drawn < options.most).mean():.0f}%")
                cells += [f"{stop.drawn.mean():,.0f}", f"{stop.rounds.mean():.1f}"]
                cells.append(_percent(stop.covered))
            wald = _stopped(_wald, "equal", scores, log_w, truth, options)
            cells.append(_percent(wald.covered))
            cells.append(_percent((fixed.lower <= truth) & (truth <= fixed.upper)))
            print("| " + " | ".join(cells) + " |", flush=True)


@dataclasses.dataclass(frozen=True)
class Stop:
    """Of each repeat: draws and rounds until the stop, and whether the interval held then."""

    drawn: np.ndarray
    rounds: np.ndarray
    covered: np.ndarray


def _stopped(
    interval: Callable[..., Interval],
    allocation: str,
    scores: np.ndarray,
    log_w: np.ndarray,
    truth: float,
    options: Options,
) -> Stop:
    """Rounds as `tailrisk estimate --until` plans them, each repeat being a query of its own."""
    settings = Settings(
        num_samples=options.chunk,
        until=options.rel,
        max_samples=options.most,
        allocation=allocation,
    )
    drawn, rounds = np.full(len(scores), options.chunk), np.ones(len(scores))
    while True:
        mask = np.arange(options.most) < drawn[:, None]
        found = interval(scores, log_w, mask, options.chunk)
        value = in_float64(importance, scores, log_w, mask=mask).value
        sizes = next_round(np.asarray(relative_width(value, found)), drawn, settings)
        if sizes is None:
            return Stop(drawn, rounds, np.asarray((found.lower <= truth) & (truth <= found.upper)))
        drawn, rounds = drawn + sizes.count, rounds + (sizes.count > 0)


def _watched(scores, log_w, mask, chunk: int) -> Interval:
    return in_float64(watched_interval, scores, log_w, mask=mask, tuned_for=chunk)


def _wald(scores, log_w, mask, chunk: int) -> Interval:
    found = in_float64(importance, scores, log_w, mask=mask)
    return in_float64(wald_interval, found.value, found.stderr)


def _percent(hit: np.ndarray) -> str:
    error = np.sqrt(hit.mean() * (1 - hit.mean()) / len(hit))
    return f"{100 * hit.mean():.1f} ({100 * error:.1f})"


if __name__ == "__main__":
    main(tyro.cli(Options))
