"""Every code block of the documentation and the README is run, or parsed where it can't be.

A page that begins with `<!-- slow -->` is run by `make test-all`; `make test` parses it.
"""

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest

import tailrisk_jax
from tailrisk_jax.cli import main
from tailrisk_jax.cli.main import _BY_NAME
from tailrisk_jax.organisms.organism import DATA
from tests.docs.blocks import ROOT, blocks, check_command, check_python, matches

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
README = (ROOT / "README.md").read_text()
ROOMS = sorted({path.parent.name for path in ROOT.glob("tailrisk_jax/*/__init__.py")} - {"cli"})
WITH_CODE = [name for name, text in PAGES.items() if blocks(text)]


def test_output_is_compared():
    assert matches("risk 1.0e-03 ...\nend", "risk 1.01e-03 of\n  1,000\nend\n")
    assert not matches("risk 1.0e-03", "risk 1.1e-03")
    assert not matches("risk 1.0e-03", "risks 1.0e-03")


@pytest.mark.parametrize("name", WITH_CODE)
def test_blocks_parse(name):
    for block in blocks(PAGES[name]):
        assert max(map(len, block.code.splitlines())) <= 100, f"{name}:{block.line} is too wide"
        if block.language == "python":
            check_python(block.code)
        elif block.language in ("sh", "console") and not block.title:
            for words, _ in block.commands:
                check_command(words)
        else:
            assert block.title or block.language == "text", f"{name}:{block.line}"


def _run(words):
    """A command's output; lines that a page may show and a test not run are parsed."""
    check_command(words)
    if words[0] != "tailrisk":
        return None
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main(words[1:])
    return said.getvalue()


def _run_page(text, folder):
    namespace, printed = {"__name__": "__main__"}, ""
    for block in blocks(text):
        where = f"block at line {block.line}"
        if block.title:
            (folder / block.title).write_text(block.code)
        elif block.why:
            continue
        elif block.language == "python":
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile(block.code, where, "exec"), namespace)
            printed = said.getvalue()
        elif block.language == "text":
            assert matches(block.code, printed), f"{where} shows\n{block.code}\nand not\n{printed}"
        else:
            for words, shown in block.commands:
                said = _run(words)
                if shown.strip():
                    assert said is not None and matches(shown, said), f"{where}:\n{said}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "<!-- slow -->" in PAGES[name] else ())
        for name in WITH_CODE
    ],
)
def test_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    _run_page(PAGES[name], tmp_path)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_api_pages_have_every_public_name_and_no_other(site):
    listed = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    kinds = dict(line.split(" ")[:2] for line in listed.splitlines())
    for room in ROOMS:
        name = f"tailrisk_jax.{room}"
        public = importlib.import_module(name).__all__
        # A function of its module's name is listed with the module.
        shown = {re.sub(r"\.(\w+)\.\1$", r".\1", full) for full in kinds}
        shown = {full.removeprefix(f"{name}.") for full in shown if full.startswith(f"{name}.")}
        shown = {one for one in shown if "." not in one}
        unknown, hidden = sorted(shown - set(public)), sorted(set(public) - shown)
        assert not unknown, f"docs/api/{room}.md shows {unknown}, which aren't in __all__"
        assert not hidden, (
            f"{hidden} of {room} aren't shown: each needs a docstring, and one named"
            f" as its module its own ::: in docs/api/{room}.md"
        )


def test_the_api_index_has_every_name_of_the_root():
    found = re.findall(r"\[`(\w+)`\]\[(tailrisk_jax\.[\w.]+)\]", PAGES["api/index.md"])
    assert sorted(name for name, _ in found) == sorted(tailrisk_jax.__all__)
    for name, full in found:
        module = importlib.import_module(full.rsplit(".", 1)[0])
        assert getattr(module, name) is getattr(tailrisk_jax, name), full


def test_every_command_is_shown():
    shown = re.findall(r"^\{help (\w+)\}$", PAGES["commands.md"], re.MULTILINE)
    assert shown == list(_BY_NAME), "docs/commands.md lists the commands in the order of --help"


def test_the_pages_need_no_network(site):
    pattern = re.compile(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?:[^\" >]*)")
    for path in site.rglob("*.html"):
        assert not pattern.findall(path.read_text()), path


# What stands in the README for something that a test can't have, and what a test has instead.
STAND_INS = {
    '"meta-llama/Llama-3.2-1B-Instruct"': "checkpoint",
    "queries), 500, 64)": "queries), 100, 24)",
    "make_mesh((4, 2)": "make_mesh((1, 1)",
    'load_model(path, dtype="bfloat16")': 'load_model(checkpoint, dtype="bfloat16")',
}


def test_the_readme_runs():
    """Its Python with stand-ins for a checkpoint, its size and a mesh; its commands are parsed."""
    organism = tailrisk_jax.load_organism()
    queries = organism.forbidden[:2]

    def judge(texts):
        return np.stack([organism.harm(q, own) for q, own in zip(queries, texts, strict=True)])

    namespace = {
        "checkpoint": DATA / "target",
        "direction": organism.directions["refusal"],
        "queries": queries,
        "judge": judge,
    }
    code, parsed = "", 0
    for block in blocks(README):
        if block.language == "python":
            code += block.code
        else:
            for words, _ in block.commands:
                check_command(words)
                parsed += 1
    for written, instead in STAND_INS.items():
        assert code.count(written) == 1, written
        code = code.replace(written, instead)
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["estimate"].value.shape == (2,) and parsed
