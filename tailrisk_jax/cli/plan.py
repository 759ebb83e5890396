"""`tailrisk plan`: what a study takes on a TPU slice or on GPUs, before there are any."""

import dataclasses
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.table import Table

from tailrisk_jax.cli.embedded import FOLDERS
from tailrisk_jax.cli.mesh import parse_layout
from tailrisk_jax.cli.progress import table_console
from tailrisk_jax.errors import InputError
from tailrisk_jax.models import ModelConfig, load_config, locate
from tailrisk_jax.planning import (
    PUBLISHED,
    Compiled,
    Layout,
    Option,
    Phase,
    Topology,
    Workload,
    choose,
    compile_option,
    parameter_count,
    phase_seconds,
    published,
    topology,
)
from tailrisk_jax.studies import json_text

GIB = 1 << 30
_SHOWN = 6  # meshes


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan a study: memory, operations and time on accelerators that need not be there.

    For a TPU slice, the functions that draw and score are compiled for it by libtpu (extra
    `plan`), so that what fits is known; times, and everything of GPUs, are by formula, at the
    peak rates that the makers publish: a lower bound. Every answer is taken to run until it is
    cut. Judging is not counted.
    """

    model: Annotated[str, tyro.conf.arg(metavar="CONFIG|NAME|HUB_ID")]
    """A config.json or its folder, a published model's name such as Llama-3.1-8B, or a hub id, of
    which config.json alone is fetched. No weights are needed."""
    topology: Annotated[str, tyro.conf.arg(metavar="CHIP:SHAPE")]
    """Such as v5e:4x4, v5p:2x2x4 or h100:8; a wrong one lists all."""
    queries: Annotated[int, tyro.conf.arg(metavar="Q")] = 313
    """How many."""
    samples: Annotated[int, tyro.conf.arg(metavar="N")] = 500
    """Answers per query."""
    new_tokens: Annotated[int, tyro.conf.arg(metavar="T")] = 150
    """Answers are cut at this many tokens."""
    prompt_tokens: Annotated[int, tyro.conf.arg(metavar="P")] = 256
    """Of the longest prompt, to which all are padded."""
    policies: Annotated[int, tyro.conf.arg(metavar="K")] = 2
    """Versions of the model that each answer is scored under, the target included; they share its
    parameters."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of parameters and caches. Peak rates are those of bfloat16 always."""
    mesh: Annotated[str | None, tyro.conf.arg(metavar="AXIS=SIZE[,..]")] = None
    """This mesh, such as data=2,tensor=8 or data=4,fsdp=2,tensor=2; by default the quickest."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="ROWS")] = None
    """Answers that are drawn or scored at once; by default what fits and takes least time."""
    price_per_hour: Annotated[float | None, tyro.conf.arg(metavar="PRICE")] = None
    """Of one chip, in any currency."""
    analytic: tyro.conf.FlagCreatePairsOff[bool] = False
    """By formula alone, without libtpu."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """The same as JSON on standard output."""


def plan(options: Plan) -> None:
    """Runs the command."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is there stays free
    where = topology(options.topology)
    name, config = read_config(options.model)
    study = _workload(options, config)
    layout = None if options.mesh is None else parse_mesh(options.mesh, where)
    found = choose(config, study, where, name=name, layout=layout, batch_size=options.batch_size)
    chosen, seen = found[0], None
    if where.chip.is_tpu and not options.analytic:
        chosen, seen = compile_option(config, study, where, chosen, dtype=options.dtype, tell=_tell)
    record = _record(options, name, config, where, study, chosen, found, seen)
    if options.json:
        print(json_text(record))
    else:
        _show(record)


def read_config(text: str) -> tuple[str, ModelConfig]:
    """A model's name and config, from a folder, a file, the table of published ones or the hub.

    Raises:
      InputError: none of them.
    """
    path = Path(text)
    if path.is_dir():
        return path.resolve().name, load_config(path)
    if path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(path, Path(folder) / "config.json")
            try:
                return path.stem, load_config(folder)
            except InputError as error:
                raise InputError(str(error).replace(f"{folder}/config.json", text)) from error
    if text in FOLDERS:
        return text, load_config(FOLDERS[text])
    config = published(text)
    if config is not None:
        return text.rpartition("/")[2], config
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        folder = locate(text, files=("config.json", "generation_config.json"))
        return text.rpartition("/")[2], load_config(folder)
    raise InputError(
        f"model {text!r} is no file, folder, hub id or published name; "
        f"published are {', '.join(PUBLISHED)}"
    )


def parse_mesh(text: str, where: Topology) -> Layout:
    """The sizes of mesh axes in a text like "data=2,tensor=8".

    Raises:
      InputError: as `parse_layout`, or sizes that don't multiply to the chips.
    """
    layout = parse_layout(text, devices=where.count)
    if layout.devices != where.count:
        raise InputError(
            f"--mesh {text!r} has {layout.devices} devices, {where.name} has {where.count}; "
            "give sizes that multiply to them"
        )
    return layout


def _workload(options: Plan, config: ModelConfig) -> Workload:
    least = dict.fromkeys(("queries", "samples", "prompt_tokens", "policies", "batch_size"), 1)
    for name, smallest in {**least, "new_tokens": 2}.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise InputError(f"{name}={value} must be at least {smallest}")
    if options.price_per_hour is not None and not options.price_per_hour >= 0:
        raise InputError(f"price_per_hour={options.price_per_hour} must be 0 or more")
    length = options.prompt_tokens + options.new_tokens
    if length > config.max_positions:
        raise InputError(
            f"{options.prompt_tokens} prompt tokens and {options.new_tokens} new ones are more "
            f"than the {config.max_positions} positions of {options.model}; give fewer"
        )
    return Workload(
        queries=options.queries,
        samples=options.samples,
        prompt=options.prompt_tokens,
        length=options.new_tokens,
        policies=options.policies,
        itemsize=jnp.dtype(options.dtype).itemsize,
    )


def _tell(what: str) -> None:
    print(f"tailrisk: {what}", file=sys.stderr, flush=True)


def _record(
    options: Plan,
    name: str,
    config: ModelConfig,
    where: Topology,
    study: Workload,
    chosen: Option,
    found: list[Option],
    seen: list[Compiled] | None,
) -> dict[str, Any]:
    """All that is known, as `--json` gives it."""
    seconds = chosen.seconds(where)
    hours = where.count * seconds / 3600
    per_1000 = hours * 1000 / study.queries
    price = options.price_per_hour
    return {
        "model": name,
        "parameters": parameter_count(config),
        "dtype": options.dtype,
        "topology": where.name,
        "chips": where.count,
        "chip": _plain(where.chip),
        "study": _plain(study),
        "mesh": dict(chosen.layout.axes),
        "draw_rows": chosen.draw_rows,
        "score_rows": chosen.score_rows,
        "by": "formula" if seen is None else "libtpu",
        "phases": [
            _phase(phase, one, where)
            for phase, one in zip(chosen.phases, seen or [None] * 4, strict=True)
        ],
        "seconds": seconds,
        "chip_hours": hours,
        "chip_hours_per_1000_queries": per_1000,
        "cost_per_1000_queries": None if price is None else per_1000 * price,
        "meshes": [_option(one, where) for one in found],
    }


def _phase(phase: Phase, seen: Compiled | None, where: Topology) -> dict[str, Any]:
    parts = phase.work.seconds(where.chip)
    record = {
        name: getattr(phase, name) for name in ("name", "queries", "rows", "runs", "steps")
    } | {
        "memory": _plain(phase.memory) | {"total": phase.memory.total},
        "work": _plain(phase.work),
        "seconds": phase_seconds(phase, where),
        "limit": max(parts, key=lambda name: parts[name]),
        "compiled": None,
    }
    if seen is not None:
        record["compiled"] = _plain(seen) | {
            "memory_ratio": phase.memory.total / seen.memory,
            "flops_ratio": None if seen.flops is None else phase.work.flops / seen.flops,
        }
    return record


def _option(option: Option, where: Topology) -> dict[str, Any]:
    return {
        "mesh": dict(option.layout.axes),
        "fits": option.fits,
        "draw_rows": option.draw_rows,
        "score_rows": option.score_rows,
        "memory": option.memory if option.fits else None,
        "seconds": option.seconds(where) if option.fits else None,
    }


def _plain(value: Any) -> dict[str, Any]:
    return {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if field.name not in ("slices", "compiler")
    }


def _show(record: dict[str, Any]) -> None:
    study, chips = record["study"], record["chips"]
    console = table_console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    say(
        f"{record['model']}, {record['parameters'] / 1e9:.3g} billion parameters in "
        f"{record['dtype']}, on {record['topology']}: {chips} "
        f"chip{'s' * (chips > 1)} of {record['chip']['memory'] / GIB:.3g} GiB"
    )
    say(
        f"{study['queries']:,} queries of {study['prompt']} tokens, {study['samples']:,} answers "
        f"each of {study['length']} tokens, scored under {study['policies']} policies"
    )
    say(
        f"Mesh {Layout(**record['mesh'])}; at once {record['draw_rows']:,} answers are drawn, "
        f"{record['score_rows']:,} scored (batch_size). Parameters take "
        f"{record['phases'][0]['memory']['parameters'] / GIB:.2f} GiB of each chip\n"
    )
    console.print(_phases_table(record["phases"]))
    say("\nMeshes, the best first:")
    console.print(_meshes_table(record["meshes"]))
    decode = record["phases"][1]
    share = decode["work"]["weights"] / decode["work"]["bytes"]
    cost = record["cost_per_1000_queries"]
    say(
        f"\nAt least {record['seconds']:,.0f} s: {record['chip_hours']:.3g} chip-hours, "
        f"{record['chip_hours_per_1000_queries']:.3g} per 1,000 queries"
        + ("" if cost is None else f", at a price of {cost:.4g}")
        + f". Decoding is limited by {_LIMITS[decode['limit']]}; reading parameters is {share:.0%} "
        "of its traffic."
    )
    if record["by"] == "formula":
        say("By formula; nothing was compiled.")
    else:
        seconds = sum(phase["compiled"]["seconds"] for phase in record["phases"])
        say(
            f"Compiled by libtpu in {seconds:.0f} s: it fits. Ratios are what the formulas say, "
            "over what the compiler says."
        )


_LIMITS = {"compute": "compute", "memory": "memory bandwidth", "links": "links between chips"}


def _phases_table(phases: list[dict[str, Any]]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("on each chip", no_wrap=True)
    headings = [
        "rows", "calls", "caches, GiB", "temporaries", "all", "compiled", "ratio",
        "TFLOP a call", "ratio", "GB a call", "seconds", "limit",
    ]  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for phase in phases:
        seen, memory = phase["compiled"], phase["memory"]
        table.add_row(
            phase["name"],
            f"{phase['queries']} x {phase['rows']}",
            f"{phase['runs']:,}",
            *(f"{memory[name] / GIB:.2f}" for name in ("caches", "temporaries", "total")),
            f"{seen['memory'] / GIB:.2f}" if seen else "",
            f"{seen['memory_ratio']:.2f}" if seen else "",
            f"{phase['work']['flops'] / 1e12:,.1f}",
            f"{seen['flops_ratio']:.2f}" if seen and seen["flops_ratio"] else "",
            f"{phase['work']['bytes'] / 1e9:,.0f}",
            f"{phase['seconds']:,.0f}",
            _LIMITS[phase["limit"]],
        )
    return table


def _meshes_table(meshes: list[dict[str, Any]]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("mesh", no_wrap=True)
    for heading in ("drawn at once", "scored at once", "GiB a chip", "seconds"):
        table.add_column(heading, justify="right")
    fitting = [mesh for mesh in meshes if mesh["fits"]]
    for mesh in fitting[:_SHOWN]:
        table.add_row(
            str(Layout(**mesh["mesh"])),
            f"{mesh['draw_rows']:,}",
            f"{mesh['score_rows']:,}",
            f"{mesh['memory'] / GIB:.2f}",
            f"{mesh['seconds']:,.0f}",
        )
    rest = len(fitting) - _SHOWN
    if rest > 0:
        table.add_row(f"{rest} more that fit")
    if len(fitting) < len(meshes):
        table.add_row(f"{len(meshes) - len(fitting)} more that don't")
    return table
