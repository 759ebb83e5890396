"""A run's folder as a study: what it is of, and whether a command may go on with it."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import store as files
from tailrisk_jax.studies.analysis import Weighting
from tailrisk_jax.studies.provenance import content_hash, session
from tailrisk_jax.studies.queries import StudyQuery
from tailrisk_jax.studies.query_weights import WEIGHTS
from tailrisk_jax.studies.settings import Settings
from tailrisk_jax.studies.store import Store

ANOTHER = (
    "Give another --out; `tailrisk judge` is for another judge, `tailrisk score` for another model"
)


@dataclasses.dataclass(frozen=True)
class Study:
    """What a run is of.

    Attributes:
      estimand: in words.
      identity: everything that a sample or a score depends on, as JSON: model, proposal, judge,
        with hashes of their files.
      settings: of which the number of samples may grow.
      weighting: of the proposal's components.
      queries: what is asked.
      selection: how the queries were chosen, counted.
      origin: for a run made from another: which, and by which command; None for a drawn one.
    """

    estimand: str
    identity: Mapping[str, Any]
    settings: Settings
    weighting: Weighting
    queries: list[StudyQuery]
    selection: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)

    @property
    def fixed(self) -> dict[str, Any]:
        """What may not change when a run goes on; files count by content, not by name."""
        settings = dataclasses.asdict(self.settings)
        growing = {
            "level", "until", "max_samples", "allocation", "chunk_size", "batch_size",
            "score_batch_size",
        }  # fmt: skip
        if self.settings.until is None and self.settings.replicates == 1:
            growing.add("num_samples")
        content = {
            **_by_content(self.identity),
            **{name: value for name, value in settings.items() if name not in growing},
            "stopping": "fixed" if self.settings.until is None else "until precise",
            "queries": {query.id: content_hash(query.content) for query in self.queries},
            "origin": self.origin,
        }
        return json.loads(json.dumps(content))


def estimand(identity: Mapping[str, Any], settings: Settings) -> str:
    """What is estimated, in words."""
    judge = identity["judge"]
    details = ", ".join(f"{name}={value!r}" for name, value in judge["settings"].items())
    by = f"{judge['name']}({details})" if details else judge["name"]
    return (
        f"E[score by {by}] over answers of at most {settings.max_new_tokens} tokens "
        f"at temperature {identity['temperature']:g}"
    )


def read_study(folder: Path) -> Study:
    """The study that a run's folder holds.

    Raises:
      InputError: no run, a damaged one, or one of a later version.
    """
    record = files.read_study(folder)
    try:
        return Study(
            estimand=record["estimand"],
            identity=record["identity"],
            settings=Settings(**record["settings"]),
            weighting=Weighting(**record["weighting"]),
            queries=[StudyQuery(**query) for query in record["queries"]],
            selection=record["selection"],
            origin=record["origin"],
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"run {folder}: study.json is damaged ({error}); restore it") from error


def open_run(
    folder: Path, study: Study, config: Mapping[str, bytes], options: Mapping[str, Any]
) -> tuple[Store, Study]:
    """The store of a new run, or of one that goes on, and the study as it is now.

    A run that goes on keeps the size of its chunks, and its name in its shards.

    Args:
      config: files that are kept with the study, by name.
      options: of the command, for the record of this session.

    Raises:
      InputError: it holds a run of something else, or one with more samples.
    """
    identity = content_hash(study.fixed)
    if files.is_run(folder):
        old, identity = read_study(folder), _identity(folder)
        settings = dataclasses.replace(study.settings, chunk_size=old.settings.chunk_size)
        study = dataclasses.replace(study, settings=settings)
        check_same(folder, old, study)
        if study.settings.num_samples < old.settings.num_samples:
            raise InputError(
                f"run {folder} has num_samples={old.settings.num_samples} already, "
                f"{study.settings.num_samples} is asked for; give as many, or another --out"
            )
    store = Store(folder, identity, jax.process_index())
    _ = store.rounds  # damaged ones are found before anything is written
    if jax.process_index() == 0:
        files.create(folder, {"run": identity, **study.record()}, config)
        files.append_session(folder, session(options))
    return store, study


def open_store(folder: Path) -> Store:
    """The store of a run that is only read."""
    return Store(folder, _identity(folder))


def _identity(folder: Path) -> str:
    """What the shards of a run are marked with: given when it began, and kept from then on."""
    return files.read_study(folder).get("run", "")


def check_same(folder: Path, old: Study, new: Study, otherwise: str = ANOTHER) -> None:
    """Refuses to go on with a run when anything that its figures depend on has changed."""
    before, after = (dict(_flat(study.fixed)) for study in (old, new))
    changed = [
        f"{name} {before.get(name, 'absent')!r} -> {after.get(name, 'absent')!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if changed:
        shown = "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" * (len(changed) > 8))
        raise InputError(f"run {folder} is of something else: {shown}. {otherwise}")


def check_output(folder: Path) -> Path:
    """A folder for a run, new or gone on with, before any work is done for it.

    Raises:
      InputError: it holds something else, or can't be written.
    """
    if files.is_run(folder):
        files.read_study(folder)
        with files.locked(folder, jax.process_index()):
            return folder
    if folder.exists() and (not folder.is_dir() or _others(folder)):
        raise InputError(f"output {folder} exists and is not empty; give a new --out folder")
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"output {folder} can't be written ({error.strerror}); give another --out folder"
        ) from error
    return folder


def _others(folder: Path) -> set[str]:
    """What a folder holds that no run left there before it had a study.json."""
    found = {path.name for path in folder.iterdir()}
    begun = {"study.yaml", WEIGHTS} if ".lock-0" in found else set()
    return {name for name in found - begun if not name.startswith(".")}


def _by_content(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is of, without the names of files: they may be moved."""
    content: dict[str, Any] = json.loads(json.dumps(identity))
    for model in {"model", "drawn_for"} & content.keys():
        content[model] = content[model]["files"]
    proposal = content["proposal"]
    for number, name in enumerate(proposal["files"]):
        named = rf"(?<=:){re.escape(name)}(?=[:@ )]|$)"
        proposal["text"] = re.sub(named, f"[{number}]", proposal["text"])
    proposal["files"] = [sorted(hashes.values()) for hashes in proposal["files"].values()]
    return content


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping) and content:
        for name, value in content.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, content
