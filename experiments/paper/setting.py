"""What an experiment is run with: options, and where their defaults come from.

Each experiment has a YAML file with three sections of options: `organism` for the embedded model,
`checkpoint` for any other (the paper's settings), and `smoke`, which makes either tiny.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import tyro
import yaml

from tailrisk_jax.cli.config import flags, read_config, with_config
from tailrisk_jax.cli.inputs import StudyOptions
from tailrisk_jax.cli.mesh import OnMesh
from tailrisk_jax.cli.parsing import parse_options

HERE = Path(__file__).parent
Hidden = tyro.conf.Suppress


@dataclasses.dataclass(frozen=True)
class Options(OnMesh, StudyOptions):
    """What all experiments take, beside a model, queries and a judge."""

    usual_queries: ClassVar[int] = 313  # of StrongREJECT, for --topology where no file says
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.YAML")] = None
    """Options as a YAML file, by their names here; flags win over it, and it over the
    experiment's own file."""
    out: Path = Path("runs/paper")
    """Folder: `runs` in it holds the draws, which experiments share, and a folder named as the
    experiment the results. The same command goes on with what it holds."""
    smoke: tyro.conf.FlagCreatePairsOff[bool] = False
    """Tiny settings, to see that all runs."""
    topology: Annotated[str | None, tyro.conf.arg(metavar="CHIP:SHAPE")] = None
    """Say first what it takes on this hardware, such as h100:1 or v5e:4x4, by formula."""
    only_plan: tyro.conf.FlagCreatePairsOff[bool] = False
    """Say that alone, and draw nothing; no weights are needed."""
    prompt_tokens: Annotated[int, tyro.conf.arg(metavar="P")] = 256
    """Of the longest prompt, for --topology."""
    chunk_size: Annotated[int, tyro.conf.arg(metavar="ANSWERS")] = 2000
    """Answers that are drawn, judged and kept together: what a kill can cost. Changes no figure."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress, only errors."""
    candidates: Annotated[tuple[str, ...], Hidden] = ()
    pilot: Annotated[int | None, Hidden] = None
    pilot_share: Annotated[float | None, Hidden] = None

    @property
    def on_organism(self) -> bool:
        """Whether the model is an embedded one, whose truth is known."""
        return is_organism(self.model)


def is_organism(model: str | None) -> bool:
    """Whether the name is of an embedded model."""
    return model is not None and model.partition(":")[0] == "organism"


_Kind = TypeVar("_Kind", bound=Options)


def read_options(name: str, kind: type[_Kind], words: Sequence[str]) -> _Kind:
    """An experiment's options: its own file, then --config, then flags.

    Raises:
      InputError: an option or file that can't be used.
    """
    prog, path = f"run.py {name}", HERE / f"{name}.yaml"
    words = with_config([name, *words], {name: kind})[1:]
    given = parse_options(words, kind, prog)
    own = read_config(path)
    base = dict(own["organism" if given.model is None else _section(given.model)])
    if given.smoke:
        base |= own["smoke"]
    options = parse_options([*flags(base, name, kind, path), *words], kind, prog)
    return dataclasses.replace(options, model=checkpoints().get(options.model, options.model))


def _section(model: str) -> str:
    return "organism" if is_organism(model) else "checkpoint"


def checkpoints() -> dict[str | None, str]:
    """Hub ids of the paper's checkpoints, by its short names for them."""
    return yaml.safe_load((HERE / "checkpoints.yaml").read_text(encoding="utf-8"))


def plain(options: Any) -> dict[str, Any]:
    """Options as JSON; those that are not set are left out."""
    fields = dataclasses.asdict(options).items()
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in fields
        if value not in (None, ())
    }
