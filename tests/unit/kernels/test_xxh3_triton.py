"""The device's digests: the reference against xxhash, the device code against the reference."""

import subprocess
import sys

import numpy
import pytest
import torch
import xxhash

from everstep.kernels import digest, xxh3_triton
from everstep.kernels.xxh3_triton import BLOCK_BYTES, LANES, UNIT_BYTES, Launch

# The interpreter takes seconds for a unit of 1 MiB: tests/gpu/test_device_kernels.py has those.
SMALL_UNIT_BYTES = 5 * BLOCK_BYTES
BLOCKS = SMALL_UNIT_BYTES // BLOCK_BYTES
GUARD_BYTES = 64


def random_units(count: int, unit_bytes: int = UNIT_BYTES, seed: int = 1) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, (count, unit_bytes), dtype=numpy.uint8)


def special_units() -> numpy.ndarray:
    units = numpy.zeros((4, UNIT_BYTES), dtype=numpy.uint8)
    units[1] = 0xFF
    units[2, -1] = 1  # the last stripe has a key of its own
    units[3].view("<u8")[:] = numpy.arange(UNIT_BYTES // 8)
    return units


@pytest.mark.parametrize("units", [random_units(3), special_units()], ids=["random", "special"])
def test_the_reference_gives_the_digests_of_xxhash(units: numpy.ndarray) -> None:
    digests = xxh3_triton.digests(xxh3_triton.reference_accumulate(units))
    assert digests == b"".join(xxhash.xxh3_128_digest(unit) for unit in units)
    assert digests == digest.digest_units(units, UNIT_BYTES)


def test_every_byte_of_a_unit_counts() -> None:
    units = numpy.repeat(random_units(1), 40, axis=0)
    places = numpy.random.default_rng(2).integers(0, UNIT_BYTES, 36).tolist()
    for unit, place in enumerate([0, UNIT_BYTES - 1, UNIT_BYTES - 64, *places], 1):
        units[unit, place] ^= 1
    digests = xxh3_triton.digests(xxh3_triton.reference_accumulate(units))
    assert len({digests[row : row + 16] for row in range(0, len(digests), 16)}) == 40


@pytest.mark.parametrize("unit_bytes", [1024, 2048, 5 * 1024])
def test_units_of_other_sizes(unit_bytes: int) -> None:
    units = random_units(3, unit_bytes)
    digests = xxh3_triton.digests(xxh3_triton.reference_accumulate(units), unit_bytes)
    assert digests == digest.digest_units(units, unit_bytes)


def test_no_units_have_no_digests() -> None:
    assert xxh3_triton.digests(numpy.zeros((0, LANES), numpy.uint64)) == b""
    nothing = torch.zeros((0, LANES), dtype=torch.int64)
    xxh3_triton.accumulate(torch.zeros(0, dtype=torch.int64), nothing, 16)


def run_at(shifts: list[int], alignment: int, launch: Launch) -> None:
    """Digest a unit at each of these addresses modulo 16, and compare."""
    units = random_units(len(shifts), SMALL_UNIT_BYTES, alignment)
    memory = numpy.full(len(shifts) * (SMALL_UNIT_BYTES + 2 * GUARD_BYTES) + 16, 0xA5, numpy.uint8)
    first = -memory.ctypes.data % 16 + GUARD_BYTES
    addresses = torch.empty(len(shifts), dtype=torch.int64)
    for unit, shift in enumerate(shifts):
        start = first + unit * (SMALL_UNIT_BYTES + 2 * GUARD_BYTES) + shift
        memory[start : start + SMALL_UNIT_BYTES] = units[unit]
        addresses[unit] = memory.ctypes.data + start
    accumulators = torch.full((len(shifts) + 1, LANES), -1, dtype=torch.int64)
    xxh3_triton.accumulate(
        addresses, accumulators[:-1], alignment, unit_bytes=SMALL_UNIT_BYTES, launch=launch
    )
    found = accumulators.numpy().view(numpy.uint64)
    assert numpy.array_equal(found[:-1], xxh3_triton.reference_accumulate(units))
    assert (accumulators[-1] == -1).all(), "written past the end"


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("alignment", "shifts"), [(16, [0, 0, 0]), (8, [8, 0, 8]), (2, [2, 4, 8]), (1, [0, 1, 15])]
)
def test_the_device_code_computes_the_reference(alignment: int, shifts: list[int]) -> None:
    run_at(shifts, alignment, Launch(units=4))


@pytest.mark.usefixtures("interpreter")
def test_several_programs_share_the_units() -> None:
    run_at([0, 0, 0], 4096, Launch(units=2))
    run_at([0], 32, Launch(units=1))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("cloned", [(True, True, True), (False, True, False), (True, False, True)])
def test_units_are_cloned_by_the_pass_that_digests_them(cloned: tuple[bool, ...]) -> None:
    units = random_units(3, SMALL_UNIT_BYTES)
    place = SMALL_UNIT_BYTES + GUARD_BYTES
    memory = numpy.full(3 * place + GUARD_BYTES + 16, 0xA5, numpy.uint8)
    before = memory.copy()
    first = -memory.ctypes.data % 16 + 16
    targets = [memory.ctypes.data + first + unit * place for unit in range(3)]
    clones = torch.tensor([t if wanted else 0 for t, wanted in zip(targets, cloned, strict=True)])
    sources = [units.ctypes.data + unit * SMALL_UNIT_BYTES for unit in range(3)]
    accumulators = torch.empty((3, LANES), dtype=torch.int64)
    xxh3_triton.accumulate(
        torch.tensor(sources), accumulators, 16, clones=clones, unit_bytes=SMALL_UNIT_BYTES
    )
    found = accumulators.numpy().view(numpy.uint64)
    assert numpy.array_equal(found, xxh3_triton.reference_accumulate(units))
    for unit, wanted in enumerate(cloned):
        begin = first + unit * place
        if wanted:
            before[begin : begin + SMALL_UNIT_BYTES] = units[unit]
    assert numpy.array_equal(memory, before)


def test_clones_of_unaligned_units_are_refused() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="aligned to 8"):
        xxh3_triton.accumulate(one, torch.zeros((1, LANES), dtype=torch.int64), 8, clones=one)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("shift", [0, 8, 3])
def test_blocks_may_lie_anywhere(shift: int) -> None:
    units = random_units(2, SMALL_UNIT_BYTES, 5)
    order = numpy.random.default_rng(6).permutation(2 * BLOCKS)
    stride = BLOCK_BYTES + 16
    memory = numpy.zeros(2 * BLOCKS * stride + 32, numpy.uint8)
    first = -memory.ctypes.data % 16 + shift
    scattered = numpy.ndarray(
        (2 * BLOCKS, BLOCK_BYTES), numpy.uint8, memory.data, first, (stride, 1)
    )
    scattered[order] = units.reshape(2 * BLOCKS, BLOCK_BYTES)
    blocks = torch.from_numpy(memory.ctypes.data + first + order.reshape(2, BLOCKS) * stride)
    accumulators = torch.empty((2, LANES), dtype=torch.int64)
    xxh3_triton.accumulate_blocks(
        blocks, accumulators, shift or 16, unit_bytes=SMALL_UNIT_BYTES, launch=Launch(units=2)
    )
    found = accumulators.numpy().view(numpy.uint64)
    digests = xxh3_triton.digests(found, SMALL_UNIT_BYTES)
    assert digests == digest.digest_units(units, SMALL_UNIT_BYTES)


@pytest.mark.parametrize(
    ("addresses", "accumulators", "alignment"),
    [
        (torch.zeros(2, dtype=torch.int32), torch.zeros((2, LANES), dtype=torch.int64), 16),
        (torch.zeros(2, dtype=torch.int64), torch.zeros((3, LANES), dtype=torch.int64), 16),
        (torch.zeros(4, dtype=torch.int64)[::2], torch.zeros((2, LANES), dtype=torch.int64), 16),
        (torch.zeros(2, dtype=torch.int64), torch.zeros((2, LANES), dtype=torch.int64), 0),
    ],
)
def test_wrong_arguments_are_refused(
    addresses: torch.Tensor, accumulators: torch.Tensor, alignment: int
) -> None:
    with pytest.raises(ValueError, match=r"int64|alignment"):
        xxh3_triton.accumulate(addresses, accumulators, alignment)


def test_accumulators_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulators"):
        xxh3_triton.digests(numpy.zeros((2, 4), numpy.uint64))
    with pytest.raises(ValueError, match="accumulators"):
        xxh3_triton.digests(numpy.zeros((2, LANES), numpy.int64))


def test_imports_neither_torch_nor_triton() -> None:
    script = (
        "import sys; from everstep.kernels import gather_triton, xxh3_triton; "
        "sys.modules['triton'] = None; "
        "sys.exit(', '.join(sorted({'torch', 'triton.language'} & sys.modules.keys())) or 0)"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 0, outcome.stderr


def test_available_says_whether_triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not xxh3_triton.available()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert xxh3_triton.available()
