"""How processes that share a run learn that one of them is gone.

Each holds a connection to the first, which the system closes when either end dies, however it
dies. jax notices a lost process too, but only when its heartbeats have been missing for a while,
and then aborts with a dump.
"""

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable

Lost = Callable[[int], None]

_LEFT = b"left"


class Lifeline:
    """The first process's end: hears of every loss and passes it on.

    Attributes:
      address: HOST:PORT/WORD, which the others connect with.
    """

    def __init__(self, host: str, lost: Lost):
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        self._word = secrets.token_hex(8)
        self._lost, self._others = lost, list[socket.socket]()
        self._lock, self._over = threading.Lock(), False
        self.address = f"{host}:{self._server.getsockname()[1]}/{self._word}"
        _in_background(self._accept)

    def leave(self) -> None:
        """From here on this process may end."""
        self._over = True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                other, _ = self._server.accept()
                _in_background(self._listen, other)

    def _listen(self, other: socket.socket) -> None:
        with other, contextlib.suppress(OSError, ValueError), other.makefile("rb") as lines:
            word, index = lines.readline().decode().split()
            if word != self._word:
                return
            with self._lock:
                self._others.append(other)
            left = _line(lines) == _LEFT
            with self._lock:
                if left or self._over:
                    return
                self._over = True  # the others stop now, which is no news
                for one in self._others:
                    with contextlib.suppress(OSError):
                        one.sendall(f"{index}\n".encode())
            self._lost(int(index))


class Connection:
    """Another process's end: hears from the first whether it and the rest are there."""

    def __init__(self, address: str, index: int, lost: Lost):
        where, word = address.split("/")
        host, port = where.rsplit(":", 1)
        self._first = socket.create_connection((host.strip("[]"), int(port)), timeout=60)
        self._first.settimeout(None)
        self._first.sendall(f"{word} {index}\n".encode())
        self._lost, self._over = lost, False
        _in_background(self._listen)

    def leave(self) -> None:
        """From here on this process may end, and the first too."""
        self._over = True
        with contextlib.suppress(OSError):
            self._first.sendall(_LEFT + b"\n")

    def _listen(self) -> None:
        with self._first, self._first.makefile("rb") as lines:
            index = _line(lines)
        if not self._over:
            self._lost(int(index or 0))


def _line(lines) -> bytes:
    """The next line, empty where the other end is gone."""
    try:
        return lines.readline().strip()
    except OSError:
        return b""


def _in_background(function: Callable, *args: object) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()
