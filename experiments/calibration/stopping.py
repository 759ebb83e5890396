"""Does stopping when the interval is narrow enough break its coverage? On chains.

python experiments/calibration/stopping.py       # prints a table; about 2 minutes
"""

import dataclasses

import numpy as np
import tyro
from run import HEIGHT, STEPS, chain_with

from tailrisk_jax.estimators import (
    importance,
    in_float64,
    relative_width,
    wald_interval,
    watched_interval,
)
from tailrisk_jax.organisms.markov import ladder

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
        f"{options.repeats} repeats, until rel={options.rel}, looked at every {options.chunk} "
        f"draws, {options.most} at most; coverage in %, at the nominal 95%\n"
    )
    print("| proposal | truth | draws, median | in time | watched | Wald, same rule | fixed N |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
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
            rules = {rule: _stopped(rule, scores, log_w, truth, options) for rule in (True, False)}
            counts, covered = rules[True]
            fixed = in_float64(importance, scores[:, :1000], log_w[:, :1000])
            cells = [
                name,
                f"{truth:.0e}",
                f"{np.median(counts):.0f}",
                f"{100 * (counts < options.most).mean():.0f}%",
                _percent(covered),
                _percent(rules[False][1]),
                _percent((fixed.lower <= truth) & (truth <= fixed.upper)),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def _stopped(watched: bool, scores, log_w, truth: float, options: Options):
    """Draws at the stop, and whether the interval held the truth then."""
    counts = np.full(len(scores), options.most)
    covered = np.zeros(len(scores), bool)
    going = np.ones(len(scores), bool)
    for n in range(options.chunk, options.most + 1, options.chunk):
        first = np.broadcast_to(np.arange(options.most) < n, scores.shape)
        found = in_float64(importance, scores, log_w, mask=first)
        if watched:
            interval = in_float64(
                watched_interval, scores, log_w, mask=first, tuned_for=options.chunk
            )
        else:
            interval = in_float64(wald_interval, found.value, found.stderr)
        done = np.asarray(relative_width(found.value, interval) <= options.rel)
        done = going & (done | (n == options.most))
        holds = (interval.lower <= truth) & (truth <= interval.upper)
        counts[done], covered[done] = n, holds[done]
        going &= ~done
        if not going.any():
            break
    return counts, covered


def _percent(hit: np.ndarray) -> str:
    error = np.sqrt(hit.mean() * (1 - hit.mean()) / len(hit))
    return f"{100 * hit.mean():.1f} ({100 * error:.1f})"


if __name__ == "__main__":
    main(tyro.cli(Options))
