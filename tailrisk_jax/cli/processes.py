"""One run by several processes, on one machine or many."""

import dataclasses
import os
import re
import sys
from typing import Annotated, NoReturn

import jax
import tyro
from jax._src.distributed import global_state  # what only jax knows: who the first is

from tailrisk_jax.cli.lifeline import Connection, Lifeline
from tailrisk_jax.errors import InputError
from tailrisk_jax.studies import stop_writing

LOST = 3  # the exit code of a process that stops since another is gone
HEARTBEAT = 30  # seconds without one after which jax counts a process as lost, as of a dead network
_ADDRESS = "tailrisk/lifeline"

_lifelines: list[Lifeline | Connection] = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Options of commands that several processes can share."""

    processes: Annotated[str | None, tyro.conf.arg(metavar="auto|HOST:PORT,INDEX/COUNT")] = None
    """Share the run with other processes that are given the same command and see the same folder:
    auto on a TPU pod, Slurm, Open MPI or Kubernetes; elsewhere the first one's address and which
    this is, such as 10.0.0.1:1234,0/2."""


def join_processes(spec: str | None) -> None:
    """Finds the other processes; before anything is computed.

    From here on this process ends with exit code 3 and one line as soon as another is gone, and
    what libraries in C write to standard output is dropped: Gloo greets there.

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
    sys.stdout.flush()
    own = os.dup(sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(
        own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False
    )
    try:
        jax.distributed.initialize(**where, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--processes {spec}: the others were not found ({reason}); "
            "give HOST:PORT,INDEX/COUNT of processes that run"
        ) from error
    _lifelines.append(_lifeline())


def leave_processes() -> None:
    """This process has done its part; the others go on without it."""
    for lifeline in _lifelines:
        lifeline.leave()


def exit_now(code: int) -> NoReturn:
    """Ends this process, which waits for no other thread and no other process."""
    stop_writing()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _lifeline() -> Lifeline | Connection:
    client, count = global_state.client, global_state.num_processes
    assert client is not None and global_state.coordinator_address is not None

    def lost(index: int) -> None:
        print(
            f"tailrisk: process {index} of {count} is gone; what the run had finished is kept: "
            "give all processes the same command again to go on",
            file=sys.stderr,
            flush=True,
        )
        exit_now(LOST)

    if global_state.process_id == 0:
        lifeline = Lifeline(global_state.coordinator_address.rsplit(":", 1)[0], lost)
        client.key_value_set(_ADDRESS, lifeline.address)
        return lifeline
    address = client.blocking_key_value_get(_ADDRESS, 60_000)
    return Connection(address, global_state.process_id, lost)
