"""Who hears of whom: connections within this process, which die when their sockets are shut."""

import contextlib
import queue
import socket
import time

import pytest

from tailrisk_jax.cli.lifeline import Connection, Lifeline


@pytest.fixture
def connected():
    """Makes the first, the others, and a queue of (who heard, who is gone)."""
    with contextlib.ExitStack() as stack:

        def connect(count):
            heard = queue.Queue()
            first = Lifeline("127.0.0.1", lambda index: heard.put((0, index)))
            others = [
                Connection(first.address, k, lambda index, k=k: heard.put((k, index)))
                for k in range(1, count)
            ]
            for one in (first._server, *(other._first for other in others)):
                stack.callback(cut, one)
            while len(first._others) < count - 1:
                time.sleep(1e-3)
            return first, others, heard

        yield connect


def cut(end: socket.socket) -> None:
    """As the system does when a process dies."""
    with contextlib.suppress(OSError):  # that is not there any more
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def test_all_hear_that_one_is_gone(connected):
    _, others, heard = connected(4)
    cut(others[1]._first)
    told = {heard.get(timeout=5) for _ in range(4)}
    assert told == {(0, 2), (1, 2), (3, 2), (2, 0)}  # the last is cut off itself


def test_all_hear_that_the_first_is_gone(connected):
    first, _, heard = connected(3)
    first._over = True  # it is dead
    for other in first._others:
        cut(other)
    assert {heard.get(timeout=5) for _ in range(2)} == {(1, 0), (2, 0)}


def test_who_has_left_is_not_missed(connected):
    first, others, heard = connected(3)
    others[0].leave()
    cut(others[0]._first)
    first.leave()
    others[1].leave()
    cut(others[1]._first)
    with pytest.raises(queue.Empty):
        heard.get(timeout=0.3)


def test_strangers_are_not_heard(connected):
    first, _, heard = connected(2)
    port = int(first.address.split("/")[0].rsplit(":", 1)[1])
    for line in (b"wrong 1\n", b"\xff\n", b""):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(line)
    with pytest.raises(queue.Empty):
        heard.get(timeout=0.3)
