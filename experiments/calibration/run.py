"""How often do intervals cover, and do verdicts warn? On chains and on the organism.

    python experiments/calibration/collect.py    # draws of the organism, once
    python experiments/calibration/run.py        # the tables and pictures, about 3 minutes

The chains are walks whose tail probability is exact from 1e-1 to 1e-8; see
tailrisk_jax/organisms/markov.py.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy.optimize import brentq

from tailrisk_jax.estimators import (
    MixtureDraws,
    betting_interval,
    bootstrap_interval,
    clopper_pearson,
    control_variates,
    empirical_bernstein,
    in_float64,
    psis,
    report,
    self_normalised,
    wald_interval,
)
from tailrisk_jax.organisms.markov import MarkovPolicy, ladder

HEIGHT, STEPS = 8, 12
TRUTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)
LEVELS = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    draws: Path = Path("runs/calibration")
    """Where collect.py left the organism's draws."""
    repeats: int = 1000
    """Of each case on the chains."""
    samples: int = 500
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """Repeats [R, N] of one query under one proposal; `log_bound` of w where there is one."""

    family: str
    proposal: str
    truth: float
    scores: np.ndarray
    log_weights: np.ndarray
    mixture: MixtureDraws | None
    log_bound: float | None


def chains(options: Options) -> Iterator[Case]:
    """Every truth under proposals from perfect to blind."""
    rng = np.random.default_rng(options.seed)
    for wanted in TRUTHS:
        target, up = chain_with(wanted), _step_up(wanted)
        singles = {
            "perfect": target.conditioned(),
            "good": ladder(0.75, HEIGHT, STEPS),
            "too timid": ladder(up + 0.4 * (0.75 - up), HEIGHT, STEPS),
            "too bold": ladder(0.93, HEIGHT, STEPS),
            "target": target,
        }
        truth = target.event_prob()
        for name, policy in singles.items():
            paths = policy.sample(rng, options.repeats * options.samples)
            log_w = target.log_prob(paths) - policy.log_prob(paths)
            bound = 0.0 if name == "target" else None
            shape = (options.repeats, options.samples)
            scores = target.event(paths).reshape(shape)
            yield Case("chain", name, truth, scores, log_w.reshape(shape), None, bound)
        late = blind(target, 0.93)
        for name, others in {
            "mixture": [singles["good"]],
            "mixture of timid and bold": [singles["too timid"], singles["too bold"]],
            "mixture, misses a part": [late],
        }.items():
            yield _mixture_case(name, target, others, rng, options)


def chain_with(truth: float) -> MarkovPolicy:
    """The walk whose tail has this probability."""
    return ladder(_step_up(truth), HEIGHT, STEPS)


def _step_up(truth: float) -> float:
    root: Any = brentq(_log_gap, 1e-3, 0.99, args=(truth,))
    return root


def _log_gap(up: float, wanted: float) -> float:
    return np.log(ladder(up, HEIGHT, STEPS).event_prob() / wanted)


def blind(target: MarkovPolicy, up: float) -> MarkovPolicy:
    """Climbs, but only if the first step is up: harm after a step down is out of its reach."""
    transitions = np.array(ladder(up, HEIGHT, STEPS).transitions)
    transitions[0, 0, :2] = 1e-12, 1 - 1e-12
    return MarkovPolicy(transitions)


def _mixture_case(name, target, others, rng, options) -> Case:
    policies = [target, *others]
    alphas = np.array([0.1, *[0.9 / len(others)] * len(others)])
    total = options.repeats * options.samples
    labels = rng.choice(len(policies), size=total, p=alphas)
    paths = np.zeros((total, STEPS + 1), int)
    for k, policy in enumerate(policies):
        paths[labels == k] = policy.sample(rng, int((labels == k).sum()))
    shape = (options.repeats, options.samples)
    log_probs = np.stack([policy.log_prob(paths) for policy in policies])
    mixed = np.logaddexp.reduce(log_probs + np.log(alphas)[:, None], axis=0)
    return Case(
        "chain",
        name,
        target.event_prob(),
        target.event(paths).reshape(shape),
        (log_probs[0] - mixed).reshape(shape),
        MixtureDraws(
            log_probs[0].reshape(shape),
            log_probs.reshape(-1, *shape),
            np.log(alphas),
            labels.reshape(shape),
            0,
        ),
        float(-np.log(alphas[0])),
    )


def organism(options: Options) -> Iterator[Case]:
    """The draws that collect.py made."""
    for path in sorted(options.draws.glob("*.npz")):
        with np.load(path) as arrays:
            data = dict(arrays)
        alphas = data["alphas"]
        for q, (lower, upper) in enumerate(data["truth"]):
            mixture, bound = None, None
            if len(alphas) > 1:
                components = np.moveaxis(data["component_log_probs"][q], -1, 0)
                mixture = MixtureDraws(
                    data["log_p"][q], components, np.log(alphas), data["labels"][q], 0
                )
                bound = float(-np.log(alphas[0]))
            log_w = data["log_p"][q] - data["log_q"][q]
            truth = np.sqrt(lower * upper)
            yield Case("organism", path.stem, truth, data["scores"][q], log_w, mixture, bound)


def measure(case: Case) -> dict[str, Any]:
    """Per repeat: values of every estimator, limits of every interval, and the verdict."""
    scores, log_w = case.scores, case.log_weights
    plain = case.proposal == "target"
    found = in_float64(report, scores, None if plain else log_w, case.mixture)
    estimate = found.estimate
    out: dict[str, Any] = {
        "case": case,
        "value": estimate.value,
        "ess_harm": estimate.ess_harm,
        "verdict": found.verdict.code,
        "reason": found.verdict.reason,
        "k_hat_harm": found.k_hat_harm,
        "self-normalised": in_float64(self_normalised, scores, log_w).value,
        "psis": in_float64(psis, scores, log_w).value,
    }
    if case.mixture is not None:
        mixed = case.mixture
        out["control variates"] = in_float64(
            control_variates, scores, mixed.log_p, mixed.component_log_probs, mixed.log_alphas
        ).value
    intervals: dict[tuple[str, float], Any] = {}
    key = jax.random.key(0)
    for level in LEVELS:
        again = in_float64(report, scores, None if plain else log_w, case.mixture, level=level)
        intervals["default", level] = again.estimate.lower, again.estimate.upper
        wald = in_float64(wald_interval, estimate.value, estimate.stderr, level=level)
        intervals["Wald", level] = wald.lower, wald.upper
        intervals["lower certificate", level] = again.lower_certificate, np.inf
        if case.log_bound is not None:
            intervals["upper certificate", level] = 0.0, again.upper_certificate
            bernstein = in_float64(empirical_bernstein, scores, log_w, case.log_bound, level=level)
            intervals["empirical Bernstein", level] = bernstein.lower, bernstein.upper
        betting = in_float64(betting_interval, scores, log_w, case.log_bound, level=level)
        intervals["betting", level] = betting.lower, betting.upper
        if plain:
            exact = clopper_pearson(estimate.hits, estimate.num_samples, level)
            intervals["Clopper-Pearson", level] = exact.lower, exact.upper
        part = slice(0, 100)  # the bootstrap takes hundreds of times as long
        boot = bootstrap_interval(key, scores[part], log_w[part], level=level, num_resamples=200)
        intervals["bootstrap", level] = boot.lower, boot.upper
    out["intervals"] = intervals
    return out


def flatten(results: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Every repeat of every case as one row of several columns."""
    names = ("value", "ess_harm", "verdict", "reason", "k_hat_harm")
    columns = {name: np.concatenate([result[name] for result in results]) for name in names}
    cases = [(result["case"], len(result["value"])) for result in results]
    for name in ("family", "proposal", "truth"):
        columns[name] = np.concatenate([np.repeat(getattr(c, name), n) for c, n in cases])
    return columns


def coverage_table(results: list[dict[str, Any]], family: str) -> str:
    """Coverage in percent, with its Monte Carlo error, by verdict and by effective sample size."""
    groups = ("all", "ok", "doubtful", "unusable", "ess < 10", "10 to 30", "30 to 100", "over 100")
    lines = ["| interval | level | " + " | ".join(groups) + " | median width |"]
    lines.append("| :-- | --: |" + " --: |" * (len(groups) + 1))
    own = [result for result in results if result["case"].family == family]
    for kind in dict.fromkeys(kind for result in own for kind, _ in result["intervals"]):
        for level in LEVELS:
            hit, verdicts, sizes, widths = [], [], [], []
            for result in own:
                if (kind, level) not in result["intervals"]:
                    continue
                truth = result["case"].truth
                lower, upper = np.broadcast_arrays(*result["intervals"][kind, level])
                size = len(lower)
                hit.append((lower <= truth * (1 + 1e-9)) & (upper >= truth * (1 - 1e-9)))
                verdicts.append(result["verdict"][:size])
                sizes.append(result["ess_harm"][:size])
                widths.append((upper - lower) / truth)
            hit, verdicts, sizes, widths = map(np.concatenate, (hit, verdicts, sizes, widths))
            edges = [(0, 10), (10, 30), (30, 100), (100, np.inf)]
            masks = [np.ones_like(hit), *(verdicts == code for code in range(3))]
            masks += [(sizes >= low) & (sizes < high) for low, high in edges]
            cells = " | ".join(_percent(hit[mask]) for mask in masks)
            lines.append(f"| {kind} | {level:.0%} | {cells} | {np.median(widths):.2g} |")
    return "\n".join(lines)


def _percent(hit: np.ndarray) -> str:
    if hit.size < 20:
        return ""
    share = hit.mean()
    error = np.sqrt(max(share * (1 - share), 1 / hit.size) / hit.size)
    return f"{100 * share:.1f} ({100 * error:.1f})"


def verdict_table(results: list[dict[str, Any]], family: str) -> str:
    """Per proposal: how often each verdict falls, and how often estimates are far off."""
    columns = flatten([result for result in results if result["case"].family == family])
    off = np.abs(np.log(np.maximum(columns["value"], 1e-300) / columns["truth"])) > np.log(3)
    flagged = columns["verdict"] > 0
    lines = [
        "| proposal | ok | doubtful | unusable | off by > 3x | of these flagged | ok and off |"
    ]
    lines.append("| :-- |" + " --: |" * 6)
    for name in [*dict.fromkeys(columns["proposal"]), "all"]:
        own = (columns["proposal"] == name) | (name == "all")
        shares = [f"{100 * (columns['verdict'][own] == code).mean():.1f}" for code in range(3)]
        caught = _percent(flagged[own & off])
        missed = f"{100 * (off & ~flagged)[own].mean():.2f}"
        cells = [*shares, f"{100 * off[own].mean():.1f}", caught, missed]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def estimator_table(results: list[dict[str, Any]]) -> str:
    """On the chains: relative bias with its standard error, and relative RMSE."""
    kinds = ("value", "self-normalised", "psis", "control variates")
    lines = ["| proposal | truth | " + " | ".join(f"{k}: bias | RMSE" for k in kinds) + " |"]
    lines[0] = lines[0].replace("value:", "importance:")
    lines.append("| :-- | --: |" + " --: |" * (2 * len(kinds)))
    for result in results:
        case = result["case"]
        if case.family != "chain":
            continue
        cells = []
        for kind in kinds:
            if kind not in result:
                cells += ["", ""]
                continue
            error = np.nan_to_num(result[kind]) / case.truth - 1
            spread = error.std() / np.sqrt(len(error))
            cells += [f"{error.mean():+.3f} ({spread:.3f})", f"{np.sqrt((error**2).mean()):.3f}"]
        lines.append(f"| {case.proposal} | {case.truth:.0e} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Coverage of the default interval against the effective number of harmful draws."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    edges = np.geomspace(1, 1000, 13)
    for family, marker in (("chain", "o"), ("organism", "s")):
        for ok, fill in ((True, "full"), (False, "none")):
            hit, sizes = [], []
            for result in results:
                if result["case"].family != family:
                    continue
                lower, upper = result["intervals"]["default", 0.95]
                kept = (result["verdict"] == 0) == ok
                truth = result["case"].truth
                hit.append(((lower <= truth) & (truth <= upper))[kept])
                sizes.append(result["ess_harm"][kept])
            if not hit:
                continue
            hit, sizes = np.concatenate(hit), np.concatenate(sizes)
            places = np.digitize(sizes, edges)
            bins = [b for b in range(1, len(edges)) if (places == b).sum() >= 50]
            axes.plot(
                [np.sqrt(edges[b - 1] * edges[b]) for b in bins],
                [hit[places == b].mean() for b in bins],
                marker=marker,
                fillstyle=fill,
                label=f"{family}, {'ok' if ok else 'flagged'}",
            )
    axes.axhline(0.95, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="effective harmful draws", ylabel="coverage of the 95% interval")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(options: Options) -> None:
    """Measures, and writes the tables and the picture beside this file."""
    results = [measure(case) for case in (*chains(options), *organism(options))]
    parts = [
        f"Made by `run.py` with {options.repeats} repeats of {options.samples} draws, seed "
        f"{options.seed}. In brackets: Monte Carlo error."
    ]
    for family in dict.fromkeys(result["case"].family for result in results):
        parts += [
            f"## {family}: coverage in %, by verdict and by effective harmful draws",
            coverage_table(results, family),
            f"## {family}: verdicts in %, and estimates off by more than a factor of 3",
            verdict_table(results, family),
        ]
    parts += ["## chain: bias and RMSE over the truth", estimator_table(results)]
    folder = Path(__file__).parent
    (folder / "tables.md").write_text("# Calibration: tables\n\n" + "\n\n".join(parts) + "\n")
    plot(results, folder / "coverage.png")


if __name__ == "__main__":
    main(tyro.cli(Options))
