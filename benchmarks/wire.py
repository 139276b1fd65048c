"""Speed of the bulk plane, beside a bare sendfile/recv_into loop of the same bytes.

``python -m benchmarks.wire [--rounds N] [--megabytes M]``. Two processes on two cores, over the
loopback interface: one serves a file in tmpfs, the other receives it into warm memory, over one
stream and over two. Ours checks the digest of every unit; the bare loop has the same send buffer,
which is worth more to it than what the kernel chooses. They take turns.
"""

import argparse
import itertools
import json
import mmap
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from benchmarks.workload import scratch

STREAMS = (1, 2)
CORES = 2
TIMEOUT_S = 30.0
SEND_BUFFER_BYTES = 512 << 10
_RANGE = struct.Struct("!QQ")


def serve(path: str) -> None:
    """The other process: answers each line of standard input with what the receiver needs."""
    from everstep.agent.sending import BulkServer, FilePiece, Source
    from everstep.proto.ids import UNIT_BYTES
    from everstep.snapshot.digest import unit_digest

    file = os.open(path, os.O_RDONLY)
    size = os.fstat(file).st_size
    with mmap.mmap(file, size, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
        digests = [unit_digest(view[at : at + UNIT_BYTES]) for at in range(0, size, UNIT_BYTES)]
    pieces = [
        FilePiece(index, file, index * UNIT_BYTES, UNIT_BYTES, digest)
        for index, digest in enumerate(digests)
    ]
    bare = socket.create_server(("127.0.0.1", 0))
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    threading.Thread(target=serve_bare, args=(bare, file), daemon=True).start()
    server = BulkServer(
        "127.0.0.1",
        0,
        max_streams=4,
        max_tickets=4,
        ticket_timeout_s=TIMEOUT_S,
        stall_timeout_s=TIMEOUT_S,
    )
    server.start()
    print(json.dumps({"bare": bare.getsockname()[1], "digests": [d.hex() for d in digests]}))
    for line in sys.stdin:
        begin, end = json.loads(line)
        ticket = server.issue(Source(pieces[begin:end], lambda: None))
        print(json.dumps([ticket.token.hex(), ticket.address, ticket.units, ticket.bytes]))
    server.close()


def serve_bare(listener: socket.socket, file: int) -> None:
    """A thread a connection, a loop around sendfile."""

    def send(connection: socket.socket) -> None:
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            offset, left = _RANGE.unpack(connection.recv(_RANGE.size, socket.MSG_WAITALL))
            while left:
                sent = os.sendfile(connection.fileno(), file, offset, left)
                offset, left = offset + sent, left - sent

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=send, args=(connection,), daemon=True).start()


def receive_bare(port: int, begin: int, view: memoryview) -> None:
    """A loop around recv_into."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(_RANGE.pack(begin, len(view)))
        at = 0
        while at < len(view):
            at += connection.recv_into(view[at : at + (1 << 20)], 0, socket.MSG_WAITALL)


class Sender:
    """The other process."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "benchmarks.wire", "--serve", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            text=True,
        )
        told = self._read()
        self.bare_port: int = told["bare"]
        self.digests = [bytes.fromhex(digest) for digest in told["digests"]]

    def ask(self, first: int, end: int) -> Any:
        """A ticket for these units, as its fields."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([first, end]) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self.process.communicate(timeout=TIMEOUT_S)


def timed(streams: int, units: int, receive: Callable[[int, int], None]) -> float:
    """Seconds until every stream has received its part of the units."""
    edges = [units * stream // streams for stream in range(streams + 1)]
    with ThreadPoolExecutor(streams) as executor:
        begun = time.perf_counter()
        list(executor.map(receive, edges[:-1], edges[1:]))
        return time.perf_counter() - begun


@contextmanager
def sender(size: int) -> Iterator[Sender]:
    """Serves a file of random bytes in tmpfs."""
    with scratch("/dev/shm") as directory:
        path = directory / "image"
        with path.open("wb") as file:
            for _ in range(size >> 20):
                file.write(os.urandom(1 << 20))
        made = Sender(path)
        try:
            yield made
        finally:
            made.close()


def run(rounds: int, megabytes: int) -> Report:
    """Measure; the table's rows are medians over the rounds, the ratios too."""
    from everstep.agent.receiving import Expected, Receiver
    from everstep.agent.tickets import IssuedTicket
    from everstep.proto.ids import UNIT_BYTES

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    report = Report("wire")
    size = megabytes << 20
    report.add("file", size, f"{size / 1e6:9.1f} MB", "file_bytes")
    with sender(size) as other, mmap.mmap(-1, size) as memory, memoryview(memory) as view:
        memory.write(bytes(size))  # its pages must exist
        expected = [
            Expected(index, UNIT_BYTES, digest) for index, digest in enumerate(other.digests)
        ]

        def ours(first: int, end: int) -> None:
            token, *rest = tickets.pop((first, end))
            with Receiver(
                IssuedTicket(bytes.fromhex(token), *rest),
                "sender",
                expected[first:end],
                connect_timeout_s=TIMEOUT_S,
                stall_timeout_s=TIMEOUT_S,
            ) as receiver:
                for index in range(first, end):
                    receiver.read_into(view[index * UNIT_BYTES : (index + 1) * UNIT_BYTES])

        def bare(first: int, end: int) -> None:
            part = view[first * UNIT_BYTES : end * UNIT_BYTES]
            receive_bare(other.bare_port, first * UNIT_BYTES, part)

        for streams in STREAMS:
            times: dict[str, list[float]] = {"bulk plane": [], "bare loop": []}
            for turn in range(rounds + 1):
                edges = [megabytes * stream // streams for stream in range(streams + 1)]
                tickets = {
                    (first, end): other.ask(first, end) for first, end in itertools.pairwise(edges)
                }
                pair = {"bulk plane": ours, "bare loop": bare}
                for name in sorted(pair, reverse=bool(turn % 2)):
                    taken = timed(streams, megabytes, pair[name])
                    if turn:
                        times[name].append(taken)
            plural = f"{streams} stream{'s' if streams > 1 else ''}"
            for name, samples in times.items():
                key = f"{name.replace(' ', '_')}_{streams}"
                median = report.seconds(f"{name}, {plural}", samples, key)
                speed = f"{size / median / 1e9:9.2f} GB/s"
                report.add(f"  {name}", size / median, speed, f"{key}_bytes_per_s")
            pairs = zip(times["bare loop"], times["bulk plane"], strict=True)
            ratio = statistics.median(loop / plane for loop, plane in pairs)
            title = f"speed of the bulk plane over the bare loop, {plural}"
            report.target(title, ratio, 0.7, at_least=True)
    return report


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    else:
        run(options.rounds, options.megabytes).print()


if __name__ == "__main__":
    main()
