"""Digests are XXH3-128 for every length, alignment and instruction set."""

import random
from pathlib import Path

import pytest
import xxhash

from everstep.kernels import digest, native

NATIVE_ISAS = list(range(1, native.best_isa() + 1))
ISAS = [*NATIVE_ISAS, 0, "reference"]
EDGES = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 159, 160]
EDGES += [161, 239, 240, 241, 255, 256, 257, 1023, 1024, 1025, 1087, 1088, 1089, 2047, 2048, 2049]
EDGES += [4095, 4096, 65535, 65537, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]
NOISE = random.Random(1).randbytes((1 << 20) + 128)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", EDGES)
def test_one_unit_of_every_size_at_odd_addresses(size: int, isa: native.Isa) -> None:
    for shift in (0, 1, 8, 63):
        data = memoryview(NOISE)[shift : shift + size]
        assert digest.digest_units(data, size, isa) == xxhash.xxh3_128_digest(data)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
def test_every_length_up_to_three_blocks(isa: native.Isa) -> None:
    for size in range(1, 3 * 1024 + 2):
        data = memoryview(NOISE)[:size]
        assert digest.digest_units(data, size, isa) == xxhash.xxh3_128_digest(data), size


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 4000, 4001, 4999])
def test_units_are_digested_one_by_one(size: int, isa: native.Isa) -> None:
    data = NOISE[:size]
    expected = [xxhash.xxh3_128_digest(data[at : at + 1000]) for at in range(0, size, 1000)]
    assert digest.digest_units(data, 1000, isa) == b"".join(expected)


@pytest.mark.parametrize("isa", ISAS)
def test_verify_names_each_unit_with_a_flipped_bit(isa: native.Isa) -> None:
    expected = digest.digest_units(NOISE[:10_500], 1000)
    assert digest.verify_units(NOISE[:10_500], 1000, expected, isa) == []
    for unit, at in ((0, 0), (0, 999), (3, 3000), (7, 7500), (10, 10_499)):
        damaged = bytearray(NOISE[:10_500])
        damaged[at] ^= 1
        assert digest.verify_units(damaged, 1000, expected, isa) == [unit]
    damaged[0] ^= 0x80
    assert digest.verify_units(damaged, 1000, expected, isa) == [0, 10]


@pytest.mark.parametrize("isa", ISAS)
def test_verify_takes_every_bit_of_the_digest_seriously(isa: native.Isa) -> None:
    expected = digest.digest_units(NOISE[:2000], 1000)
    for at in range(len(expected)):
        wrong = bytearray(expected)
        wrong[at] ^= 1
        assert digest.verify_units(NOISE[:2000], 1000, wrong, isa) == [at // 16]


def test_verify_refuses_digests_of_something_else() -> None:
    with pytest.raises(ValueError, match="16 bytes of digests for 2 units"):
        digest.verify_units(NOISE[:2000], 1000, bytes(16))


@pytest.mark.parametrize("unit_bytes", [0, -1])
def test_a_unit_without_bytes_is_refused(unit_bytes: int) -> None:
    with pytest.raises(ValueError, match="make no sense"):
        digest.digest_units(b"abc", unit_bytes)


def test_other_buffers_than_bytes(tmp_path: Path) -> None:
    expected = digest.digest_units(NOISE[:4096], 1024)
    words = memoryview(bytearray(NOISE[:4096])).cast("Q")
    assert digest.digest_units(words, 1024) == expected
    assert digest.digest_units(words, 1024, "reference") == expected
