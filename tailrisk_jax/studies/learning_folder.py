"""The folder of a learning: what each round drew, and what was trained on it.

    DIR/learn.json              settings, and per round what was drawn, seen and spent
    DIR/rounds/N/draws/         the harmful responses of round N, and their log-probabilities
    DIR/rounds/N/adapter/       the adapter trained after it

Both parts of a round are Orbax checkpoints, there whole or not at all.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from tailrisk_jax.adaptation.learning import Harmful
from tailrisk_jax.errors import InputError
from tailrisk_jax.models import LowRank
from tailrisk_jax.studies.store import read_json, write_json


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """The first part of a round.

    Attributes:
      hits: its harmful responses.
      log_q: of these, under the target, the K parts of the start and the adapter of every earlier
        round, [1 + K + N, Q, H].
      record: for learn.json.
    """

    hits: Harmful
    log_q: Float[np.ndarray, "C Q H"]
    record: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """The second part of a round.

    Attributes:
      adapter: in float32.
      earlier: log q of the hits of all rounds before, side by side, under the latest adapter that
        it was trained beside; None in the first round, [Q, H].
      record: for learn.json.
    """

    adapter: dict[str, Any]
    earlier: Float[np.ndarray, "Q H"] | None
    record: dict[str, Any]


class LearningFolder:
    """Keeps rounds, and finds them again.

    Args:
      identity: of all that the rounds depend on.
      head: the beginning of learn.json.

    Raises:
      InputError: the folder has another identity.
    """

    def __init__(self, folder: Path, identity: str, head: Mapping[str, Any]):
        self._folder, self._head = folder, {"identity": identity, **head}
        if (folder / "learn.json").exists():
            kept = read_json(folder / "learn.json", f"{folder} is damaged")
            if kept.get("identity") != identity:
                raise InputError(
                    f"{folder} holds a proposal that was learned with other options; give them, "
                    "or another --out"
                )

    def log(self, records: Sequence[dict[str, Any]], best: int) -> dict[str, Any]:
        """Writes learn.json, and returns what is in it."""
        content = {**self._head, "best_round": best, "rounds": list(records)}
        write_json(self._folder / "learn.json", content)
        return content

    def write_drawn(self, number: int, drawn: Drawn) -> None:
        """Keeps what a round drew."""
        hits = dataclasses.asdict(drawn.hits)
        self._write(number, "draws", {"hits": hits, "log_q": drawn.log_q}, drawn.record)

    def read_drawn(self, number: int) -> Drawn | None:
        """What a round drew; None before that is there."""
        tree, record = self._read(number, "draws")
        return tree and Drawn(Harmful(**tree["hits"]), tree["log_q"], record)

    def write_trained(self, number: int, trained: Trained) -> None:
        """Keeps what a round trained."""
        leaves: Any = traverse_util.flatten_dict(trained.adapter, sep="/")
        tree: dict[str, Any] = {
            "adapter": {path: dataclasses.asdict(one) for path, one in leaves.items()}
        }
        if trained.earlier is not None:
            tree["earlier"] = trained.earlier
        self._write(number, "adapter", tree, trained.record)

    def read_trained(self, number: int) -> Trained | None:
        """What a round trained; None before that is there."""
        tree, record = self._read(number, "adapter")
        if tree is None:
            return None
        leaves = {tuple(path.split("/")): LowRank(**one) for path, one in tree["adapter"].items()}
        return Trained(traverse_util.unflatten_dict(leaves), tree.get("earlier"), record)

    def _path(self, number: int, part: str) -> Path:
        return (self._folder / "rounds" / str(number) / part).absolute()

    def _write(self, number: int, part: str, tree: dict, record: dict[str, Any]) -> None:
        import orbax.checkpoint as ocp  # slow

        whole = {**tree, "record": np.frombuffer(json.dumps(record).encode(), np.uint8)}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self._path(number, part), whole)

    def _read(self, number: int, part: str) -> tuple[Any, dict[str, Any]]:
        import orbax.checkpoint as ocp  # slow

        if not self._path(number, part).exists():
            return None, {}
        with ocp.StandardCheckpointer() as checkpointer:
            tree: Any = checkpointer.restore(self._path(number, part))
        tree = jax.tree.map(np.asarray, tree)
        return tree, json.loads(tree.pop("record").tobytes())
