"""gRPC through the door, as trainers and the CLI use it."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from everstep.agent.door import Door
from everstep.proto.places import format_address

LIMIT_S = 20.0


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="door-", dir="/tmp") as name:
        (Path(name) / "private").mkdir(mode=0o700)
        yield Path(name)


async def no_links(door: Door) -> None:
    while door.open_count:  # noqa: ASYNC110  bounded by the test; a door announces nothing
        await asyncio.sleep(0.001)


def test_grpc_through_the_door(directory: Path) -> None:
    """Large and many small calls and a stream that stays open, as trainers make them."""

    async def reverse(request: bytes, _: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return request[::-1]

    async def count(
        request: bytes, _: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        for number in range(3):
            yield request + bytes([number])
        await asyncio.Event().wait()

    limit = [("grpc.max_receive_message_length", 1 << 24)]

    async def talk(door: Door) -> None:
        address = format_address(directory / "agent.sock")
        async with grpc.aio.insecure_channel(address, options=limit) as channel:
            stream = channel.unary_stream("/test/Count", None, None)(b"n")
            assert [await stream.read() for _ in range(3)] == [b"n\0", b"n\1", b"n\2"]
            call = channel.unary_unary("/test/Reverse", None, None)
            large = os.urandom(6 << 20)
            assert await call(large) == large[::-1]
            for number in range(200):
                small = number.to_bytes(8, "big")
                assert await call(small) == small[::-1]
            assert door.open_count == 1
            stream.cancel()

    async def scenario() -> None:
        server = grpc.aio.server(options=limit)
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "test",
                    {
                        "Reverse": grpc.unary_unary_rpc_method_handler(reverse),
                        "Count": grpc.unary_stream_rpc_method_handler(count),
                    },
                ),
            )
        )
        server.add_insecure_port(format_address(directory / "private/agent.sock"))
        await server.start()
        door = Door(directory / "agent.sock", directory / "private/agent.sock", frozenset(), 8)
        await door.start()
        await talk(door)
        # Here, because gRPC keeps a connection open for as long as a call object of it lives.
        await no_links(door)
        await server.stop(0)
        await door.close()

    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await scenario()

    asyncio.run(bounded())
