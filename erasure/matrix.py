"""The code: a systematic Cauchy matrix over GF(2^8), and what undoes it.

Owns which coefficients make a parity ("cauchy-11d", the matrix of ISA-L's gf_gen_cauchy1_matrix)
and which ones compute a symbol from any k others. Promises that any k symbols are enough: every
square part of a Cauchy matrix can be inverted. Knows no bytes: coefficients only.

Symbols of a row are numbered: 0..k-1 data, k + t parity t.
"""

from functools import lru_cache

from everstep.kernels.gf256 import inverse, multiply
from everstep.proto.errors import TooFewSymbols

CODE_ID = "cauchy-11d"
MAX_SYMBOLS = 255
_ROWS_KEPT = 1024


def coefficient(data_symbols: int, parity: int, symbol: int) -> int:
    """What data symbol `symbol` is multiplied by in parity `parity`."""
    return inverse((data_symbols + parity) ^ symbol)


@lru_cache(maxsize=_ROWS_KEPT)
def encoding_row(data_symbols: int, parities: int, wanted: int) -> tuple[int, ...]:
    """The coefficients of all data symbols in one symbol, data symbols themselves included.

    Args:
        data_symbols: k.
        parities: m.
        wanted: Which symbol, 0..k+m-1.

    Raises:
        ValueError: If there is no such code or no such symbol.
    """
    if data_symbols < 1 or parities < 1 or data_symbols + parities > MAX_SYMBOLS:
        raise ValueError(f"no code of {data_symbols} data symbols and {parities} parities")
    if not 0 <= wanted < data_symbols + parities:
        raise ValueError(f"symbol {wanted} of {data_symbols} + {parities}")
    if wanted < data_symbols:
        return tuple(int(symbol == wanted) for symbol in range(data_symbols))
    parity = wanted - data_symbols
    return tuple(coefficient(data_symbols, parity, symbol) for symbol in range(data_symbols))


@lru_cache(maxsize=_ROWS_KEPT)
def decoding_row(
    data_symbols: int, parities: int, present: tuple[int, ...], wanted: int
) -> tuple[int, ...]:
    """The coefficients that compute one symbol from k others, in the order of `present`.

    Args:
        data_symbols: k.
        parities: m.
        present: The symbols to compute from, exactly k different ones.
        wanted: The symbol to compute; may be one of `present`.

    Raises:
        ValueError: If there is no such code or symbol, or `present` names one twice or too many.
        TooFewSymbols: If `present` names fewer than k.
    """
    wanted_row = encoding_row(data_symbols, parities, wanted)
    if len(present) < data_symbols:
        raise TooFewSymbols(data_symbols, len(set(present)))
    if not set(present) <= set(range(data_symbols + parities)):
        raise ValueError(f"symbols {present} of {data_symbols} + {parities}")
    if len(set(present)) != len(present) or len(present) > data_symbols:
        raise ValueError(f"{present} are not {data_symbols} different symbols")
    # Present data symbols are unit vectors, so only the columns of the missing ones need solving:
    # a square part of the Cauchy matrix, no larger than the number of parities.
    helping = {s: encoding_row(data_symbols, parities, s) for s in present if s >= data_symbols}
    missing = [symbol for symbol in range(data_symbols) if symbol not in present]
    square = [[row[symbol] for symbol in missing] for row in helping.values()]
    solution = _times([wanted_row[symbol] for symbol in missing], inverted(square))
    of_parity = dict(zip(helping, solution, strict=True))
    coefficients = []
    for symbol in present:
        if symbol in of_parity:
            coefficients.append(of_parity[symbol])
            continue
        value = wanted_row[symbol]
        for parity, factor in of_parity.items():
            value ^= multiply(factor, helping[parity][symbol])
        coefficients.append(value)
    return tuple(coefficients)


def inverted(square: list[list[int]]) -> list[list[int]]:
    """The inverse of a square matrix over the field, by Gauss-Jordan elimination.

    Raises:
        ValueError: If it has none.
    """
    size = len(square)
    rows = [[*row, *(int(i == j) for j in range(size))] for i, row in enumerate(square)]
    for column in range(size):
        pivot = next((row for row in range(column, size) if rows[row][column]), None)
        if pivot is None:
            raise ValueError("this matrix cannot be inverted")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = inverse(rows[column][column])
        rows[column] = [multiply(scale, value) for value in rows[column]]
        for row in range(size):
            factor = rows[row][column]
            if row != column and factor:
                rows[row] = [
                    value ^ multiply(factor, pivoted)
                    for value, pivoted in zip(rows[row], rows[column], strict=True)
                ]
    return [row[size:] for row in rows]


def _times(vector: list[int], matrix: list[list[int]]) -> list[int]:
    """The product of a row vector and a square matrix."""
    product = [0] * len(vector)
    for factor, row in zip(vector, matrix, strict=True):
        for column, value in enumerate(row):
            product[column] ^= multiply(factor, value)
    return product
