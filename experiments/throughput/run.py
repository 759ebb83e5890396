"""How fast samples are drawn and weighed, against two peers, and what it costs in memory.

    python experiments/throughput/run.py                 # all measurements, about 15 minutes
    python experiments/throughput/run.py systems parts   # some of them
    python experiments/throughput/run.py --quick         # a tiny model, to see that all runs

Every system runs in a process of its own that stays alive; rounds alternate between them. The
results are merged into --out and printed as the tables that the README carries.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import platform
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

import numpy as np
import report
from setting import Setting, write_inputs

from experiments.machine import Usage, hardware
from experiments.tables import fill
from experiments.workers import Failed, Worker

HERE = Path(__file__).resolve().parent
QUICK = {
    "layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "mlp": 96, "vocab": 1000,
    "samples": 8, "prompt": 8, "new_tokens": 8,
}  # fmt: skip
DISTURBED = 0.1  # cores used by others, beyond which timings say little; PyTorch suffers most
TOLERANCE = 1e-3  # nats, on a response's log-weight, in float32


def worker(system: str, setting: Setting, folder: Path) -> Worker:
    """A process that runs one system."""
    fields, threads = json.dumps(dataclasses.asdict(setting)), str(setting.threads)
    return Worker(
        [str(HERE / "worker.py"), system, str(folder), fields],
        {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        },
    )


@contextlib.contextmanager
def workers(setting: Setting, folder: Path, *systems: str) -> Iterator[list[Worker]]:
    """Started workers, ended at the exit."""
    started = [worker(system, setting, folder) for system in systems]
    try:
        yield started
    finally:
        for one in started:
            one.close()


def measure_systems(setting: Setting, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Alternating runs of ours and the peers, and the machine's rates in the same process tree."""
    names = ("ours", "lock-step", "generate")
    with workers(setting, folder, *names) as (ours, lock_step, generate):
        calls = {
            "ours": lambda seed: ours("run", seed=seed, both=False),
            "ours, both scored": lambda seed: ours("run", seed=seed, both=True),
            "lock-step": lambda seed: lock_step("run", seed=seed),
            "generate": lambda seed: generate("run", seed=seed),
        }
        loaded = [one("about") for one in (ours, lock_step, generate)]
        first = {name: call(0) for name, call in calls.items()}
        matmul: dict[str, Any] = {}
        for name, system in (("jax", ours), ("torch", generate)):
            matmul[name] = system("matmul", seconds=options.rate_seconds)
        bandwidth = ours("bandwidth", seconds=options.rate_seconds)
        rounds: dict[str, list] = {name: [] for name in calls}
        order = list(calls)
        for number in range(options.rounds):
            for name in order[number % len(order) :] + order[: number % len(order)]:
                rounds[name].append(calls[name](number + 1)["seconds"])
                print(f"round {number + 1}: {name} {rounds[name][-1]}", file=sys.stderr)
        rounds["generate, target scored"] = [
            {"total": run["total"] - run["score proposal"]} for run in rounds["generate"]
        ]
        del first["ours, both scored"]["tokens"]  # those of "ours": one seed
        difference, std = agreement(first, [ours, lock_step, generate])
    if setting.dtype == "float32" and loaded[0]["backend"] == "cpu" and difference > TOLERANCE:
        raise Failed(f"log-weights differ by {difference:.2e} nats, more than {TOLERANCE}")
    return {
        "rounds": rounds,
        "matmul": matmul,
        "bandwidth": bandwidth,
        "first_seconds": {name: run["seconds"]["total"] for name, run in first.items()},
        "compile_seconds": first["ours"]["compile_seconds"],
        "largest_difference": difference,
        "log_weight_std": std,
        "devices": [about["device"] for about in loaded],
    }


def agreement(runs: dict[str, Any], scorers: list[Worker]) -> tuple[float, float]:
    """Largest difference of a log-weight or log q between who drew and any scorer; their std.

    Every system's draws, where it hands back its tokens, are scored by every system.
    """
    worst, weights = 0.0, []
    for run in (run for run in runs.values() if "tokens" in run):
        log_w, log_q = np.subtract(run["log_p"], run["log_q"]), np.array(run["log_q"])
        weights.append(log_w)
        for scorer in scorers:
            other = scorer("score", tokens=run["tokens"])
            other_w = np.subtract(other["log_p"], other["log_q"])
            worst = max(worst, np.abs(other_w - log_w).max(), np.abs(other["log_q"] - log_q).max())
    return float(worst), float(np.std(np.concatenate(weights)))


def measure_device(setting: Setting, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The systems' table in bfloat16, where there is a GPU."""
    with workers(setting, folder, "shapes") as (shapes,):
        backend = shapes("about")["backend"]
    if backend != "gpu":
        return {"status": "skipped", "reason": f"jax runs on {backend}, not on a GPU"}
    setting = dataclasses.replace(setting, dtype="bfloat16")
    return measure_systems(setting, folder, options) | {"setting": dataclasses.asdict(setting)}


def measure_parts(setting: Setting, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prefill, layers, head, token draw and scoring of ours, each alone."""
    with workers(setting, folder, "ours") as (ours,):
        return {"seconds": ours("parts", repeats=options.repeats)}


def measure_prefix(setting: Setting, folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    """Memory of the shared prompt for few and many samples."""
    with workers(setting, folder, "shapes") as (shapes,):
        counts = [setting.samples, 8 * setting.samples]
        return {"rows": shapes("prefix_memory", counts=counts)}


def measure_compile(setting: Setting, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compile time at two depths, alternating, after one compilation that doesn't count."""
    depths = (4, 32)
    seconds: dict[int, list] = {depth: [] for depth in depths}
    with workers(setting, folder, "shapes") as (shapes,):
        shapes("compile_seconds", layers=depths[0])
        for number in range(options.repeats):
            for depth in depths if number % 2 == 0 else depths[::-1]:
                seconds[depth].append(shapes("compile_seconds", layers=depth))
    return {"layers": depths, "seconds": seconds}


def measure_score_memory(
    setting: Setting, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Temporaries of the scoring pass as responses grow."""
    with workers(setting, folder, "shapes") as (shapes,):
        rows = shapes("score_memory", lengths=options.lengths)
    return {"rows": rows, "samples": setting.samples}


MEASURES = {
    "systems": measure_systems,
    "parts": measure_parts,
    "prefix": measure_prefix,
    "compile": measure_compile,
    "score-memory": measure_score_memory,
    "device": measure_device,
}
TIMED = ("systems", "parts", "compile", "device")


def versions() -> dict[str, str]:
    """Versions of what is compared."""
    names = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measures", nargs="*", metavar="measure", help=", ".join(MEASURES))
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round")
    parser.add_argument("--rounds", type=int, help="alternating rounds (5)")
    parser.add_argument("--repeats", type=int, help="of compilations and parts (5)")
    parser.add_argument("--rate-seconds", type=float, help="time for each rate (2)")
    parser.add_argument("--lengths", type=int, nargs="+", help="T of score-memory (64 256 1024)")
    parser.add_argument("--out", type=Path, help="results.json; none with --quick")
    parser.add_argument("--update-readme", action="store_true", help="write the tables there")
    parser.add_argument("--report", action="store_true", help="only print what --out holds")
    for field in dataclasses.fields(Setting):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), help=f"({field.default})")
    options = parser.parse_args(arguments)
    for name in options.measures:
        if name not in MEASURES:
            parser.error(f"unknown measure {name!r}; give some of {', '.join(MEASURES)}")
    quick = options.quick
    defaults = {
        "rounds": 2 if quick else 5,
        "repeats": 1 if quick else 5,
        "rate_seconds": 0.1 if quick else 2.0,
        "lengths": [8, 16] if quick else [64, 256, 1024],
        "out": None if quick else HERE / "results.json",
    } | ({name: value for name, value in QUICK.items()} if quick else {})
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the measurements; exit status 1 if one failed."""
    options = parse(arguments)
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Setting)}
    setting = Setting(**{name: value for name, value in given.items() if value is not None})
    out: Path | None = options.out
    results = json.loads(out.read_text()) if out and out.exists() else {}
    failed = False
    if not options.report:
        for name in options.measures or MEASURES:
            print(f"measuring: {name}", file=sys.stderr)
            results[name] = measure(name, setting, options)
            failed |= results[name]["status"] == "failed"
            print(f"\n## {name}\n\n{report.render(name, results[name])}", flush=True)
            if out:
                out.write_text(json.dumps(results, indent=1) + "\n")
    else:
        for name, result in results.items():
            print(f"\n## {name}\n\n{report.render(name, result)}")
    if options.update_readme:
        texts = {name: report.render(name, result) for name, result in results.items()}
        fill(HERE / "README.md", texts)
    return int(failed)


def measure(name: str, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement with all that says how it was made."""
    result: dict[str, Any] = {
        "status": "complete",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "setting": dataclasses.asdict(setting),
        "versions": versions(),
        "hardware": hardware(),
    }
    usage = Usage()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            write_inputs(setting, path)
            with workers(setting, path, "checkpoint", "shapes") as (checkpoint, shapes):
                saved, about = checkpoint("save"), shapes("about")
            if saved != setting.parameters:
                raise Failed(f"{saved} parameters were saved, not {setting.parameters}")
            result["hardware"] |= {"backend": about["backend"], "device": about["device"]}
            result |= MEASURES[name](setting, path, options)
        result["others_cores"] = usage.others()
        disturbed = name in TIMED and (result["others_cores"] or 0) > DISTURBED
        if result["status"] == "complete" and disturbed:
            result["status"] = "disturbed"
    except Exception:
        result |= {"status": "failed", "reason": traceback.format_exc()}
    return result


if __name__ == "__main__":
    sys.exit(main())
