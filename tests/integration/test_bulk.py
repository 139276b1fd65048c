"""The bulk plane over loopback: exact bytes at every size, tickets, limits, rates and TLS."""

import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from everstep.agent.framing import ANSWER, HEADER, HELLO
from everstep.agent.rates import Rate
from everstep.agent.sending import BulkServer
from everstep.agent.tickets import IssuedTicket
from everstep.proto.errors import FormatInvalid, PeerUnavailable, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES

from .bulk_plane import DEADLINE_S, Units, eventually, received, receiver

pytestmark = pytest.mark.usefixtures("nothing_stays_open")


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
    # By the thread of the first stream, which the second one does not wait for.
    eventually(lambda: units.closes == 1, "the source is closed, once")


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
