"""Hostile ends of the bulk plane: refused, counted, named; and the next honest stream works."""

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from everstep.agent.framing import ANSWER, END, HEADER, HELLO, MAGIC, VERSION, Status
from everstep.agent.receiving import Expected, Receiver
from everstep.agent.sending import BufferPiece, BulkServer, Source
from everstep.agent.tickets import IssuedTicket
from everstep.proto.errors import EverstepError, FormatInvalid, PeerUnavailable, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.digest import unit_digest

DEADLINE_S = 30.0
STALL_TIMEOUT_S = 0.6
_RESET = struct.pack("ii", 1, 0)
DATA = [bytes([number]) * 1000 for number in range(3)]
EXPECTED = [Expected(index, len(data), unit_digest(data)) for index, data in enumerate(DATA)]


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = held()
    yield
    eventually(lambda: all(now <= then for now, then in zip(held(), before, strict=True)), "leaks")


class Honest:
    """A server, what it closed, and a client that behaves."""

    def __init__(self) -> None:
        self.closes = 0
        self.issued = 0
        self.server = BulkServer(
            "127.0.0.1",
            0,
            max_streams=2,
            max_tickets=8,
            ticket_timeout_s=DEADLINE_S,
            stall_timeout_s=STALL_TIMEOUT_S,
        )
        self.server.start()

    def issue(self, data: list[bytes] = DATA) -> IssuedTicket:
        def close() -> None:
            self.closes += 1

        self.issued += 1
        pieces = [
            BufferPiece(index, memoryview(one), unit_digest(one)) for index, one in enumerate(data)
        ]
        return self.server.issue(Source(pieces, close))

    def visit(self) -> socket.socket:
        host, _, port = self.server.address.rpartition(":")
        # Without a timeout: with one, MSG_WAITALL would not wait.
        return socket.create_connection((host, int(port)))

    def assert_serves_nobody(self) -> None:
        def serves() -> bool:
            return any(one.name.startswith("bulk-127") for one in threading.enumerate())

        eventually(lambda: not serves(), "the hostile stream's thread has ended")

    def assert_well(self) -> None:
        self.assert_serves_nobody()
        assert fetch(self.issue()) == DATA
        eventually(lambda: self.closes == self.issued, "all sources are closed, each once")


@pytest.fixture
def honest() -> Iterator[Honest]:
    made = Honest()
    yield made
    made.server.close()
    assert made.closes == made.issued


def fetch(ticket: IssuedTicket, expected: list[Expected] = EXPECTED) -> list[bytes]:
    """Every unit, each into a buffer that has no room for more."""
    arrived = []
    with Receiver(
        ticket,
        "n7",
        expected,
        connect_timeout_s=DEADLINE_S,
        stall_timeout_s=STALL_TIMEOUT_S,
    ) as receiver:
        for unit in expected:
            buffer = bytearray(unit.length + 64)
            assert receiver.read_into(memoryview(buffer)) == unit.length
            assert not any(buffer[unit.length :])
            arrived.append(bytes(buffer[: unit.length]))
    return arrived


def hello(token: bytes, magic: bytes = MAGIC, version: int = VERSION) -> bytes:
    return HELLO.pack(magic, version, token)


def read_all(visitor: socket.socket) -> bytes:
    """What the server says until it hangs up, one way or the other."""
    said = b""
    try:
        while data := visitor.recv(1 << 16):
            said += data
    except ConnectionResetError:
        pass
    return said


def status(said: bytes) -> tuple[bytes, int]:
    magic, code = ANSWER.unpack(said)
    return magic, code


@pytest.mark.parametrize(
    ("said", "counter", "answer"),
    [
        (hello(bytes(16), b"HTTP"), "refused_hello", None),
        (b"GET / HTTP/1.1\r\nHost: n1\r\n\r\n", "refused_hello", None),
        (os.urandom(100_000), "refused_hello", None),
        (hello(bytes(16), version=2), "refused_hello", Status.WRONG_VERSION),
        (hello(bytes(16), version=END), "refused_hello", Status.WRONG_VERSION),
        (hello(bytes(16)), "refused_token", Status.UNKNOWN_TOKEN),
        (hello(b"\xff" * 16), "refused_token", Status.UNKNOWN_TOKEN),
    ],
)
def test_a_client_that_says_something_else_is_refused(
    honest: Honest, said: bytes, counter: str, answer: Status | None
) -> None:
    with honest.visit() as visitor:
        visitor.sendall(said)
        heard = read_all(visitor)
    if answer is None:
        assert heard == b""
    else:
        assert status(heard) == (MAGIC, answer)
    eventually(lambda: honest.server.counters[counter] == 1, f"{counter} is counted")
    honest.assert_well()


def test_a_token_that_was_used_is_refused_while_its_stream_still_runs(honest: Honest) -> None:
    ticket = honest.issue([bytes(UNIT_BYTES)] * 32)
    with honest.visit() as first, honest.visit() as second:
        first.sendall(hello(ticket.token))
        assert status(first.recv(ANSWER.size, socket.MSG_WAITALL)) == (MAGIC, Status.GRANTED)
        second.sendall(hello(ticket.token))
        assert status(read_all(second)) == (MAGIC, Status.USED_TOKEN)
    assert honest.server.counters["refused_replay"] == 1
    honest.assert_well()


@pytest.mark.parametrize("said", [b"", b"E", hello(bytes(16))[:-1]])
def test_a_client_that_never_shows_a_ticket_is_dropped(honest: Honest, said: bytes) -> None:
    with honest.visit() as visitor:
        visitor.sendall(said)
        assert read_all(visitor) == b""
    eventually(lambda: honest.server.counters["stalled"] == 1, "counted")
    honest.assert_well()


def test_a_client_that_trickles_its_ticket_is_dropped(honest: Honest) -> None:
    begun = time.monotonic()
    with honest.visit() as visitor:
        visitor.settimeout(STALL_TIMEOUT_S / 4)
        with pytest.raises((ConnectionError, EOFError)):
            for byte in hello(bytes(16)) * 100:
                visitor.sendall(bytes([byte]))
                try:
                    if not visitor.recv(1):
                        raise EOFError
                except TimeoutError:
                    continue
    assert time.monotonic() - begun < STALL_TIMEOUT_S * 5
    assert honest.server.counters["refused_token"] == 0
    honest.assert_well()


@pytest.mark.parametrize("resets", [False, True])
def test_a_client_that_leaves_at_once_is_nothing(honest: Honest, resets: bool) -> None:
    for said in (b"", b"EVBK", hello(bytes(16)), hello(honest.issue().token)):
        honest.assert_serves_nobody()
        with honest.visit() as visitor:
            visitor.sendall(said)
            if resets:
                visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    honest.assert_serves_nobody()
    # A reset can be quicker than the thread that would have read the ticket.
    honest.server.close()
    assert honest.closes == honest.issued


@pytest.mark.parametrize("moment", ["at once", "in the middle"])
def test_a_client_that_stops_reading_is_dropped(honest: Honest, moment: str) -> None:
    ticket = honest.issue([bytes(UNIT_BYTES)] * 64)
    with honest.visit() as visitor:
        visitor.sendall(hello(ticket.token))
        if moment == "in the middle":
            visitor.recv(5 * UNIT_BYTES, socket.MSG_WAITALL)
        eventually(lambda: honest.closes, "its source is closed")
        # Not an orderly end: what was not sent yet is dropped with its pages.
        with pytest.raises(ConnectionResetError):
            while visitor.recv(1 << 16):
                pass
    eventually(
        lambda: honest.server.counters["stalled"] + honest.server.counters["reset"] == 1, "counted"
    )
    honest.assert_well()


def test_a_client_that_does_not_hang_up_is_dropped(honest: Honest) -> None:
    with honest.visit() as visitor:
        visitor.sendall(hello(honest.issue().token))
        whole = ANSWER.size + sum(HEADER.size + len(data) for data in DATA) + HEADER.size
        assert len(visitor.recv(whole, socket.MSG_WAITALL)) == whole
        eventually(lambda: honest.closes, "its source is closed")
    eventually(lambda: honest.server.counters["stalled"] == 1, "counted")
    honest.assert_well()


def test_a_client_that_goes_on_talking_is_dropped(honest: Honest) -> None:
    with honest.visit() as visitor:
        visitor.sendall(hello(honest.issue().token))
        with pytest.raises(OSError):  # noqa: PT011  EPIPE or ECONNRESET
            while True:
                visitor.sendall(bytes(100))
    honest.assert_well()


def test_a_crowd_holds_up_nobody_for_long(honest: Honest) -> None:
    with ExitStack() as crowd:
        for _ in range(60):
            crowd.enter_context(honest.visit())
        counters = honest.server.counters
        while counters["refused_busy"] + counters["stalled"] < 60:
            eventually(lambda seen=counters: honest.server.counters != seen, "the next is gone")
            counters = honest.server.counters
        assert counters["refused_busy"] > 0
        honest.assert_well()


GRANT = ANSWER.pack(MAGIC, Status.GRANTED)
FIRST = HEADER.pack(0, 1000, EXPECTED[0].digest) + DATA[0]
WHOLE = GRANT + b"".join(
    HEADER.pack(unit.index, unit.length, unit.digest) + data
    for unit, data in zip(EXPECTED, DATA, strict=True)
)
LIE = bytes(16)


@contextmanager
def speaking(said: bytes, *, hangs_up: bool, trickles: bytes = b"") -> Iterator[IssuedTicket]:
    """A server that says this to whoever comes, whatever they say."""
    leave = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                connection.recv(HELLO.size, socket.MSG_WAITALL)
                connection.sendall(said)
                for byte in trickles:
                    if leave.wait(STALL_TIMEOUT_S / 8):
                        return
                    connection.sendall(bytes([byte]))
            except OSError:
                return
            if not hangs_up:
                leave.wait(DEADLINE_S)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        yield IssuedTicket(bytes(16), address, len(DATA), sum(map(len, DATA)))
    finally:
        leave.set()
        thread.join(DEADLINE_S)
        listener.close()


@pytest.mark.parametrize("hangs_up", [True, False], ids=["hangs up", "stays"])
@pytest.mark.parametrize(
    ("said", "error", "reason"),
    [
        (b"", PeerUnavailable, "the answer"),
        (GRANT[:-1], PeerUnavailable, "the answer"),
        (b"HTTP/1.1 400 Bad Request", FormatInvalid, "no bulk plane"),
        (ANSWER.pack(MAGIC, 77), PeerUnavailable, "status 77"),
        (ANSWER.pack(MAGIC, END), PeerUnavailable, "status 4294967295"),
        (ANSWER.pack(MAGIC, Status.BUSY), PeerUnavailable, "as many streams"),
        (ANSWER.pack(MAGIC, Status.UNKNOWN_TOKEN), PeerUnavailable, "does not know the ticket"),
        (GRANT, PeerUnavailable, "header of unit 0"),
        (GRANT + HEADER.pack(0, END, LIE), FormatInvalid, "unit 0 of 4294967295 bytes"),
        (GRANT + HEADER.pack(0, 1001, LIE) + bytes(1001), FormatInvalid, "of 1001 bytes"),
        (GRANT + HEADER.pack(0, 999, LIE) + bytes(999), FormatInvalid, "of 999 bytes"),
        (GRANT + HEADER.pack(0, 0, LIE), FormatInvalid, "of 0 bytes"),
        (GRANT + HEADER.pack(1, 1000, LIE), FormatInvalid, "unit 1 of 1000"),
        (GRANT + FIRST + FIRST, FormatInvalid, "instead of unit 1"),
        (GRANT + HEADER.pack(0, 1000, LIE) + DATA[0], ShardCorrupt, "the digest that n7 sent"),
        (GRANT + FIRST[:-1] + b"!" + FIRST, ShardCorrupt, "what n7 sent"),
        (GRANT + FIRST[:-1], PeerUnavailable, "unit 0"),
        (GRANT + FIRST, PeerUnavailable, "header of unit 1"),
        (GRANT + FIRST + HEADER.pack(END, 0, LIE), PeerUnavailable, "ended the stream, before"),
        (GRANT + FIRST + HEADER.pack(END, 6, LIE), PeerUnavailable, "could not read its copy"),
        (GRANT + FIRST + HEADER.pack(END, 99, LIE), PeerUnavailable, "status 99"),
        (WHOLE + HEADER.pack(3, 1000, LIE) + bytes(1000), FormatInvalid, "unit 3 follows"),
        (WHOLE + HEADER.pack(END, 6, LIE), FormatInvalid, "follows the last"),
    ],
)
def test_a_server_that_breaks_the_rules_is_named(
    said: bytes, error: type[EverstepError], reason: str, hangs_up: bool
) -> None:
    begun = time.monotonic()
    with speaking(said, hangs_up=hangs_up) as ticket, pytest.raises(error, match=reason) as caught:
        fetch(ticket)
    assert "n7" in str(caught.value)
    assert time.monotonic() - begun < STALL_TIMEOUT_S * 10


def test_a_server_that_leaves_after_the_last_unit_has_delivered() -> None:
    with speaking(WHOLE, hangs_up=True) as ticket:
        assert fetch(ticket) == DATA


def test_a_lie_about_a_digest_that_is_not_known_is_seen_in_the_bytes() -> None:
    unknown = [Expected(unit.index, unit.length, None) for unit in EXPECTED]
    said = GRANT + HEADER.pack(0, 1000, LIE) + DATA[0]
    with speaking(said, hangs_up=True) as ticket, pytest.raises(ShardCorrupt, match="n7"):
        fetch(ticket, unknown)


@pytest.mark.parametrize("before", [b"", GRANT[:4], GRANT, GRANT + FIRST[:100]])
def test_a_server_that_trickles_is_left(before: bytes) -> None:
    rest = WHOLE[len(before) :]
    begun = time.monotonic()
    with (
        speaking(before, hangs_up=False, trickles=rest) as ticket,
        pytest.raises(PeerUnavailable, match=r"n7 .*stopped sending"),
    ):
        fetch(ticket)
    assert time.monotonic() - begun < STALL_TIMEOUT_S * 20


def test_a_ticket_for_something_else_is_not_used(honest: Honest) -> None:
    ticket = honest.issue()
    with pytest.raises(FormatInvalid, match="n7"):
        fetch(ticket, EXPECTED[:2])
    assert honest.server.counters["streams"] == 0
    assert fetch(ticket) == DATA


@pytest.mark.parametrize("address", ["", "n1", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:x", ":5"])
def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(PeerUnavailable, match="n7"):
        fetch(IssuedTicket(bytes(16), address, 3, 3000))
