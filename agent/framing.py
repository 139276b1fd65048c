"""The bytes of the bulk plane, and what both of its ends ask of a TCP connection.

Owns the wire format: the client sends HELLO, the server answers with ANSWER and, if that grants
the stream, with HEADER and bytes for each unit, and last a HEADER whose index is END. All integers
are big-endian; nothing has a length that the receiver did not know before. Owns too when a peer
counts as stalled. Promises nothing about who the peer is: that is TLS's part.
"""

import socket
import struct
import time
from enum import IntEnum

from everstep.agent.tickets import TOKEN_BYTES

MAGIC = b"EVBK"
VERSION = 1
HELLO = struct.Struct(f"!4sI{TOKEN_BYTES}s")
"""Magic, version, token."""
ANSWER = struct.Struct("!4sI")
"""Magic, status."""
HEADER = struct.Struct("!II16s")
"""Index, length, digest; or END, status, zeros."""
END = 0xFFFFFFFF

_LEAST_BYTES = 16 << 10
"""What must have moved within the stall timeout, or the rest if that is less."""
_TIMEVAL = struct.Struct("@ll")
_KEEPALIVE_IDLE_S = 5
_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_PROBES = 3


class Status(IntEnum):
    """How the server answers a stream, or ends it."""

    GRANTED = 0
    UNKNOWN_TOKEN = 1
    USED_TOKEN = 2
    EXPIRED_TOKEN = 3
    BUSY = 4
    WRONG_VERSION = 5
    UNREADABLE = 6


_MEANINGS = {
    Status.UNKNOWN_TOKEN: "it does not know the ticket; it may have been restarted",
    Status.USED_TOKEN: "the ticket was used before; each is good for one stream",
    Status.EXPIRED_TOKEN: "the ticket has expired",
    Status.BUSY: "it serves as many streams as it may",
    Status.WRONG_VERSION: f"it does not speak version {VERSION} of the bulk plane",
    Status.UNREADABLE: "it could not read its copy",
}


def meaning(status: int) -> str:
    """A status in words, for messages; any number may have been received."""
    for known, words in _MEANINGS.items():
        if status == known:
            return words
    return f"it answered status {status}, which this version does not know"


class Stalled(Exception):
    """The peer did not move enough within the stall timeout; does not leave the bulk plane."""


class Progress:
    """Whether the other end of a connection still moves; a trickle does not count."""

    def __init__(self, stall_timeout_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._window_began_s = time.monotonic()
        self._window_bytes = 0

    def moved(self, count_bytes: int) -> None:
        """Note what one call moved, perhaps nothing; the caller still wants more.

        Raises:
            Stalled: If too little moved for too long.
        """
        self._window_bytes += count_bytes
        now_s = time.monotonic()
        if self._window_bytes >= _LEAST_BYTES:
            self._window_began_s, self._window_bytes = now_s, 0
        elif now_s - self._window_began_s >= self._stall_timeout_s:
            raise Stalled(f"{self._window_bytes} bytes in {self._stall_timeout_s:g} s")


def prepare(connection: socket.socket, stall_timeout_s: float) -> None:
    """Set what both ends want: no delays, and dead links noticed.

    The socket stays blocking for Python and gets its timeouts from the kernel, which saves a poll
    for every call: a call that timed out raises BlockingIOError or returns less than asked for.

    Args:
        connection: Before any TLS.
        stall_timeout_s: For every blocking call, and for data that nobody acknowledges.
    """
    connection.settimeout(None)
    timeout = _TIMEVAL.pack(int(stall_timeout_s), int(stall_timeout_s % 1 * 1e6))
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(int(stall_timeout_s * 1e3), 1)),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES),
    ):
        connection.setsockopt(level, option, value)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 host stands in brackets.

    Raises:
        ValueError: If it is neither.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
