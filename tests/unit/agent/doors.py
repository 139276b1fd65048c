"""A door with a stand-in for the gRPC server behind it, and peers who knock."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from everstep.agent.door import Door

LIMIT_S = 20.0
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def door_directory() -> Iterator[Path]:
    """Short enough for sockets, and open to other users except for private/."""
    with tempfile.TemporaryDirectory(prefix="door-", dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        (path / "private").mkdir(mode=0o700)
        yield path


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario and hold it to leaving neither tasks nor file descriptors behind."""

    async def bounded() -> None:
        before = descriptors()
        async with asyncio.timeout(LIMIT_S):
            await scenario()
            await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
            await until(lambda: descriptors() == before)

    asyncio.run(bounded())


def descriptors() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  bounded by `run`, and nobody could set an event
        await asyncio.sleep(0.001)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


class Server:
    """Stands in for the gRPC server: listens on the private socket, counts who gets through."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.accepted = 0
        self.ended = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            await self.handler(reader, writer)
        finally:
            self.ended += 1
            writer.close()


@asynccontextmanager
async def opened(
    directory: Path,
    handler: Handler = echo,
    allowed: frozenset[int] = frozenset(),
    max_connections: int = 8,
) -> AsyncIterator[tuple[Door, Server]]:
    server = Server(handler)
    listening = await asyncio.start_unix_server(server, directory / "private/agent.sock")
    door = Door(
        directory / "agent.sock", directory / "private/agent.sock", allowed, max_connections
    )
    await door.start()
    try:
        yield door, server
    finally:
        await door.close()
        listening.close()
        await until(lambda: server.ended == server.accepted)


async def connect(directory: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(directory / "agent.sock")


async def gone(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionError:
        pass


async def is_cut(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read(1) == b""
    except ConnectionError:
        return True
