"""The bulk plane over loopback: exact bytes at every size, over every kind of broken link."""

import os
import random
import select
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from everstep.agent.framing import ANSWER, HEADER, HELLO
from everstep.agent.rates import Rate
from everstep.agent.receiving import Expected, Receiver, receive_all
from everstep.agent.sending import BufferPiece, BulkServer, FilePiece, Piece, Source
from everstep.agent.tickets import IssuedTicket
from everstep.proto.errors import (
    DeadlineExceeded,
    FormatInvalid,
    PeerUnavailable,
    ShardCorrupt,
)
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.digest import unit_digest

STALL_TIMEOUT_S = 10.0
DEADLINE_S = 30.0
_RESET = struct.pack("ii", 1, 0)


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
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


@dataclass
class Contexts:
    server: ssl.SSLContext
    client: ssl.SSLContext
    stranger: ssl.SSLContext


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    """Both sides show a certificate of a throw-away authority; the stranger trusts another."""
    if shutil.which("openssl") is None:
        pytest.skip("making certificates needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(words: str) -> None:
        subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True)

    new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for name in ("authority", "other"):
        openssl(f"req -x509 {new_key} -keyout {name}.key -out {name}.crt -days 2 -subj /CN={name}")
    openssl(f"req {new_key} -keyout node.key -out node.csr -subj /CN=node")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl(
        "x509 -req -in node.csr -CA authority.crt -CAkey authority.key -CAcreateserial "
        "-out node.crt -days 2 -extfile names"
    )
    server = ssl.create_default_context(
        ssl.Purpose.CLIENT_AUTH, cafile=str(folder / "authority.crt")
    )
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=str(folder / "authority.crt"))
    for context in (server, client):
        context.load_cert_chain(folder / "node.crt", folder / "node.key")
    stranger = ssl.create_default_context(cafile=str(folder / "other.crt"))
    return Contexts(server, client, stranger)


SIZES = [
    [],
    [1],
    [UNIT_BYTES - 1],
    [UNIT_BYTES],
    [UNIT_BYTES] * 5 + [123_457],
    [1, UNIT_BYTES, 4096] * 3,
]


@pytest.mark.parametrize("lengths", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["file", "buffer"])
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
def test_units_arrive_as_they_were_sent(
    make_units: Callable[..., Units],
    start_server: Callable[..., BulkServer],
    request: pytest.FixtureRequest,
    lengths: list[int],
    kind: str,
    encrypted: bool,
) -> None:
    tls = request.getfixturevalue("contexts") if encrypted else None
    server = start_server(tls=tls and tls.server)
    for known in (True, False):
        units = make_units(lengths, first=7)
        ticket = server.issue(units.source(kind))
        assert (ticket.units, ticket.bytes) == (len(lengths), sum(lengths))
        arrived = received(ticket, units.expected(known=known), tls=tls and tls.client)
        assert arrived == units.data
        eventually(lambda units=units: units.closes, "the source is closed")
        assert units.closes == 1
    eventually(lambda: server.counters["completed"] == 2, "both are counted")
    assert server.counters["bytes_sent"] == 2 * sum(lengths)


def test_streams_run_side_by_side(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer]
) -> None:
    server = start_server()
    several = [make_units([UNIT_BYTES] * 6 + [stream + 1]) for stream in range(4)]
    tickets = [server.issue(units.source()) for units in several]
    with ThreadPoolExecutor(len(several)) as executor:
        arrived = list(executor.map(received, tickets, [units.expected() for units in several]))
    assert arrived == [units.data for units in several]
    eventually(lambda: all(units.closes == 1 for units in several), "all are closed")


def test_only_the_buffer_given_is_written(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer]
) -> None:
    units = make_units([1000])
    buffer = bytearray(b"\xaa" * 3000)
    with receiver(start_server().issue(units.source()), units.expected()) as stream:
        assert stream.read_into(memoryview(buffer)[1000:]) == 1000
    assert buffer == b"\xaa" * 1000 + units.data[0] + b"\xaa" * 1000


def test_a_ticket_is_good_once(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer]
) -> None:
    server, units = start_server(), make_units([10])
    ticket = server.issue(units.source())
    assert received(ticket, units.expected()) == units.data
    with pytest.raises(PeerUnavailable, match=r"n1 .*used before"):
        received(ticket, units.expected())
    eventually(lambda: server.counters["refused_replay"] == 1, "the replay is counted")
    assert units.closes == 1


def test_a_ticket_that_nobody_uses_expires(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer]
) -> None:
    server, units = start_server(ticket_timeout_s=0.2), make_units([10])
    ticket = server.issue(units.source())
    eventually(lambda: units.closes, "the source is closed without being asked for")
    with pytest.raises(PeerUnavailable, match="expired"):
        received(ticket, units.expected())
    assert (units.closes, server.counters["tickets_expired"]) == (1, 1)
    eventually(lambda: server.counters["refused_expired"] == 1, "counted")


def test_no_more_tickets_than_allowed(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer]
) -> None:
    server, units = start_server(max_tickets=2), make_units([10])
    tickets = [server.issue(units.source()) for _ in range(2)]
    with pytest.raises(PeerUnavailable, match="all 2 tickets"):
        server.issue(units.source())
    assert (units.closes, server.counters["tickets_refused"]) == (1, 1)
    assert received(tickets[0], units.expected()) == units.data
    server.issue(units.source())


def test_no_more_streams_than_allowed(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer]
) -> None:
    server, units = start_server(max_streams=1), make_units([UNIT_BYTES, 1])
    first, second, third = (server.issue(units.source()) for _ in range(3))
    buffer = memoryview(bytearray(UNIT_BYTES))
    with receiver(first, units.expected()) as stream:
        stream.read_into(buffer)
        for _ in range(50):
            with pytest.raises(PeerUnavailable, match="as many streams as it may"):
                received(second, units.expected())
        stream.read_into(buffer)
    assert server.counters["refused_busy"] == 50
    eventually(lambda: server.counters["completed"] == 1, "the first is done")
    for thread in threading.enumerate():
        if thread.name.startswith("bulk-127"):
            thread.join(DEADLINE_S)
    # A refusal for lack of room does not use a ticket up.
    assert received(second, units.expected()) == units.data
    eventually(lambda: server.counters["completed"] == 2, "the second is done")
    assert third.token != second.token


def test_a_server_that_closes_ends_everything(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer]
) -> None:
    server = start_server()
    waiting, running = make_units([10]), make_units([UNIT_BYTES] * 64)
    server.issue(waiting.source())
    buffer = memoryview(bytearray(UNIT_BYTES))
    with receiver(server.issue(running.source()), running.expected()) as stream:
        stream.read_into(buffer)
        server.close()
        with pytest.raises(PeerUnavailable):
            for _ in range(63):
                stream.read_into(buffer)
    assert (waiting.closes, running.closes) == (1, 1)
    with pytest.raises(PeerUnavailable, match="shutting down"):
        server.issue(waiting.source())
    assert waiting.closes == 2
    with pytest.raises(PeerUnavailable, match="no connection"):
        received(IssuedTicket(bytes(16), server.address, 0, 0), [])


def test_a_file_that_became_shorter_is_said_to_be(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer], tmp_path: Path
) -> None:
    server, units = start_server(), make_units([UNIT_BYTES, UNIT_BYTES])
    os.truncate(tmp_path / "units-0", UNIT_BYTES + 100)
    buffer = memoryview(bytearray(UNIT_BYTES))
    with receiver(server.issue(units.source()), units.expected()) as stream:
        stream.read_into(buffer)
        with pytest.raises(PeerUnavailable, match=r"could not read its copy, before unit 1"):
            stream.read_into(buffer)
    eventually(lambda: units.closes == 1, "closed")
    eventually(lambda: server.counters["unreadable"] == 1, "counted")


@pytest.mark.parametrize("where", ["server", "stream", "client"])
def test_a_rate_is_kept(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer], where: str
) -> None:
    rates = {where: Rate(4e6, 128 << 10)}
    server, units = start_server(rate=rates.get("server")), make_units([UNIT_BYTES, UNIT_BYTES])
    ticket = server.issue(units.source(), rate=rates.get("stream"))
    begun = time.monotonic()
    assert received(ticket, units.expected(), rate=rates.get("client")) == units.data
    assert time.monotonic() - begun >= (2 * UNIT_BYTES - (128 << 10)) / 4e6


def test_a_slow_rate_is_no_stall(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer]
) -> None:
    server = start_server(rate=Rate(600e3, 128 << 10), stall_timeout_s=1.0)
    units = make_units([UNIT_BYTES])
    buffer = memoryview(bytearray(UNIT_BYTES))
    ticket = server.issue(units.source())
    with receiver(ticket, units.expected(), stall_timeout_s=1.0) as stream:
        stream.read_into(buffer)
    assert buffer == units.data[0]


def test_a_stranger_gets_nothing(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer], contexts: Contexts
) -> None:
    server, units = start_server(tls=contexts.server), make_units([10])
    ticket = server.issue(units.source())
    with pytest.raises(PeerUnavailable, match="certificate"):
        received(ticket, units.expected(), tls=contexts.stranger)
    nameless = ssl.create_default_context(cadata=None)
    nameless.check_hostname, nameless.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(PeerUnavailable):
        received(ticket, units.expected(), tls=nameless)
    with pytest.raises((PeerUnavailable, FormatInvalid)):
        received(ticket, units.expected())
    eventually(lambda: server.counters["refused_tls"] == 3, "all three are counted")
    assert received(ticket, units.expected(), tls=contexts.client) == units.data


@dataclass
class Harm:
    """What happens to the bytes from server to client, once so many have passed."""

    kind: str
    at: int


class Proxy:
    """Stands between; each connection suffers the next harm, later ones none."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.harms: list[Harm] = []
        self._ended, self._end = socket.socketpair()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            harm = self.harms.pop(0) if self.harms else Harm("none", 0)
            thread = threading.Thread(target=self._relay, args=(client, server, harm))
            self._threads.append(thread)
            thread.start()

    def _relay(self, client: socket.socket, server: socket.socket, harm: Harm) -> None:
        """One thread for both ways, so that a close is a close."""
        passed = 0
        readable = [client, server, self._ended]
        with client, server:
            while len(readable) > 1:
                for end in select.select(readable, [], [])[0]:
                    if end is self._ended:
                        return
                    try:
                        data = end.recv(1 << 16)
                        if not data:
                            readable.remove(end)
                            (client if end is server else server).shutdown(socket.SHUT_WR)
                        elif end is client:
                            server.sendall(data)
                        elif not self._pass(client, data, harm, passed):
                            if harm.kind == "reset":
                                for other in (client, server):
                                    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                            if harm.kind != "hold":
                                return
                            readable = [client, self._ended]
                        else:
                            passed += len(data)
                    except OSError:
                        return

    def _pass(self, client: socket.socket, data: bytes, harm: Harm, passed: int) -> bool:
        """Let the bytes through as far as the harm lets them; whether it goes on."""
        at = harm.at - passed
        if harm.kind == "none" or not 0 <= at < len(data):
            client.sendall(data)
            return True
        if harm.kind == "flip":
            client.sendall(data[:at] + bytes([data[at] ^ 1 << harm.at % 8]) + data[at + 1 :])
            return True
        client.sendall(data[:at])
        return False

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._end.close()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        self._ended.close()


@dataclass
class Link:
    """A server behind a proxy, and a client that resumes."""

    server: BulkServer
    proxy: Proxy

    def fetch(
        self,
        units: Units,
        *,
        known: bool = True,
        retries: int = 1,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        deadline_s: float | None = None,
    ) -> tuple[list[bytes], list[int]]:
        """The units, and from where on each ticket was asked for."""
        opened: list[int] = []
        buffers = [bytearray(len(data)) for data in units.data]

        def open_ticket(first: int) -> IssuedTicket:
            opened.append(first)
            ticket = self.server.issue(units.source(first=first))
            return IssuedTicket(ticket.token, self.proxy.address, ticket.units, ticket.bytes)

        receive_all(
            open_ticket,
            "n1",
            units.expected(known=known),
            lambda position: memoryview(buffers[position]),
            retries=retries,
            connect_timeout_s=STALL_TIMEOUT_S,
            stall_timeout_s=stall_timeout_s,
            deadline_s=deadline_s,
        )
        eventually(lambda: units.closes == len(opened), "every source is closed")
        return [bytes(buffer) for buffer in buffers], opened


@pytest.fixture
def link(start_server: Callable[..., BulkServer]) -> Iterator[Link]:
    server = start_server()
    proxy = Proxy(server.address)
    yield Link(server, proxy)
    proxy.close()


TINY = [5, 1, 9]
ENDS = [ANSWER.size]
for _length in TINY:
    ENDS.append(ENDS[-1] + HEADER.size + _length)
WHOLE = ENDS[-1] + HEADER.size


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_stream_resumes_wherever_it_was_cut(
    make_units: Callable[..., Units], link: Link, kind: str
) -> None:
    for at in range(WHOLE):
        units = make_units(TINY, first=3)
        link.proxy.harms = [Harm(kind, at)]
        arrived, opened = link.fetch(units)
        assert arrived == units.data
        whole = sum(at >= end for end in ENDS[1:])
        if kind == "cut":
            assert opened == ([0] if whole == len(TINY) else [0, whole])
        else:
            # A reset may overtake what was sent before it.
            assert opened[0] == 0
            assert len(opened) <= 2
            assert opened[-1] <= whole


@pytest.mark.parametrize("known", [True, False])
def test_a_flipped_bit_is_seen_wherever_it_is(
    make_units: Callable[..., Units], link: Link, known: bool
) -> None:
    for at in range(ENDS[-1]):
        units = make_units(TINY, first=3)
        link.proxy.harms = [Harm("flip", at)]
        arrived, opened = link.fetch(units, known=known)
        assert arrived == units.data
        assert opened == [0, sum(at >= end for end in ENDS[1:])]


def test_a_long_stream_over_a_bad_link_arrives(
    make_units: Callable[..., Units], link: Link
) -> None:
    units = make_units([UNIT_BYTES] * 8 + [77])
    generator = random.Random(1)
    for kind in ("cut", "reset", "flip") * 3:
        link.proxy.harms.append(Harm(kind, generator.randrange(4 * UNIT_BYTES)))
    arrived, opened = link.fetch(units, retries=9)
    assert arrived == units.data
    assert opened == sorted(opened)
    assert len(opened) > 2


def test_retries_are_bounded(make_units: Callable[..., Units], link: Link) -> None:
    units = make_units(TINY)
    link.proxy.harms = [Harm("cut", ENDS[1])] * 10
    with pytest.raises(PeerUnavailable, match=r"n1 .*hung up"):
        link.fetch(units, retries=0)
    assert len(link.proxy.harms) == 9
    link.proxy.harms = [Harm("flip", ENDS[0] + HEADER.size)] * 10
    with pytest.raises(ShardCorrupt, match=r"n1 .*\(0\)"):
        link.fetch(units, retries=2)
    assert len(link.proxy.harms) == 7


def test_a_peer_that_falls_silent_is_noticed(make_units: Callable[..., Units], link: Link) -> None:
    units = make_units([UNIT_BYTES] * 2)
    link.proxy.harms = [Harm("hold", UNIT_BYTES // 2)]
    arrived, opened = link.fetch(units, stall_timeout_s=0.3)
    assert (arrived, opened) == (units.data, [0, 0])


def test_a_deadline_ends_it(make_units: Callable[..., Units], link: Link) -> None:
    units = make_units(TINY)
    link.proxy.harms = [Harm("hold", ENDS[1])]
    with pytest.raises(DeadlineExceeded, match="3 units from n1, 1 of which came"):
        link.fetch(units, stall_timeout_s=0.3, deadline_s=time.monotonic() + 0.1)


def test_a_client_that_does_not_read_is_dropped(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer]
) -> None:
    server, units = start_server(stall_timeout_s=0.3), make_units([UNIT_BYTES] * 64)
    with receiver(server.issue(units.source()), units.expected()):
        eventually(lambda: units.closes, "the source is closed")
    assert units.closes == 1
    eventually(lambda: server.counters["stalled"] + server.counters["reset"] == 1, "counted")


def test_a_damaged_copy_is_not_taken(
    make_units: Callable[..., Units], start_server: Callable[..., BulkServer], tmp_path: Path
) -> None:
    server, units = start_server(), make_units([UNIT_BYTES, 100])
    with (tmp_path / "units-0").open("r+b") as file:
        file.seek(len(b"before") + UNIT_BYTES + 50)
        file.write(b"\0\0\0\0\0")
    for known in (True, False):
        with pytest.raises(ShardCorrupt) as caught:
            received(server.issue(units.source()), units.expected(known=known))
        assert caught.value.units == (1,)
        assert "n1" in str(caught.value)


def test_the_hello_is_as_documented() -> None:
    assert (HELLO.size, ANSWER.size, HEADER.size) == (24, 8, 24)
