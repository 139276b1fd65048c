"""Speed of the flush to NVMe, beside a bare O_DIRECT write loop of the same bytes.

``python -m benchmarks.flush [--rounds N] [--parameters P] [--directory DIR]``. The flush is timed
from the request to the durable commit: digests checked on the way, files and directories synced,
the commit written last. The bare loop writes as many bytes from warm memory with as many threads
and the same chunks, and syncs once. They take turns.
"""

import argparse
import logging
import mmap
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.report import Report
from benchmarks.workload import PARAMETERS, Training, agent, scratch

THREADS = 3
CHUNK_BYTES = 8 << 20


def bare_write(path: Path, size: int) -> float:
    """Seconds of an O_DIRECT write loop, allocation and fsync included."""
    size = -(-size // 4096) * 4096
    with mmap.mmap(-1, size) as memory:
        memory.write(bytes(size))  # its pages must exist, as those of the arena do
        view = memoryview(memory)
        begun = time.perf_counter()
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_DIRECT
        descriptor = os.open(path, flags)
        os.posix_fallocate(descriptor, 0, size)

        def write(at: int) -> None:
            end = min(at + CHUNK_BYTES, size)
            while at < end:
                at += os.pwrite(descriptor, view[at:end], at)

        with ThreadPoolExecutor(THREADS) as executor:
            list(executor.map(write, range(0, size, CHUNK_BYTES)))
        os.fsync(descriptor)
        os.close(descriptor)
        taken = time.perf_counter() - begun
        view.release()
    path.unlink()
    return taken


def run(rounds: int, parameters: int, parent: str) -> Report:
    """Measure; the table's rows are medians over the rounds."""
    import everstep

    report = Report("flush")
    flushes: list[float] = []
    bare: list[float] = []
    training = Training.start(parameters)
    size = training.state_bytes
    with scratch(parent) as directory, agent(**{"nvme-dir": str(directory / "nvme")}) as address:
        client = everstep.connect("bench", agent=address, nvme_interval=10**9)
        client.attach(model=training.model, optimizer=training.optimizer)
        for step in range(1, rounds + 2):
            training.steps(1)
            handle = client.snapshot(step)
            assert handle.wait()
            begun = time.perf_counter()
            assert handle.wait("nvme")
            flushed = time.perf_counter() - begun
            written = bare_write(directory / "bare", size)
            if step > 1:
                flushes.append(flushed)
                bare.append(written)
        client.close(timeout=0)
    report.add("state", size, f"{size / 1e6:9.1f} MB", "state_bytes")
    ours = report.seconds("flush, to the durable commit", flushes, "flush")
    loop = report.seconds(f"bare O_DIRECT loop, {THREADS} threads", bare, "bare")
    report.add("flush", size / ours, f"{size / ours / 1e9:9.2f} GB/s", "flush_bytes_per_s")
    report.add("bare", size / loop, f"{size / loop / 1e9:9.2f} GB/s", "bare_bytes_per_s")
    report.target("speed of the flush over the bare loop", loop / ours, 0.85, at_least=True)
    return report


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--directory", default=".", help="on the disk to measure")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("everstep").setLevel(logging.ERROR)
    run(options.rounds, options.parameters, os.path.abspath(options.directory)).print()


if __name__ == "__main__":
    main()
