"""Fingerprints: the same on every machine, and different where a sampled word differs."""

import random

import pytest

from everstep.kernels import native
from everstep.kernels.capture import Sampler

SIZES = [0, 1, 7, 8, 15, 16, 17, 24, 63, 64, 65, 1000, 100_003]


def sampler(sources: list[bytearray]) -> tuple[Sampler, list[native.Bytes]]:
    held = [native.Bytes(source) for source in sources]
    return Sampler([one.address for one in held], [one.bytes for one in held]), held


def noise(sizes: list[int]) -> list[bytearray]:
    return [bytearray(random.Random(size).randbytes(size)) for size in sizes]


@pytest.mark.parametrize("samples", [0, 1, 2, 8, 40])
@pytest.mark.parametrize("seed", [0, 1, 1 << 40, (1 << 64) - 1])
def test_native_equals_reference(samples: int, seed: int) -> None:
    taken, _held = sampler(noise(SIZES))
    prints = taken.fingerprints(samples, seed)
    assert len(prints) == 8 * len(SIZES) == 8 * len(taken)
    assert prints == taken.fingerprints(samples, seed, "reference")


def test_fingerprints_are_the_same_everywhere() -> None:
    # Written down once: replicas on different machines compare them.
    taken, _held = sampler([bytearray(b""), bytearray(b"abc"), bytearray(range(200))])
    assert taken.fingerprints(4, 7).hex() == "7f498d4624c3016050392f89945faf78e600cba3ec659f76"


@pytest.mark.parametrize("size", [1, 8, 17, 64, 65, 100_003])
@pytest.mark.parametrize("end", [0, -1])
def test_both_ends_are_always_looked_at(size: int, end: int) -> None:
    sources = noise([size])
    taken, _held = sampler(sources)
    before = taken.fingerprints(8, 3)
    sources[0][end] ^= 1
    assert taken.fingerprints(8, 3) != before


def test_a_small_source_is_looked_at_whole() -> None:
    sources = noise([64])
    taken, _held = sampler(sources)
    before = taken.fingerprints(8, 3)
    for at in range(64):
        sources[0][at] ^= 1
        assert taken.fingerprints(8, 3) != before
        sources[0][at] ^= 1
    assert taken.fingerprints(8, 3) == before


def test_a_wholesale_change_is_seen_and_only_where_it_is() -> None:
    sources = noise([5000, 5000, 70_000])
    taken, _held = sampler(sources)
    before = taken.fingerprints(8, 3)
    sources[1][100:-100] = bytes(4800)
    after = taken.fingerprints(8, 3)
    assert [before[at : at + 8] == after[at : at + 8] for at in (0, 8, 16)] == [True, False, True]


def test_other_seeds_look_elsewhere() -> None:
    # One word in 1000 differs: some seeds must see it and some not.
    sources = noise([8000])
    taken, _held = sampler(sources)
    before = [taken.fingerprints(30, seed) for seed in range(200)]
    sources[0][4000:4008] = bytes(8)
    seen = sum(taken.fingerprints(30, seed) != before[seed] for seed in range(200))
    assert 2 < seen < 40


def test_positions_reach_every_part_of_a_source() -> None:
    sources = noise([4096])
    taken, _held = sampler(sources)
    before = [taken.fingerprints(16, seed) for seed in range(100)]
    for at in range(0, 4096, 256):
        kept = sources[0][at : at + 256]
        sources[0][at : at + 256] = bytes(256)
        assert any(taken.fingerprints(16, seed) != before[seed] for seed in range(100)), at
        sources[0][at : at + 256] = kept


def test_mismatched_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="1 addresses and 2 sizes"):
        Sampler([64], [1, 2])
    with pytest.raises(ValueError, match="5 bytes at address 0"):
        Sampler([0], [5])
