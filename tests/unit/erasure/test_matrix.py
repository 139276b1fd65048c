"""The code's coefficients, against the published matrix and an independent field."""

import itertools

import pytest

from everstep.erasure.matrix import coefficient, decoding_row, encoding_row, inverted
from everstep.kernels.gf256 import multiply
from everstep.proto.errors import TooFewSymbols

from .oracle import generator, product, solved

CODES = [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2), (7, 1), (6, 2), (5, 3), (14, 2), (1, 4), (3, 5)]


def test_the_matrix_of_isa_l() -> None:
    """gf_gen_cauchy1_matrix(a, 6, 4), its two last rows: parity on disk depends on it."""
    assert encoding_row(4, 2, 4) == (0x47, 0xA7, 0x7A, 0xBA)
    assert encoding_row(4, 2, 5) == (0xA7, 0x47, 0xBA, 0x7A)
    assert encoding_row(1, 1, 1) == (1,)


@pytest.mark.parametrize(("data_symbols", "parities"), CODES)
def test_encoding_rows_are_the_generator(data_symbols: int, parities: int) -> None:
    rows = [list(encoding_row(data_symbols, parities, s)) for s in range(data_symbols + parities)]
    assert rows == generator(data_symbols, parities)
    assert coefficient(data_symbols, 0, 0) == rows[data_symbols][0]


@pytest.mark.parametrize(("data_symbols", "parities"), CODES)
def test_any_k_symbols_give_every_symbol(data_symbols: int, parities: int) -> None:
    matrix = generator(data_symbols, parities)
    symbols = range(data_symbols + parities)
    for present in itertools.combinations(symbols, data_symbols):
        for wanted in symbols:
            row = decoding_row(data_symbols, parities, present, wanted)
            assert product(row, [matrix[symbol] for symbol in present]) == matrix[wanted]


def test_coefficients_follow_the_order_of_the_symbols() -> None:
    forward = decoding_row(4, 2, (0, 2, 4, 5), 1)
    assert decoding_row(4, 2, (5, 2, 0, 4), 1) == tuple(forward[i] for i in (3, 1, 0, 2))


def test_the_widest_code_decodes() -> None:
    present = (*range(2, 253), 253, 254)
    row = decoding_row(253, 2, present, 1)
    matrix = generator(253, 2)
    assert product(row, [matrix[symbol] for symbol in present]) == matrix[1]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_inversion_against_the_oracle(size: int) -> None:
    square = generator(size, size)[size:]
    identity = [[int(i == j) for j in range(size)] for i in range(size)]
    assert inverted(square) == solved(square, identity)
    assert [product(row, inverted(square)) for row in square] == identity


def test_inversion_exchanges_rows_where_it_must() -> None:
    square = [[0, 0, 7], [5, 0, 1], [0, 9, 0]]
    identity = [[int(i == j) for j in range(3)] for i in range(3)]
    assert [product(row, inverted(square)) for row in square] == identity


def test_a_matrix_without_an_inverse_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be inverted"):
        inverted([[3, 5], [multiply(2, 3), multiply(2, 5)]])


def test_fewer_than_k_symbols_are_too_few() -> None:
    with pytest.raises(TooFewSymbols) as raised:
        decoding_row(4, 2, (0, 2, 5), 1)
    assert (raised.value.needed, raised.value.had) == (4, 3)


@pytest.mark.parametrize(
    ("code", "present", "wanted"),
    [
        ((4, 2), (0, 1, 2, 2), 3),
        ((4, 2), (0, 1, 2, 4, 5), 3),
        ((4, 2), (0, 1, 2, 6), 3),
        ((4, 2), (0, 1, 2, -1), 3),
        ((4, 2), (0, 1, 2, 4), 6),
        ((0, 2), (), 0),
        ((2, 0), (0, 1), 0),
        ((200, 56), tuple(range(200)), 0),
    ],
)
def test_what_no_code_has_is_refused(
    code: tuple[int, int], present: tuple[int, ...], wanted: int
) -> None:
    with pytest.raises(ValueError, match=r"symbol|code"):
        decoding_row(*code, present, wanted)


def test_what_is_kept_is_bounded() -> None:
    for rows in (encoding_row, decoding_row):
        assert rows.cache_info().maxsize is not None
