"""A checkpoint of fifteen words, runs of it, and processes that make them."""

import functools

import pytest

from tailrisk_jax.cli import main
from tests.studies.runs import command_for, save_tiny
from tests.studies.spawner import Spawner


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def spawner(tmp_path_factory):
    with Spawner(tmp_path_factory.mktemp("errors")) as spawner:
        yield spawner


@pytest.fixture(scope="session")
def command(tiny):
    return functools.partial(command_for, tiny)


@pytest.fixture(scope="session")
def whole(command, tmp_path_factory):
    """A finished run; tests that change it take a copy."""
    run = tmp_path_factory.mktemp("whole") / "run"
    main(command(run))
    return run


@pytest.fixture(scope="session")
def second(command, tmp_path_factory):
    """The same under another seed."""
    run = tmp_path_factory.mktemp("second") / "run"
    main(command(run, seed=1))
    return run
