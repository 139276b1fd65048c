"""Encoding and decoding of bytes: buffers of all kinds and lengths, refusals."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.erasure.codec import Codec
from everstep.proto.errors import Damaged, TooFewSymbols

STALE = 0xA5
"""What targets hold before: whatever is not written shows."""


def stale(size: int) -> bytearray:
    return bytearray([STALE]) * size


def encoded(codec: Codec, data: list[bytes], size: int) -> list[bytes]:
    parities = []
    for parity in range(codec.parities):
        target = stale(size)
        codec.encode(parity, data, target)
        parities.append(bytes(target))
    return parities


def row_of(codec: Codec, data: list[bytes]) -> dict[int, bytes]:
    size = max(map(len, data))
    return dict(enumerate(data + encoded(codec, data, size)))


@st.composite
def codecs_and_data(draw: st.DrawFn) -> tuple[Codec, list[bytes]]:
    codec = Codec(draw(st.integers(1, 9)), draw(st.integers(1, 4)))
    return codec, [draw(st.binary(max_size=80)) for _ in range(codec.data_symbols)]


@given(codecs_and_data(), st.data())
def test_any_loss_up_to_the_parities_is_decoded(
    case: tuple[Codec, list[bytes]], data: st.DataObject
) -> None:
    codec, sources = case
    row = row_of(codec, sources)
    lost = data.draw(
        st.lists(st.sampled_from(sorted(row)), unique=True, max_size=codec.parities), label="lost"
    )
    present = {symbol: held for symbol, held in row.items() if symbol not in lost}
    for wanted in row:
        target = stale(len(row[wanted]))
        codec.decode(present, wanted, target)
        assert target == row[wanted]


@given(codecs_and_data(), st.data())
def test_a_changed_symbol_gives_the_parity_of_a_new_encoding(
    case: tuple[Codec, list[bytes]], data: st.DataObject
) -> None:
    codec, sources = case
    size = max(map(len, sources))
    symbol = data.draw(st.integers(0, codec.data_symbols - 1), label="symbol")
    new = data.draw(st.binary(max_size=size), label="new")
    changed = [*sources[:symbol], new, *sources[symbol + 1 :]]
    expected = encoded(codec, changed, size)
    for parity, before in enumerate(encoded(codec, sources, size)):
        target = bytearray(before)
        codec.encode_changed(parity, symbol, sources[symbol], new, target)
        assert target == expected[parity]


def test_a_long_change_is_made_in_blocks() -> None:
    codec, size = Codec(3, 2), 300_001
    source = numpy.random.default_rng(3)
    data = [source.bytes(size) for _ in range(3)]
    for new in (source.bytes(size), source.bytes(140_000), b""):
        changed = [data[0], new, data[2]]
        for parity, before in enumerate(encoded(codec, data, size)):
            target = bytearray(before)
            codec.encode_changed(parity, 1, data[1], new, target)
            assert target == encoded(codec, changed, size)[parity]


def test_a_pair_is_a_mirror() -> None:
    assert encoded(Codec(1, 1), [b"the same bytes"], 14) == [b"the same bytes"]


def test_one_parity_is_not_just_a_xor() -> None:
    """The code is the same for any number of parities: coefficients differ from one."""
    (parity,) = encoded(Codec(2, 1), [b"\x01\x00", b"\x00\x01"], 2)
    assert parity == bytes([0x8E, 0xF4])


def test_missing_data_is_zeros() -> None:
    codec = Codec(3, 1)
    target, same = stale(6), stale(6)
    codec.encode(0, [b"abcdef", None, b"ab"], target)
    codec.encode(0, [b"abcdef", bytes(6), b"ab\0\0\0\0"], same)
    assert target == same
    codec.encode(0, [None, b"", None], target)
    assert target == bytes(6)


def test_a_row_without_data_is_zeros() -> None:
    codec, target = Codec(2, 1), stale(200_000)
    codec.decode({0: b"", 2: b""}, 1, target)
    assert target == bytes(200_000)


def test_an_empty_target_is_left_alone() -> None:
    codec = Codec(2, 1)
    codec.encode(0, [None, b""], bytearray())
    codec.decode({0: b"abc", 2: b"abc"}, 1, bytearray())
    codec.encode_changed(0, 1, b"", b"", bytearray())


def test_all_contiguous_buffers_are_taken() -> None:
    codec = Codec(4, 1)
    words = numpy.arange(6, dtype=numpy.uint32).reshape(2, 3)
    words.flags.writeable = False
    empty = numpy.zeros((0, 3))
    data = [words, bytearray(b"x" * 24), memoryview(b"..y" * 8)[3:], empty]
    plain = [words.tobytes(), b"x" * 24, b"..y" * 7, b""]
    target = numpy.full((6, 4), STALE, dtype=numpy.uint8)
    codec.encode(0, data, target)
    assert [target.tobytes()] == encoded(codec, plain, 24)
    lost = numpy.zeros(6, dtype=numpy.uint32)
    codec.decode({1: data[1], 2: data[2], 3: empty, 4: target}, 0, lost)
    assert lost.tobytes() == words.tobytes()


def test_a_part_of_a_row_is_decoded_alone() -> None:
    codec = Codec(4, 2)
    row = row_of(codec, [bytes([j]) * (100 + j) + b"end" for j in range(4)])
    target = stale(20)
    parts = {symbol: row[symbol][90:110] for symbol in (0, 2, 4, 5)}
    codec.decode(parts, 1, target)
    assert target.rstrip(b"\0") == row[1][90:110]
    codec.decode({symbol: row[symbol] for symbol in (0, 2, 4, 5)}, 3, target)
    assert target == row[3][:20]


def test_too_few_symbols_are_named_and_nothing_is_written() -> None:
    codec = Codec(4, 2)
    row = row_of(codec, [bytes([j + 1]) * 10 for j in range(4)])
    target = stale(10)
    with pytest.raises(TooFewSymbols, match=r"takes 4 members .* 3 are left") as raised:
        codec.decode({symbol: row[symbol] for symbol in (0, 3, 5)}, 1, target)
    assert isinstance(raised.value, Damaged)
    assert (raised.value.needed, raised.value.had) == (4, 3)
    assert target == stale(10)
    with pytest.raises(TooFewSymbols):
        codec.needed([0, 0, 0, 0], 1)


def test_only_what_is_needed_is_read() -> None:
    codec = Codec(4, 2)
    assert codec.needed(range(6), 3) == {3: 1}
    assert codec.needed([5, 4, 3, 2, 1, 0], 5) == {5: 1}
    assert codec.needed([0, 1, 2, 3], 4).keys() == {0, 1, 2, 3}
    assert codec.needed([5, 0, 1, 2, 4], 3).keys() == {5, 0, 1, 2}
    row = row_of(codec, [bytes([j + 1]) * 10 for j in range(4)])
    target = stale(10)
    wrong = {**row, 5: b"not needed"}
    del wrong[0]
    codec.decode(wrong, 0, target)
    assert target == row[0]


@pytest.mark.parametrize(("data_symbols", "parities"), [(0, 1), (1, 0), (200, 56), (-1, 2)])
def test_impossible_codes_are_refused(data_symbols: int, parities: int) -> None:
    with pytest.raises(ValueError, match="no code"):
        Codec(data_symbols, parities)


def test_arguments_that_do_not_fit_are_refused() -> None:
    codec, target = Codec(2, 1), stale(4)
    with pytest.raises(ValueError, match="parity 1 of 1"):
        codec.encode(1, [b"", b""], target)
    with pytest.raises(ValueError, match="parity -1 of 1"):
        codec.encode_changed(-1, 0, b"", b"", target)
    with pytest.raises(ValueError, match="3 data symbols"):
        codec.encode(0, [b"", b"", b""], target)
    with pytest.raises(ValueError, match="longer than the parity"):
        codec.encode(0, [b"12345", b""], target)
    with pytest.raises(ValueError, match="data symbol 2 of 2"):
        codec.encode_changed(0, 2, b"", b"", target)
    with pytest.raises(ValueError, match="longer than the parity"):
        codec.encode_changed(0, 0, b"", b"12345", target)
    with pytest.raises(ValueError, match="symbol 3"):
        codec.decode({0: b"", 1: b""}, 3, target)
    assert target == stale(4)
