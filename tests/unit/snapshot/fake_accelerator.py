"""A device whose memory is the host's, which does nothing before somebody looks for it."""

import ctypes
import threading

import numpy
from numpy.typing import NDArray

from everstep.kernels.digest import digest_units
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.accelerator import DeviceFailure, Table
from everstep.snapshot.pinning import StagingRing
from everstep.snapshot.ring_pump import Row


class FakeMark:
    """Copies up to here are made when it is asked for the second time."""

    def __init__(self, device: "FakeAccelerator", place: int) -> None:
        self.device = device
        self.place = place
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1 and self.device.advance(self.place)


class FakeDigests(FakeMark):
    """Computed when the device comes to them, after all copies that were enqueued before."""

    def __init__(self, device: "FakeAccelerator", place: int, address: int, count: int) -> None:
        super().__init__(device, place)
        self.address = address
        self.count = count
        self.found: bytes | None = None

    def compute(self) -> None:
        memory = ctypes.string_at(self.address, self.count * UNIT_BYTES)
        self.found = digest_units(memory, UNIT_BYTES)

    def read(self) -> bytes:
        assert self.found is not None
        return self.found


class FakeAccelerator:
    """See `everstep.snapshot.accelerator.Accelerator`.

    Attributes:
        copies_left: How many more calls of `copy` succeed.
        disturb: Whether the first byte of each copy arrives wrong.
        made: The copies that were made.
        digested: How many units were digested.
        calls: How often `copy` was called.
    """

    def __init__(self, *, room: int = 1 << 40, can_digest: bool = True) -> None:
        self._room = room
        self.can_digest = can_digest
        self.copies_left = 1 << 30
        self.calls = 0
        self.disturb = False
        self.staging: list[NDArray[numpy.uint8]] = []
        self.rings: list[StagingRing] = []
        self.digested = 0
        self._lock = threading.Lock()
        self._queue: list[Row | FakeDigests] = []
        self._done = 0

    @property
    def made(self) -> list[Row]:
        return [row for row in self._queue[: self._done] if not isinstance(row, FakeDigests)]

    def enter_thread(self) -> None:
        pass

    def ring(self, buffers: int, buffer_bytes: int) -> StagingRing:
        self.rings.append(StagingRing(None, buffers, buffer_bytes))
        return self.rings[-1]

    def room(self) -> int:
        return self._room

    def allocate(self, size: int) -> int | None:
        self.staging.append(numpy.zeros(size, dtype=numpy.uint8))
        return int(self.staging[-1].ctypes.data)

    def free(self) -> None:
        assert self._done == len(self._queue), "freed under a copy"
        self.staging.clear()

    def follow(self) -> None:
        pass

    def copy(self, table: Table) -> None:
        with self._lock:
            self.calls += 1
            self.copies_left -= 1
            if self.copies_left < 0:
                raise DeviceFailure("refused")
            self._queue += [(int(row[0]), int(row[1]), int(row[2])) for row in table]

    def mark(self) -> FakeMark:
        with self._lock:
            return FakeMark(self, len(self._queue))

    def digests(self, address: int, count: int) -> FakeDigests:
        with self._lock:
            self.digested += count
            found = FakeDigests(self, len(self._queue) + 1, address, count)
            self._queue.append(found)
            return found

    def advance(self, place: int) -> bool:
        with self._lock:
            while self._done < place:
                self._make(self._queue[self._done])
                self._done += 1
        return True

    def _make(self, work: Row | FakeDigests) -> None:
        if isinstance(work, FakeDigests):
            work.compute()
            return
        target, source, size = work
        ctypes.memmove(target, source, size)
        if self.disturb:
            ctypes.memset(target, 0x55, 1)
