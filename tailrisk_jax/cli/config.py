"""Options in YAML files: what `--config` reads, and what a run keeps of its own command."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tailrisk_jax.errors import InputError

VERSION = 1
FILE = "study.yaml"
DIRECTORY = "directory"  # where a run's command was given; its relative paths are meant from there
POSITIONAL = ("run", "runs")  # options without a flag
_OF_ONE_SESSION = ("out", "quiet", "json", "processes", "mesh")  # not the run's own


def with_config(argv: Sequence[str], commands: Mapping[str, type]) -> list[str]:
    """The arguments with those of `--config FILE` put before them, so that flags win.

    Raises:
      InputError: an unreadable file, one of a later version, an unknown option.
    """
    argv = list(argv)
    at = next((i for i, word in enumerate(argv) if word.split("=")[0] == "--config"), None)
    if at is None or argv[0] not in commands or not hasattr(commands[argv[0]], "config"):
        return argv
    _, equals, value = argv[at].partition("=")
    if not equals and at + 1 == len(argv):
        raise InputError("--config needs a file, such as --config study.yaml")
    path = Path(value if equals else argv[at + 1])
    rest = argv[1:at] + argv[at + (1 if equals else 2) :]
    return [argv[0], *flags(read_config(path), argv[0], commands[argv[0]], path), *rest]


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file, by name; dashes in names become underscores."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} can't be read ({error}); check the path") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"config {path} is not valid YAML ({reason}); mend it") from error
    if not isinstance(content, dict):
        raise InputError(f"config {path} must hold options as 'name: value' lines")
    content = {str(name).replace("-", "_"): value for name, value in content.items()}
    version = content.pop("version", VERSION)
    if version != VERSION:
        raise InputError(
            f"config {path} has version {version!r}, this tailrisk reads {VERSION}; update it"
        )
    return content


def flags(content: Mapping[str, Any], command: str, options: type, path: Path) -> list[str]:
    """Options as the flags of a command."""
    content = dict(content)
    own = content.pop("command", command)
    if own != command:
        raise InputError(f"config {path} is for `tailrisk {own}`, not `tailrisk {command}`")
    content.pop(DIRECTORY, None)
    known = {field.name for field in dataclasses.fields(options)}
    words = []
    for name, value in content.items():
        if name not in known:
            close = ", ".join(sorted(known))
            raise InputError(f"config {path} has the unknown option {name!r}; known: {close}")
        if isinstance(value, dict):
            raise InputError(f"config {path}: option {name!r} is a mapping; give a value")
        flag = "--" + name.replace("_", "-")
        if name in POSITIONAL:
            words = [*map(str, value if isinstance(value, list) else [value]), *words]
        elif value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    return words


def config_file(command: str, options: Any) -> dict[str, bytes]:
    """What a run keeps of its command: the resolved options, and where it was given."""
    content = {"version": VERSION, "command": command, DIRECTORY: str(Path.cwd())}
    for name, value in dataclasses.asdict(options).items():
        if name not in _OF_ONE_SESSION and value not in (None, ()):
            content[name] = value if isinstance(value, int | float | str | bool) else _plain(value)
    return {FILE: yaml.safe_dump(content, sort_keys=False).encode()}


def _plain(value: Any) -> Any:
    return [str(one) for one in value] if isinstance(value, list | tuple) else str(value)
