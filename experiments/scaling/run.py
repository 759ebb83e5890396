"""How do time and memory grow with samples, queries, prompt, new tokens and layers?

python experiments/scaling/run.py cpu     on this machine; minutes, goes on where it stopped
python experiments/scaling/run.py tpu     compiled by libtpu for a slice that isn't there
python experiments/scaling/run.py plot    tables and pictures of what there is
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))

from experiments.scaling import cpu, plots, report, tpu
from experiments.scaling.setting import QUICK, OnCpu, OnTpu
from experiments.tables import fill
from tailrisk_jax.errors import InputError

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and where results go."""

    what: tyro.conf.Positional[Literal["cpu", "tpu", "plot", "all"]]
    """All is cpu, then tpu; tables and pictures are made after each."""
    rounds: Annotated[int, tyro.conf.arg(metavar="R")] = 5
    """Of times on the CPU; a larger number goes on from a smaller one."""
    compile_rounds: Annotated[int, tyro.conf.arg(metavar="R")] = 3
    """Of compilations on the CPU."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = HERE / "results"
    """Results, tables and pictures; with this folder alone, the README is filled too."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """A tiny model on the CPU, to see that all runs; give another --out."""


def main(options: Options) -> int:
    """Measures; the exit status is 2 where something is missing."""
    try:
        for name in ("rounds", "compile_rounds"):
            if getattr(options, name) < 1:
                raise InputError(f"{name}={getattr(options, name)} must be at least 1")
        if options.quick and options.out == HERE / "results":
            raise InputError("--quick measures nothing worth keeping; give it another --out")
        if options.what in ("cpu", "all"):
            setting = QUICK if options.quick else OnCpu()
            rounds = {"rounds": options.rounds, "compile_rounds": options.compile_rounds}
            cpu.measure(setting, options.out, **rounds, tell=_tell)
            show(options.out)
        if options.what in ("tpu", "all"):
            tpu.measure(OnTpu(), options.out, _tell)
            show(options.out)
        if options.what == "plot":
            show(options.out)
    except InputError as error:
        print(f"scaling: {error}", file=sys.stderr)
        return 2
    return 0


def show(out: Path) -> None:
    """Makes tables and pictures of what is in `out`.

    Raises:
      InputError: nothing is.
    """
    texts: dict[str, str] = {}
    if (content := report.read(out / "cpu.json")) is not None:
        of_cpu = report.OfCpu(content)
        texts |= of_cpu.tables()
        plots.plot_cpu(of_cpu, out / "cpu.png")
    if (content := report.read(out / "tpu.json")) is not None:
        of_tpu = report.OfTpu(content)
        texts |= of_tpu.tables()
        plots.plot_tpu(of_tpu, out / "tpu.png")
    if not texts:
        raise InputError(f"{out} holds no results; run cpu or tpu first")
    tables = "\n\n".join(f"## {name}\n\n{text}" for name, text in texts.items())
    (out / "tables.md").write_text(tables + "\n")
    if out == HERE / "results":
        fill(HERE / "README.md", texts)
    print(tables)


def _tell(what: str) -> None:
    print(f"scaling: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
