"""Offers without gRPC, at the agent's end: real sockets, one loop."""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from everstep.agent.offers import Offers
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import ArenaLost, StaleIncarnation
from everstep.proto.wire_errors import decode_bytes

Story = Callable[[Offers], Awaitable[None]]
NAME = "agent.sock"
STALE = 13
LOST = 14
BROKEN = 15


class Desk:
    """Grants every step but three."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def answer(self, request: wire.OfferRequest) -> wire.OfferReply:
        self.asked.append(request.step)
        if request.step == STALE:
            raise StaleIncarnation("gpt", 3, 4)
        if request.step == LOST:
            raise ArenaLost("gpt", 0)
        if request.step == BROKEN:
            raise ZeroDivisionError("an accident")
        return wire.OfferReply(granted=True, slot=request.step % 3, generation=7)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def run(root: Path, desk: Desk, story: Story, *, most: int = 8) -> None:
    async def whole() -> None:
        offers = Offers(root / "offers" / NAME, most, desk.answer)
        offers.start()
        try:
            await story(offers)
        finally:
            offers.close()

    asyncio.run(whole())


def connected(offers: Offers) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    found.connect(str(offers._path))
    found.setblocking(False)
    return found


async def ask(peer: socket.socket, step: int) -> wire.OfferAnswer:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(peer, wire.OfferRequest(step=step).SerializeToString())
    return wire.OfferAnswer.FromString(await heard(peer))


async def heard(peer: socket.socket) -> bytes:
    async with asyncio.timeout(10):
        return await asyncio.get_running_loop().sock_recv(peer, 1 << 16)


def test_each_question_has_its_answer(tmp_path: Path, desk: Desk) -> None:
    async def story(offers: Offers) -> None:
        with connected(offers) as one, connected(offers) as other:
            for step in (1, 2, 3):
                for peer in (one, other):
                    reply = (await ask(peer, step)).reply
                    assert (reply.granted, reply.slot, reply.generation) == (True, step % 3, 7)

    run(tmp_path, desk, story)
    assert desk.asked == [1, 1, 2, 2, 3, 3]


def test_an_error_arrives_as_itself_and_the_next_question_is_answered(
    tmp_path: Path, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(offers: Offers) -> None:
        with connected(offers) as peer:
            stale = decode_bytes((await ask(peer, STALE)).error, "here")
            assert isinstance(stale, StaleIncarnation) and str(stale) == str(
                StaleIncarnation("gpt", 3, 4)
            )
            assert isinstance(decode_bytes((await ask(peer, LOST)).error, "here"), ArenaLost)
            fault = decode_bytes((await ask(peer, BROKEN)).error, "here")
            assert "an accident" in str(fault)
            assert (await ask(peer, 1)).reply.granted

    run(tmp_path, desk, story)
    assert "ZeroDivisionError" in caplog.text


def test_what_is_no_question_ends_that_connection_alone(tmp_path: Path, desk: Desk) -> None:
    async def story(offers: Offers) -> None:
        with connected(offers) as strange, connected(offers) as peer:
            strange.send(b"GET / HTTP/1.1\r\n\r\n")
            assert await heard(strange) == b""
            assert (await ask(peer, 1)).reply.granted

    run(tmp_path, desk, story)


@pytest.mark.parametrize("how", ["closed", "shut down, and open in a child"])
def test_a_question_that_nobody_waits_for_any_more_changes_nothing(
    tmp_path: Path, desk: Desk, how: str
) -> None:
    async def story(offers: Offers) -> None:
        with connected(offers) as peer:
            await ask(peer, 1)
            peer.send(wire.OfferRequest(step=2).SerializeToString())
            if how == "closed":
                peer.close()
            else:
                peer.shutdown(socket.SHUT_RDWR)
            with connected(offers) as next_one:
                await ask(next_one, 3)

    run(tmp_path, desk, story)
    assert desk.asked == [1, 3]


def test_there_is_room_for_so_many(tmp_path: Path, desk: Desk) -> None:
    async def story(offers: Offers) -> None:
        with connected(offers) as one:
            await ask(one, 1)
            with connected(offers) as two:
                assert await heard(two) == b""
        async with asyncio.timeout(10):
            while not await has_room(offers):
                pass  # the first one's end is seen at some time

    async def has_room(offers: Offers) -> bool:
        with connected(offers) as peer:
            try:
                return (await ask(peer, 2)).reply.granted
            except OSError:
                return False

    run(tmp_path, desk, story, most=1)


class Full:
    """A listener of a process that has no descriptors left."""

    def __init__(self, listener: socket.socket) -> None:
        self.fileno, self.close = listener.fileno, listener.close
        self.tries = 0

    def accept(self) -> None:
        self.tries += 1
        raise OSError(errno.EMFILE, "too many open files")


def test_without_descriptors_it_waits(
    tmp_path: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everstep.agent.offers._PAUSE_S", 0.01)

    async def story(offers: Offers) -> None:
        listener = offers._listener
        assert listener is not None
        offers._listener = full = Full(listener)  # type: ignore[assignment]
        with connected(offers) as peer:
            turns = 0
            while full.tries < 3:
                await asyncio.sleep(0)
                turns += 1
            assert turns > 30, "and the agent does other things"
            offers._listener = listener
            assert (await ask(peer, 1)).reply.granted

    run(tmp_path, desk, story)


def test_the_socket_goes_with_the_agent(tmp_path: Path, desk: Desk) -> None:
    directory = tmp_path / "offers"
    directory.mkdir(mode=0o700)
    (directory / NAME).write_bytes(b"left behind")

    async def story(offers: Offers) -> None:
        with connected(offers) as peer:
            await ask(peer, 1)
            offers.close()
            assert await heard(peer) == b""

    run(tmp_path, desk, story)
    assert not list(directory.iterdir())


@pytest.mark.parametrize("why", ["too long", "open to others"])
def test_where_no_socket_can_be_there_is_none(
    tmp_path: Path, desk: Desk, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / ("x" * 120 if why == "too long" else "short")
    if why == "open to others":
        (root / "offers").mkdir(parents=True)
        (root / "offers").chmod(0o755)

    async def story(offers: Offers) -> None:
        assert "offers go through gRPC" in caplog.text

    run(root, desk, story)
    assert not list(root.glob("*/*"))
