"""A device whose memory is the host's, which does nothing before somebody looks for it."""

import ctypes
import threading

import numpy
from numpy.typing import NDArray

from everstep.kernels.digest import digest_units
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.accelerator import DeviceFailure, Table
from everstep.snapshot.device_fill import Row
from everstep.snapshot.pinning import StagingRing


class FakeMark:
    """Copies up to here are made when it is asked for the second time."""

    def __init__(self, device: "FakeAccelerator", place: int) -> None:
        self.device = device
        self.place = place
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1 and self.device.advance(self.place)


class FakeAccelerator:
    """See `everstep.snapshot.accelerator.Accelerator`.

    Attributes:
        copies_left: How many more calls of `copy` succeed.
        disturb: Whether the first byte of each copy arrives wrong.
        made: The copies that were made.
    """

    def __init__(self, *, room: int = 1 << 40, can_digest: bool = True) -> None:
        self._room = room
        self.can_digest = can_digest
        self.copies_left = 1 << 30
        self.disturb = False
        self.staging: list[NDArray[numpy.uint8]] = []
        self.rings: list[StagingRing] = []
        self.digested = 0
        self._lock = threading.Lock()
        self._queue: list[Row] = []
        self._done = 0

    @property
    def made(self) -> list[Row]:
        return self._queue[: self._done]

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
            self.copies_left -= 1
            if self.copies_left < 0:
                raise DeviceFailure("refused")
            self._queue += [(int(row[0]), int(row[1]), int(row[2])) for row in table]

    def mark(self) -> FakeMark:
        with self._lock:
            return FakeMark(self, len(self._queue))

    def digests(self, addresses: NDArray[numpy.int64]) -> bytes:
        assert self._done == len(self._queue)
        self.digested += len(addresses)
        memory = (ctypes.string_at(int(address), UNIT_BYTES) for address in addresses)
        return b"".join(digest_units(unit, UNIT_BYTES) for unit in memory)

    def advance(self, place: int) -> bool:
        with self._lock:
            while self._done < place:
                target, source, size = self._queue[self._done]
                ctypes.memmove(target, source, size)
                if self.disturb:
                    ctypes.memset(target, 0x55, 1)
                self._done += 1
        return True
