"""Scattered copies and sampled fingerprints: the device code against the host's references."""

import random

import numpy
import pytest
import torch

from everstep.kernels import gather_triton
from everstep.kernels.capture import Sampler

SIZES = [0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 100, 1024, 4097, 16400]


class Memory:
    """Ranges of random bytes, each beginning at a chosen distance from a multiple of 16."""

    def __init__(self, ranges: list[tuple[int, int]], seed: int) -> None:
        """`ranges` are (bytes, address modulo 16)."""
        self.bytes = numpy.frombuffer(
            random.Random(seed).randbytes(sum(size + 64 for size, _ in ranges) + 16), numpy.uint8
        ).copy()
        self.base = self.bytes.ctypes.data
        self.addresses = []
        start = self.base
        for size, shift in ranges:
            start += -start % 16 + shift
            self.addresses.append(start)
            start += size + 16

    def at(self, address: int, size: int) -> bytes:
        return self.bytes[address - self.base : address - self.base + size].tobytes()


def pieces_between(
    shifts: list[tuple[int, int, int]],
) -> tuple[Memory, Memory, list[tuple[int, int, int]]]:
    sources = Memory([(size, shift) for size, shift, _ in shifts], 1)
    targets = Memory([(size, shift) for size, _, shift in shifts], 2)
    sizes = [size for size, _, _ in shifts]
    return sources, targets, list(zip(targets.addresses, sources.addresses, sizes, strict=True))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("shifts", [(0, 0), (8, 8), (4, 12), (2, 0), (3, 5)])
def test_gather_copies_what_the_reference_copies(shifts: tuple[int, int]) -> None:
    _, expected, pieces = pieces_between([(size, *shifts) for size in SIZES])
    gather_triton.reference_gather(pieces)
    _sources, targets, pieces = pieces_between([(size, *shifts) for size in SIZES])
    gather_triton.gather(torch.tensor(pieces), max(SIZES))
    # The bytes around the targets are compared too: the same random ones.
    assert targets.bytes.tobytes() == expected.bytes.tobytes()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("hint", [0, 1, 200_000])
def test_the_largest_size_is_only_a_hint(hint: int) -> None:
    sources, targets, pieces = pieces_between([(100_001, 0, 0), (3, 1, 1), (70_000, 1, 0)])
    gather_triton.gather(torch.tensor(pieces), hint)
    for target, source, size in pieces:
        assert targets.at(target, size) == sources.at(source, size)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("samples", [0, 1, 8])
@pytest.mark.parametrize("seed", [0, -1, 0x1234_5678_9ABC_DEF0])
def test_sample_computes_the_reference(samples: int, seed: int) -> None:
    sizes = [*SIZES, 8 * samples, 8 * samples + 1, 9, 10, 11, 12, 13, 14, 257]
    memory = Memory([(size, index % 16) for index, size in enumerate(sizes)], seed & 0xFF)
    sources = list(zip(memory.addresses, sizes, strict=True))
    sources.append((0, 0))
    fingerprints = torch.empty(len(sources), dtype=torch.int64)
    gather_triton.sample(torch.tensor(sources), samples, seed, fingerprints)
    expected = gather_triton.reference_sample(sources, samples, seed)
    assert fingerprints.numpy().view(numpy.uint64).tolist() == expected


def test_a_sample_sees_the_first_and_the_last_byte_and_all_of_a_short_source() -> None:
    memory = Memory([(4096, 3), (61, 1)], 7)
    sources = list(zip(memory.addresses, [4096, 61], strict=True))
    before = gather_triton.reference_sample(sources, 8, 99)
    (start, size), (short, short_size) = sources
    watched = [(0, start), (0, start + size - 1)]
    watched += [(1, short + offset) for offset in range(short_size)]
    for source, address in watched:
        memory.bytes[address - memory.base] ^= 1
        after = gather_triton.reference_sample(sources, 8, 99)
        memory.bytes[address - memory.base] ^= 1
        assert [index for index in (0, 1) if before[index] != after[index]] == [source]


@pytest.mark.parametrize("seed", [5, 6, (1 << 64) - 1])
def test_positions_depend_on_the_seed_and_the_size_alone(seed: int) -> None:
    """Not on the place among the sources: another rank may have others before it."""

    def seen(seed: int) -> list[set[int]]:
        """Which bytes change the fingerprint of each source."""
        memory = Memory([(400, 0), (400, 0), (399, 0)], 7)
        sources = list(zip(memory.addresses, (400, 400, 399), strict=True))
        before = gather_triton.reference_sample(sources, 4, seed)
        found: list[set[int]] = [set() for _ in sources]
        for index, (address, size) in enumerate(sources):
            for offset in range(size):
                memory.bytes[address + offset - memory.base] ^= 1
                after = gather_triton.reference_sample(sources, 4, seed)
                memory.bytes[address + offset - memory.base] ^= 1
                if after != before:
                    found[index].add(offset)
        return found

    first, second, other = seen(seed)
    assert first == second
    assert other - {*range(391, 399)} != first - {*range(392, 400)}
    assert [first, second, other] != seen(seed + 7)
    for places in (first, second):
        assert {*range(8), *range(392, 400)} <= places
        assert 16 < len(places) <= 6 * 8


def test_the_host_looks_at_a_short_source_from_the_same_size_on() -> None:
    # `Sampler` and `sample` share this limit, so that either sort of source is torn-checked alike.
    memory = Memory([(65, 0)], 7)
    for size, whole in [(64, True), (65, False)]:
        hits = 0
        for offset in range(size):
            sampler = Sampler(memory.addresses, [size])
            before = sampler.fingerprints(8, 3), reference(memory, size)
            memory.bytes[memory.addresses[0] + offset - memory.base] ^= 1
            after = sampler.fingerprints(8, 3), reference(memory, size)
            memory.bytes[memory.addresses[0] + offset - memory.base] ^= 1
            hits += before[0] != after[0] and before[1] != after[1]
        assert (hits == size) is whole


def reference(memory: Memory, size: int) -> list[int]:
    return gather_triton.reference_sample([(memory.addresses[0], size)], 8, 3)


def test_wrong_arguments_are_refused() -> None:
    words = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows"):
        gather_triton.gather(torch.zeros((2, 2), dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="rows"):
        gather_triton.gather(torch.zeros((2, 3), dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="gaps"):
        gather_triton.gather(torch.zeros((2, 6), dtype=torch.int64)[:, ::2], 1)
    with pytest.raises(ValueError, match="fingerprints"):
        gather_triton.sample(torch.zeros((3, 2), dtype=torch.int64), 8, 0, words)
    with pytest.raises(ValueError, match="samples"):
        gather_triton.sample(torch.zeros((2, 2), dtype=torch.int64), 1023, 0, words)


def test_nothing_to_do_is_done() -> None:
    gather_triton.gather(torch.zeros((0, 3), dtype=torch.int64), 0)
    nothing = torch.zeros(0, dtype=torch.int64)
    gather_triton.sample(torch.zeros((0, 2), dtype=torch.int64), 8, 0, nothing)
