"""What a run rests on, for the record: files, versions, devices."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from tailrisk_jax.judges import Judge
from tailrisk_jax.models import Model

_PACKAGES = (
    "tailrisk-jax", "jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "safetensors",
    "pyarrow", "openai",
)  # fmt: skip
_SOURCE = Path(__file__).parents[1]
_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of the files of a checkpoint folder, by name.

    The hub's cache names a large file by its hash already; it is not read again.
    """
    files = [path] if path.is_file() else [f for pattern in _FILES for f in path.glob(pattern)]
    return {file.name: _sha256(file) for file in sorted(files)}


def model_identity(name: str, folder: Path) -> dict[str, Any]:
    """A checkpoint: its files' hashes, and its revision where the folder is of the hub's cache."""
    revision = folder.name if folder.parent.name == "snapshots" else None
    return {"name": name, "revision": revision, "files": file_hashes(folder)}


def judge_identity(judge: Judge) -> dict[str, Any]:
    """All that a score depends on."""
    return {"name": judge.name, "version": judge.version, "settings": dict(judge.settings)}


def tokens_identity(model: Model) -> dict[str, Any]:
    """What token ids mean, and how a query becomes a prompt."""
    tokenizer = model.tokenizer
    return {
        "end_ids": list(model.config.end_ids),
        "vocabulary": None if tokenizer is None else content_hash(tokenizer.get_vocab()),
        "chat_template": None if tokenizer is None else content_hash(tokenizer.chat_template),
    }


def content_hash(content: Any) -> str:
    """A short hash of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def session(options: Mapping[str, Any]) -> dict[str, Any]:
    """One process that works on a run: when, with what, on what."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": dict(options),
        "processes": jax.process_count(),
        "git": {"here": _git_state(Path.cwd()), "tailrisk_jax": _git_state(_SOURCE)},
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Versions and devices."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
    }


def _sha256(file: Path) -> str:
    name = file.resolve().name
    if file.is_symlink() and len(name) == 64 and set(name) <= set("0123456789abcdef"):
        return name
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> str | None:
    """The commit that a folder is of, "+" where files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    if "site-packages" in folder.parts:
        return None  # installed; the repository around it is another's
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
