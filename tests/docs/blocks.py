"""The code blocks of a page, what each is, and how it is checked.

- `python`: run in order, in one namespace for the page; or parsed, its imports looked up.
- `sh`: each `tailrisk` line is run in-process, in the page's folder; or its options are parsed by
  the command's own parser, and its proposal by the proposals' grammar where it names no file.
- `console`: the same with a `$` before each command, and what it prints under it.
- `text` after a python block: what that prints.
- any block with a title: a file of that name, written to the page's folder.

In shown output `...` stands for anything, and numbers may differ by 2%. `<!-- parsed: WHY -->`
above a block has it parsed and not run.
"""

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

from tailrisk_jax.cli.config import with_config
from tailrisk_jax.cli.main import _BY_NAME
from tailrisk_jax.cli.parsing import parse_commands

ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "sh", "console", "text", "")
_FENCE = re.compile(
    r"^(?P<why>[ ]*<!-- parsed: [^\n]*-->\n\n?)?"
    r"(?P<indent>[ ]*)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[ ]*\n"
    r"(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_NUMBER = r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?"


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
      why: it is parsed and not run, if it is so marked.
      line: of its fence.
    """

    language: str
    title: str | None
    code: str
    why: str | None
    line: int

    @property
    def commands(self) -> list[tuple[list[str], str]]:
        """Each command's words, and what it is shown to print."""
        joined = self.code.replace("\\\n", " ")
        if self.language != "console":
            words = [shlex.split(line, comments=True) for line in joined.splitlines()]
            return [(one, "") for one in words if one]
        said = re.split(r"^\$ ", joined, flags=re.MULTILINE)
        assert not said[0].strip(), f"line {self.line}: console blocks begin with $"
        parted = (one.partition("\n") for one in said[1:])
        return [(shlex.split(words, comments=True), shown) for words, _, shown in parted]


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page; every fence belongs to one."""
    found = list(_FENCE.finditer(text))
    fences = len(re.findall(r"^ *```", text, re.MULTILINE))
    assert 2 * len(found) == fences, f"{fences} fences, {len(found)} blocks are understood"
    out = []
    for match in found:
        indent, why = len(match["indent"]), match["why"]
        code = "\n".join(line[indent:] for line in match["code"].splitlines()) + "\n"
        line = text.count("\n", 0, match.start()) + 1
        language = match["language"]
        assert match["title"] or language in LANGUAGES, f"line {line}: what is {language!r}?"
        out.append(Block(language, match["title"], code, why and why.strip(), line))
    return out


def check_python(code: str) -> None:
    """It compiles, and what it imports is there."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def check_command(words: list[str]) -> None:
    """A command that exists, with options that it has."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    match words:
        case ["tailrisk", *rest]:
            rest = rest[: rest.index("&")] if "&" in rest else rest
            if "--config" in rest:
                at = rest.index("--config")
                rest = rest[:at] + rest[at + 2 :]
            parse_commands(with_config(rest, _BY_NAME), _BY_NAME)
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"no target {target}"
        case ["python", script, *_] if script.startswith("experiments/"):
            assert (ROOT / script).is_file(), f"no {script}"
        case ["pip", "install", *what] if what:
            extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")
            for name in re.findall(r"\[(\w+)\]", " ".join(what)):
                assert f"\n{name} = [" in extras[1], f"no extra {name}"
        case _:
            raise AssertionError(f"what is {shlex.join(words)!r}?")


def matches(shown: str, said: str) -> bool:
    """Whether a page shows what was printed."""
    pattern, numbers = "", []
    for part in re.split(rf"(\.\.\.|{_NUMBER}|\s+)", shown.strip()):
        if part == "...":
            pattern += r".*?"
        elif re.fullmatch(_NUMBER, part):
            pattern += f"({_NUMBER})"
            numbers.append(float(part.replace(",", "")))
        else:
            pattern += r"\s+" if part.isspace() else re.escape(part)
    found = re.fullmatch(pattern, said.strip(), re.DOTALL)
    if found is None:
        return False
    values = [float(value.replace(",", "")) for value in found.groups()]
    return all(abs(a - b) <= 0.02 * abs(b) for a, b in zip(values, numbers, strict=True))
