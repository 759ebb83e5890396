"""How good is each unsafe version of a model as a proposal? On the organism, exactly.

python experiments/proposals/run.py
python experiments/proposals/run.py --model FOLDER_OR_HUB_ID ...    any other one: checkpoint.py
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import report
import tyro
from automatic import automatic
from collect import harmful_draws, uniform_weights
from exact import Harm, gather, ratios, switched, with_target
from fitted import Fitted, dictionaries, score_pilot, searches, two_rounds
from learned import BESIDE, BESIDE_NAME, PARTS, WITH_ADAPTER, learned, train, training_cost
from sampled import SIZES, chosen_queries, from_draws, from_leaves, rows_of_columns
from setting import LEARNED, TARGET_SHARE, UNSAFE, WARM, WARM_ABLATION, Setting, addition, load

from tailrisk_jax.organisms import load_organism
from tailrisk_jax.organisms.efficiency import load_responses
from tailrisk_jax.policies import mixture

RESULTS = Path(__file__).parent / "results"
FIGURES = ("lower", "cautious", "middle", "upper")
DEMO, DEMO_SHARES = "the demo's mixture", {"target": 0.1, WARM_ABLATION: 0.7, UNSAFE: 0.2}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    seed: int = 0
    cache: Path = Path("runs/proposals")
    """Draws and their scores are kept here; empty it after a change of policies."""
    adapter: Path = Path("runs/learned")
    """The learned adapter; trained first (`tailrisk learn`, minutes) if it isn't there."""
    pilots: tuple[int, ...] = (200, 1000)
    """Pilot draws per query of the uniform dictionary; the smaller ones are its first draws."""
    check: int = 1200
    """Draws per query that estimate the harm that is not enumerated."""
    auto: int = 300
    """Pilot draws per query of `choose`."""
    repeats: int = 40
    """Of 100 real draws each for all queries, and of 500 for ten, which make 10 of 2,000 too."""
    sampled: bool = True
    """Whether to draw too; otherwise the last results/sampled.parquet stays."""
    simulated: int = 200
    """Repeats drawn from the leaves, for all queries."""


def plain(harm: Harm) -> Iterator[Fitted]:
    """Every policy with 10% target, switched and biased ones, and the demo's mixture."""
    setting = harm.setting
    yield Fitted("target", "target", harm.log_p, 1.0)
    for name, family in setting.families.items():
        if name != "target":
            cost = 3.9 if family == "logit path" else 3.0
            spent = training_cost(len(harm.found)) if family == LEARNED else 0
            yield Fitted(family, name, with_target(harm, harm.log_q(name)), cost, spent)
    strong = (UNSAFE, "ablation:refusal:0.3", "ablation:refusal:0.5",
              addition(setting.organism, 0.6), WARM)  # fmt: skip
    for name in strong:
        for step in (1, 3, 6, 12):
            log_q = with_target(harm, switched(harm, name, step))
            yield Fitted("switch", f"switch:{step}({name})", log_q, 3.9)
    for name in strong[:4]:
        for bias in (0.1, 0.3, 0.6):
            length = setting.organism.max_new_tokens
            log_q = with_target(harm, switched(harm, name, length, bias))
            yield Fitted("bias", f"bias:{bias}({name})", log_q, 3.9)
    parts = [np.log(share) + harm.log_q(name) for name, share in DEMO_SHARES.items()]
    yield Fitted("mixture", DEMO, np.logaddexp.reduce(parts), 4.0)
    parts = [np.log(1 / 7) + harm.log_q(name) for name in ("target", *setting.parts)]
    log_q = np.logaddexp.reduce(parts)
    yield Fitted("mixture", "the dictionary's policies, equal shares", log_q, 8.0)


def main(options: Options) -> None:
    """Draws, fits, measures, and writes results/."""
    start = time.perf_counter()
    seconds = {}

    def lap(name):
        seconds[name] = round(time.perf_counter() - start - sum(seconds.values()), 1)
        print(f"{name}: {seconds[name]} s", flush=True)

    train(options.adapter)
    lap("learning")
    setting: Setting = load(load_organism(), options.adapter)
    uniform = uniform_weights(setting, TARGET_SHARE)
    whole = setting.dictionary_mixture(uniform.tolist())
    most = max(options.pilots)
    files = options.cache / f"{options.seed}-{most}-{options.check}"
    draws, hits = harmful_draws(setting, whole, most, options.seed + 1, files / "pilot.npz")
    lap("pilot draws")
    check, _ = harmful_draws(setting, whole, options.check, options.seed + 2, files / "check.npz")
    lap("checking draws")
    harm = gather(
        setting, load_responses(), check, uniform, options.check, files / "harm_scores.npz"
    )
    pilot = score_pilot(setting, draws, uniform, files / "pilot_scores.npz")
    pilots = {n: pilot.first(len(hits), hits[:, :n].sum(axis=1)) for n in options.pilots}
    lap("scoring")
    found = list(plain(harm))
    found += dictionaries(harm, pilots)
    least = min(options.pilots)
    found += two_rounds(harm, pilots[least], least, options.seed + 7, files)
    lap("dictionaries")
    found += learned(harm, pilots)
    lap("learned")
    found += searches(harm, pilots)
    lap("searches")
    auto, told = automatic(harm, options.auto, options.seed + 3, files / f"auto-{options.auto}.npz")
    found.append(auto)
    lap("auto")
    if options.sampled:
        rows = pa.table(rows_of_columns(sampling(harm, found, options)))
        RESULTS.mkdir(exist_ok=True)
        pq.write_table(rows, RESULTS / "sampled.parquet", compression="zstd")
        lap("sampling")
    save(harm, found, told, seconds, options)
    report.main()


def sampling(harm: Harm, found: list[Fitted], options: Options) -> list[dict[str, Any]]:
    """Rows of results/sampled.parquet."""
    setting, most = harm.setting, max(options.pilots)
    policies: Any = setting.policies
    target, single, by_name = policies["target"], "ablation:refusal:0.3", {f.name: f for f in found}
    shared = f"dictionary: shared, shrunk, {most} pilot draws"
    weights: Any = by_name[shared].weights
    drawn_too = {
        single: mixture([target, policies[single]], [TARGET_SHARE, 1 - TARGET_SHARE]),
        DEMO: mixture([policies[name] for name in DEMO_SHARES], list(DEMO_SHARES.values())),
        shared: setting.dictionary_mixture(weights[0]),
        BESIDE_NAME: mixture([policies[name] for name in BESIDE], list(BESIDE.values())),
    }
    own = f"{WITH_ADAPTER}: shrunk, {most} pilot draws"
    weights = by_name[own].weights
    drawn_too[own] = setting.dictionary_mixture(weights, PARTS)
    rows, queries = [], chosen_queries(setting)
    for name, proposal in drawn_too.items():
        for own, sizes in ((range(len(harm.found)), SIZES[:1]), (queries, SIZES[1:])):
            pool = options.repeats * sizes[0]
            rows += from_draws(setting, name, proposal, own, pool, options.seed + 5, sizes)
        print(f"drawn: {name}", flush=True)
    more = [UNSAFE, "dictionary: uniform weights", f"dictionary: shrunk, {most} pilot draws",
            f"dictionary: per query, {most} pilot draws"]  # fmt: skip
    for name in (*drawn_too, *more):
        rows += from_leaves(harm, name, by_name[name].log_q, options.simulated, options.seed + 6)
    return rows


def save(harm, found, told, seconds, options) -> None:
    """results/exact.parquet, one row per proposal and query, and results/summary.json."""
    queries = harm.setting.organism.forbidden
    columns = {name: [] for name in ("family", "name", "query", *FIGURES)}
    costs = {}
    for one in found:
        bound = 1.0 if one.family == "target" else 1 / TARGET_SHARE
        own = ratios(harm, one.log_q, max_weight=bound)
        for q, query in enumerate(queries):
            figures = [getattr(own, figure)[q] for figure in FIGURES]
            row = (one.family, one.name, query.id, *figures)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
        costs[one.name] = {"cost": one.cost, "pilot": one.pilot}
    RESULTS.mkdir(exist_ok=True)
    table = pa.table(columns)
    for i in (0, 1, 2):
        table = table.set_column(i, table.column_names[i], table[i].dictionary_encode())
    for i in range(3, 3 + len(FIGURES)):
        table = table.set_column(i, table.column_names[i], table[i].cast(pa.float32()))
    pq.write_table(table, RESULTS / "exact.parquet", compression="zstd")
    omitted = harm.omitted_estimate() / np.array([query.lower for query in queries])
    summary = {
        "options": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(options).items()
        },
        "seconds": seconds,
        "costs": costs,
        "auto": told,
        "omitted, estimated share": dict(
            zip([query.id for query in queries], omitted.round(5).tolist(), strict=True)
        ),
        "checking draws not enumerated": int((~harm.enumerated).sum()),
    }
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    if any(word.split("=")[0] == "--model" for word in sys.argv[1:]):
        checkpoint.command()
    else:
        main(tyro.cli(Options))
