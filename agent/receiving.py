"""The fetching end of the bulk plane: units into the caller's buffers, verified.

Owns one connection for each ticket. Promises that no more bytes are received than were expected,
straight into the buffer given, that a unit is only ever called received if its digest is the
expected one, and that a peer that stops is noticed within the stall timeout. Whatever the peer does
wrong raises an error that names it. Keeps nothing between streams: to resume is to ask for another
ticket from the first missing unit on.
"""

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

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
    meaning,
    prepare,
    split_address,
)
from everstep.agent.rates import Rate
from everstep.agent.tickets import IssuedTicket
from everstep.proto.errors import DeadlineExceeded, FormatInvalid, PeerUnavailable, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.digest import DIGEST_BYTES, unit_matches

_SLICE_BYTES = 128 << 10
_SHORTEST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Expected:
    """One unit as it should arrive.

    Attributes:
        index: Its number.
        length: 1 to UNIT_BYTES.
        digest: From the record; None to go by the one that is sent.
    """

    index: int
    length: int
    digest: bytes | None


class Receiver:
    """One stream; a context manager.

    Who reads must not pause for longer than the peer's stall timeout, or the peer hangs up.
    """

    def __init__(
        self,
        ticket: IssuedTicket,
        peer: str,
        expected: Sequence[Expected],
        *,
        connect_timeout_s: float,
        stall_timeout_s: float,
        rate: Rate | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Prepare; the connection is opened on entering.

        Args:
            ticket: From the peer.
            peer: Its node id, for messages.
            expected: Every unit of the stream, in order.
            connect_timeout_s: For the connection and TLS.
            stall_timeout_s: How long the peer may keep any read waiting.
            rate: Not to be exceeded.
            tls: A client's context; None for none.
        """
        assert all(0 < unit.length <= UNIT_BYTES for unit in expected)
        assert all(unit.digest is None or len(unit.digest) == DIGEST_BYTES for unit in expected)
        self._ticket = ticket
        self._peer = peer
        self._expected = expected
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._rate = rate
        self._tls = tls
        self._link: socket.socket | None = None
        self._next = 0
        self._header = memoryview(bytearray(HEADER.size))

    def __enter__(self) -> Self:
        """Connect and show the ticket.

        Raises:
            PeerUnavailable: If it cannot be reached or refuses; says why.
            FormatInvalid: If that is no bulk plane, or the ticket is for another stream.
        """
        wanted = (len(self._expected), sum(unit.length for unit in self._expected))
        if (self._ticket.units, self._ticket.bytes) != wanted:
            raise FormatInvalid(
                f"the ticket of {self._peer}",
                f"it is for {self._ticket.units} units of {self._ticket.bytes} bytes together, "
                f"wanted were {wanted[0]} of {wanted[1]}",
            )
        try:
            self._connect()
            if not self._expected:
                self._finish()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. Idempotent."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def read_into(self, buffer: memoryview) -> int:
        """Receive the next unit.

        Args:
            buffer: At least as long as the unit; holds rubbish if this raises.

        Returns:
            The unit's length.

        Raises:
            PeerUnavailable: If the stream broke, stalled, or was ended by the peer.
            FormatInvalid: If the peer sends something else than this unit.
            ShardCorrupt: If the bytes, or the digest that they should have, are not as expected.
            DeadlineExceeded: If the rate is too low to go on within the stall timeout.
        """
        unit = self._expected[self._next]
        assert len(buffer) >= unit.length, (len(buffer), unit.length)
        digest = self._read_header(unit)
        data = buffer[: unit.length]
        if self._rate is None:
            self._receive(data, f"unit {unit.index}")
        else:
            self._receive_slowly(data, f"unit {unit.index}", self._rate)
        if not unit_matches(data, digest):
            raise ShardCorrupt(f"what {self._peer} sent", (unit.index,))
        self._next += 1
        if self._next == len(self._expected):
            self._finish()
        return unit.length

    def _connect(self) -> None:
        deadline_s = time.monotonic() + self._connect_timeout_s
        try:
            host, port = split_address(self._ticket.address)
            self._link = socket.create_connection((host, port), self._connect_timeout_s)
            prepare(self._link, self._stall_timeout_s)
            if self._tls is not None:
                self._link.settimeout(max(deadline_s - time.monotonic(), 0.001))
                self._link = self._tls.wrap_socket(self._link, server_hostname=host)
                self._link.settimeout(self._stall_timeout_s)
            self._link.sendall(HELLO.pack(MAGIC, VERSION, self._ticket.token))
        except (OSError, ValueError) as error:
            detail = f"no connection to its bulk plane at {self._ticket.address}: {error}"
            raise PeerUnavailable(self._peer, detail) from error
        answer = memoryview(bytearray(ANSWER.size))
        self._receive(answer, "the answer to the ticket")
        magic, status = ANSWER.unpack(answer)
        if magic != MAGIC:
            problem = f"what listens at {self._ticket.address} is no bulk plane of ours"
            raise FormatInvalid(f"the answer of {self._peer}", problem)
        if status != Status.GRANTED:
            raise PeerUnavailable(self._peer, meaning(status))

    def _read_header(self, unit: Expected) -> bytes:
        """Check everything that is said about a unit before a byte of it is taken."""
        self._receive(self._header, f"the header of unit {unit.index}")
        index, length, digest = HEADER.unpack(self._header)
        if index == END:
            detail = meaning(length) if length else "it ended the stream"
            raise PeerUnavailable(self._peer, f"{detail}, before unit {unit.index}")
        if (index, length) != (unit.index, unit.length):
            problem = f"unit {index} of {length} bytes instead of unit {unit.index} of "
            raise FormatInvalid(f"the stream of {self._peer}", f"{problem}{unit.length}")
        assert isinstance(digest, bytes)
        if unit.digest is not None and digest != unit.digest:
            raise ShardCorrupt(f"the digest that {self._peer} sent", (unit.index,))
        return digest

    def _receive_slowly(self, data: memoryview, what: str, rate: Rate) -> None:
        """In slices, so that the peer sees us move."""
        for begin in range(0, len(data), _SLICE_BYTES):
            piece = data[begin : begin + _SLICE_BYTES]
            rate.take(len(piece), time.monotonic() + self._stall_timeout_s)
            self._receive(piece, what)

    def _finish(self) -> None:
        """Look that nothing follows. If the peer leaves now, nothing is missing."""
        try:
            self._receive(self._header, "the end of the stream")
        except PeerUnavailable:
            return
        index, status, _ = HEADER.unpack(self._header)
        if (index, status) != (END, Status.GRANTED):
            problem = f"unit {index} follows the last one, {len(self._expected)} were expected"
            raise FormatInvalid(f"the stream of {self._peer}", problem)
        # The peer waits for it before it lets go of what it sent.
        self.close()

    def _receive(self, data: memoryview, what: str) -> None:
        """Fill `data`, or raise PeerUnavailable."""
        assert self._link is not None, "not entered, or already at its end"
        flags = 0 if isinstance(self._link, ssl.SSLSocket) else socket.MSG_WAITALL
        progress = Progress(self._stall_timeout_s)
        try:
            while data:
                try:
                    received = self._link.recv_into(data, 0, flags)
                    if not received:
                        detail = f"it hung up before {what}"
                        raise PeerUnavailable(self._peer, detail)
                except (BlockingIOError, TimeoutError):
                    received = 0
                data = data[received:]
                if data:
                    progress.moved(received)
        except Stalled as error:
            detail = f"it stopped sending before {what}: {error}"
            raise PeerUnavailable(self._peer, detail) from error
        except OSError as error:
            raise PeerUnavailable(self._peer, f"the stream broke at {what}: {error}") from error


class _Deadline:
    """Until when all units must have come, if there is such a time."""

    def __init__(self, peer: str, units: int, deadline_s: float | None) -> None:
        self._peer = peer
        self._units = units
        self._deadline_s = deadline_s
        self._begun_s = time.monotonic()

    def check(self, arrived: int) -> None:
        """Raise DeadlineExceeded if it has passed."""
        if self._deadline_s is None or time.monotonic() < self._deadline_s:
            return
        waited_for = (
            f"the transfer of {self._units} units from {self._peer}, {arrived} of which came"
        )
        raise DeadlineExceeded(waited_for, self._deadline_s - self._begun_s, (self._peer,))


def receive_all(
    open_ticket: Callable[[int], IssuedTicket],
    peer: str,
    expected: Sequence[Expected],
    buffer_for: Callable[[int], memoryview],
    *,
    retries: int,
    connect_timeout_s: float,
    stall_timeout_s: float,
    deadline_s: float | None = None,
    rate: Rate | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Receive every unit, over as many streams as it takes.

    Args:
        open_ticket: Asks the peer for a stream of ``expected[first:]``, given `first`. What it
            raises ends the attempt if it is PeerUnavailable, else everything.
        peer: Its node id, for messages.
        expected: Every unit, in order.
        buffer_for: Where ``expected[position]`` goes, given `position`. Called in order; when it
            is, all before are received and verified. Called again for a unit that must be repeated.
        retries: How many streams in a row may fail without one more unit.
        connect_timeout_s: See `Receiver`.
        stall_timeout_s: See `Receiver`.
        deadline_s: By the monotonic clock; None for none but that of the retries.
        rate: See `Receiver`.
        tls: See `Receiver`.

    Raises:
        PeerUnavailable: If the last attempt ended so; likewise the others.
        FormatInvalid: The peer sent something else.
        ShardCorrupt: The peer's copy is damaged, or what lies between is.
        DeadlineExceeded: If the deadline passed first, or the rate is too low to go on.
    """
    first, failures = 0, 0
    deadline = _Deadline(peer, len(expected), deadline_s)
    while first < len(expected):
        deadline.check(first)
        before = first
        try:
            with Receiver(
                open_ticket(first),
                peer,
                expected[first:],
                connect_timeout_s=connect_timeout_s,
                stall_timeout_s=stall_timeout_s,
                rate=rate,
                tls=tls,
            ) as receiver:
                while first < len(expected):
                    deadline.check(first)
                    receiver.read_into(buffer_for(first))
                    first += 1
        except (PeerUnavailable, FormatInvalid, ShardCorrupt):
            failures = 1 if first > before else failures + 1
            if failures > retries:
                raise
            if failures > 1:
                time.sleep(min(_SHORTEST_PAUSE_S * 2 ** (failures - 2), _LONGEST_PAUSE_S))
