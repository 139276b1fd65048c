"""The door: bytes unchanged both ways, bounds on everything, nothing left behind."""

import asyncio
import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from everstep.agent.door import Door, peer_credentials

from .doors import (
    connect,
    door_directory,
    gone,
    is_cut,
    opened,
    run,
    until,
)


@pytest.fixture
def directory() -> Iterator[Path]:
    with door_directory() as path:
        yield path


def test_bytes_pass_unchanged_in_both_directions(directory: Path) -> None:
    async def scenario() -> None:
        async with opened(directory) as (door, _):
            reader, writer = await connect(directory)
            message = os.urandom(5 * (1 << 20) + 7)
            receiving = asyncio.create_task(reader.readexactly(len(message)))
            writer.write(message)
            assert await receiving == message
            for number in range(2000):
                small = number.to_bytes(4, "big") * 5
                writer.write(small)
                assert await reader.readexactly(20) == small
            assert door.open_count == 1
            await gone(writer)
            await until(lambda: door.open_count == 0)

    run(scenario)


def test_several_links_do_not_mix(directory: Path) -> None:
    async def talk(number: int) -> None:
        reader, writer = await connect(directory)
        message = bytes([number]) * (300_000 + number)
        receiving = asyncio.create_task(reader.readexactly(len(message)))
        writer.write(message)
        assert await receiving == message
        await gone(writer)

    async def scenario() -> None:
        async with opened(directory) as (door, _):
            await asyncio.gather(*(talk(number) for number in range(8)))
            await until(lambda: door.open_count == 0)

    run(scenario)


def test_the_other_half_stays_open_when_the_peer_has_said_all(directory: Path) -> None:
    async def answer_after_the_end(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        question = await reader.read()
        writer.write(question[::-1] * 100_000)
        await writer.drain()

    async def scenario() -> None:
        async with opened(directory, answer_after_the_end) as (_, _):
            reader, writer = await connect(directory)
            writer.write(b"everstep")
            writer.write_eof()
            assert await reader.read() == b"petsreve" * 100_000
            await gone(writer)

    run(scenario)


def test_the_other_half_stays_open_when_the_server_has_said_all(directory: Path) -> None:
    received: list[bytes] = []

    async def speak_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"goodbye")
        writer.write_eof()
        received.append(await reader.read())

    async def scenario() -> None:
        async with opened(directory, speak_first) as (_, server):
            reader, writer = await connect(directory)
            assert await reader.read() == b"goodbye"
            writer.write(b"x" * 700_000)
            await writer.drain()
            await gone(writer)
            await until(lambda: server.ended == 1)
        assert received == [b"x" * 700_000]

    run(scenario)


def test_what_the_server_said_last_arrives_although_it_has_left(directory: Path) -> None:
    async def speak_and_leave(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"z" * 900_000)
        await writer.drain()

    async def scenario() -> None:
        async with opened(directory, speak_and_leave):
            reader, writer = await connect(directory)
            assert await reader.read() == b"z" * 900_000
            await gone(writer)

    run(scenario)


def test_a_peer_that_dies_is_noticed_by_the_server(directory: Path) -> None:
    async def scenario() -> None:
        async with opened(directory) as (door, server):
            _, writer = await connect(directory)
            writer.write(b"a" * 10_000)
            await until(lambda: server.accepted == 1)
            writer.transport.abort()
            await until(lambda: server.ended == 1)
            await until(lambda: door.open_count == 0)

    run(scenario)


def test_a_peer_that_resets_the_link_is_noticed_by_the_server(directory: Path) -> None:
    """Closing with bytes unread is an error at the other end, not the end of a stream."""

    async def speak_and_wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"unread" * 1000)
        assert await reader.read() == b""

    async def scenario() -> None:
        async with opened(directory, speak_and_wait) as (door, server):
            peer = socket.socket(socket.AF_UNIX)
            peer.setblocking(False)
            await asyncio.get_running_loop().sock_connect(peer, str(directory / "agent.sock"))
            await until(lambda: bool(select.select([peer], [], [], 0)[0]))
            peer.close()
            await until(lambda: server.ended == 1)
            await until(lambda: door.open_count == 0)

    run(scenario)


def test_a_peer_that_does_not_read_is_not_buffered_without_end(directory: Path) -> None:
    """The same for a server that does not read: the sender waits, and nothing is lost."""
    go_on = asyncio.Event()
    received: list[bytes] = []

    async def slow(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await go_on.wait()
        received.append(await reader.read())

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with opened(directory, slow) as (_, server):
            peer = socket.socket(socket.AF_UNIX)
            peer.setblocking(False)
            await loop.sock_connect(peer, str(directory / "agent.sock"))
            await until(lambda: server.accepted == 1)
            sent = bytearray()
            quiet_since_s = time.monotonic()
            while time.monotonic() - quiet_since_s < 0.3:
                try:
                    block = os.urandom(1 << 16)
                    sent += block[: peer.send(block)]
                    quiet_since_s = time.monotonic()
                    assert len(sent) < 4 << 20, "the door takes in without end"
                except BlockingIOError:
                    await asyncio.sleep(0.005)
            go_on.set()
            peer.close()
            await until(lambda: server.ended == 1)
            assert received == [bytes(sent)]

    run(scenario)


def test_closing_cuts_links_and_removes_the_socket(directory: Path) -> None:
    async def scenario() -> None:
        async with opened(directory) as (door, server):
            reader, writer = await connect(directory)
            await until(lambda: server.accepted == 1)
            await door.close()
            assert await is_cut(reader)
            assert door.open_count == 0
            assert not (directory / "agent.sock").exists()
            await door.close()
            await gone(writer)

    run(scenario)


def test_a_server_that_is_gone_costs_the_peer_its_link_and_nothing_else(directory: Path) -> None:
    async def scenario() -> None:
        async with opened(directory) as (door, server):
            (directory / "private/agent.sock").rename(directory / "private/away")
            reader, writer = await connect(directory)
            assert await is_cut(reader)
            await gone(writer)
            await until(lambda: door.open_count == 0)
            (directory / "private/away").rename(directory / "private/agent.sock")
            reader, writer = await connect(directory)
            writer.write(b"again")
            assert await reader.readexactly(5) == b"again"
            assert server.accepted == 1
            await gone(writer)

    run(scenario)


def test_a_server_with_a_full_backlog_is_waited_for(directory: Path) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "private/agent.sock"))
        listener.listen(0)
        listener.setblocking(False)
        filler = socket.socket(socket.AF_UNIX)
        filler.connect(str(directory / "private/agent.sock"))
        door = Door(directory / "agent.sock", directory / "private/agent.sock", frozenset(), 8)
        await door.start()
        reader, writer = await connect(directory)
        writer.write(b"patience")
        await until(lambda: door.open_count == 1)
        with closing(socket.socket(socket.AF_UNIX)) as probe:
            probe.setblocking(False)
            with pytest.raises(BlockingIOError):
                probe.connect(str(directory / "private/agent.sock"))
        (await loop.sock_accept(listener))[0].close()
        inner, _ = await loop.sock_accept(listener)
        assert await loop.sock_recv(inner, 100) == b"patience"
        for end in (inner, filler, listener):
            end.close()
        assert await is_cut(reader)
        await gone(writer)
        await door.close()

    run(scenario)


def test_closing_while_a_link_is_being_opened(directory: Path) -> None:
    async def scenario() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "private/agent.sock"))
        listener.listen(0)
        filler = socket.socket(socket.AF_UNIX)
        filler.connect(str(directory / "private/agent.sock"))
        door = Door(directory / "agent.sock", directory / "private/agent.sock", frozenset(), 8)
        await door.start()
        reader, writer = await connect(directory)
        await until(lambda: door.open_count == 1)
        async with asyncio.timeout(1.0):  # far less than what the attempt itself may take
            await door.close()
        assert door.open_count == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert await is_cut(reader)
        for end in (filler, listener):
            end.close()
        await gone(writer)

    run(scenario)


def test_an_open_door_at_rest_uses_no_processor(directory: Path) -> None:
    async def scenario() -> None:
        async with opened(directory, max_connections=64) as (door, _):
            links = [await connect(directory) for _ in range(32)]
            links[0][1].write_eof()
            await until(lambda: door.open_count == 31)
            before_s = time.process_time()
            await asyncio.sleep(0.5)
            assert time.process_time() - before_s < 0.1
            for _, writer in links:
                await gone(writer)

    run(scenario)


def test_the_kernel_names_the_peer() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert peer_credentials(one) == (os.getpid(), os.getuid())
