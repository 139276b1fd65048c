"""Sending units of shard images to a device through a ring of pinned buffers.

Owns the ring, and the threads that copy units from a shard into its buffers, from which they travel
on the device's stream, each checked there before if that is wanted. Promises that a buffer is not
filled again before it was sent, that no buffer is pinned before somebody needs one, and that every
wait for the device is bounded. Does not know which tensors want what, nor what goes other ways.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy

from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.accelerator import Accelerator, Buffer, DeviceFailure, Mark, Ring, Table
from everstep.snapshot.reading import ShardReader
from everstep.snapshot.stretches import Stretch

BUFFER_BYTES = 8 * UNIT_BYTES
"""Large enough that threads hold the interpreter's lock for a small part of the time: with half of
it 15 GB from memory took 0.8 s, of which that was most (H100); small enough that pinning two for
each thread is over before the first read of a disk."""
LANES = 16
"""Threads that fill buffers, each two in turn: one is sent while the other is filled. A disk wants
as many reads under way."""
_WAIT_S = 60.0
_POLL_S = 0.0002

Row = tuple[int, int, int]
"""(target, source, bytes)"""
Rows = Callable[[Stretch, int], list[Row]]


@dataclass(slots=True)
class _Work:
    """What the lanes of a pump share: runs that each fit a buffer, and the units found damaged."""

    todo: deque[Stretch]
    rows: Rows
    check: bool
    bad: list[tuple[int, int]] = field(default_factory=list)


class RingPump:
    """Sends runs to one device. Runs of one call are sent in any order.

    Args:
        accelerator: The device.
        reader: Opens the shard of a rank.
        executor: Spreads the work over its threads.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        reader: Callable[[int], ShardReader],
        executor: Executor | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._reader = reader
        self._executor = executor
        self._ring: Ring | None = None
        self._lanes = 0

    def prepare(self, size: int) -> None:
        """Have buffers pinned, which takes tens of milliseconds, beside what comes next.

        Args:
            size: Bytes to be sent, about; no more buffers are pinned than that fills.
        """
        if self._ring is not None:
            return
        self._lanes = max(1, min(LANES, -(-size // (2 * BUFFER_BYTES))))
        ring = self._ring = self._accelerator.ring(2 * self._lanes, BUFFER_BYTES)

        def touch() -> None:
            buffer = ring.acquire(_WAIT_S)
            if buffer is not None:
                buffer.release()

        if self._executor is not None:
            self._executor.submit(touch)

    def send(self, runs: Iterable[Stretch], rows: Rows, *, check: bool) -> None:
        """Send all runs; return when they have arrived, and those to check matched.

        Args:
            runs: None longer than a buffer.
            rows: The copies that bring a run, given its address in a buffer, to its targets.
            check: Whether to check each unit in the buffer that is sent.

        Raises:
            ShardCorrupt: With the units that do not match; they were not sent, others were.
            DeviceFailure: If the device fails; some runs may have been sent.
        """
        work = _Work(deque(runs), rows, check)
        if not work.todo:
            return
        self.prepare(sum(run.count for run in work.todo) * UNIT_BYTES)
        for holder in {run.holder for run in work.todo}:
            self._reader(holder)  # opened here, since threads would each open one
        if self._executor is None:
            self._lane(work)
        else:
            lanes = [self._executor.submit(self._entered, work) for _ in range(self._lanes)]
            # All have ended before any error goes on: what they use may be freed then.
            for lane in lanes:
                lane.exception()
            for lane in lanes:
                lane.result()
        wait_for(self._accelerator.mark())
        self._refuse(work.bad)

    def close(self) -> None:
        """Free the buffers."""
        if self._ring is not None:
            self._ring.close()

    def _entered(self, work: _Work) -> None:
        self._accelerator.enter_thread()
        self._lane(work)

    def _lane(self, work: _Work) -> None:
        """One thread's part: fill a buffer while the other one is being sent."""
        assert self._ring is not None
        turns = _Turns(self._ring)
        try:
            while True:
                try:
                    run = work.todo.popleft()
                except IndexError:
                    return
                self._carry(run, turns, work)
        except BaseException:
            work.todo.clear()
            raise
        finally:
            turns.close()

    def _carry(self, run: Stretch, turns: "_Turns", work: _Work) -> None:
        reader = self._reader(run.holder)
        address = turns.next()
        reader.into(address, run.first, run.count)
        damaged = reader.damaged(address, run.first, run.count) if work.check else []
        if damaged:
            work.bad += [(run.holder, unit) for unit in damaged]
            return
        self._accelerator.copy(table(work.rows(run, address)))
        turns.sent(self._accelerator.mark())

    def _refuse(self, bad: Sequence[tuple[int, int]]) -> None:
        if bad:
            holder = min(bad)[0]
            units = sorted(unit for rank, unit in bad if rank == holder)
            raise self._reader(holder).corrupt(units)


class _Turns:
    """Two buffers of a ring, used in turn by one thread."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._turns: deque[tuple[Buffer, Mark | None]] = deque()

    def next(self) -> int:
        """The address of a buffer that nothing reads from any more."""
        if len(self._turns) < 2:
            buffer = self._ring.acquire(_WAIT_S)
            if buffer is None:
                raise DeviceFailure(f"no buffer of pinned memory came free within {_WAIT_S:.0f} s")
        else:
            buffer, mark = self._turns[0]
            if mark is not None:
                wait_for(mark)
            self._turns.popleft()
        self._turns.append((buffer, None))
        return buffer.address

    def sent(self, mark: Mark) -> None:
        """What was filled last is free again when the device is past the mark."""
        buffer, _ = self._turns.pop()
        self._turns.append((buffer, mark))

    def close(self) -> None:
        """Give the buffers back once they have been sent."""
        for buffer, mark in self._turns:
            if mark is not None:
                # Not released if this fails: the device may still read from it.
                wait_for(mark)
            buffer.release()


def wait_for(mark: Mark) -> None:
    """Wait until the device has come past a place in its work.

    Raises:
        DeviceFailure: If that takes too long.
    """
    deadline = time.monotonic() + _WAIT_S
    while not mark.query():
        if time.monotonic() >= deadline:
            raise DeviceFailure(f"the device has not finished a copy within {_WAIT_S:.0f} s")
        time.sleep(_POLL_S)


def table(rows: Sequence[Row]) -> Table:
    """Rows as a device takes them."""
    return numpy.array(rows, dtype=numpy.uint64).reshape(len(rows), 3)
