"""Who may import whom, what the functional core may touch, and what an import costs."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import tailrisk_jax
from tests.oracles import random_model, tiny_config
from tests.policies.word_tokenizer import WORDS, ids, word_tokenizer

PACKAGE = Path(tailrisk_jax.__file__).parent
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))

# What each room may import of the package; `errors` is open to all but the estimators.
LOWER = {
    "models": set(),
    "policies": {"models"},
    "estimators": set(),
    "forecasting": {"estimators"},
    "rollouts": {"models", "policies", "estimators"},
    "adaptation": {"models", "policies", "rollouts", "estimators"},
    "planning": {"models", "policies", "rollouts"},
}
NEVER = {"reports": {"models"}}
ORDER = ("models", "policies", "rollouts", "adaptation", "studies", "cli")
CORE = ("models", "policies", "rollouts", "estimators", "adaptation", "forecasting")
IO_MODULES = {
    "asyncio", "builtins", "datetime", "http", "io", "logging", "pathlib", "random",
    "requests", "shutil", "socket", "subprocess", "sys", "tempfile", "time", "tqdm", "urllib",
}  # fmt: skip
IO_CALLS = {"print", "open", "input", "exec", "eval", "__import__"}


def sources(room):
    return sorted((PACKAGE / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of all modules imported anywhere in a file, inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path) if name.startswith("tailrisk_jax.")]
    return {part[1] for part in parts} & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    for path in sources(room):
        others = rooms_imported(path) - {room}
        assert others <= LOWER.get(room, set(ROOMS)), path
        assert not others & NEVER.get(room, set()), path
        if room in ORDER:
            assert not others & set(ORDER[ORDER.index(room) :]), path
        assert room == "cli" or "cli" not in others, path


def test_estimators_import_only_arrays():
    for path in sources("estimators"):
        roots = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        assert roots <= {"jax", "jaxtyping", "flax", "numpy", "tailrisk_jax"}, path
        assert all(
            name.startswith("tailrisk_jax.estimators")
            for name in imported(path)
            if name.startswith("tailrisk_jax")
        ), path


@pytest.mark.parametrize("room", [room for room in CORE if room in ROOMS])
def test_the_functional_core_does_no_io(room):
    """No files, network, clocks, printing or logging, but where checkpoints are read."""
    for path in sources(room):
        if path.name in ("checkpoint.py", "loading.py", "tensor_files.py", "weights_cache.py"):
            continue
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & (IO_MODULES | {"torch", "transformers", "safetensors"}), path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in IO_CALLS, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "os" or node.attr == "cpu_count", path


def test_nothing_imports_torch():
    for path in PACKAGE.rglob("*.py"):
        assert "torch" not in {name.split(".")[0] for name in imported(path)}, path


def test_the_public_index():
    wanted = {
        "load_model", "Policy", "ablate", "steer", "encode", "logits", "sample", "log_prob",
        "mixture", "monte_carlo", "importance", "load_organism",
    }  # fmt: skip
    assert wanted <= set(tailrisk_jax.__all__)
    assert all(hasattr(tailrisk_jax, name) for name in tailrisk_jax.__all__)


def run_without_torch(script: str, *arguments) -> str:
    """The output of a script in a process that finds no torch, warnings being errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.modules['torch'] = None\n{script}"]
        + [str(argument) for argument in arguments],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_takes_no_torch_or_transformers():
    """In 3 seconds of one processor, however busy the machine is."""
    script = """
import time, tailrisk_jax
assert "transformers" not in sys.modules
print(time.process_time())
"""
    assert float(run_without_torch(script)) < 3


def test_a_checkpoint_is_loaded_and_encoded_for_without_torch(tmp_path):
    model = random_model(tiny_config(vocab_size=len(WORDS)))
    tailrisk_jax.save_model(dataclasses.replace(model, tokenizer=word_tokenizer()), tmp_path)
    script = """
from tailrisk_jax import encode, load_model
print(encode(load_model(sys.argv[1]), ["hello"]).tokens.tolist())
"""
    wanted = str([ids("<s> <user> hello </s> <assistant>")])
    assert run_without_torch(script, tmp_path).strip() == wanted
