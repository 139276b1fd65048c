"""Which units of an image are copied and digested by the host, and in which blocks.

Owns that division, and the digests of units that are in the slot already. Promises that every
unit gets its digest from exactly one: a device that holds all of it, the copy that writes all of
it, or the host once everything is there.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from everstep.kernels.capture import Pieces, capture_units
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.digest import unit_count

BLOCK_UNITS = 8
"""Copied at a time: whoever helps begins with the next block."""
DIGEST_UNITS = 32
DIGEST_THREADS = min(8, len(os.sched_getaffinity(0)))

Flags = NDArray[numpy.bool_]


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """The division.

    Attributes:
        blocks: (first unit, count, whether the copy digests) for the lazy copy from the host.
        on_host: Units that the host digests after everything has been copied.
    """

    blocks: list[tuple[int, int, bool]]
    on_host: Flags


def plan_units(
    image_bytes: int,
    devices: Sequence[tuple[Flags, NDArray[numpy.int64]]],
    lazy: Sequence[tuple[int, int]],
) -> UnitPlan:
    """Divide an image's units.

    Args:
        image_bytes: The image's length.
        devices: For each, which units have a byte there, and the numbers of those it digests.
        lazy: (offset, bytes) of what is copied lazily from the host.
    """
    units = unit_count(image_bytes)
    touched = numpy.zeros(units, dtype=bool)
    digested = numpy.zeros(units, dtype=bool)
    for flags, numbers in devices:
        touched |= flags
        digested[numbers] = True
    copied = numpy.zeros(units, dtype=bool)
    for offset, size in lazy:
        copied[offset // UNIT_BYTES : -(-(offset + size) // UNIT_BYTES)] = True
    blocks = [(first, count, True) for first, count in _runs(~touched, BLOCK_UNITS)]
    blocks += [(first, count, False) for first, count in _runs(touched & copied, BLOCK_UNITS)]
    return UnitPlan(blocks, touched & ~digested)


def digest_in_place(image_address: int, image_bytes: int, units: Flags, digests: bytearray) -> None:
    """Write the digests of these units of an image, by several threads if they are many."""

    def digest(task: tuple[int, int]) -> None:
        capture_units(Pieces([]), image_address, image_bytes, UNIT_BYTES, *task, digests)

    tasks = list(_runs(units, DIGEST_UNITS))
    if len(tasks) <= 2 or DIGEST_THREADS == 1:
        for task in tasks:
            digest(task)
        return
    with ThreadPoolExecutor(DIGEST_THREADS, "everstep-digest") as executor:
        list(executor.map(digest, tasks))


def _runs(flags: Flags, most: int) -> Iterator[tuple[int, int]]:
    """The runs of set flags, (first, count), of at most so many each."""
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate([[0], flags.astype(int), [0]])))
    for start, stop in zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True):
        for first in range(start, stop, most):
            yield first, min(most, stop - first)
