"""`choose` on the benchmark: pilots of its own, what it picks from each, and what that is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from collect import all_rows, drawn, uniform_weights
from exact import Harm, dictionary_log_probs, mixed, ratios
from fitted import Fitted
from rows import saved, score
from setting import TARGET_SHARE, UNSAFE, WARM, WARM_ABLATION, Setting, addition

from tailrisk_jax.adaptation import Choice, Costs, Pilot, choose
from tailrisk_jax.policies import mixture

PILOTS = 3
SEEDS_APART = 100
DICTIONARY, BESIDE = "dictionary", 0.9  # share of its draws with two policies in lock-step


def candidates(setting: Setting) -> list[str]:
    """Names of the policies that are chosen among, the target first, beside the dictionary."""
    organism = setting.organism
    fixed = ["target", UNSAFE, "ablation:refusal:0.1", "ablation:refusal:0.3",
             "ablation:refusal:0.5", "ablation:refusal:1.0", addition(organism, 0.35),
             addition(organism, 0.6), addition(organism, 1.0), "target@2.0", WARM,
             WARM_ABLATION, f"{UNSAFE}@2.5", "interpolation:unsafe:0.5"]  # fmt: skip
    return fixed + [name for name in setting.policies if name.startswith("adapter:")]


def automatic(harm: Harm, count: int, seed: int, path: Path) -> tuple[Fitted, dict[str, Any]]:
    """`choose` over singles and the uniform dictionary, from `count` pilot draws of each query.

    It is done for several pilots. The proposal is that whose worth per unit of compute is the
    median of theirs; the account has all.

    Args:
      seed: of the first pilot; the others are `SEEDS_APART`.
      path: where draws are kept, with the seed and the number of candidates appended.
    """
    names = candidates(harm.setting)
    costs = draw_costs(harm.setting, names)
    found = []
    for one in range(seed, seed + PILOTS * SEEDS_APART, SEEDS_APART):
        file = path.with_name(f"{path.stem}-{len(names)}-{one}.npz")
        pilot, labels = drawn_pilot(harm.setting, names, count, one, file)
        choice = choose(pilot, labels, costs, [*names, DICTIONARY], target_share=TARGET_SHARE)
        found.append(measured(harm, names, costs, choice, count))
    worth = [told["exact_per_compute"] for _, told in found]
    middle = int(np.argsort(worth)[len(worth) // 2])
    fitted, told = found[middle]
    return fitted, told | {"pilots": [told for _, told in found]}


def draw_costs(setting: Setting, names: list[str]) -> Costs:
    """In draws of Monte Carlo; every policy scores at the cost of one, the dictionary's too."""
    policies = list(dict.fromkeys([*names, *setting.parts]))
    needs = [{name} for name in names] + [{"target", *setting.parts}]
    return Costs(
        draw=(*[1.0] * len(names), 1 + BESIDE),
        score=(1.0,) * len(policies),
        consists=tuple(tuple(policy in own for policy in policies) for own in needs),
    )


def drawn_pilot(
    setting: Setting, names: list[str], count: int, seed: int, path: Path
) -> tuple[Pilot, np.ndarray]:
    """Draws from all in equal shares, with the component that drew each."""
    uniform = uniform_weights(setting, TARGET_SHARE)
    number, queries = len(names) + 1, len(setting.organism.forbidden)
    of_dictionary = count // number

    def make():
        policies = [setting.policies[name] for name in names]
        mix = mixture(policies, [1 / len(names)] * len(names))
        singles, harm_1 = drawn(setting, mix, count - of_dictionary, seed)
        whole = setting.dictionary_mixture(uniform.tolist())
        from_windows, harm_2 = drawn(setting, whole, of_dictionary, seed + 1)
        end_ids = setting.organism.target.model.config.end_ids
        needed = list(dict.fromkeys([*names, *setting.parts]))
        parts = []
        for draws in (singles, from_windows):
            scored = score([setting.policies[n] for n in needed], setting.prompts, end_ids,
                           all_rows(draws))  # fmt: skip
            by_name = dict(zip(needed, scored, strict=True))
            log_q = [by_name[n].sum(axis=-1, dtype=np.float64) for n in names]
            log_q.append(mixed(dictionary_log_probs(setting, by_name), uniform))
            parts.append(np.stack(log_q).reshape(number, queries, -1))
        labels = np.concatenate(
            [np.asarray(singles.labels), np.full((queries, of_dictionary), len(names))], axis=1
        )
        return {
            "log_probs": np.concatenate(parts, axis=-1),
            "harm": np.concatenate([harm_1, harm_2], axis=1),
            "labels": labels,
        }

    kept = saved(path, make)
    log_probs = kept["log_probs"]
    alphas = np.full(number, (count - of_dictionary) / len(names) / count)
    alphas[-1] = of_dictionary / count
    log_m = np.logaddexp.reduce(log_probs + np.log(alphas)[:, None, None], axis=0)
    return Pilot(log_probs, log_m, kept["harm"]), kept["labels"]


def measured(
    harm: Harm, names: list[str], costs: Costs, choice: Choice, count: int
) -> tuple[Fitted, dict[str, Any]]:
    """What was chosen as a proposal, and what was expected of it beside what it is worth."""
    uniform = uniform_weights(harm.setting, TARGET_SHARE)
    on_rows = np.stack([*(harm.log_q(n) for n in names), mixed(harm.windows, uniform)])
    kept = choice.weights > 0
    log_q = mixed(on_rows[kept], choice.weights[kept])
    plain = choice.weights[0] == 1
    cost = 1.0 if plain else float(choice.weights @ np.array(costs.draw)) + costs.scoring(kept)
    exact = ratios(harm, log_q, max_weight=1 / float(choice.weights[0])).middle
    every = [*names, DICTIONARY]
    told = {
        "reason": choice.reason,
        "ratio": choice.ratio,
        "ratio_per_compute": choice.ratio_per_compute,
        "seen_per_compute": choice.seen_per_compute,
        "exact_per_compute": float(np.exp(np.mean(np.log(exact)))) / cost,
        "exact_median_per_compute": float(np.median(exact)) / cost,
        "weights": dict(zip(every, choice.weights.tolist(), strict=True)),
        "mean_weights": dict(zip(every, choice.mean_weights.tolist(), strict=True)),
        "hits": int(choice.hits.sum()),
    }
    return Fitted("auto", f"auto, {count} pilot draws", log_q, cost, count), told
