"""The code once more, in plain Python over reedsolo's field: slow, and independent of ours."""

from collections.abc import Sequence

import reedsolo

reedsolo.init_tables(0x11D)

Matrix = list[list[int]]


def generator(data_symbols: int, parities: int) -> Matrix:
    """All symbols as sums of the data symbols: the identity above a Cauchy matrix."""
    identity = [[int(i == j) for j in range(data_symbols)] for i in range(data_symbols)]
    cauchy = [
        [reedsolo.gf_inverse((data_symbols + parity) ^ j) for j in range(data_symbols)]
        for parity in range(parities)
    ]
    return identity + cauchy


def product(row: Sequence[int], columns: Sequence[Sequence[int]]) -> list[int]:
    """The row times the matrix."""
    total = [0] * len(columns[0])
    for factor, column in zip(row, columns, strict=True):
        for place, value in enumerate(column):
            total[place] ^= reedsolo.gf_mul(factor, value)
    return total


def solved(equations: Matrix, right: Matrix) -> Matrix:
    """The x of equations times x = right, by elimination from below; raises if there is none."""
    size = len(equations)
    rows = [[*left, *values] for left, values in zip(equations, right, strict=True)]
    for column in reversed(range(size)):
        pivot = max(range(column + 1), key=lambda row: rows[row][column] != 0)
        if not rows[pivot][column]:
            raise ArithmeticError("singular")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for row in range(size):
            if row != column and rows[row][column]:
                factor = reedsolo.gf_div(rows[row][column], rows[column][column])
                rows[row] = [
                    value ^ reedsolo.gf_mul(factor, other)
                    for value, other in zip(rows[row], rows[column], strict=True)
                ]
    return [
        [reedsolo.gf_div(value, rows[row][row]) for value in rows[row][size:]]
        for row in range(size)
    ]
