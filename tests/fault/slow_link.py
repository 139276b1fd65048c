"""A link that is slow by a random time, for one node's outgoing connections.

Run in the node's network namespace, ``slow_link.py PORT LEAST_S MOST_S SEED FLIPS``; nft sends each
connection here (see netns.py), and what arrives in either direction is held back for a while. With
FLIPS, every so many streams of the bulk plane that come to the node have one flipped bit.
Within a connection the order stays, as TCP has it; messages on different connections overtake each
other. netem would do this in the kernel, where a kernel has it.
"""

import asyncio
import random
import socket
import struct
import sys
from collections.abc import Callable

SO_MARK = 36
SO_ORIGINAL_DST = 80
MARK = 7
BULK_MAGIC = b"EVBK"
CHUNK_BYTES = 1 << 16
IN_FLIGHT = 64


class Flips:
    """Which streams are damaged."""

    streams = 0

    def __init__(self) -> None:
        self._waiting = False

    def asked(self, data: bytes) -> bytes:
        """What the node sends: the first bytes tell a stream of the bulk plane."""
        every = int(sys.argv[5])
        if every and data.startswith(BULK_MAGIC):
            Flips.streams += 1
            self._waiting = Flips.streams % every == 0
        return data

    def answered(self, data: bytes) -> bytes:
        """What the node is sent."""
        if not self._waiting or len(data) < 1000:
            return data
        self._waiting = False
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 1
        return bytes(damaged)


async def pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    chance: random.Random,
    change: Callable[[bytes], bytes],
) -> None:
    """Pass on what comes, each piece when its time has come."""
    least_s, most_s = float(sys.argv[2]), float(sys.argv[3])
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)

    async def take() -> None:
        data = b"-"
        while data:
            try:
                data = await reader.read(CHUNK_BYTES)
            except ConnectionError:
                data = b""
            await queue.put((loop.time() + chance.uniform(least_s, most_s), data))

    taking = loop.create_task(take())
    try:
        while True:
            due_s, data = await queue.get()
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            if not data:
                return
            writer.write(change(data))
            await writer.drain()
    finally:
        taking.cancel()
        writer.close()


async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, to where it was meant to go."""
    own = writer.get_extra_info("socket")
    _, port, host = struct.unpack("!HH4s8x", own.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16))
    other = socket.socket()
    other.setblocking(False)
    other.setsockopt(socket.SOL_SOCKET, SO_MARK, MARK)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(other, (socket.inet_ntoa(host), port))
        there = await asyncio.open_connection(sock=other)
    except OSError:
        writer.close()
        return
    chance = random.Random(int(sys.argv[4]))
    flips = Flips()
    await asyncio.gather(
        pump(reader, there[1], chance, flips.asked),
        pump(there[0], writer, chance, flips.answered),
        return_exceptions=True,
    )


async def main() -> None:
    server = await asyncio.start_server(link, "127.0.0.1", int(sys.argv[1]))
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
