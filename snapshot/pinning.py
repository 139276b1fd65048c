"""Host memory that a GPU copies to and from at full speed.

Owns the registration of an arena with CUDA, in a thread of its own (`PinnedArena`), and the few
pinned buffers that stand in where an arena is not registered, or not yet (`StagingRing`).
Promises that memory is told to be pinned only while all of it is, that nothing touches it any
more once `close` has returned True, and that a forked child neither waits for its parent's thread
nor calls CUDA. Does not map or unmap the memory, nor know of copies under way: callers close only
after these.
"""

import atexit
import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy
from numpy.typing import NDArray

from everstep.kernels import pages
from everstep.kernels.cuda_runtime import CudaFailure, CudaRuntime

PIECE_BYTES = 1 << 30
"""Registered by one call, which cannot be stopped: `close` waits for one of them at most, and
others who need the driver's lock meanwhile wait for less. Not measured against other sizes."""
CLOSE_TIMEOUT_S = 60.0
POPULATE_BYTES = 64 << 20
POPULATE_THREADS = min(4, len(os.sched_getaffinity(0)) // 4)
"""New memory is cleared as it is mapped, which a driver does by one thread: 1.8 GB/s on an H100's
host, 4.7 GB/s by four threads, and no more by eight or sixteen. One alone is the driver's."""
STAGING_BUFFERS = 4
STAGING_BUFFER_BYTES = 32 << 20
_MADV_WIPEONFORK = 18


class PinnedArena:
    """Registers an arena's slots with CUDA in the background, the first slot first.

    Args:
        address: Of the arena's mapping; on a page's border.
        slot_bytes: The size of a slot, whole pages.
        slot_count: How many there are.
        runtime: What `CudaRuntime.find` returned.
        on_problem: Called at most once, with `problem`: from the constructor where there is no
            runtime or device, else from the thread, where it must not call `close`.
        device: Whose context the thread uses; by default that of the constructing thread. The
            memory is pinned for all devices either way.
        piece_bytes: How much to register at a time, whole pages.
        populate_threads: How many map and clear a slot's pages before; fewer than two: none.
        keep: Referenced until the thread has ended; the mapping, say.

    Attributes:
        problem: Why not everything could be pinned, or unpinned; empty while all is well.
    """

    def __init__(
        self,
        address: int,
        slot_bytes: int,
        slot_count: int,
        runtime: CudaRuntime | None,
        on_problem: Callable[[str], None] | None = None,
        *,
        device: int | None = None,
        piece_bytes: int = PIECE_BYTES,
        populate_threads: int = POPULATE_THREADS,
        keep: object = None,
    ) -> None:
        for size in (address, slot_bytes, piece_bytes):
            assert size % mmap.PAGESIZE == 0, size
        self.problem = ""
        self._address = address
        self._slot_bytes = slot_bytes
        self._slot_count = slot_count
        self._piece_bytes = piece_bytes
        self._pieces_per_slot = -(-slot_bytes // piece_bytes)
        self._populate_threads = populate_threads
        self._on_problem = on_problem
        self._keep = keep
        self._pid = os.getpid()
        self._registered: list[int] = []
        self._pinned_slots = 0
        self._settled = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._start(runtime, device)

    def is_pinned(self, slot: int) -> bool:
        """Whether every byte of the slot is pinned, for this process."""
        # Slots are registered in order, so that their number says which.
        mine = os.getpid() == self._pid
        return mine and not self._closing.is_set() and slot < self._pinned_slots

    def wait(self, timeout_s: float) -> bool:
        """Wait until no more slots will be pinned. Whether all are."""
        if os.getpid() == self._pid:
            self._settled.wait(timeout_s)
        return self.is_pinned(self._slot_count - 1)

    def split(self, address: int, size: int) -> list[tuple[int, int]]:
        """Cut a range of the arena where one copy must not cross.

        CUDA refuses a copy whose host side lies in two registered pieces. The cuts are the same
        whatever is registered at the moment.

        Args:
            address: Of the first byte.
            size: In bytes.

        Returns:
            The parts in order, as (address, bytes); none of an empty range.

        Raises:
            ValueError: If the range is not inside the arena.
        """
        begin = address - self._address
        end = begin + size
        if begin < 0 or size < 0 or end > self._slot_bytes * self._slot_count:
            raise ValueError(f"{size} bytes at {address:#x} are not inside the arena")
        parts = []
        while begin < end:
            slot, within = divmod(begin, self._slot_bytes)
            border = min(self._slot_bytes, (within // self._piece_bytes + 1) * self._piece_bytes)
            stop = min(end, slot * self._slot_bytes + border)
            parts.append((self._address + begin, stop - begin))
            begin = stop
        return parts

    def split_copies(self, table: NDArray[numpy.uint64], column: int = 0) -> NDArray[numpy.uint64]:
        """Cut the copies of a table as `split` does; the same table if none needs it.

        Args:
            table: One (target, source, bytes) a row, as `CudaRuntime.copy_async` takes it.
            column: Which of the two lies in the arena: 0 the targets, 1 the sources.

        Raises:
            ValueError: If a range is not inside the arena.
        """
        begins = table[:, column] - numpy.uint64(self._address)
        ends = begins + table[:, 2]
        total = self._slot_bytes * self._slot_count
        # An address before the arena has wrapped around to far behind it.
        if numpy.any((begins > total) | (ends > total)):
            raise ValueError("a copy is not inside the arena")
        lasts = ends - (table[:, 2] > 0).astype(numpy.uint64)
        crossing = self._piece_numbers(begins) != self._piece_numbers(lasts)
        if not crossing[table[:, 2] > 0].any():
            return table
        rows: list[tuple[int, int, int]] = []
        for target, source, size in table.tolist():
            shift = source - target if column == 0 else target - source
            for start, part in self.split((target, source)[column], size):
                other = start + shift
                rows.append((start, other, part) if column == 0 else (other, start, part))
        return numpy.array(rows, dtype=numpy.uint64).reshape(len(rows), 3)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Stop registering, and unregister everything. May be called again.

        No copy from or to the arena may be under way.

        Args:
            timeout_s: How long to wait for the call into the driver that is under way, and for
                the unregistering.

        Returns:
            Whether the memory may be unmapped. False only if the driver did not answer in time.
            A forked child gets True at once: it has nothing registered.
        """
        if os.getpid() != self._pid:
            return True
        self._closing.set()
        if self._thread is not None:
            self._thread.join(max(0.0, timeout_s))
            if self._thread.is_alive():
                return False
        atexit.unregister(self.close)
        return True

    def _start(self, runtime: CudaRuntime | None, device: int | None) -> None:
        if runtime is None:
            self._fail("no CUDA runtime library is loaded in this process")
            return
        try:
            device = runtime.current_device() if device is None else device
        except CudaFailure as failure:
            self._fail(str(failure))
            return
        # One thread does all of it, so that no other one has to choose a device.
        self._thread = threading.Thread(
            target=self._run, args=(runtime, device), name="everstep-pinning", daemon=True
        )
        self._thread.start()
        # The driver must not be ended under a thread that is inside of it.
        atexit.register(self.close)

    def _run(self, runtime: CudaRuntime, device: int) -> None:
        try:
            runtime.enter_thread(device)
            for slot in range(self._slot_count):
                if self._populate_threads > 1:
                    self._populate(slot)
                if not self._register_slot(runtime, slot):
                    break
                self._pinned_slots = slot + 1
        except CudaFailure as failure:
            if not self._closing.is_set():
                self._fail(str(failure))
        finally:
            self._settled.set()
        # Not bounded: ended by `close`, at the latest when the interpreter exits.
        self._closing.wait()
        self._unregister(runtime, 0)

    def _populate(self, slot: int) -> None:
        """Have all pages of a slot there; only a matter of time."""
        begin = self._address + slot * self._slot_bytes

        def populate(offset: int) -> None:
            if not self._closing.is_set():
                size = min(POPULATE_BYTES, self._slot_bytes - offset)
                pages.populate(begin + offset, size)

        threads = ThreadPoolExecutor(self._populate_threads, "everstep-populating")
        # Nobody can start a thread while the interpreter exits.
        with suppress(RuntimeError), threads as workers:
            for offset in range(0, self._slot_bytes, POPULATE_BYTES):
                workers.submit(populate, offset)

    def _register_slot(self, runtime: CudaRuntime, slot: int) -> bool:
        """Whether all of the slot was registered; not, once the arena is being closed."""
        first = len(self._registered)
        begin = self._address + slot * self._slot_bytes
        try:
            for address, size in self.split(begin, self._slot_bytes):
                if self._closing.is_set():
                    return False
                runtime.register(address, size)
                self._registered.append(address)
        except CudaFailure:
            # Half a slot is of no use, and costs others what they may lock.
            self._unregister(runtime, first)
            raise
        return True

    def _unregister(self, runtime: CudaRuntime, first: int) -> None:
        while len(self._registered) > first:
            try:
                runtime.unregister(self._registered.pop())
            except CudaFailure as failure:
                if not failure.is_shutdown:
                    self.problem = self.problem or str(failure)

    def _fail(self, problem: str) -> None:
        self.problem = problem
        self._settled.set()
        if self._on_problem is not None:
            self._on_problem(problem)

    def _piece_numbers(self, offsets: NDArray[numpy.uint64]) -> NDArray[numpy.uint64]:
        slots, within = numpy.divmod(offsets, numpy.uint64(self._slot_bytes))
        pieces = within // numpy.uint64(self._piece_bytes)
        return slots * numpy.uint64(self._pieces_per_slot) + pieces


class StagingBuffer:
    """One buffer of a `StagingRing`, until it is released.

    Attributes:
        address: Of the first byte.
        bytes: How many there are.
        pinned: Whether it is pinned; else copies block and are slow, but right.
    """

    __slots__ = ("_index", "_ring", "address", "bytes", "pinned")

    def __init__(self, ring: "StagingRing", index: int, address: int, pinned: bool) -> None:
        self.address = address
        self.bytes = ring.buffer_bytes
        self.pinned = pinned
        self._index = index
        self._ring: StagingRing | None = ring

    def release(self) -> None:
        """Give it back: no copy from or to it is under way. Again does nothing."""
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.take_back(self._index)


class StagingRing:
    """A bounded number of host buffers, pinned if that is possible.

    The memory is reserved when the first buffer is asked for, so that a ring which is never used
    costs nothing. A child that is forked meanwhile has other memory in its place, and so cannot
    make the kernel move a page that a device is writing to. It lies in huge pages where the kernel
    has them: a restore from a disk took 1.04 of a bare loop's time into those, and 1.19 into shared
    memory, whose small pages lie apart (`benchmarks.gpu_capture`, an H100's host).

    Args:
        runtime: What `CudaRuntime.find` returned; None for buffers that are not pinned.
        buffers: How many there are.
        buffer_bytes: The size of each, whole pages.
        device: See `PinnedArena`; by default that of the thread that asks first.
    """

    def __init__(
        self,
        runtime: CudaRuntime | None,
        buffers: int = STAGING_BUFFERS,
        buffer_bytes: int = STAGING_BUFFER_BYTES,
        *,
        device: int | None = None,
    ) -> None:
        assert buffers > 0, buffers
        self.buffer_bytes = buffer_bytes
        self._runtime = runtime
        self._device = device
        self._buffers = buffers
        self._free = list(range(buffers))
        self._condition = threading.Condition()
        self._address = 0
        self._arena: PinnedArena | None = None
        self._closed = False
        self._pid = os.getpid()

    @property
    def pinned(self) -> bool:
        """Whether all buffers are pinned; not before the first was asked for."""
        return self._arena is not None and self._arena.is_pinned(self._buffers - 1)

    @property
    def problem(self) -> str:
        """Why the buffers are not pinned; empty while they are, or none was asked for."""
        return "" if self._arena is None else self._arena.problem

    def acquire(self, timeout_s: float) -> StagingBuffer | None:
        """A buffer, once there is one; None after the timeout, `close` or a fork.

        Raises:
            OSError: If there is no memory for the buffers.
        """
        if os.getpid() != self._pid:
            return None
        deadline_s = time.monotonic() + timeout_s
        with self._condition:
            usable = self._condition.wait_for(lambda: self._free or self._closed, timeout_s)
            if not usable or self._closed:
                return None
            arena = self._arena = self._arena or self._reserve()
            index = self._free.pop()
        # Registering these few takes tens of milliseconds: worth it even for the first copy.
        arena.wait(max(0.0, deadline_s - time.monotonic()))
        address = self._address + index * self.buffer_bytes
        return StagingBuffer(self, index, address, arena.is_pinned(index))

    def take_back(self, index: int) -> None:
        """For `StagingBuffer.release` only."""
        if os.getpid() != self._pid:
            return
        with self._condition:
            self._free.append(index)
            self._condition.notify_all()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Hand out no more, wait for those that are out, unpin. May be called again.

        Returns:
            Whether everything has come back and is unpinned. If not, the memory stays as it is.
        """
        if os.getpid() != self._pid:
            return True
        deadline_s = time.monotonic() + timeout_s
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            if not self._condition.wait_for(lambda: len(self._free) == self._buffers, timeout_s):
                return False
        return self._arena is None or self._arena.close(deadline_s - time.monotonic())

    def _reserve(self) -> PinnedArena:
        total = self._buffers * self.buffer_bytes
        buffers = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffers.madvise(_MADV_WIPEONFORK)
        with suppress(OSError):  # a kernel that was built without them
            buffers.madvise(mmap.MADV_HUGEPAGE)
        memory = (ctypes.c_char * total).from_buffer(buffers)
        self._address = ctypes.addressof(memory)
        return PinnedArena(
            self._address,
            self.buffer_bytes,
            self._buffers,
            self._runtime,
            device=self._device,
            keep=memory,
        )
