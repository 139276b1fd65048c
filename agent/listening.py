"""The door of the bulk plane: one thread that accepts connections, and turns away what is too many.

Owns the listening socket. Promises that a peer that is turned away is told so, that it can hold up
nobody and no more than a few such peers are kept waiting for their end. Knows no tickets.
"""

import errno
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from everstep.agent.framing import HELLO, join_address

_SEND_BUFFER_BYTES = 512 << 10
"""The kernel doubles it: 1 MiB a stream under way fills 10 GbE up to 0.8 ms. With 4 MiB, which is
what Linux grows to by itself, two streams over loopback take twice as long: see benchmarks/wire.py.
"""
_MAX_LINGERING = 32
_LINGER_TIMEOUT_S = 2.0
_TICK_S = 0.5
_CLOSE_TIMEOUT_S = 5.0


class Listener:
    """Accepts until it is closed."""

    def __init__(
        self,
        host: str,
        port: int,
        backlog: int,
        *,
        begin: Callable[[socket.socket, str], bytes | None],
        tick: Callable[[], None],
    ) -> None:
        """Prepare; `start` listens.

        Args:
            host: The address to listen at.
            port: 0 for any that is free.
            backlog: Connections that may wait to be accepted.
            begin: Takes a connection over, given its peer's address, and returns None; or does
                not, and returns what to tell the peer. Must not block.
            tick: Called a few times a second.
        """
        self._host, self._port, self._backlog = host, port, backlog
        self._begin = begin
        self._tick = tick
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._wake: socket.socket | None = None

    def start(self) -> str:
        """Listen; returns HOST:PORT.

        Raises:
            OSError: If the address cannot be had.
        """
        assert self._thread is None
        family, _, _, _, where = socket.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        door = socket.create_server((where[0], where[1]), family=family, backlog=self._backlog)
        door.setblocking(False)
        # Accepted sockets inherit it.
        door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        woken, self._wake = socket.socketpair()
        bound = door.getsockname()
        self._thread = threading.Thread(
            target=self._stand, args=(door, woken), name="bulk-door", daemon=True
        )
        self._thread.start()
        return join_address(bound[0], bound[1])

    def close(self) -> None:
        """Listen no more. Idempotent; bounded to a few seconds."""
        self._stopping.set()
        if self._wake is not None:
            self._wake.close()
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _stand(self, door: socket.socket, woken: socket.socket) -> None:
        refused: dict[socket.socket, float] = {}
        with selectors.DefaultSelector() as selector, door, woken:
            selector.register(door, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while not self._stopping.is_set():
                for key, _ in selector.select(_TICK_S):
                    if key.fileobj is door:
                        turned_away = self._accept(door, len(refused) < _MAX_LINGERING)
                        if turned_away is not None:
                            refused[turned_away] = time.monotonic() + _LINGER_TIMEOUT_S
                            selector.register(turned_away, selectors.EVENT_READ)
                now_s = time.monotonic()
                for one, until_s in list(refused.items()):
                    if now_s >= until_s or _has_left(one):
                        selector.unregister(one)
                        del refused[one]
                        one.close()
                self._tick()
            for one in refused:
                one.close()

    def _accept(self, door: socket.socket, may_linger: bool) -> socket.socket | None:
        """One connection; returned if it was refused and should be given time to read why."""
        try:
            connection, address = door.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                # Out of descriptors, most likely: the listening socket stays readable.
                self._stopping.wait(_TICK_S)
            return None
        answer = self._begin(connection, join_address(address[0], address[1]))
        if answer is None:
            return None
        connection.setblocking(False)
        with suppress(OSError):
            if answer and may_linger:
                connection.send(answer)
                connection.shutdown(socket.SHUT_WR)
                # Closed at once, its unread hello would become a reset that overtakes the answer.
                return connection
        connection.close()
        return None


def _has_left(refused: socket.socket) -> bool:
    try:
        return not refused.recv(HELLO.size)
    except BlockingIOError:
        return False
    except OSError:
        return True
