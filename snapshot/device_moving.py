"""Two ways from a device into a slot: straight, or through a few pinned buffers.

Owns what of one capture is under way from the device to the host. Promises that `is_idle` is true
only once everything accepted is in the slot, and that after `discard` nothing more is written to
it by the host. Does not wait for the device, nor keep its memory alive.
"""

import ctypes
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy
from numpy.typing import NDArray

from everstep.snapshot.device import Buffer, Device, Mark
from everstep.snapshot.device_plan import Table, table

BATCH_ROWS = 256
"""Enqueued by one call at most: whoever holds a lock meanwhile holds it for a moment only."""

Split = Callable[[NDArray[numpy.uint64]], NDArray[numpy.uint64]]


class Mover(Protocol):
    """One of the two ways.

    Attributes:
        done_bytes: What has arrived in the slot.
        is_pinned: Whether the device writes to the slot itself.
        most_bytes: Of a row.
    """

    done_bytes: int
    is_pinned: bool
    most_bytes: int

    @property
    def is_idle(self) -> bool:
        """Whether everything that was accepted is in the slot."""

    def prepare(self) -> None:
        """Do what takes a moment and can be done ahead; called without locks."""

    def accept(self, rows: Table) -> int:
        """Enqueue rows (offset, address, bytes), in order, as long as there is room; how many."""

    def pump(self) -> bool:
        """See what has arrived, and pass it on; return whether anything had."""

    def discard(self) -> None:
        """What is under way will not be needed."""


class PinnedMover:
    """Copies straight into the slot."""

    is_pinned = True
    most_bytes = 1 << 62

    def __init__(self, device: Device, address: int, split: Split) -> None:
        self.done_bytes = 0
        self._device = device
        self._address = address
        self._split = split
        self._marks: deque[tuple[Mark, int]] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether everything that was accepted is in the slot."""
        return not self._marks

    def prepare(self) -> None:
        """Nothing to do."""

    def accept(self, rows: Table) -> int:
        """Enqueue rows (offset, address, bytes), in order; return how many."""
        if not len(rows):
            return 0
        targets = rows[:, 0] + self._address
        copies = numpy.stack([targets, rows[:, 1], rows[:, 2]], axis=1)
        self._device.copy("copies", self._split(copies.view(numpy.uint64)).view(numpy.int64))
        self._marks.append((self._device.mark("copies"), int(rows[:, 2].sum())))
        return len(rows)

    def pump(self) -> bool:
        """See what has been done; return whether anything was new."""
        before = self.done_bytes
        while self._marks and self._marks[0][0].query():
            self.done_bytes += self._marks.popleft()[1]
        return self.done_bytes != before

    def discard(self) -> None:
        """What is under way will not be needed, but cannot be stopped."""


class StagedMover:
    """Copies through a bounded number of pinned buffers, for a slot that is not pinned."""

    is_pinned = False

    def __init__(self, device: Device, address: int) -> None:
        self.done_bytes = 0
        self.most_bytes = device.ring.buffer_bytes
        self._device = device
        self._address = address
        self._under_way: deque[tuple[Mark, Buffer, list[tuple[int, int, int]]]] = deque()
        self._discarding = False
        self._warm = False

    @property
    def is_idle(self) -> bool:
        """Whether everything that was accepted is in the slot."""
        return not self._under_way

    def prepare(self) -> None:
        """Have the ring reserved, which takes a moment, without anybody waiting for a lock."""
        if not self._warm:
            self._warm = True
            buffer = self._device.ring.acquire(1.0)
            if buffer is not None:
                buffer.release()

    def accept(self, rows: Table) -> int:
        """Enqueue rows as long as there are buffers; return how many."""
        count = 0
        while count < len(rows):
            buffer = self._device.ring.acquire(0.0)
            if buffer is None:
                break
            count += self._fill(buffer, rows[count:])
        return count

    def _fill(self, buffer: Buffer, rows: Table) -> int:
        places = numpy.concatenate([[0], numpy.cumsum(rows[:, 2])])
        count = int(numpy.searchsorted(places, self.most_bytes, "right")) - 1
        offsets, sources, sizes = rows[:count].T
        starts = places[:count] + buffer.address
        self._device.copy("copies", numpy.stack([starts, sources, sizes], axis=1))
        moves = table(zip(offsets + self._address, starts, sizes, strict=True)).tolist()
        self._under_way.append((self._device.mark("copies"), buffer, moves))
        return count

    def pump(self) -> bool:
        """Move on what has arrived in a buffer; return whether anything had."""
        before = len(self._under_way)
        while self._under_way and self._under_way[0][0].query():
            _, buffer, moves = self._under_way.popleft()
            for target, source, size in moves:
                if not self._discarding:
                    ctypes.memmove(target, source, size)
                self.done_bytes += size
            buffer.release()
        return len(self._under_way) != before

    def discard(self) -> None:
        """What is under way will not be needed: buffers come back, and nothing is moved on."""
        self._discarding = True
