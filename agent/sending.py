"""The serving end of the bulk plane: streams of units for whoever shows a ticket.

Owns the threads of the streams and the outstanding tickets. Promises that threads,
connections and tickets are bounded, that a peer that does not move is dropped within the stall
timeout, that each `Source` is closed exactly once, and that whatever is refused is counted and the
peer named in the log. Does not know what the bytes are, and does not check them: digests are sent
along as given. If the bytes of a file change while they are sent, the receiver sees it by them.
"""

import errno
import logging
import os
import secrets
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from everstep.agent.framing import (
    ANSWER,
    END,
    HEADER,
    HELLO,
    MAGIC,
    VERSION,
    Progress,
    Stalled,
    Status,
    join_address,
    prepare,
    split_address,
)
from everstep.agent.listening import Listener
from everstep.agent.rates import Rate
from everstep.agent.tickets import TOKEN_BYTES, IssuedTicket, Tickets, Verdict
from everstep.proto.errors import DeadlineExceeded, PeerUnavailable
from everstep.proto.ids import UNIT_BYTES

_log = logging.getLogger(__name__)

_SLICE_BYTES = 128 << 10
"""What a rate lets through at a time, so that a slow stream still moves steadily."""
_BACKLOG = 128
_CLOSE_TIMEOUT_S = 5.0
_LOG_INTERVAL_S = 10.0
_RESET = struct.pack("ii", 1, 0)
_NO_DIGEST = bytes(16)
_REFUSALS = {
    Verdict.UNKNOWN: (Status.UNKNOWN_TOKEN, "refused_token"),
    Verdict.USED: (Status.USED_TOKEN, "refused_replay"),
    Verdict.EXPIRED: (Status.EXPIRED_TOKEN, "refused_expired"),
}
_SOURCE_ERRORS = {errno.EIO, errno.EBADF, errno.EINVAL, errno.ESTALE, errno.ENOMEM, errno.EISDIR}


@dataclass(frozen=True, slots=True)
class FilePiece:
    """One unit, sent from an open descriptor.

    Attributes:
        index: The unit's number, as the receiver expects it.
        descriptor: Stays open until the source is closed.
        offset: Where in the file.
        length: 1 to UNIT_BYTES.
        digest: What the bytes should have.
    """

    index: int
    descriptor: int
    offset: int
    length: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class BufferPiece:
    """One unit, sent from memory.

    Attributes:
        index: The unit's number, as the receiver expects it.
        data: 1 to UNIT_BYTES bytes; unchanged until the source is closed.
        digest: What the bytes should have.
    """

    index: int
    data: memoryview
    digest: bytes

    @property
    def length(self) -> int:
        """How many bytes."""
        return len(self.data)


Piece = FilePiece | BufferPiece


@dataclass(frozen=True, slots=True)
class Source:
    """What one stream sends.

    Attributes:
        pieces: In this order.
        close: Called exactly once, from any thread: when the stream ended and the peer has it all,
            when it failed, or when its ticket expired.
    """

    pieces: Sequence[Piece]
    close: Callable[[], None]


class BulkServer:
    """Listens, and serves one stream a ticket."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        max_streams: int,
        max_tickets: int,
        ticket_timeout_s: float,
        stall_timeout_s: float,
        advertised_host: str = "",
        rate: Rate | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare; nothing is opened before `start`.

        Args:
            host: The address to listen at.
            port: 0 for any that is free.
            max_streams: Connections, and so threads, at one time.
            max_tickets: Tickets outstanding at one time.
            ticket_timeout_s: How long a ticket is good for.
            stall_timeout_s: How long a peer may keep a stream waiting.
            advertised_host: Where others reach this one, if `host` stands for all addresses.
            rate: Shared by all streams.
            tls: A server's context; None for none.
        """
        self._max_streams = max_streams
        self._stall_timeout_s = stall_timeout_s
        self._rate = rate
        self._tls = tls
        self._lock = threading.Lock()
        self._tickets: Tickets[_Granted] = Tickets(max_tickets, ticket_timeout_s)
        self._max_tickets = max_tickets
        self._counters: Counter[str] = Counter()
        self._links: dict[socket.socket, threading.Thread] = {}
        self._stopping = threading.Event()
        self._listener = Listener(host, port, _BACKLOG, begin=self._begin, tick=self._expire)
        self._address = ""
        self._advertised_host = advertised_host
        self._logged_s = -_LOG_INTERVAL_S

    @property
    def address(self) -> str:
        """HOST:PORT where others reach it; empty before `start`."""
        return self._address

    @property
    def counters(self) -> Mapping[str, int]:
        """How often what happened since the start; a copy.

        streams, completed, bytes_sent; refused_hello, refused_token, refused_replay,
        refused_expired, refused_busy, refused_tls; stalled, reset, unreadable; tickets_issued,
        tickets_expired, tickets_refused.
        """
        with self._lock:
            return Counter(self._counters)

    def start(self) -> None:
        """Listen.

        Raises:
            OSError: If the address cannot be had.
        """
        self._address = self._listener.start()
        if self._advertised_host:
            port = split_address(self._address)[1]
            self._address = join_address(self._advertised_host, port)

    def close(self) -> None:
        """Cut every stream, close every source. Idempotent; bounded to a few seconds."""
        self._stopping.set()
        self._listener.close()
        with self._lock:
            left = self._tickets.drain()
            links = dict(self._links)
            for connection in links:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for granted in left:
            _release(granted.source)
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in links.values():
            thread.join(max(deadline_s - time.monotonic(), 0))

    def issue(self, source: Source, *, rate: Rate | None = None) -> IssuedTicket:
        """Promise a stream to whoever shows the ticket. Takes the source over, whatever happens.

        Args:
            source: What to send.
            rate: For this stream, besides the one of all streams.

        Raises:
            PeerUnavailable: If too many tickets are outstanding, or this server has stopped.
        """
        lengths = [piece.length for piece in source.pieces]
        assert all(0 < length <= UNIT_BYTES for length in lengths)
        assert all(0 <= piece.index < END for piece in source.pieces)
        token = secrets.token_bytes(TOKEN_BYTES)
        self._expire()
        with self._lock:
            problem = f"all {self._max_tickets} tickets are taken" if self._tickets.full else ""
            problem = "it is shutting down" if self._stopping.is_set() else problem
            if not problem:
                self._tickets.issue(token, _Granted(source, rate), time.monotonic())
            self._counters["tickets_refused" if problem else "tickets_issued"] += 1
        if problem:
            _release(source)
            raise PeerUnavailable(self._address, problem)
        return IssuedTicket(token, self._address, len(lengths), sum(lengths))

    def _begin(self, connection: socket.socket, peer: str) -> bytes | None:
        """Give a connection a thread, or say why not."""
        with self._lock:
            busy = len(self._links) >= self._max_streams or self._stopping.is_set()
            if not busy:
                self._links[connection] = thread = threading.Thread(
                    target=self._serve, args=(connection, peer), name=f"bulk-{peer}", daemon=True
                )
        if not busy:
            try:
                thread.start()
                return None
            except RuntimeError:
                # No more threads to be had.
                with self._lock:
                    del self._links[connection]
        self._note("refused_busy", peer, f"all {self._max_streams} streams are taken")
        # A client that expects TLS could not read it.
        return b"" if self._tls is not None else ANSWER.pack(MAGIC, Status.BUSY)

    def _expire(self) -> None:
        with self._lock:
            over = self._tickets.expire(time.monotonic())
            self._counters["tickets_expired"] += len(over)
        for granted in over:
            _release(granted.source)

    def _serve(self, connection: socket.socket, peer: str) -> None:
        """A stream's thread."""
        link: socket.socket = connection
        granted: _Granted | None = None
        try:
            prepare(connection, self._stall_timeout_s)
            link = self._secured(connection)
            granted = self._admit(link, peer)
            if granted is not None:
                self._count("streams", 1)
                rates = [rate for rate in (self._rate, granted.rate) if rate is not None]
                _Stream(link, rates, self._stall_timeout_s, self._stopping, self._count).send(
                    granted.source.pieces
                )
                self._count("completed", 1)
        except _Unreadable as error:
            self._note("unreadable", peer, str(error))
            _cut(link)
        except (Stalled, TimeoutError, BlockingIOError, DeadlineExceeded) as error:
            self._note("stalled", peer, str(error))
            _cut(link)
        except ssl.SSLError as error:
            self._note("refused_tls" if granted is None else "reset", peer, str(error))
            _cut(link)
        except OSError as error:
            self._note("reset", peer, str(error))
            _cut(link)
        finally:
            link.close()
            connection.close()
            if granted is not None:
                _release(granted.source)
            with self._lock:
                del self._links[connection]

    def _secured(self, connection: socket.socket) -> socket.socket:
        if self._tls is None:
            return connection
        # A duplicate, so that close() can cut the connection whatever state TLS is in.
        link = self._tls.wrap_socket(
            connection.dup(), server_side=True, do_handshake_on_connect=False
        )
        try:
            link.settimeout(self._stall_timeout_s)
            link.do_handshake()
        except BaseException:
            link.close()
            raise
        return link

    def _admit(self, link: socket.socket, peer: str) -> "_Granted | None":
        """Read the hello and answer it."""
        magic, version, token = HELLO.unpack(_hello(link, self._stall_timeout_s))
        granted = None
        if magic != MAGIC:
            # Not one of ours, so there is nobody to answer.
            self._note("refused_hello", peer, "it did not send our magic bytes")
            return None
        if version != VERSION:
            status, counter = Status.WRONG_VERSION, "refused_hello"
        else:
            with self._lock:
                verdict, granted = self._tickets.redeem(token, time.monotonic())
            status, counter = _REFUSALS.get(verdict, (Status.GRANTED, ""))
        try:
            link.sendall(ANSWER.pack(MAGIC, status))
        except BaseException:
            if granted is not None:
                _release(granted.source)
            raise
        if counter:
            self._note(counter, peer, status.name.lower().replace("_", " "))
            _await_end(link, self._stall_timeout_s)
        return granted

    def _count(self, counter: str, by: int) -> None:
        with self._lock:
            self._counters[counter] += by

    def _note(self, counter: str, peer: str, detail: str) -> None:
        """Count what went wrong, and say so now and then."""
        now_s = time.monotonic()
        with self._lock:
            self._counters[counter] += 1
            quiet = now_s - self._logged_s < _LOG_INTERVAL_S or self._stopping.is_set()
            if not quiet:
                self._logged_s = now_s
        if not quiet:
            _log.warning("bulk stream of %s: %s (%s)", peer, counter.replace("_", " "), detail)


@dataclass(frozen=True, slots=True)
class _Granted:
    source: Source
    rate: Rate | None


class _Unreadable(Exception):
    """The source did not have the bytes; they are not the peer's fault."""


class _Stream:
    """One granted stream."""

    def __init__(
        self,
        link: socket.socket,
        rates: Sequence[Rate],
        stall_timeout_s: float,
        stopping: threading.Event,
        count: Callable[[str, int], None],
    ) -> None:
        self._link = link
        self._encrypted = isinstance(link, ssl.SSLSocket)
        self._rates = rates
        self._stall_timeout_s = stall_timeout_s
        self._stopping = stopping
        self._count = count
        self._slice_bytes = _SLICE_BYTES if rates or self._encrypted else UNIT_BYTES
        self._buffer = memoryview(bytearray(_SLICE_BYTES if self._encrypted else 0))

    def send(self, pieces: Sequence[Piece]) -> None:
        """Send all, and wait until the peer has read it."""
        for piece in pieces:
            if isinstance(piece, FilePiece) and not _is_long_enough(piece):
                self._end(Status.UNREADABLE)
                raise _Unreadable(f"the file of unit {piece.index} is shorter than it was")
            header = HEADER.pack(piece.index, piece.length, piece.digest)
            self._send(memoryview(header), more=True)
            for begin in range(0, piece.length, self._slice_bytes):
                length = min(self._slice_bytes, piece.length - begin)
                self._pace(length)
                if isinstance(piece, BufferPiece):
                    self._send(piece.data[begin : begin + length])
                elif self._encrypted:
                    self._send(self._read(piece, begin, length))
                else:
                    self._send_file(piece, begin, length)
            self._count("bytes_sent", piece.length)
        self._end(Status.GRANTED)

    def _end(self, status: Status) -> None:
        self._send(memoryview(HEADER.pack(END, status, _NO_DIGEST)))
        # Sent pages of a file stay in use until the peer has read them.
        _await_end(self._link, self._stall_timeout_s)

    def _pace(self, length: int) -> None:
        deadline_s = time.monotonic() + self._stall_timeout_s
        for rate in self._rates:
            if not rate.take(length, deadline_s, self._stopping):
                raise ConnectionAbortedError(errno.ECONNABORTED, "this agent is shutting down")

    def _send(self, data: memoryview, *, more: bool = False) -> None:
        flags = socket.MSG_MORE if more and not self._encrypted else 0
        progress = Progress(self._stall_timeout_s)
        while data:
            try:
                sent = self._link.send(data, flags)
            except (BlockingIOError, TimeoutError):
                sent = 0
            data = data[sent:]
            if data:
                progress.moved(sent)

    def _send_file(self, piece: FilePiece, begin: int, length: int) -> None:
        target = self._link.fileno()
        end = piece.offset + begin + length
        progress = Progress(self._stall_timeout_s)
        while length:
            try:
                sent = os.sendfile(target, piece.descriptor, end - length, length)
                if not sent:
                    raise _Unreadable(f"the file of unit {piece.index} was cut")
            except BlockingIOError:
                sent = 0
            except OSError as error:
                if error.errno in _SOURCE_ERRORS:
                    raise _Unreadable(f"unit {piece.index}: {error}") from error
                raise
            length -= sent
            if length:
                progress.moved(sent)

    def _read(self, piece: FilePiece, begin: int, length: int) -> memoryview:
        view = self._buffer[:length]
        try:
            read = os.preadv(piece.descriptor, [view], piece.offset + begin)
        except OSError as error:
            raise _Unreadable(f"unit {piece.index}: {error}") from error
        if read != length:
            raise _Unreadable(f"the file of unit {piece.index} was cut")
        return view


def _is_long_enough(piece: FilePiece) -> bool:
    with suppress(OSError):
        return os.fstat(piece.descriptor).st_size >= piece.offset + piece.length
    return False


def _hello(link: socket.socket, timeout_s: float) -> bytes:
    """The first bytes of a client, within one timeout for all of them."""
    deadline_s = time.monotonic() + timeout_s
    hello = b""
    while len(hello) < HELLO.size:
        if time.monotonic() >= deadline_s:
            raise Stalled(f"no ticket within {timeout_s:g} s")
        received = link.recv(HELLO.size - len(hello))
        if not received:
            raise ConnectionResetError(errno.ECONNRESET, "it left before it showed a ticket")
        hello += received
    return hello


def _await_end(link: socket.socket, timeout_s: float) -> None:
    """Until the peer has closed its end, which it does when it has read everything."""
    deadline_s = time.monotonic() + timeout_s
    link.shutdown(socket.SHUT_WR)
    while link.recv(HELLO.size):
        if time.monotonic() >= deadline_s:
            raise Stalled(f"it did not hang up within {timeout_s:g} s")


def _cut(link: socket.socket) -> None:
    """Make the close drop what is not sent yet, and the peer notice at once."""
    with suppress(OSError):
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _release(source: Source) -> None:
    try:
        source.close()
    except Exception:
        _log.exception("a source could not be closed; its files may stay open")
