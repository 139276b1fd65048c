"""The bulk plane over broken links: exact bytes, wherever the stream was cut, reset or changed."""

import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from everstep.agent.framing import ANSWER, HEADER
from everstep.agent.receiving import receive_all
from everstep.agent.sending import BulkServer
from everstep.agent.tickets import IssuedTicket
from everstep.proto.errors import DeadlineExceeded, PeerUnavailable, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES

from .bulk_plane import DEADLINE_S, STALL_TIMEOUT_S, Units, eventually

pytestmark = pytest.mark.usefixtures("nothing_stays_open")

_RESET = struct.pack("ii", 1, 0)


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
