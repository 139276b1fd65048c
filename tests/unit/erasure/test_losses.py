"""Whole groups, encoded for real: every loss of at most m members, every symbol, bit for bit."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from everstep.erasure.codec import Codec
from everstep.erasure.rows import Rows
from everstep.proto.errors import TooFewSymbols

from .oracle import generator, product, solved

CODES = [(2, 1), (3, 1), (4, 1), (4, 2), (6, 2), (8, 1), (8, 2), (8, 3), (16, 2)]
UNIT_BYTES = 13


def stale(size: int) -> bytearray:
    """What a buffer holds before it is written: whatever is left out shows."""
    return bytearray(b"\xa5" * size)


def equal_sizes(members: int, parities: int) -> list[int]:
    return [2 * (members - parities)] * members


def unequal_sizes(members: int, parities: int) -> list[int]:
    source = random.Random(members * 100 + parities)
    return [source.randrange(1, 4 * members) for _ in range(members)]


def some_empty(members: int, parities: int) -> list[int]:
    return [0 if member % 3 == 1 else 1 + 2 * member for member in range(members)]


def one_alone(members: int, parities: int) -> list[int]:
    return [0] * (members - 1) + [3]


SIZES = [equal_sizes, unequal_sizes, some_empty, one_alone]


@dataclass
class Held:
    """What one member holds: its stream and its parity file."""

    stream: bytearray
    parity: bytearray


class EncodedGroup:
    """A group whose members have encoded all their rows."""

    def __init__(self, units: list[int], parities: int) -> None:
        self.rows = Rows(tuple(units), parities)
        self.codec = Codec(self.rows.data_symbols, parities)
        source = random.Random(str(units))
        self.held = [
            Held(
                bytearray(source.randbytes(length * UNIT_BYTES)),
                stale(self.rows.parity_file_units(member) * UNIT_BYTES),
            )
            for member, length in enumerate(units)
        ]
        for member in range(self.rows.members):
            for row, parity in self.rows.rows_of(member):
                sources = [self.symbol(other, row) for other in self.rows.contributors(row)]
                self.codec.encode(parity, sources, self.symbol(member, row))
        everyone = range(self.rows.members)
        self.symbol_of = [
            [self.rows.symbol_of(member, row) for member in everyone] for row in everyone
        ]
        self.symbols = [[self.symbol(member, row) for member in everyone] for row in everyone]

    def symbol(self, member: int, row: int) -> memoryview:
        return self.part(self.held[member], member, row)

    def part(self, held: Held, member: int, row: int) -> memoryview:
        """The bytes of `held` that are this member's symbol of the row."""
        if member in self.rows.contributors(row):
            units, whole = self.rows.contribution(member, row), memoryview(held.stream)
        else:
            units, whole = self.rows.parity_extent(member, row), memoryview(held.parity)
        return whole[units.start * UNIT_BYTES : units.stop * UNIT_BYTES]

    def present(self, row: int, lost: tuple[int, ...]) -> dict[int, memoryview]:
        numbered = zip(self.symbol_of[row], self.symbols[row], strict=True)
        return {
            symbol: held for member, (symbol, held) in enumerate(numbered) if member not in lost
        }

    def rebuilt(self, member: int, lost: tuple[int, ...]) -> Held:
        """All that a lost member held, from what the survivors hold."""
        known = self.held[member]
        held = Held(stale(len(known.stream)), stale(len(known.parity)))
        for row in range(self.rows.members):
            wanted = self.symbol_of[row][member]
            self.codec.decode(self.present(row, lost), wanted, self.part(held, member, row))
        return held


def losses(members: int, parities: int) -> list[tuple[int, ...]]:
    return [
        lost
        for count in range(parities + 1)
        for lost in itertools.combinations(range(members), count)
    ]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("members", "parities"), CODES)
def test_every_loss_is_rebuilt(
    members: int, parities: int, sizes: Callable[[int, int], list[int]]
) -> None:
    group = EncodedGroup(sizes(members, parities), parities)
    for lost in losses(members, parities):
        for member in lost:
            assert group.rebuilt(member, lost) == group.held[member], (lost, member)


@pytest.mark.parametrize(("members", "parities"), CODES)
def test_one_loss_more_is_refused(members: int, parities: int) -> None:
    group = EncodedGroup(unequal_sizes(members, parities), parities)
    for lost in itertools.combinations(range(members), parities + 1):
        # One row where the first of them holds a parity, one where it contributes data.
        for row in (lost[0], (lost[0] + 1) % members):
            wanted = group.rows.symbol_of(lost[0], row)
            target = stale(UNIT_BYTES)
            with pytest.raises(TooFewSymbols) as raised:
                group.codec.decode(group.present(row, lost), wanted, target)
            assert raised.value.needed == members - parities
            assert raised.value.had == members - parities - 1
            assert target == stale(UNIT_BYTES)


@pytest.mark.parametrize(("members", "parities"), CODES)
def test_the_oracle_decodes_what_was_encoded(members: int, parities: int) -> None:
    """Solves for the data with reedsolo's arithmetic, from parity as the codec wrote it."""
    group = EncodedGroup(unequal_sizes(members, parities), parities)
    matrix = generator(members - parities, parities)
    source = random.Random(7)
    patterns = list(itertools.combinations(range(members), parities))
    for lost in source.sample(patterns, min(4, len(patterns))):
        row = source.randrange(members)
        length = group.rows.parity_units(row) * UNIT_BYTES
        present = {s: b.tobytes().ljust(length, b"\0") for s, b in group.present(row, lost).items()}
        assert len(present) == members - parities
        solution = solved(
            [matrix[symbol] for symbol in present], [list(held) for held in present.values()]
        )
        for member in lost:
            symbol = group.rows.symbol_of(member, row)
            expected = bytes(product(matrix[symbol], solution))
            held = group.symbol(member, row).tobytes()
            assert held.ljust(length, b"\0") == expected


def test_a_member_that_had_nothing_counts_as_present() -> None:
    """Two of four lost at one parity: a lost symbol that is known to be empty needs no parity."""
    group = EncodedGroup([6, 6, 0, 6], 1)
    for row in range(4):
        if {0, 2} <= set(group.rows.contributors(row)):
            present = group.present(row, (0, 2)) | {group.rows.symbol_of(2, row): b""}
            target = bytearray(len(group.symbol(0, row)))
            group.codec.decode(present, group.rows.symbol_of(0, row), target)
            assert target == group.symbol(0, row)
