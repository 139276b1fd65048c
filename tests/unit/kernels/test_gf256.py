"""The field, and sums of multiples over it: every instruction set, size, alignment, coefficient."""

import ctypes
import ctypes.util
import mmap
import random
from importlib import metadata
from pathlib import Path

import numpy
import pytest
import reedsolo

from everstep.kernels import gf256, native

NATIVE_ISAS = list(range(1, native.best_isa() + 1))
ISAS = [*NATIVE_ISAS, 0, "reference"]
EDGES = [0, 1, 15, 16, 31, 32, 63, 64, 65, 127, 128, 255, 256, 257, 319, 4095, 4096, 4097]
LARGE = (1 << 20) + 3  # three targets of it together are stored past the caches
GUARD = 64
NOISE = random.Random(7).randbytes(LARGE + 4096)


def expected_dot(row: list[int], sources: list[bytes], size: int) -> bytes:
    """Byte by byte from reedsolo's logarithms: independent of every table of ours."""
    reedsolo.init_tables(0x11D)
    total = 0
    for coefficient, source in zip(row, sources, strict=True):
        products = bytes(reedsolo.gf_mul(coefficient, value) for value in range(256))
        total ^= int.from_bytes(source.translate(products).ljust(size, b"\0"), "little")
    return total.to_bytes(size, "little")


def noise(size: int, at: int) -> bytes:
    return NOISE[at : at + size]


def guarded(size: int, shift: int = 0) -> tuple[bytearray, memoryview]:
    """Memory full of 0xA5, and the part in its middle that may be written, `shift` off a line."""
    whole = bytearray(b"\xa5" * (size + 2 * GUARD + 128))
    start = GUARD + (-(native.Bytes(whole).address + GUARD) % 64) + shift
    return whole, memoryview(whole)[start : start + size]


def check_guards(whole: bytearray, size: int, shift: int = 0) -> None:
    start = GUARD + (-(native.Bytes(whole).address + GUARD) % 64) + shift
    assert whole[:start].count(0xA5) == start
    assert whole[start + size :].count(0xA5) == len(whole) - start - size


def test_the_field_is_the_one_of_reedsolo() -> None:
    reedsolo.init_tables(0x11D)
    for a in range(256):
        for b in range(256):
            assert gf256.multiply(a, b) == reedsolo.gf_mul(a, b), (a, b)
    assert [gf256.inverse(a) for a in range(1, 256)] == [
        reedsolo.gf_inverse(a) for a in range(1, 256)
    ]


def test_the_laws_of_a_field() -> None:
    products = gf256.PRODUCTS.astype(int)
    elements = numpy.arange(256)
    assert (products == products.T).all()
    assert (products[1] == elements).all() and not products[0].any()
    for a in range(256):
        assert (products[products[a]][:, elements] == products[a][products]).all()
        sums = elements[:, None] ^ elements
        assert (products[a][sums] == products[a][:, None] ^ products[a]).all()
    for a in range(1, 256):
        assert gf256.multiply(a, gf256.inverse(a)) == 1


def test_zero_has_no_inverse_and_other_numbers_are_no_elements() -> None:
    with pytest.raises(ZeroDivisionError):
        gf256.inverse(0)
    for number in (-1, 256):
        with pytest.raises(ValueError, match="no element"):
            gf256.inverse(number)
        with pytest.raises(ValueError, match="no element"):
            gf256.multiply(number, 1)
        with pytest.raises(ValueError, match="no element"):
            gf256.multiply(1, number)
        with pytest.raises(ValueError, match="no element"):
            gf256.multiply_accumulate(number, b"a", bytearray(1))
        with pytest.raises(ValueError, match="range"):
            gf256.dot([number], [b"a"], bytearray(1))


@pytest.mark.parametrize("isa", ISAS)
def test_every_product(isa: native.Isa) -> None:
    values = bytes(range(256)) * 3
    for coefficient in range(256):
        wanted = expected_dot([coefficient], [values], len(values))
        target = bytearray(noise(len(values), 5))
        gf256.dot([coefficient], [values], target, isa)
        assert target == wanted, coefficient
        gf256.multiply_accumulate(coefficient, values, target, isa)
        assert not any(target), coefficient


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [*EDGES, LARGE])
def test_dots_of_every_size(size: int, isa: native.Isa) -> None:
    sources = [noise(size, 100 * source) for source in range(5)]
    for rows in range(1, 7):
        chosen = random.Random(rows)
        matrix = [[chosen.randrange(256) for _ in sources] for _ in range(rows)]
        wholes, targets = zip(*(guarded(size) for _ in range(rows)), strict=True)
        gf256.dots(matrix, sources, targets, isa)
        for row, whole, target in zip(matrix, wholes, targets, strict=True):
            assert target == expected_dot(row, sources, size)
            check_guards(whole, size)
        if size == LARGE and rows == 3:
            break


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [*EDGES, LARGE])
def test_accumulate_of_every_size(size: int, isa: native.Isa) -> None:
    source, before = noise(size, 1), noise(size, 2000)
    whole, target = guarded(size)
    target[:] = before
    gf256.multiply_accumulate(0xB7, source, target, isa)
    assert target == expected_dot([0xB7, 1], [source, before], size)
    check_guards(whole, size)


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("size", [65, 700])
def test_every_alignment_of_source_and_target(size: int, isa: native.Isa) -> None:
    matrix = [[3, 0x8E], [0x50, 1]]
    _, room = guarded(size + 64)
    room[:] = noise(size + 64, 9)
    for source_shift in range(64):
        sources = [bytes(room[source_shift : source_shift + size]), noise(size, 77)]
        wanted = [expected_dot(row, sources, size) for row in matrix]
        placed = [room[source_shift : source_shift + size], sources[1]]
        for shift in range(64):
            # The second target lies elsewhere in its line than the first.
            places = (shift, shift * 5 % 64)
            wholes, targets = zip(*(guarded(size, place) for place in places), strict=True)
            gf256.dots(matrix, placed, targets, isa)
            assert list(targets) == wanted, (source_shift, shift)
            for whole, place in zip(wholes, places, strict=True):
                check_guards(whole, size, place)
    assert bytes(room) == noise(size + 64, 9), "a source was written"


@pytest.mark.parametrize("isa", NATIVE_ISAS)
@pytest.mark.parametrize("shifts", [(0, 0, 0), (1, 1, 1), (63, 63, 63), (0, 32, 0), (0, 8, 1)])
def test_large_targets_at_odd_addresses(shifts: tuple[int, ...], isa: native.Isa) -> None:
    sources = [noise(LARGE, 3), noise(LARGE - 70_001, 64), noise(LARGE, 1025)]
    matrix = [[2, 4, 8], [1, 1, 1], [0, 255, 17]]
    wholes, targets = zip(*(guarded(LARGE, shift) for shift in shifts), strict=True)
    gf256.dots(matrix, sources, targets, isa)
    for row, whole, target, shift in zip(matrix, wholes, targets, shifts, strict=True):
        assert target == expected_dot(row, sources, LARGE)
        check_guards(whole, LARGE, shift)


@pytest.mark.parametrize("isa", ISAS)
def test_a_short_source_goes_on_as_zeros(isa: native.Isa) -> None:
    chosen = random.Random(11)
    for _ in range(60):
        size = chosen.choice([1, 64, 300, 1500])
        lengths = [chosen.choice([0, 1, size // 2, size - 1, size]) for _ in range(6)]
        # Nothing may be read beyond a source's end: what follows there is not zero.
        sources = [noise(length, 50 * index) for index, length in enumerate(lengths)]
        placed = [memoryview(NOISE)[50 * i : 50 * i + n] for i, n in enumerate(lengths)]
        row = [chosen.randrange(1, 256) for _ in lengths]
        whole, target = guarded(size)
        gf256.dot(row, placed, target, isa)
        assert target == expected_dot(row, sources, size), lengths
        check_guards(whole, size)


@pytest.mark.parametrize("isa", ISAS)
def test_as_many_sources_as_the_field_has_factors(isa: native.Isa) -> None:
    sources = [noise(500, 3 * index) for index in range(255)]
    rows = [list(range(1, 256)), list(range(255, 0, -1)), [7] * 255, [0] * 255, [1] * 255]
    targets = [bytearray(noise(500, 0)) for _ in rows]
    gf256.dots(rows, sources, targets, isa)
    assert targets == [expected_dot(row, sources, 500) for row in rows]
    with pytest.raises(ValueError, match="255 are the most"):
        gf256.dot([1] * 256, [*sources, b""], bytearray(500), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [0, 1, 100, 1000, 3 << 20])
def test_without_sources_the_target_becomes_zeros(size: int, isa: native.Isa) -> None:
    whole, target = guarded(size)
    gf256.dot([], [], target, isa)
    assert target == bytes(size)
    check_guards(whole, size)


@pytest.mark.parametrize("isa", ISAS)
def test_the_same_buffers_over_and_over(isa: native.Isa) -> None:
    sources, target = [bytearray(300), bytearray(200)], bytearray(300)
    prepared = gf256.Dots([[9, 200]], sources, [target])
    for turn in range(3):
        sources[0][:], sources[1][:] = noise(300, turn), noise(200, 10 * turn)
        prepared.write(isa)
        assert target == expected_dot([9, 200], [bytes(source) for source in sources], 300)


def test_buffers_that_are_made_ready_can_neither_move_nor_shrink() -> None:
    source, target = bytearray(300), bytearray(300)
    prepared = gf256.Dots([[9]], [source], [target])
    for buffer in (source, target):
        with pytest.raises(BufferError):
            buffer.clear()
    del prepared
    source.clear()
    target.clear()


@pytest.mark.parametrize("isa", [0, "reference"])
def test_what_does_not_fit_is_refused_and_nothing_written(isa: native.Isa) -> None:
    target = bytearray(b"kept")
    with pytest.raises(ValueError, match="source of 3 bytes for a target of 4"):
        gf256.multiply_accumulate(1, b"abc", target, isa)
    with pytest.raises(ValueError, match="source of 5 bytes for targets of 4"):
        gf256.dot([1], [b"abcde"], target, isa)
    with pytest.raises(ValueError, match="2 coefficients for 1 sources"):
        gf256.dot([1, 2], [b"abcd"], target, isa)
    with pytest.raises(ValueError, match="2 rows of coefficients for 1 targets"):
        gf256.dots([[1], [2]], [b"abcd"], [target], isa)
    with pytest.raises(ValueError, match="targets of 4 and of 5 bytes"):
        gf256.dots([[1], [2]], [b"abcd"], [target, bytearray(5)], isa)
    with pytest.raises(ValueError, match="read-only"):
        gf256.dot([1], [b"abcd"], bytes(4), isa)
    with pytest.raises(ValueError, match="read-only"):
        gf256.multiply_accumulate(1, b"abcd", bytes(4), isa)
    with pytest.raises(BufferError, match="contiguous"):
        gf256.dot([1], [memoryview(b"abcdefgh")[::2]], target, isa)
    with pytest.raises(BufferError, match="contiguous"):
        gf256.dot([1], [b"abcd"], memoryview(bytearray(8))[::2], isa)
    assert target == b"kept"


@pytest.mark.parametrize("isa", [0, "reference"])
def test_other_buffers_than_bytes(isa: native.Isa, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(4096, 0))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    words = numpy.frombuffer(noise(4096, 1), dtype=numpy.uint64).reshape(32, 16)
    target = numpy.ones((16, 32), dtype=numpy.uint64)
    gf256.dot(numpy.array([5, 6]), [mapped, words], target, isa)
    assert target.tobytes() == expected_dot([5, 6], [noise(4096, 0), noise(4096, 1)], 4096)
    gf256.multiply_accumulate(5, mapped, target, isa)
    assert target.tobytes() == expected_dot([6], [noise(4096, 1)], 4096)


def find_libisal() -> str | None:
    try:
        bundled = [file for file in metadata.files("pyeclib") or [] if "libisal" in file.name]
    except metadata.PackageNotFoundError:
        bundled = []
    return str(bundled[0].locate()) if bundled else ctypes.util.find_library("isal")


@pytest.mark.skipif(find_libisal() is None, reason="no libisal here")
@pytest.mark.parametrize("isa", ISAS)
def test_libisal_writes_the_same(isa: native.Isa) -> None:
    library = ctypes.CDLL(str(find_libisal()))
    sources = [noise(5003, 10 * index) for index in range(8)]
    matrix = ctypes.create_string_buffer(11 * 8)
    library.gf_gen_cauchy1_matrix(matrix, 11, 8)
    tables = ctypes.create_string_buffer(32 * 8 * 3)
    library.ec_init_tables(8, 3, matrix.raw[64:], tables)
    wanted = [ctypes.create_string_buffer(5003) for _ in range(3)]
    library.ec_encode_data(
        5003,
        8,
        3,
        tables,
        (ctypes.c_char_p * 8)(*sources),
        (ctypes.c_void_p * 3)(*map(ctypes.addressof, wanted)),
    )
    rows = [list(matrix.raw[at : at + 8]) for at in (64, 72, 80)]
    assert rows[1][2] == gf256.inverse(9 ^ 2)
    targets = [bytearray(5003) for _ in rows]
    gf256.dots(rows, sources, targets, isa)
    assert targets == [bytearray(buffer.raw) for buffer in wanted]
