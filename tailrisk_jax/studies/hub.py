"""Data sets of the Hugging Face hub, by name: hf:OWNER/NAME[:CONFIG][:SPLIT][:COLUMN]."""

import dataclasses
import re
from pathlib import Path, PurePosixPath

from tailrisk_jax.errors import InputError

PREFIX = "hf:"
_PARQUET = "refs/convert/parquet"  # where the hub keeps every data set as CONFIG/SPLIT/*.parquet


@dataclasses.dataclass(frozen=True)
class DatasetName:
    """A split of a data set; an empty config or split means the only one."""

    name: str
    config: str = ""
    split: str = ""
    column: str | None = None


def parse_dataset_name(text: str) -> DatasetName:
    """Reads hf:OWNER/NAME[:CONFIG][:SPLIT][:COLUMN].

    Raises:
      InputError: another text.
    """
    name, *parts = text.removeprefix(PREFIX).split(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or len(parts) > 3:
        raise InputError(f"{text!r} is not hf:OWNER/NAME[:CONFIG][:SPLIT][:COLUMN]; mend it")
    config, split, column = [*parts, "", "", ""][:3]
    return DatasetName(name, config, split, column or None)


def fetch(dataset: DatasetName) -> list[Path]:
    """The Parquet files of a split, fetched unless the hub's cache has them.

    Without a network, or with HF_HUB_OFFLINE=1, the cache alone is used.

    Raises:
      InputError: not to be had, or several configs or splits to choose from.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().dataset_info(dataset.name, revision=_PARQUET)
        listed = [file.rfilename for file in info.siblings or ()]
    except Exception as error:  # the client's errors share no base class
        listed = _cached(dataset)
        if not listed:
            raise _unfetched(dataset, error) from error
    chosen = _choose(dataset, listed)
    try:
        folder = snapshot_download(
            dataset.name, repo_type="dataset", revision=_PARQUET, allow_patterns=chosen
        )
    except Exception as error:
        raise _unfetched(dataset, error) from error
    return [Path(folder) / name for name in chosen]


def _unfetched(dataset: DatasetName, error: Exception) -> InputError:
    reason = next(iter(str(error).strip().splitlines()), "no reason given")
    return InputError(
        f"data set {dataset.name!r} could not be fetched from the hub "
        f"({type(error).__name__}: {reason}); check the name and the network, "
        "or download its file and give that"
    )


def _cached(dataset: DatasetName) -> list[str]:
    """What the cache has of it, if that is all of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = f"{dataset.config or '*'}/{dataset.split or '*'}/*.parquet"
    try:
        folder = snapshot_download(
            dataset.name,
            repo_type="dataset",
            revision=_PARQUET,
            allow_patterns=wanted,
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return []
    return [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.parquet")]


def _choose(dataset: DatasetName, listed: list[str]) -> list[str]:
    files = [PurePosixPath(name) for name in sorted(listed) if name.endswith(".parquet")]
    files = [file for file in files if len(file.parts) == 3]
    if not files:
        raise InputError(
            f"data set {dataset.name!r} has no Parquet files on the hub; download it and give that"
        )
    for kind, level, wanted in (("config", 0, dataset.config), ("split", 1, dataset.split)):
        known = sorted({file.parts[level] for file in files})
        if wanted not in known and (wanted or len(known) != 1):
            found = f"has no {kind} {wanted!r}" if wanted else f"has {len(known)} {kind}s"
            raise InputError(f"data set {dataset.name!r} {found}; name one of: {', '.join(known)}")
        files = [file for file in files if file.parts[level] == (wanted or known[0])]
    return [str(file) for file in files]
