"""The compiled device code on a GPU, against xxhash and the host's references."""

from collections.abc import Iterator

import numpy
import pytest
import torch

from everstep.kernels import digest, gather_triton, xxh3_triton
from everstep.kernels.xxh3_triton import BLOCK_BYTES, LANES, UNIT_BYTES, Launch

pytestmark = pytest.mark.gpu

BLOCKS = UNIT_BYTES // BLOCK_BYTES
LAUNCHES = [
    *(Launch(units=1), Launch(units=2), Launch(units=4), Launch(units=8)),
    *(Launch(units=4, warps=2), Launch(units=8, warps=4), Launch(units=2, stages=3)),
]


@pytest.fixture
def device() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    yield torch.device("cuda")
    torch.cuda.empty_cache()


def noise(size: int, device: torch.device, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device=device, generator=generator)


def digests_at(memory: torch.Tensor, starts: list[int], alignment: int, launch: Launch) -> bytes:
    addresses = torch.tensor(starts, device=memory.device) + memory.data_ptr()
    accumulators = torch.full((len(starts) + 1, LANES), -1, device=memory.device)
    xxh3_triton.accumulate(addresses, accumulators[:-1], alignment, launch=launch)
    assert (accumulators[-1] == -1).all(), "written past the end"
    return xxh3_triton.digests(accumulators[:-1].cpu().numpy().view(numpy.uint64))


def expected_at(memory: torch.Tensor, starts: list[int]) -> bytes:
    host = memory.cpu().numpy()
    return b"".join(digest.digest_units(host[at : at + UNIT_BYTES], UNIT_BYTES) for at in starts)


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize(("alignment", "shift"), [(16, 0), (8, 8), (4, 4), (2, 2), (1, 1), (1, 15)])
def test_digests_are_those_of_the_host(
    device: torch.device, alignment: int, shift: int, launch: Launch
) -> None:
    units = 11  # no multiple of any launch's units
    memory = noise((units + 1) * UNIT_BYTES, device)
    starts = [shift + unit * UNIT_BYTES for unit in range(units)]
    assert digests_at(memory, starts, alignment, launch) == expected_at(memory, starts)


def test_the_path_for_any_alignment_takes_aligned_units_too(device: torch.device) -> None:
    memory = noise(9 * UNIT_BYTES, device)
    starts = [unit * UNIT_BYTES + unit for unit in range(8)]
    assert digests_at(memory, starts, 1, xxh3_triton.DEFAULT) == expected_at(memory, starts)


def test_a_unit_at_the_very_end_of_an_allocation(device: torch.device) -> None:
    # compute-sanitizer sees a read past the end here.
    for alignment, shift in [(16, 0), (8, 8), (1, 3)]:
        memory = noise(UNIT_BYTES + shift, device)
        assert digests_at(memory, [shift], alignment, xxh3_triton.DEFAULT) == expected_at(
            memory, [shift]
        )


def test_special_units(device: torch.device) -> None:
    memory = torch.zeros(3 * UNIT_BYTES, dtype=torch.uint8, device=device)
    memory[UNIT_BYTES : 2 * UNIT_BYTES] = 255
    memory[-1] = 1
    starts = [0, UNIT_BYTES, 2 * UNIT_BYTES]
    assert digests_at(memory, starts, 16, xxh3_triton.DEFAULT) == expected_at(memory, starts)


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize(("alignment", "shift"), [(16, 0), (8, 8), (4, 4), (1, 3)])
def test_blocks_may_lie_anywhere(
    device: torch.device, alignment: int, shift: int, launch: Launch
) -> None:
    units, stride = 5, BLOCK_BYTES + 16
    memory = noise(units * BLOCKS * stride + shift, device)
    order = torch.randperm(units * BLOCKS)
    blocks = (memory.data_ptr() + shift + order * stride).reshape(units, BLOCKS).to(device)
    accumulators = torch.empty((units, LANES), dtype=torch.int64, device=device)
    xxh3_triton.accumulate_blocks(blocks, accumulators, alignment, launch=launch)
    found = xxh3_triton.digests(accumulators.cpu().numpy().view(numpy.uint64))
    rows = memory.cpu().as_strided((units * BLOCKS, BLOCK_BYTES), (stride, 1), shift)
    expected = digest.digest_units(rows[order].contiguous().numpy(), UNIT_BYTES)
    assert found == expected


def test_launches_on_the_current_stream(device: torch.device) -> None:
    memory = torch.zeros(64 * UNIT_BYTES, dtype=torch.uint8, device=device)
    addresses = torch.arange(64, device=device) * UNIT_BYTES + memory.data_ptr()
    accumulators = torch.zeros((64, LANES), dtype=torch.int64, device=device)
    xxh3_triton.accumulate(addresses, accumulators, 16)  # compiled before it is timed
    accumulators.zero_()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # The digest must see what this stream writes before, and wait for it.
        torch.cuda._sleep(200_000_000)
        memory.fill_(7)
        xxh3_triton.accumulate(addresses, accumulators, 16)
        ended = stream.record_event()
    assert not ended.query(), "the launch waited for the device"
    ended.synchronize()
    found = xxh3_triton.digests(accumulators.cpu().numpy().view(numpy.uint64))
    assert found == digest.digest_units(bytes([7]) * UNIT_BYTES, UNIT_BYTES) * 64


def test_no_number_compiles_anew(device: torch.device) -> None:
    xxh3_triton.prepare(device)
    gather_triton.prepare(device, [8, 32])
    before = compiled()
    memory = noise(40 * UNIT_BYTES, device)
    for count in (1, 2, 3, 16, 39):
        table = torch.arange(count + 1, device=device) * UNIT_BYTES + memory.data_ptr()
        accumulators = torch.empty((count + 1, LANES), dtype=torch.int64, device=device)
        for alignment in (16, 8, 4):
            xxh3_triton.accumulate(table[1:], accumulators[1:], alignment)
        sources = torch.stack([table, torch.full_like(table, 1000)], dim=1)
        fingerprints = torch.empty(count + 2, dtype=torch.int64, device=device)
        for seed in (0, 1, 16, -1, 1 << 63, (1 << 64) - 1):
            gather_triton.sample(sources, 8, seed, fingerprints[1:])
            gather_triton.sample(sources, 32, seed, fingerprints[1:])
        pieces = torch.stack([table + 5000, table, torch.full_like(table, 1000)], dim=1)
        for largest in (1, 1000, 1 << 20):
            gather_triton.gather(pieces[:count], largest)
    assert compiled() == before


def compiled() -> int:
    """How many variants there are of all device code."""
    from everstep.kernels import gather_program_triton, xxh3_program_triton

    programs = (
        xxh3_program_triton.accumulate_units,
        gather_program_triton.gather_pieces,
        gather_program_triton.sample_source,
    )
    return sum(len(caches[0]) for each in programs for caches in each.device_caches.values())


def scattered_pieces(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Memory to copy from, as much to copy to, and the copies: (offset, offset, bytes)."""
    generator = numpy.random.default_rng(3)
    sizes = generator.integers(0, 5000, 3000)
    sizes[::3] = sizes[::3] // 16 * 16
    sizes[1] = 3_000_001
    # Every third is aligned to 16 on both sides, every third to 4, the rest not at all.
    grain = numpy.resize([16, 4, 1], len(sizes))
    gaps = generator.integers(0, 3, len(sizes)) * grain + 32
    ends = numpy.cumsum(sizes + gaps + 16)
    targets = (ends - sizes - 16) // grain * grain
    sources = targets + generator.integers(0, 2, len(sizes)) * grain
    memory = noise(int(ends[-1]) + 64, device, 4)
    rows = torch.from_numpy(numpy.stack([targets, sources, sizes], axis=1).astype(numpy.int64))
    return memory, noise(len(memory), device, 5), rows


@pytest.mark.parametrize("hint", [0, 4096, 3_000_001])
def test_gather_copies_every_piece_and_nothing_else(device: torch.device, hint: int) -> None:
    sources, targets, rows = scattered_pieces(device)
    expected, held = targets.cpu(), sources.cpu()
    for target, source, size in rows.tolist():
        expected[target : target + size] = held[source : source + size]
    base = torch.tensor([targets.data_ptr(), sources.data_ptr(), 0])
    gather_triton.gather((rows + base).to(device), hint)
    assert torch.equal(targets.cpu(), expected)


@pytest.mark.parametrize("samples", [0, 8, 32])
@pytest.mark.parametrize("seed", [0, -1, 0x1234_5678_9ABC_DEF0])
def test_sample_computes_the_reference(device: torch.device, samples: int, seed: int) -> None:
    memory = noise(1 << 22, device, 6)
    host = memory.cpu()
    generator = numpy.random.default_rng(7)
    sizes = [*range(300), *generator.integers(0, 1 << 20, 500).tolist(), 1 << 22]
    starts = [int(generator.integers(0, (1 << 22) - size + 1)) for size in sizes]
    rows = torch.tensor(list(zip(starts, sizes, strict=True)))
    fingerprints = torch.empty(len(sizes), dtype=torch.int64, device=device)
    on_device = (rows + torch.tensor([memory.data_ptr(), 0])).to(device)
    gather_triton.sample(on_device, samples, seed, fingerprints)
    on_host = [(host.data_ptr() + start, size) for start, size in rows.tolist()]
    expected = gather_triton.reference_sample(on_host, samples, seed)
    assert fingerprints.cpu().numpy().view(numpy.uint64).tolist() == expected
