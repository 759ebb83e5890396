"""Small runs for tests, and what tests look at in a run's folder."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tailrisk_jax.cli import main
from tailrisk_jax.models import save_model
from tailrisk_jax.studies import Settings, Weighting
from tests.oracles import random_model, tiny_config
from tests.policies.word_tokenizer import IDS, WORDS, word_tokenizer

QUERIES = {"cake": "how to bake a cake", "kind": "how to be kind", "greeting": "hello"}
RESULTS = ("estimates.parquet", "samples.parquet", "summary.json")
SHARDS = ("samples/*.parquet", "judgements/*.parquet")


def save_tiny(folder: Path) -> Path:
    """Two checkpoints, `model` and `other`, over the same words, and queries.jsonl."""
    for name, seed in (("model", 0), ("other", 1)):
        config = tiny_config(vocab_size=len(WORDS), end_ids=(IDS["</s>"],), max_positions=64)
        model = dataclasses.replace(random_model(config, seed), tokenizer=word_tokenizer())
        save_model(model, folder / name)
    lines = [json.dumps({"id": name, "prompt": text}) for name, text in QUERIES.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    return folder


def command_for(tiny: Path, out: Path | str, **changes) -> list[str]:
    """`tailrisk estimate` with 24 answers to each of three queries, in chunks of 6.

    Args:
      changes: of its options; None leaves one out.
    """
    options = {
        "model": tiny / "model",
        "queries": tiny / "queries.jsonl",
        "proposal": "0.5*target + 0.5*target@2",
        "event": "cake",
        "samples": 24,
        "max_new_tokens": 6,
        "chunk_size": 6,
        "out": out,
    } | changes
    flags = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    return ["estimate", "--quiet", *(f"--{name}={value}" for name, value in flags.items())]


def contents(run: Path, *names: str) -> dict[str, bytes]:
    """The files of a run whose bytes may not depend on how often it was started.

    Others do: sessions.jsonl has a line for each start, and the manifests have one for each time
    that a shard was written.
    """
    names = names or (*RESULTS, *SHARDS, "study.json", "study.yaml", "rounds.json")
    found = [path for name in names for path in sorted(run.glob(name))]
    return {str(path.relative_to(run)): path.read_bytes() for path in found if path.is_file()}


def leftovers(run: Path) -> list[Path]:
    """Temporary files."""
    return [path for path in run.rglob(".*") if not path.name.startswith(".lock")]


def table(run: Path, name: str = "estimates") -> dict[str, list]:
    """A table of the results, by column."""
    return pq.read_table(run / f"{name}.parquet").to_pydict()


def assert_same_but_for_rounding(run, wanted):
    """What holds for runs over other batches or devices."""
    ours, theirs = table(run, "samples"), table(wanted, "samples")
    for name in ("query_id", "sample", "tokens", "text", "component", "score", "ended"):
        assert ours[name] == theirs[name], name
    for name in ("log_p", "log_q", "component_log_q"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-4)
    for name in ("value", "lower", "upper", "ess_harm"):
        np.testing.assert_allclose(table(run)[name], table(wanted)[name], rtol=1e-3)


def write_study(run: Path, queries: list[dict]) -> None:
    """The study.json of a run whose results are made up.

    Args:
      queries: id, content and metadata of each.
    """
    study = {
        "format": 1, "estimand": "E[score by toy]", "identity": {},
        "settings": dataclasses.asdict(Settings()),
        "weighting": dataclasses.asdict(Weighting(["target"], None, 0)), "selection": {},
        "origin": None, "queries": queries,
    }  # fmt: skip
    (run / "study.json").write_text(json.dumps(study))


def refused(argv, capsys) -> str:
    """The one line that a command is refused with."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("tailrisk: ")
    return lines[0]
