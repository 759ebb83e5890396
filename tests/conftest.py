"""Shared by all tests: on the CPU unless the environment says otherwise, compiled once, offline."""

import gc
import os
from pathlib import Path

SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for name, value in SETTINGS.items():  # before jax is imported, and for processes that tests start
    os.environ.setdefault(name, value)

import jax  # noqa: E402
import pytest  # noqa: E402

assert jax.config.jax_compilation_cache_dir, "jax was imported before tests/conftest.py"


def pytest_configure(config):
    # Two test processes may write one cache entry at a time; jax then compiles again, and says so.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache"
    )


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Forgets compiled programs before the process runs out of memory mappings.

    Each takes several, Linux grants a process 65,530, and XLA crashes without. Not every module
    forgets, since what modules share would be traced again.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 45_000:
        jax.clear_caches()
        gc.collect()
