"""What estimating, tuning and learning are about: a model, queries, a judge, candidates."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from tailrisk_jax.cli.embedded import CUTS, FOLDERS, Embedded, load_embedded
from tailrisk_jax.cli.judges import JudgeOptions, make_judge
from tailrisk_jax.cli.loading import DType, load, resolved_dtype
from tailrisk_jax.errors import InputError
from tailrisk_jax.judges import Judge
from tailrisk_jax.models import Model, locate
from tailrisk_jax.policies import Policy, at_temperature
from tailrisk_jax.studies import (
    Material,
    Proposal,
    Selection,
    Settings,
    judge_identity,
    model_identity,
    parse_proposal,
    read_queries,
    tokens_identity,
)

PILOT_SAMPLES, PILOT_SHARE = 500, 0.1

_Words = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]


@dataclasses.dataclass(frozen=True)
class QueryOptions:
    """Which queries."""

    queries: Annotated[str | None, tyro.conf.arg(metavar="FILE|hf:NAME")] = None
    """A file, told by its columns: StrongREJECT, HarmBench, JailbreakBench, AdvBench or XSTest CSV,
    a persona trait's JSON, or JSON lines of {"prompt": ..} or {"messages": [..]} with an optional
    "id"; or hf:OWNER/NAME[:CONFIG][:SPLIT][:COLUMN] from the hub. The organism has its own."""
    query_column: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The prompt's column in any other CSV or data set."""
    exclude: Annotated[
        tuple[str, ...], tyro.conf.arg(constructor=_Words, metavar="FILE_OR_ID [..]")
    ] = ()
    """Queries to leave out: ids, or files of ids, one a line."""
    where: Annotated[
        tuple[str, ...], tyro.conf.arg(constructor=_Words, metavar="COLUMN=VALUE [..]")
    ] = ()
    """Only queries that their file says this of; several values of one column are alternatives,
    and several columns must all fit."""
    first: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Only the first N queries of those that the other options leave."""

    def __post_init__(self) -> None:
        """Flat, whether given as `--where A B` or as `--where A --where B`."""
        for name in ("exclude", "where", "candidates"):
            if hasattr(self, name):
                parts = [[part] if isinstance(part, str) else part for part in getattr(self, name)]
                object.__setattr__(self, name, tuple(word for part in parts for word in part))

    def read(self) -> Selection:
        """Those of the file, but for what --exclude and --where leave out.

        Raises:
          InputError: no file, or one that can't be used.
        """
        assert self.queries is not None
        return self.chosen(read_queries(self.queries, self.query_column))

    def chosen(self, selection: Selection) -> Selection:
        """What --exclude and --where leave."""
        return selection.exclude(self.exclude).where(self.where)


@dataclasses.dataclass(frozen=True)
class InputOptions(QueryOptions):
    """The model, the queries, and what a proposal may be chosen from."""

    model: Annotated[str | None, tyro.conf.arg(metavar="FOLDER|HUB_ID|organism")] = None
    """The target: a Hugging Face checkpoint folder, a hub id, "organism" (embedded), or
    "organism:persona" (embedded too: its harm is a harmless persona trait)."""
    max_prompt_tokens: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Leave out queries whose prompt, chat template included, is longer; none is cut."""
    max_new_tokens: Annotated[int | None, tyro.conf.arg(metavar="T")] = None
    """Answers are cut at this many tokens, by default 64 (24 for the organism); part of what is
    estimated."""
    seed: int = 0
    """Of all draws; the same seed gives the same answers."""
    temperature: float = 1.0
    """Of the target; part of what is estimated."""
    dtype: DType = "auto"
    """Of the parameters, by default bfloat16 on GPU and TPU and float32 on CPU; kept with the run,
    which goes on in it. Probabilities are float32 always."""
    weights_cache: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Keep the converted checkpoints here, and read them from here the next time."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="ROWS")] = None
    """Answers on the device at once; by default what fits. Changes no figure."""
    candidates: Annotated[
        tuple[str, ...], tyro.conf.arg(constructor=_Words, metavar="TERM [..]")
    ] = ()
    """What a pilot chooses a proposal from, beside the target: terms of --proposal. The organism
    has its own."""
    pilot: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Answers per pilot query, by default 500. None is used again in an estimate."""
    pilot_share: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None
    """Share of the queries that the pilot takes, by default 0.1, but 5 at least."""

    @property
    def cut(self) -> int:
        """`max_new_tokens`, or its default."""
        default = CUTS.get(str(self.model), Settings.max_new_tokens)
        return default if self.max_new_tokens is None else self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class StudyOptions(JudgeOptions, InputOptions):
    """All that says what is estimated."""


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """A model, queries and a judge, loaded.

    Attributes:
      options: which they were named by, the dtype resolved.
      target: the policy whose risk is estimated.
      folder: of its checkpoint.
      judge: of its answers.
      selection: the queries.
      vectors, checkpoints: what a proposal may name, beside files.
      load: reads the folder of another checkpoint.
      embedded: what comes with the model; None where it doesn't come with the package.
    """

    options: StudyOptions
    target: Policy
    folder: Path
    judge: Judge
    selection: Selection
    vectors: Mapping[str, Any]
    checkpoints: Mapping[str, Policy]
    load: Callable[[Path], Model]
    embedded: Embedded | None

    def parse(self, text: str) -> Proposal:
        """A proposal for this target."""
        return parse_proposal(
            text,
            self.target,
            vectors=self.vectors,
            checkpoints=self.checkpoints,
            load=self.load,
        )

    def identity(self) -> dict[str, Any]:
        """What a score depends on beside the proposal, as JSON."""
        assert self.options.model is not None
        return {
            "model": model_identity(self.options.model, self.folder),
            "tokens": tokens_identity(self.target.model),
            "dtype": self.options.dtype,
            "temperature": self.options.temperature,
            "judge": judge_identity(self.judge),
        }

    def candidates(self) -> tuple[str, ...]:
        """What a pilot chooses from.

        Raises:
          InputError: nothing, with a model that isn't the organism.
        """
        given = self.options.candidates
        if not given and self.embedded is None:
            raise InputError(
                f"--candidates is needed with --model {self.options.model}: terms to choose a "
                "proposal from, such as target@2 or ablation:DIRECTION:0.5"
            )
        return given or (self.embedded.candidates if self.embedded else ())

    def material(self) -> Material:
        """What a pilot draws from and is judged by."""
        options = self.options
        pilot, share = options.pilot, options.pilot_share
        return Material(
            target=self.target,
            parse=self.parse,
            queries=self.selection.queries,
            judge=self.judge,
            settings=Settings(
                num_samples=PILOT_SAMPLES if pilot is None else pilot,
                max_new_tokens=options.cut,
                seed=options.seed,
                batch_size=options.batch_size,
            ),
            share=PILOT_SHARE if share is None else share,
        )


def load_inputs(options: StudyOptions, *, quiet: bool) -> Inputs:
    """Reads the queries, makes the judge and loads the model.

    Args:
      quiet: show no progress, and don't say how many queries were left out.

    Raises:
      InputError: anything of it that can't be used.
    """
    dtype = resolved_dtype(options.dtype, options.model)
    options = dataclasses.replace(options, dtype=dtype)
    assert options.model is not None
    read = functools.partial(load, dtype=dtype, quiet=quiet, cache=options.weights_cache)
    embedded = load_embedded(options.model)
    selection = _selection(options, embedded)
    judge = make_judge(options, selection.queries, reach=True)
    vectors, checkpoints = {}, {}
    if embedded is not None:
        target, folder = embedded.target, FOLDERS[options.model]
        judge = judge or embedded.judge
        vectors, checkpoints = embedded.vectors, embedded.checkpoints
    else:
        if judge is None:
            raise InputError(f"--judge or --event is needed with --model {options.model}; give one")
        folder = locate(options.model)
        target = Policy(read(folder))
    selection = selection.within(options.max_prompt_tokens, target.model).first(options.first)
    if not quiet and jax.process_index() == 0 and len(selection.queries) != selection.read:
        print(f"Queries of {selection}", file=sys.stderr)
    target = at_temperature(target, options.temperature)
    return Inputs(options, target, folder, judge, selection, vectors, checkpoints, read, embedded)


def own_queries(name: str, embedded: Embedded) -> Selection:
    """The queries that an embedded model comes with."""
    own = embedded.queries
    return Selection(own, own, name, name, "", read=len(own))


def _selection(options: InputOptions, embedded: Embedded | None) -> Selection:
    """The queries, but for those that the model's tokenizer will find too long."""
    if options.queries is not None:
        return options.read()
    if embedded is not None:
        return options.chosen(own_queries(str(options.model), embedded))
    raise InputError(f"--queries is needed with --model {options.model}; give a file")
