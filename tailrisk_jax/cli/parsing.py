"""Words of a command line to options; what is wrong with them in one line."""

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from tailrisk_jax.errors import InputError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = "─╭╮╰╯│ \t"


def parse_commands(words: Sequence[str], commands: dict[str, Callable[..., Any]]) -> Any:
    """The options of the command that the words name.

    Raises:
      InputError: an unknown command or option, a missing one, or a value of another kind.
    """
    named = f"tailrisk {words[0]}" if words and words[0] in commands else "tailrisk"
    return _parsed(
        named,
        tyro.extras.subcommand_cli_from_dict,
        commands,
        prog="tailrisk",
        description="How likely is a harmful answer? Tail risks by importance sampling.",
        args=words,
    )


def parse_options(words: Sequence[str], command: type, prog: str | None = None) -> Any:
    """The options of one command.

    Args:
      prog: what it is called by; by default it is one of `tailrisk`.

    Raises:
      InputError: as `parse_commands`.
    """
    named = prog or f"tailrisk {command.__name__.lower()}"
    return _parsed(named, tyro.cli, command, prog=named, args=words)


def _parsed(named: str, parse: Callable[..., Any], *what: Any, **how: Any) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(*what, **how)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise InputError(f"{_one_line(said.getvalue())}; see {named} --help") from None


def _one_line(box: str) -> str:
    """What tyro says in a box: a title, what is wrong, and under a rule what may help."""
    lines = [line.strip(_FRAME) for line in _COLOUR.sub("", box).splitlines()]
    body = lines[1:]
    if "" in body:
        body = body[: body.index("")]
    return " ".join(body).rstrip(".")
