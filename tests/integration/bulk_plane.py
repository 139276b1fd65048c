"""Units to send, and both ends of the bulk plane on loopback, for the tests of it.

Whatever a fixture here opens ends with the test. The fixtures are the folder's: see conftest.py.
"""

import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from everstep.agent.rates import Rate
from everstep.agent.receiving import Expected, Receiver
from everstep.agent.sending import BufferPiece, BulkServer, FilePiece, Piece, Source
from everstep.agent.tickets import IssuedTicket
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.digest import unit_digest

STALL_TIMEOUT_S = 10.0
DEADLINE_S = 30.0


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def nothing_stays_open() -> Iterator[None]:
    descriptors, threads = open_descriptors(), threading.active_count()
    yield
    eventually(lambda: open_descriptors() <= descriptors, "descriptors leaked")
    eventually(lambda: threading.active_count() <= threads, "threads leaked")


class Units:
    """Some units, in memory and in a file."""

    def __init__(self, path: Path, lengths: Sequence[int], first: int = 0) -> None:
        generator = random.Random(repr(lengths))
        self.data = [generator.randbytes(length) for length in lengths]
        self.digests = [unit_digest(data) for data in self.data]
        self.first = first
        path.write_bytes(b"before" + b"".join(self.data) + b"after")
        self.descriptor = os.open(path, os.O_RDONLY)
        self.closes = 0

    def expected(self, *, known: bool = True) -> list[Expected]:
        return [
            Expected(index, len(data), digest if known else None)
            for index, (data, digest) in enumerate(
                zip(self.data, self.digests, strict=True), self.first
            )
        ]

    def source(self, kind: str = "file", first: int = 0) -> Source:
        pieces: list[Piece] = []
        offset = len(b"before")
        for position, (data, digest) in enumerate(zip(self.data, self.digests, strict=True)):
            index = self.first + position
            if kind == "file":
                pieces.append(FilePiece(index, self.descriptor, offset, len(data), digest))
            else:
                pieces.append(BufferPiece(index, memoryview(data), digest))
            offset += len(data)
        return Source(pieces[first:], self._closed)

    def _closed(self) -> None:
        self.closes += 1


@pytest.fixture
def make_units(tmp_path: Path) -> Iterator[Callable[..., Units]]:
    made: list[Units] = []

    def make(lengths: Sequence[int], first: int = 0) -> Units:
        made.append(Units(tmp_path / f"units-{len(made)}", lengths, first))
        return made[-1]

    yield make
    for units in made:
        os.close(units.descriptor)


@pytest.fixture
def start_server() -> Iterator[Callable[..., BulkServer]]:
    started: list[BulkServer] = []

    def start(
        max_streams: int = 4,
        max_tickets: int = 4,
        ticket_timeout_s: float = DEADLINE_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        rate: Rate | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> BulkServer:
        server = BulkServer(
            "127.0.0.1",
            0,
            max_streams=max_streams,
            max_tickets=max_tickets,
            ticket_timeout_s=ticket_timeout_s,
            stall_timeout_s=stall_timeout_s,
            rate=rate,
            tls=tls,
        )
        server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


def receiver(
    ticket: IssuedTicket,
    expected: Sequence[Expected],
    *,
    stall_timeout_s: float = STALL_TIMEOUT_S,
    rate: Rate | None = None,
    tls: ssl.SSLContext | None = None,
) -> Receiver:
    return Receiver(
        ticket,
        "n1",
        expected,
        connect_timeout_s=STALL_TIMEOUT_S,
        stall_timeout_s=stall_timeout_s,
        rate=rate,
        tls=tls,
    )


def received(
    ticket: IssuedTicket,
    expected: Sequence[Expected],
    *,
    rate: Rate | None = None,
    tls: ssl.SSLContext | None = None,
) -> list[bytes]:
    buffer = memoryview(bytearray(UNIT_BYTES))
    with receiver(ticket, expected, rate=rate, tls=tls) as stream:
        return [bytes(buffer[: stream.read_into(buffer)]) for _ in expected]
