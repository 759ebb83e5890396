"""One run by several processes, on one machine or many."""

import dataclasses
import re
from typing import Annotated

import jax
import tyro

from tailrisk_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Options of commands that several processes can share."""

    processes: Annotated[str | None, tyro.conf.arg(metavar="auto|HOST:PORT,INDEX/COUNT")] = None
    """Share the run with other processes that are given the same command and see the same folder:
    auto on a TPU pod, Slurm, Open MPI or Kubernetes; elsewhere the first one's address and which
    this is, such as 10.0.0.1:1234,0/2."""


def join_processes(spec: str | None) -> None:
    """Finds the other processes; before anything is computed.

    Raises:
      InputError: a text that isn't understood, or nobody found.
    """
    if spec is None:
        return
    where: dict = {}
    if spec != "auto":
        match = re.fullmatch(r"(?P<address>\S+:\d+),(?P<index>\d+)/(?P<count>\d+)", spec)
        if match is None or int(match["index"]) >= int(match["count"]):
            raise InputError(
                f"--processes {spec!r} is neither auto nor HOST:PORT,INDEX/COUNT; "
                "give e.g. 10.0.0.1:1234,0/2"
            )
        where = {
            "coordinator_address": match["address"],
            "num_processes": int(match["count"]),
            "process_id": int(match["index"]),
        }
    try:
        jax.distributed.initialize(**where)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--processes {spec}: the others were not found ({reason}); "
            "give HOST:PORT,INDEX/COUNT of processes that run"
        ) from error
