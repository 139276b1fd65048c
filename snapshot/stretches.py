"""Units of images that lie one after the other, as filling a device handles them.

Owns the arithmetic alone: which units a set of ranges needs, and how these are cut and grouped.
Promises that nothing overlaps and that order is kept. Does not touch any byte.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.reading import Range


@dataclass(frozen=True, slots=True)
class Stretch:
    """Units of one image that lie one after the other in device memory too.

    `address` is that of the first; 0 where they have no place of their own.
    """

    holder: int
    first: int
    count: int
    address: int = 0


def stretches(holder: int, ranges: Iterable[Range], most: int = 1 << 40) -> Iterator[Stretch]:
    """The units with a byte of these ranges, as long stretches, at most so many units each."""
    units = sorted(
        (start // UNIT_BYTES, (stop - 1) // UNIT_BYTES + 1)
        for start, stop in ranges
        if start < stop
    )
    first = last = 0
    for begin, end in [*units, (1 << 60, 1 << 60)]:
        if begin > last:
            for at in range(first, last, most):
                yield Stretch(holder, at, min(most, last - at))
            first = begin
        last = max(last, end)


def cut(stretch: Stretch, most: int) -> Iterator[Stretch]:
    """A stretch in runs of so many units at most, cut where the image has a multiple of that."""
    at, last = stretch.first, stretch.first + stretch.count
    while at < last:
        stop = min(last, (at // most + 1) * most)
        address = stretch.address + (at - stretch.first) * UNIT_BYTES
        yield Stretch(stretch.holder, at, stop - at, address)
        at = stop


def packed(wanted: Iterable[Stretch], most: int) -> Iterator[list[Stretch]]:
    """The stretches, none longer than that, in groups of so many units at most."""
    group: list[Stretch] = []
    left = most
    for stretch in wanted:
        if stretch.count > left:
            yield group
            group, left = [], most
        group.append(stretch)
        left -= stretch.count
    if group:
        yield group
