"""Speed of the device code: digests, gathering and sampling, on one GPU.

``python -m benchmarks.device_kernels [--bytes N] [--rounds N]``. First every variant is checked
against the host on random data. Then the digest of all units of distinct buffers is timed with
CUDA events, in several layouts and at several alignments, beside a copy of the same bytes within
the device, which moves twice as many. Last, many small tensors are gathered and sampled, beside
torch's own copies. All take turns in every round; a figure is the median.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy
import torch

from benchmarks.report import Report
from everstep.kernels import digest, gather_triton, xxh3_triton
from everstep.kernels.xxh3_triton import BLOCK_BYTES, LANES, UNIT_BYTES, Launch

BUFFER_BYTES = 256 << 20
SHIFTS = {16: 0, 8: 8, 4: 4, 1: 3}
LAUNCHES = (
    *(Launch(units, 1) for units in (1, 2, 4, 8)),
    *(Launch(units, 2) for units in (2, 4, 8)),
    *(Launch(4, 4), Launch(8, 4), Launch(16, 4), Launch(2, 1, 3), Launch(4, 1, 3)),
)
SMALL_TENSORS = 5000
SMALL_BYTES = (4, 64 << 10)
SAMPLES = (8, 32)
DEVICE = torch.device("cuda")


@dataclass(slots=True)
class Candidate:
    """Something to be timed.

    Attributes:
        name: Of its line.
        key: Of its figure.
        call: Launches it once.
        read_bytes: How much it reads.
        samples: Seconds, one for each round.
    """

    name: str
    key: str
    call: Callable[[], object]
    read_bytes: int
    samples: list[float] = field(default_factory=list)


def noise(size: int, seed: int) -> torch.Tensor:
    """Random bytes on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE, generator=generator)


def found(accumulators: torch.Tensor) -> bytes:
    """The digests, on the host."""
    return xxh3_triton.digests(accumulators.cpu().numpy().view(numpy.uint64))


def check(launch: Launch) -> None:
    """Stop if a digest is not the host's: numbers of units, alignments, scattered blocks."""
    for alignment, shift in SHIFTS.items():
        for units in (1, 7, 64):
            memory = noise(units * UNIT_BYTES + 16, units)
            start = memory.data_ptr() + shift
            host = memory.cpu().numpy()[shift : shift + units * UNIT_BYTES]
            accumulators = torch.empty((units, LANES), dtype=torch.int64, device=DEVICE)
            addresses = torch.arange(units, device=DEVICE) * UNIT_BYTES + start
            xxh3_triton.accumulate(addresses, accumulators, alignment, launch=launch)
            if found(accumulators) != digest.digest_units(host, UNIT_BYTES):
                raise SystemExit(f"wrong digests: {launch}, alignment {alignment}, {units} units")
            order = torch.randperm(units * UNIT_BYTES // BLOCK_BYTES)
            blocks = (order * BLOCK_BYTES + start).reshape(units, -1).to(DEVICE)
            xxh3_triton.accumulate_blocks(blocks, accumulators, alignment, launch=launch)
            shuffled = host.reshape(-1, BLOCK_BYTES)[order.numpy()]
            if found(accumulators) != digest.digest_units(shuffled, UNIT_BYTES):
                raise SystemExit(f"wrong digests of blocks: {launch}, alignment {alignment}")


def digest_candidates(buffers: list[torch.Tensor]) -> list[Candidate]:
    """Every layout at alignment 16, and the default one at the others and for blocks."""
    made = []
    for launch in LAUNCHES:
        text = f"{launch.units} units, {launch.warps} warps, {launch.stages} stages"
        key = f"digest_{launch.units}_{launch.warps}_{launch.stages}"
        made.append(digest_candidate(buffers, f"digest, {text}", key, 16, launch, False))
    default = xxh3_triton.DEFAULT
    for scattered in (False, True):
        for alignment in SHIFTS:
            name = f"digest{' of blocks' if scattered else ''}, aligned to {alignment}"
            key = f"digest_{'blocks_' if scattered else ''}aligned_{alignment}"
            made.append(digest_candidate(buffers, name, key, alignment, default, scattered))
    return made


def digest_candidate(
    buffers: list[torch.Tensor],
    name: str,
    key: str,
    alignment: int,
    launch: Launch,
    scattered: bool,
) -> Candidate:
    """The digest of all whole units, each buffer beginning at the alignment and no better."""
    shift = SHIFTS[alignment]
    each = (BUFFER_BYTES - shift) // UNIT_BYTES
    starts = torch.tensor([buffer.data_ptr() + shift for buffer in buffers])
    units = (starts[:, None] + torch.arange(each) * UNIT_BYTES).reshape(-1)
    accumulators = torch.empty((len(units), LANES), dtype=torch.int64, device=DEVICE)
    size = len(units) * UNIT_BYTES
    if scattered:
        blocks = (units[:, None] + torch.arange(0, UNIT_BYTES, BLOCK_BYTES)).to(DEVICE)

        def call() -> None:
            xxh3_triton.accumulate_blocks(blocks, accumulators, alignment, launch=launch)

    else:
        addresses = units.to(DEVICE)

        def call() -> None:
            xxh3_triton.accumulate(addresses, accumulators, alignment, launch=launch)

    return Candidate(name, key, call, size)


def small_candidates() -> list[Candidate]:
    """Gathering and sampling of many small tensors, beside torch's own copies of them."""
    low, high = numpy.log(SMALL_BYTES)
    draws = numpy.random.default_rng(1).uniform(low, high, SMALL_TENSORS)
    sizes = (numpy.exp(draws).astype(numpy.int64) // 4 * 4).clip(4).tolist()
    sources = [noise(size, index) for index, size in enumerate(sizes)]
    total = sum(sizes)
    packed = torch.empty(total, dtype=torch.uint8, device=DEVICE)
    targets = list(packed.split(sizes))
    pairs = list(zip(targets, sources, strict=True))
    pieces = torch.tensor([(to.data_ptr(), of.data_ptr(), of.nbytes) for to, of in pairs])
    pieces = pieces.to(DEVICE)
    gather_triton.gather(pieces, max(sizes))
    if not all(torch.equal(target, source) for target, source in pairs):
        raise SystemExit("gather copied something else")
    rows = pieces[:, 1:].contiguous()
    fingerprints = torch.empty(SMALL_TENSORS, dtype=torch.int64, device=DEVICE)
    count = f"{SMALL_TENSORS} tensors"
    made = [
        Candidate(
            f"gather {count}", "gather", lambda: gather_triton.gather(pieces, max(sizes)), total
        ),
        Candidate(
            "torch._foreach_copy_", "foreach", lambda: torch._foreach_copy_(targets, sources), total
        ),
        Candidate("torch.cat", "cat", lambda: torch.cat(sources, out=packed), total),
    ]
    for samples in SAMPLES:

        def call(samples: int = samples) -> None:
            gather_triton.sample(rows, samples, 1, fingerprints)

        read = SMALL_TENSORS * (samples + 2) * 8
        made.append(Candidate(f"sample {count}, {samples}", f"sample_{samples}", call, read))
    return made


def measure(turns: list[Candidate], rounds: int) -> None:
    """Time each candidate in each round, after one to warm up."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for index in range(rounds + 1):
        shift = index * 3 % len(turns)
        for turn in turns[shift:] + turns[:shift]:
            torch.cuda.synchronize()
            # Launching takes longer than a small kernel: the device must not wait for that.
            torch.cuda._sleep(1_000_000)
            begun.record()
            turn.call()
            ended.record()
            ended.synchronize()
            if index:
                turn.samples.append(begun.elapsed_time(ended) / 1e3)


def run(total_bytes: int, rounds: int) -> Report:
    """Measure."""
    for launch in LAUNCHES:
        check(launch)
    buffers = [noise(BUFFER_BYTES, index) for index in range(max(1, total_bytes // BUFFER_BYTES))]
    copies = [torch.empty_like(buffer) for buffer in buffers]
    copied = sum(buffer.nbytes for buffer in buffers)

    def copy() -> None:
        for target, source in zip(copies, buffers, strict=True):
            target.copy_(source)

    reference = Candidate("copy within the device", "copy", copy, copied)
    digests = digest_candidates(buffers)
    small = small_candidates()
    measure([reference, *digests, *small], rounds)
    report = Report("device kernels")
    report.rows.append(("device", torch.cuda.get_device_name(DEVICE)))
    report.rows.append(("read by each digest", f"{copied / 1e9:9.2f} GB"))
    for turn in [reference, *digests, *small]:
        median = report.seconds(turn.name, turn.samples, turn.key)
        speed = turn.read_bytes / median
        report.add("", speed, f"{speed / 1e9:9.1f} GB/s read", turn.key + "_bytes_per_s")
    compare(report, reference, digests)
    return report


def compare(report: Report, reference: Candidate, digests: list[Candidate]) -> None:
    """The ratios that are to hold: seconds for each byte, over those of the copy."""

    def pace(turn: Candidate) -> float:
        return report.figures[turn.key + "_s"] / turn.read_bytes

    for turn in digests[len(LAUNCHES) :]:
        report.target(f"{turn.name}, time over the copy's", pace(turn) / pace(reference), 1.0)
    best = min(digests[: len(LAUNCHES)], key=pace)
    report.rows.append(("fastest layout", best.name))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=8 << 30)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if not (torch.cuda.is_available() and xxh3_triton.available()):
        raise SystemExit("this needs an NVIDIA GPU and triton")
    run(options.bytes, options.rounds).print()


if __name__ == "__main__":
    main()
