"""Clones of what an update would overtake, in device memory that is given back soon.

Owns the scratch of one capture: its allocation in chunks, the clones, their copies off the device,
and the release of each chunk as soon as the host has seen that it was copied. Promises to take no
more than its budget, and to clone what fits if there is less. Does not choose the budget, nor wait
for anything.
"""

from collections import deque
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from everstep.snapshot.device import Device, Lane, Mark, Memory
from everstep.snapshot.device_moving import BATCH_ROWS, Mover
from everstep.snapshot.device_plan import Table, UnitTable, split_clones, without_units

CHUNK_BYTES = 1 << 30
"""Allocated at a time: one large piece may not be free in one place. All but the last are of this
size, so that those of one capture fit where those of another were."""
_SMALLEST_BYTES = 2 << 20
_PLACE_BYTES = 256


class Scratch:
    """The scratch of one capture.

    Attributes:
        run: The timed marks around the copies off the device, with their bytes; None before.
        accepted_bytes: What is on its way off the device, or has left it.
        cloned: After the last clones; None before any.
    """

    def __init__(self, device: Device) -> None:
        self.run: tuple[Mark, Mark, int] | None = None
        self.accepted_bytes = 0
        self.cloned: Mark | None = None
        self._device = device
        self._awaited: Mark | None = None
        self._wanted: list[Table] = []
        self._left: Table | None = None
        self._held: list[Memory] = []
        self._chunks: deque[tuple[Memory, Table]] = deque()
        self._freeing: deque[tuple[Mark, Memory]] = deque()

    def allocate(self, rows: Table, budget_bytes: int) -> int:
        """Memory for the first rows (offset, address, bytes), as many as fit; return how many.

        To be called with the update lane current, and followed by `fuse`, maybe, and `clone`.
        """
        sizes = -(-rows[:, 2] // _PLACE_BYTES) * _PLACE_BYTES
        ends = numpy.concatenate([[0], numpy.cumsum(sizes)])
        chunks = _cut(ends, budget_bytes)
        done = 0
        found = self._device.allocate([size for _, _, size in chunks]) if chunks else []
        for memory, (first, last, _) in zip(found, chunks, strict=False):
            self._held.append(memory)
            places = memory.address + ends[first:last] - ends[first]
            offsets, sources, lengths = rows[first:last].T
            self._wanted.append(numpy.stack([offsets, places, sources, lengths], axis=1))
            self._chunks.append((memory, numpy.stack([offsets, places, lengths], axis=1)))
            done = last
        return done

    def fuse(self, tables: Sequence[UnitTable], unit_count: int) -> list[Table | None]:
        """Leave to the pass that digests these units what it can clone; see `split_clones`."""
        if not self._wanted:
            return [None] * len(tables)
        clones, self._left = split_clones(numpy.concatenate(self._wanted), tables, unit_count)
        return clones

    def clone(self, lane: Lane) -> None:
        """Clone the rest of what was allocated for, on a lane that has come past the allocation
        and, if there is one, past the pass that clones the others."""
        if not self._wanted:
            return
        left = self._left if self._left is not None else numpy.concatenate(self._wanted)[:, 1:]
        if len(left):
            self._device.clone(lane, left)
        self.cloned = self._awaited = self._device.mark(lane)
        self._wanted, self._left = [], None

    def drain(self, mover: Mover, skipped: NDArray[numpy.bool_] | None) -> bool:
        """Enqueue the copies off the device, as far as there is room; return whether all are.

        Args:
            mover: Takes them.
            skipped: Units to leave out; the same every time.
        """
        if self._awaited is not None:
            self._device.follow("copies", self._awaited)
            self._awaited = None
            if skipped is not None:
                self._chunks = deque((m, without_units(rows, skipped)) for m, rows in self._chunks)
            start = self._device.mark("copies", timed=True)
            self.run = (start, start, 0)
        while self._chunks:
            memory, rows = self._chunks[0]
            count = mover.accept(rows[:BATCH_ROWS])
            if len(rows) and not count:
                return False
            self.accepted_bytes += int(rows[:count, 2].sum())
            mark = self._device.mark("copies", timed=True)
            if self.run is not None:
                self.run = (self.run[0], mark, self.accepted_bytes)
            if count == len(rows):
                self._chunks.popleft()
                self._freeing.append((mark, memory))
            else:
                self._chunks[0] = (memory, rows[count:])
        return True

    def free(self) -> None:
        """Give back the chunks that have been copied."""
        while self._freeing and self._freeing[0][0].query():
            self._freeing.popleft()[1].release()

    def release(self) -> None:
        """Give everything back."""
        for memory in self._held:
            memory.release()
        self._held.clear()
        self._chunks.clear()
        self._freeing.clear()


def _cut(ends: NDArray[numpy.int64], budget_bytes: int) -> list[tuple[int, int, int]]:
    """Chunks (first row, row after the last, bytes) for rows that end there, within a budget."""
    chunks: list[tuple[int, int, int]] = []
    first = 0
    while first < len(ends) - 1:
        size = min(_chunk_bytes(int(ends[-1] - ends[first])), budget_bytes)
        last = int(numpy.searchsorted(ends, ends[first] + size, "right")) - 1
        if last <= first:
            break
        chunks.append((first, last, size))
        budget_bytes -= size
        first = last
    return chunks


def _chunk_bytes(wanted_bytes: int) -> int:
    """The size of the next chunk; powers of two at the end, so that there are few sizes."""
    if wanted_bytes >= CHUNK_BYTES:
        return CHUNK_BYTES
    return max(_SMALLEST_BYTES, 1 << (wanted_bytes - 1).bit_length())
