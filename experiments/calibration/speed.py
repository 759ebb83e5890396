"""How long does the full report take? 1,000 queries of 10,000 draws, after compilation.

python experiments/calibration/speed.py
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tailrisk_jax.estimators import MixtureDraws, importance, in_float64, mixture_log_prob, report

QUERIES, DRAWS, REPEATS = 1000, 10_000, 5


def seconds(call: Callable[[], Any]) -> str:
    """Median, and range, of calls after the first."""
    jax.block_until_ready(call())
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return f"{np.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})"


def main() -> None:
    """Prints the times."""
    rng = np.random.default_rng(0)
    shape = (QUERIES, DRAWS)
    scores = (rng.random(shape) < 0.1).astype(np.float32)
    log_p = rng.normal(size=shape).astype(np.float32) - 20
    components = np.stack([log_p, log_p + rng.normal(size=shape).astype(np.float32) + 3])
    log_alphas = np.log([0.1, 0.9])
    log_weights = log_p - np.asarray(mixture_log_prob(components, log_alphas))
    labels = (rng.random(shape) < 0.9).astype(np.int32)
    mixture = MixtureDraws(log_p, components, log_alphas, labels, 0)
    print("importance:", seconds(lambda: importance(scores, log_weights)))
    print("report:", seconds(lambda: report(scores, log_weights)))
    print("report, mixture of two:", seconds(lambda: report(scores, log_weights, mixture)))
    print(
        "the same in float64:",
        seconds(lambda: in_float64(report, scores, log_weights, mixture)),
    )


if __name__ == "__main__":
    main()
