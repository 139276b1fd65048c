"""The door: who may enter, and what those cost who may not."""

import asyncio
import logging
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.agent.door import Door

from .doors import (
    LIMIT_S,
    connect,
    descriptors,
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


def test_a_full_house_refuses_and_has_room_again(directory: Path) -> None:
    async def scenario() -> None:
        async with opened(directory, max_connections=2) as (door, server):
            first, second = await connect(directory), await connect(directory)
            await until(lambda: door.open_count == 2)
            third = await connect(directory)
            assert await is_cut(third[0])
            assert (door.refused_count, door.open_count) == (1, 2)
            await gone(first[1])
            await until(lambda: door.open_count == 1)
            fourth = await connect(directory)
            fourth[1].write(b"hello")
            assert await fourth[0].readexactly(5) == b"hello"
            assert server.accepted == 3
            for _, writer in (second, third, fourth):
                await gone(writer)

    run(scenario)


def test_a_crowd_takes_no_more_descriptors_than_there_is_room_for(directory: Path) -> None:
    """Also not for a moment: a record or a flush may need one just then."""

    async def scenario() -> None:
        async with opened(directory, max_connections=8) as (door, server):
            crowd = [socket.socket(socket.AF_UNIX) for _ in range(100)]
            for visitor in crowd:
                visitor.connect(str(directory / "agent.sock"))
            before = most = len(descriptors())
            while server.accepted < 8 or door.refused_count < 92:
                await asyncio.sleep(0)
                most = max(most, len(descriptors()))
            assert door.open_count == 8
            assert most - before <= 8 * 3, "two of the door for each, and one of the server"
            for visitor in crowd:
                visitor.close()
            await until(lambda: door.open_count == 0)
            reader, writer = await connect(directory)
            writer.write(b"room again")
            assert await reader.readexactly(10) == b"room again"
            await gone(writer)

    run(scenario)


def test_a_stranger_is_refused_before_any_byte_passes(directory: Path) -> None:
    """Whoever runs the tests plays the stranger: the door is told not to know this user."""

    async def scenario() -> None:
        async with opened(directory) as (door, server):
            door._allowed_uids = frozenset({os.getuid() + 1})
            for _ in range(3):
                reader, writer = await connect(directory)
                writer.write(b"let me in")
                assert await is_cut(reader)
                await gone(writer)
            assert door.refused_count == 3
            assert (server.accepted, door.open_count) == (0, 0)

    run(scenario)


_KNOCK = """
import os, socket, sys
os.setgid(65534); os.setuid(int(sys.argv[2]))
s = socket.socket(socket.AF_UNIX)
try:
    s.connect(sys.argv[1]); s.sendall(b"knock"); print(s.recv(5).decode())
except PermissionError:
    print("no permission")
except ConnectionError:
    print()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("allowed", "uid", "answer"),
    [
        (frozenset(), 65533, "no permission"),
        (frozenset({65533}), 65533, "knock"),
        (frozenset({65533}), 65532, ""),
        (frozenset(), 0, "knock"),
    ],
)
def test_real_users(allowed: frozenset[int], uid: int, answer: str, directory: Path) -> None:
    async def scenario() -> None:
        async with opened(directory, allowed=allowed) as (_, server):
            command = [sys.executable, "-I", "-c", _KNOCK, str(directory / "agent.sock"), str(uid)]
            done = await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=LIMIT_S
            )
            assert (done.returncode, done.stdout.strip()) == (0, answer), done.stderr
            assert server.accepted == (answer == "knock")
        await asyncio.get_running_loop().shutdown_default_executor()

    run(scenario)


def test_the_sockets_mode(directory: Path) -> None:
    async def scenario() -> None:
        for allowed, mode in (
            (frozenset[int](), 0o600),
            (frozenset({os.getuid(), 0}), 0o600),
            (frozenset({os.getuid() + 1}), 0o666),
        ):
            before = os.umask(0o077)
            try:
                async with opened(directory, allowed=allowed):
                    found = (directory / "agent.sock").stat().st_mode
                    assert stat.S_IMODE(found) == mode
                    (directory / "private/agent.sock").unlink()
            finally:
                os.umask(before)

    run(scenario)


def test_refusals_are_logged_once_in_a_while(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times_s = iter((0.0, 1.0, 9.9, 10.0, 10.1))
    door = Door(directory / "a", directory / "b", frozenset(), 1, clock=lambda: next(times_s))
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            door._refused(1, "no")
    assert [record.args[-1] for record in caplog.records if isinstance(record.args, tuple)] == [
        1,
        3,
    ]
    assert door.refused_count == 5
