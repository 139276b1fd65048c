"""Speed of Reed-Solomon coding on one thread, beside memcpy and libisal.

``python -m benchmarks.erasure [--rounds N] [--libisal PATH]``. For each code (k data symbols,
m parities) all m parities are encoded, and m lost data symbols decoded, in one call each: from
shards far larger than the caches (`dram`), and from blocks that stay in them (`cache`). The speed
is that of the k symbols read. memcpy copies four of the same shards. All take turns in every
round, the order changing; a ratio is the median of the rounds' ratios.

libisal is the one of an installed pyeclib, else the system's; without any, its rows are left out.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from benchmarks.isal import Isal, Sums
from benchmarks.report import Report
from everstep.erasure.matrix import decoding_row, encoding_row
from everstep.kernels.gf256 import Dots, dots

CODES = ((8, 2), (4, 1))
SHARD_BYTES = 64 << 20
BLOCK_BYTES = 256 << 10
BLOCK_REPEATS = 64
MEMCPY_SHARDS = 4
# Whole lines, and no two buffers equally far from a page's beginning.
STAGGER_BYTES = 5 * 64

Array = NDArray[numpy.uint8]


@dataclass(slots=True)
class Candidate:
    """Something to be timed.

    Attributes:
        name: Also the key of its figure.
        call: Does it once.
        coded_bytes: Of data, in all repetitions.
        repeats: How often to call.
    """

    name: str
    call: Callable[[], object]
    coded_bytes: int
    repeats: int = 1

    def speed(self) -> float:
        """Bytes a second, now."""
        if self.repeats > 1:
            self.call()  # so that whoever comes first after `dram` does not fill the caches for all
        begun = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        return self.coded_bytes / (time.perf_counter() - begun)


def buffers(count: int, size: int, noise: bool) -> list[Array]:
    """Touched memory, staggered within its pages."""
    generator = numpy.random.default_rng(1)
    made = []
    for index in range(count):
        whole = numpy.zeros(size + (count + 32) * STAGGER_BYTES, dtype=numpy.uint8)
        start = -whole.ctypes.data % 4096 + (index + (16 if noise else 0)) * STAGGER_BYTES % 4096
        whole[:] = 1
        made.append(whole[start : start + size])
        if noise:
            made[-1].view(numpy.uint64)[:] = generator.integers(0, 2**64, size // 8, numpy.uint64)
    return made


def coefficients(k: int, m: int) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """The rows that encode all parities, and those that decode the first m data symbols."""
    yield "encode", [encoding_row(k, m, k + parity) for parity in range(m)]
    present = tuple(range(m, k + m))
    yield "decode", [decoding_row(k, m, present, lost) for lost in range(m)]


def check(ours: Dots, theirs: Sums, targets: list[Array]) -> None:
    """Stop if the two do not write the same bytes."""
    ours.write()
    written = [target.copy() for target in targets]
    for target in targets:
        target[:] = 0
    theirs.write()
    for target, expected in zip(targets, written, strict=True):
        if not numpy.array_equal(target, expected):
            raise SystemExit("libisal computes something else")


def candidates(
    isal: Isal | None, place: str, shards: list[Array], targets: list[Array]
) -> list[Candidate]:
    """Each code's encoding and decoding, ours and libisal's, their arguments made ready."""
    made = []
    repeats = 1 if place == "dram" else BLOCK_REPEATS
    for k, m in CODES:
        sources, outputs = shards[:k], targets[:m]
        coded = k * sources[0].nbytes * repeats
        for verb, rows in coefficients(k, m):
            name = f"{verb}_{k}_{m}_{place}"
            ours = Dots(rows, sources, outputs)
            made.append(Candidate(name, ours.write, coded, repeats))
            if isal:
                theirs = isal.sums(rows, sources, outputs)
                check(ours, theirs, outputs)
                made.append(Candidate(name + "_libisal", theirs.write, coded, repeats))
    return made


def check_matrix(isal: Isal) -> None:
    """Stop if libisal's codes are not ours."""
    for k, m in CODES:
        encoding = dict(coefficients(k, m))["encode"]
        if [tuple(row) for row in isal.cauchy_rows(k, m)] != encoding:
            raise SystemExit(f"libisal has another matrix for k={k}, m={m}")


def call_overhead_s(arrays: list[Array], m: int) -> float:
    """What one `dots` costs beside its work, with a line of each array."""
    lines = [array[:64] for array in arrays]
    rows = [[1] * (len(lines) - m)] * m
    times = []
    for _ in range(1000):
        begun = time.perf_counter()
        dots(rows, lines[m:], lines[:m])
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def memcpy(shards: list[Array], spare: list[Array]) -> Candidate:
    """libc's memcpy of whole shards."""
    function = ctypes.CDLL(None).memcpy
    function.restype = ctypes.c_void_p
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    pairs = [
        (output.ctypes.data, source.ctypes.data, source.nbytes)
        for output, source in zip(spare, shards, strict=False)
    ]

    def call() -> None:
        for pair in pairs:
            function(*pair)

    return Candidate("memcpy", call, sum(pair[2] for pair in pairs))


def measure(turns: list[Candidate], rounds: int) -> dict[str, list[float]]:
    """Each candidate's speed in each round, after one to warm up."""
    speeds: dict[str, list[float]] = {turn.name: [] for turn in turns}
    for turn in turns:
        turn.speed()
    for index in range(rounds):
        shift = index * 3 % len(turns)
        for turn in turns[shift:] + turns[:shift]:
            speeds[turn.name].append(turn.speed())
    return speeds


def ratio(speeds: dict[str, list[float]], ours: str, theirs: str) -> float:
    """The median of the rounds' ratios."""
    pairs = zip(speeds[ours], speeds[theirs], strict=True)
    return statistics.median(left / right for left, right in pairs)


def run(rounds: int, isal: Isal | None) -> Report:
    """Measure."""
    most = max(k for k, _ in CODES)
    parities = max(m for _, m in CODES)
    shards = buffers(most, SHARD_BYTES, noise=True)
    spare = buffers(MEMCPY_SHARDS, SHARD_BYTES, noise=False)
    blocks = buffers(most, BLOCK_BYTES, noise=True)
    outputs = buffers(parities, BLOCK_BYTES, noise=False)
    if isal:
        check_matrix(isal)
    turns = [memcpy(shards, spare)]
    turns += candidates(isal, "dram", shards, spare)
    turns += candidates(isal, "cache", blocks, outputs)
    speeds = measure(turns, rounds)
    report = Report("erasure")
    report.rows.append(("libisal", isal.version if isal else "not found"))
    for name, samples in speeds.items():
        median, low, high = statistics.median(samples), min(samples), max(samples)
        text = f"{median / 1e9:9.2f} GB/s   ({low / 1e9:.2f} to {high / 1e9:.2f}, n={rounds})"
        report.add(name.replace("_", " "), median, text, name + "_bytes_per_s")
    overhead = call_overhead_s(shards + spare[:parities], parities)
    text = f"{overhead * 1e6:9.1f} us   (a dots() of {most} + {parities} buffers beside its work)"
    report.add("call from Python", overhead, text, "call_s")
    compare(report, speeds)
    return report


def compare(report: Report, speeds: dict[str, list[float]]) -> None:
    """The ratios that are to hold."""
    for name in [name for name in speeds if name.split("_")[0] in ("encode", "decode")]:
        if name.endswith("libisal"):
            continue
        label = name.replace("_", " ")
        if name.endswith("dram"):
            value = ratio(speeds, name, "memcpy")
            report.target(f"{label} over memcpy", value, 0.9, at_least=True)
        if name + "_libisal" in speeds:
            value = ratio(speeds, name, name + "_libisal")
            limit = 1.0 if name.endswith("dram") else 0.8
            report.target(f"{label} over libisal", value, limit, at_least=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--libisal", metavar="PATH", help="the library to compare with")
    options = parser.parse_args()
    isal = Isal(options.libisal) if options.libisal else Isal.find()
    run(options.rounds, isal).print()


if __name__ == "__main__":
    main()
