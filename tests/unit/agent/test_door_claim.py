"""Which door gets a socket's path: dead ones are replaced, live ones and other files are not."""

import asyncio
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from everstep.agent.door import Door
from everstep.proto.errors import InvalidConfiguration


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="door-", dir="/tmp") as name:
        (Path(name) / "private").mkdir(mode=0o700)
        yield Path(name)


def door_in(directory: Path, public: str = "agent.sock") -> Door:
    return Door(directory / public, directory / "private/agent.sock", frozenset(), 8)


def answers(directory: Path) -> bool:
    """Whether someone answers at the public socket."""
    with closing(socket.socket(socket.AF_UNIX)) as probe:
        return probe.connect_ex(str(directory / "agent.sock")) == 0


def leave_dead_socket(directory: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(directory / "agent.sock"))


def test_a_socket_file_that_nobody_listens_on_is_replaced(directory: Path) -> None:
    leave_dead_socket(directory)

    async def scenario() -> None:
        door = door_in(directory)
        assert not answers(directory)
        await door.start()
        assert answers(directory)
        await door.close()
        assert not (directory / "agent.sock").exists()

    asyncio.run(scenario())


def test_a_second_agent_is_told_of_the_first(directory: Path) -> None:
    async def scenario() -> None:
        first, second = door_in(directory), door_in(directory)
        await first.start()
        with pytest.raises(InvalidConfiguration, match=f"process {os.getpid()}"):
            await second.start()
        await second.close()
        assert answers(directory), "the first one's socket must survive the second's end"
        await first.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("dead", [True, False])
def test_of_several_agents_that_start_at_once_one_wins(dead: bool, directory: Path) -> None:
    if dead:
        leave_dead_socket(directory)

    async def scenario() -> None:
        doors = [door_in(directory) for _ in range(6)]
        results = await asyncio.gather(*(door.start() for door in doors), return_exceptions=True)
        assert [isinstance(result, InvalidConfiguration) for result in results].count(False) == 1
        assert answers(directory)
        for door in doors:
            await door.close()

    asyncio.run(scenario())


def test_a_claim_waits_for_another_claim_under_way(directory: Path) -> None:
    async def scenario() -> None:
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        door = door_in(directory)
        starting = asyncio.create_task(door.start())
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not starting.done()
        assert not (directory / "agent.sock").exists()
        os.close(descriptor)
        await starting
        await door.close()

    asyncio.run(scenario())


def test_what_is_not_a_socket_is_not_touched(directory: Path) -> None:
    (directory / "agent.sock").write_bytes(b"mine")
    with pytest.raises(InvalidConfiguration, match="not a socket"):
        asyncio.run(door_in(directory).start())
    assert (directory / "agent.sock").read_bytes() == b"mine"


def test_a_private_socket_that_others_can_reach_is_refused(directory: Path) -> None:
    (directory / "private").chmod(0o711)
    with pytest.raises(InvalidConfiguration, match="chmod 700"):
        asyncio.run(door_in(directory).start())
    assert not (directory / "agent.sock").exists()


@pytest.mark.parametrize("public", ["missing/agent.sock", "x" * 110])
def test_a_missing_directory_and_a_long_path(public: str, directory: Path) -> None:
    with pytest.raises(InvalidConfiguration):
        asyncio.run(door_in(directory, public).start())


def test_closing_leaves_a_successors_socket(directory: Path) -> None:
    async def scenario() -> None:
        door = door_in(directory)
        await door.start()
        (directory / "agent.sock").unlink()
        leave_dead_socket(directory)
        await door.close()
        assert (directory / "agent.sock").exists()

    asyncio.run(scenario())
