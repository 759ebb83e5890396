"""Loading as a user sees it: a bar where it takes long, the dtype of the device, a cache."""

import dataclasses
import json

import jax
import pytest
import yaml

from tailrisk_jax.cli import loading, main
from tailrisk_jax.cli.inputs import StudyOptions, load_inputs
from tailrisk_jax.cli.loading import resolved_dtype
from tailrisk_jax.models import load_model
from tests.cli.test_progress import Terminal, frames
from tests.studies.runs import command_for, refused, save_tiny

GB = 10**9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(loading.time, "monotonic", lambda: now[0])
    return now


def told(clock, seconds):
    """16 GB in so many seconds."""
    start = clock[0]
    with loading.loading(False) as tell:
        for done in range(1, 17):
            clock[0] = start + done * seconds / 16
            tell(done * GB, 16 * GB)


def test_a_long_load_shows_a_bar_on_a_terminal(monkeypatch, clock):
    terminal = Terminal(monkeypatch)
    told(clock, 0.9)
    told(clock, 32.0)
    shown = terminal.close()
    assert "16.0/16.0 GB" in frames(shown)[-1] and shown.count("parameters") >= 1
    quick = Terminal(monkeypatch)
    told(clock, 0.9)
    assert quick.close() == ""


def test_elsewhere_there_is_a_line_now_and_then(clock, capsys):
    told(clock, 9.0)
    assert capsys.readouterr().err == ""
    told(clock, 32.0)
    assert capsys.readouterr().err.splitlines() == [
        f"loaded {done}.0 of 16.0 GB of parameters" for done in (5, 10, 15)
    ]
    with loading.loading(True) as tell:
        clock[0] += 100
        tell(GB, GB)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("backend", "wanted"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_the_dtype_fits_the_device(monkeypatch, backend, wanted):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert resolved_dtype("auto") == wanted
    assert resolved_dtype("auto", "organism") == "float32"
    assert resolved_dtype("float16") == "float16"


@pytest.fixture
def reads(monkeypatch):
    """The checkpoints that are read, not counting the cache."""
    folders = []
    names = load_model.__globals__
    original = names["load_params"]
    noting = lambda folder, *a, **k: folders.append(folder.name) or original(folder, *a, **k)  # noqa: E731
    monkeypatch.setitem(names, "load_params", noting)
    return folders


def test_the_dtype_and_the_cache_are_those_of_all_that_is_loaded(tiny, tmp_path, reads):
    options = StudyOptions(
        model=str(tiny / "model"), queries=str(tiny / "queries.jsonl"), event="cake",
        dtype="bfloat16", weights_cache=tmp_path / "cache",
    )  # fmt: skip
    for _ in range(2):
        inputs = load_inputs(options, quiet=True)
        proposal = inputs.parse(f"checkpoint:{tiny / 'model'} & int8")
        assert inputs.identity()["dtype"] == "bfloat16"
        for policy in (inputs.target, proposal.policy):
            assert policy.model.params["embedding"].dtype == "bfloat16"
    assert reads == ["model"]
    plain = dataclasses.replace(options, dtype="auto", weights_cache=None)
    inputs = load_inputs(plain, quiet=True)
    assert inputs.options.dtype == inputs.identity()["dtype"] == "float32"
    assert reads == ["model"] * 2


@pytest.mark.slow
def test_a_run_keeps_its_dtype_and_its_cache(tiny, tmp_path, monkeypatch, capsys, reads):
    """Begun where bfloat16 is the default, it goes on in it anywhere."""
    out = tmp_path / "run"
    words = command_for(
        tiny, out, samples=4, proposal=f"0.5*target + 0.5*checkpoint:{tiny / 'model'} & int8",
        weights_cache=tmp_path / "cache",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("tailrisk_jax.cli.inputs.resolved_dtype", lambda *_: "bfloat16")
        main(words)
    assert yaml.safe_load((out / "study.yaml").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "study.json").read_text())["identity"]["dtype"] == "bfloat16"
    main(["resume", str(out), "--quiet"])
    assert reads == ["model"]
    assert "dtype" in refused(words, capsys)
