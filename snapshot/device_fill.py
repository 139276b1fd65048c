"""Moving units of shard images to a device, through pinned memory, checked on the way.

Owns the pump: threads copy units from a shard into buffers of pinned memory, and from there they
travel on a stream. Two ways lead to the tensors. *Staged*: units go to device memory of their own,
are digested there and compared with the record, and are scattered to the tensors by copies on the
device once all have matched (`stage`, then `scatter`). *Direct*, where there is no room for that:
they go straight into the tensors, each checked in the buffer that is sent (`direct`).

Promises that `stage` touches no tensor; that a unit reaches a tensor only if its bytes, as they
came to the device or as they lay in the buffer, matched its digest; that memory is bounded by the
buffers and the staging copy; and that every wait for the device is bounded. Does not know torch or
CUDA (see `snapshot/accelerator.py`), which tensors want which bytes, or where shards lie.
"""

import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass

import numpy

from everstep.kernels.digest import differing_units
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.accelerator import Accelerator, Buffer, DeviceFailure, Mark, Ring, Table
from everstep.snapshot.reading import Range, ShardReader

BUFFER_BYTES = 4 * UNIT_BYTES
"""Large enough that a copy takes longer than to enqueue it, small enough to stay in a cache."""
LANES = 12
"""Threads that fill buffers, each two in turn: one is sent while the other is filled."""
CHUNK_BYTES = 1024 * UNIT_BYTES
"""Staging memory is allocated in such pieces: one large piece may not be free in one place."""
SPARE_BYTES = 512 * UNIT_BYTES
"""Device memory that staging leaves alone, for kernels and whatever runs beside it."""
_WAIT_S = 60.0
_POLL_S = 0.0002

Row = tuple[int, int, int]
"""(target, source, bytes)"""
Pinned = Callable[[str, int, int], int | None]
"""Where a piece of a file lies in pinned memory of this process: (path, offset, bytes)."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Units of one image that lie one after the other in device memory too.

    `address` is that of the first; 0 where they have no place of their own.
    """

    holder: int
    first: int
    count: int
    address: int = 0


@dataclass(frozen=True, slots=True)
class _Run:
    """What fits a buffer; checked in it, or else on the device."""

    holder: int
    first: int
    count: int
    address: int
    check: bool


class DeviceFill:
    """Brings bytes of shards to one device.

    Args:
        accelerator: The device.
        reader: Opens the shard of a rank; stays open for as long as this object is used.
        executor: Spreads the work over its threads.
        pinned: Tells what lies in pinned memory already.

    Attributes:
        problem: Why bytes could not be staged, if the device was the reason.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        reader: Callable[[int], ShardReader],
        executor: Executor | None = None,
        pinned: Pinned | None = None,
    ) -> None:
        self.problem = ""
        self._accelerator = accelerator
        self._reader = reader
        self._executor = executor
        self._pinned = pinned
        self._ring: Ring | None = None
        self._staged: dict[int, list[Stretch]] = {}

    def stage(self, ranges: Mapping[int, Iterable[Range]]) -> bool:
        """Bring all units with a byte of these ranges to memory of their own on the device.

        Args:
            ranges: Of each rank's image.

        Returns:
            Whether they are there, and match their digests. If not, the device has no room or
            failed, and the bytes are still unchecked.

        Raises:
            ShardCorrupt: With the units that do not match.
            FormatInvalid: If a file is too short.
        """
        wanted = [
            stretch
            for holder, parts in ranges.items()
            for stretch in stretches(holder, parts, CHUNK_BYTES // UNIT_BYTES)
        ]
        try:
            self._open_ring()
            placed = self._placed(wanted)
            if placed is None:
                return False
            digest = self._accelerator.can_digest
            self._accelerator.follow()
            runs = [run for stretch in placed for run in self._runs(stretch, check=not digest)]
            self._pump(runs, lambda run, source: [(run.address, source, self._size(run))])
            if digest:
                self._compare(placed)
        except DeviceFailure as failure:
            self.problem = str(failure)
            with suppress(DeviceFailure):
                self._wait(self._accelerator.mark())
                self._accelerator.free()
            return False
        for stretch in placed:
            self._staged.setdefault(stretch.holder, []).append(stretch)
        return True

    def staged_rows(self, target: int, holder: int, offset: int, size: int) -> list[Row] | None:
        """The copies from staging memory that make up a piece of an image.

        Args:
            target: The address that takes it.
            holder: Whose image it is.
            offset: Of the piece in it.
            size: Of the piece.

        Returns:
            None if not all of it was staged.
        """
        rows: list[Row] = []
        staged = self._staged.get(holder, [])
        at = bisect_right(staged, offset, key=lambda stretch: stretch.first * UNIT_BYTES) - 1
        for stretch in staged[max(0, at) :]:
            begin = stretch.first * UNIT_BYTES
            start = max(offset, begin)
            stop = min(offset + size, begin + stretch.count * UNIT_BYTES)
            if start >= stop:
                break
            rows.append((target + start - offset, stretch.address + start - begin, stop - start))
        return rows if sum(row[2] for row in rows) == size else None

    def scatter(self, rows: Sequence[Row]) -> None:
        """Copy on the device, and wait until that is done.

        Raises:
            DeviceFailure: If the device fails; targets may be partly filled then.
        """
        if rows:
            self._accelerator.follow()
            self._accelerator.copy(_table(rows))
            self._wait(self._accelerator.mark())

    def direct(self, pieces: Mapping[int, Sequence[Row]]) -> None:
        """Send bytes straight to their targets, each unit checked in the buffer that is sent.

        Args:
            pieces: For each rank's image: (target, offset in the image, bytes).

        Raises:
            ShardCorrupt: With the units that do not match; targets may be partly filled then.
            DeviceFailure: If the device fails; the same goes for it.
        """
        ordered = {
            holder: sorted(parts, key=lambda piece: piece[1])
            for holder, parts in pieces.items()
            if parts
        }
        if not ordered:
            return
        begins = {holder: [offset for _, offset, _ in parts] for holder, parts in ordered.items()}

        def rows(run: _Run, source: int) -> list[Row]:
            begin = run.first * UNIT_BYTES
            end = begin + self._size(run)
            parts, starts = ordered[run.holder], begins[run.holder]
            at = max(0, bisect_right(starts, begin) - 1)
            return list(_overlaps(parts[at : bisect_left(starts, end)], begin, end, source))

        self._accelerator.follow()
        runs = [
            run
            for holder, parts in ordered.items()
            for stretch in stretches(holder, [(offset, offset + n) for _, offset, n in parts])
            for run in self._runs(stretch, check=True)
        ]
        self._pump(runs, rows)

    def close(self) -> None:
        """Free buffers and staging memory."""
        self._staged.clear()
        with suppress(DeviceFailure):
            # After an error, copies may still be under way.
            self._wait(self._accelerator.mark())
        self._accelerator.free()
        if self._ring is not None:
            self._ring.close()

    def _open_ring(self) -> None:
        """Have the buffers pinned, which takes tens of milliseconds, beside what comes next."""
        if self._ring is not None:
            return
        ring = self._ring = self._accelerator.ring(2 * LANES, BUFFER_BYTES)

        def touch() -> None:
            buffer = ring.acquire(_WAIT_S)
            if buffer is not None:
                buffer.release()

        if self._executor is not None:
            self._executor.submit(touch)

    def _placed(self, wanted: Sequence[Stretch]) -> list[Stretch] | None:
        """The stretches with a place each in new device memory."""
        units = sum(stretch.count for stretch in wanted)
        if units * UNIT_BYTES + SPARE_BYTES > self._accelerator.room():
            return None
        placed: list[Stretch] = []
        address, left = 0, 0
        for stretch in wanted:
            if left < stretch.count:
                # As much as is still to come, so that many small stretches share a chunk.
                left = min(CHUNK_BYTES // UNIT_BYTES, units)
                found = self._accelerator.allocate(left * UNIT_BYTES)
                if found is None:
                    self._accelerator.free()
                    return None
                address = found
            placed.append(Stretch(stretch.holder, stretch.first, stretch.count, address))
            address += stretch.count * UNIT_BYTES
            left -= stretch.count
            units -= stretch.count
        return placed

    def _runs(self, stretch: Stretch, *, check: bool) -> Iterator[_Run]:
        """A stretch in pieces of a buffer; a unit that is not whole cannot be digested there."""
        last = stretch.first + stretch.count
        whole = min(last, self._reader(stretch.holder).image_bytes // UNIT_BYTES)
        step = BUFFER_BYTES // UNIT_BYTES
        for first in range(stretch.first, whole, step):
            address = stretch.address + (first - stretch.first) * UNIT_BYTES
            yield _Run(stretch.holder, first, min(step, whole - first), address, check)
        if whole < last:
            address = stretch.address + (whole - stretch.first) * UNIT_BYTES
            yield _Run(stretch.holder, whole, last - whole, address, check=True)

    def _size(self, run: _Run) -> int:
        begin = run.first * UNIT_BYTES
        return min(run.count * UNIT_BYTES, self._reader(run.holder).image_bytes - begin)

    def _pump(
        self,
        runs: Sequence[_Run],
        rows: Callable[[_Run, int], list[Row]],
    ) -> None:
        """Send all runs; return when they have arrived and those to check on the way matched."""
        self._open_ring()
        for holder in {run.holder for run in runs}:
            self._reader(holder)  # opened here, since threads would each open one
        todo = deque(runs)
        bad: list[tuple[int, int]] = []
        if self._executor is None:
            self._lane(todo, rows, bad)
        else:
            lanes = [self._executor.submit(self._entered, todo, rows, bad) for _ in range(LANES)]
            # All have ended before any error goes on: what they use may be freed then.
            for lane in lanes:
                lane.exception()
            for lane in lanes:
                lane.result()
        self._wait(self._accelerator.mark())
        self._refuse(bad)

    def _entered(self, *work: object) -> None:
        self._accelerator.enter_thread()
        self._lane(*work)  # type: ignore[arg-type]

    def _lane(
        self,
        todo: deque[_Run],
        rows: Callable[[_Run, int], list[Row]],
        bad: list[tuple[int, int]],
    ) -> None:
        """One thread's part: fill a buffer while the other one is being sent."""
        assert self._ring is not None
        turns = _Turns(self._ring, self._wait)
        try:
            while True:
                try:
                    run = todo.popleft()
                except IndexError:
                    return
                self._carry(run, turns, rows, bad)
        except BaseException:
            todo.clear()
            raise
        finally:
            turns.close()

    def _carry(
        self,
        run: _Run,
        turns: "_Turns",
        rows: Callable[[_Run, int], list[Row]],
        bad: list[tuple[int, int]],
    ) -> None:
        reader = self._reader(run.holder)
        # What is checked on the host must be what is sent: others can write to shared memory.
        found = None if run.check or self._pinned is None else self._find(run, self._pinned)
        if found is not None:
            self._accelerator.copy(_table(rows(run, found)))
            return
        address = turns.next()
        reader.into(address, run.first, run.count)
        damaged = reader.damaged(address, run.first, run.count) if run.check else []
        if damaged:
            bad += [(run.holder, unit) for unit in damaged]
            return
        self._accelerator.copy(_table(rows(run, address)))
        turns.sent(self._accelerator.mark())

    def _find(self, run: _Run, pinned: Pinned) -> int | None:
        shard = self._reader(run.holder).shard
        return pinned(shard.path, shard.offset + run.first * UNIT_BYTES, self._size(run))

    def _compare(self, placed: Sequence[Stretch]) -> None:
        """Digest what has arrived; the last unit of an image, if not whole, was checked before."""
        whole = []
        for stretch in placed:
            units = self._reader(stretch.holder).image_bytes // UNIT_BYTES - stretch.first
            whole.append(min(stretch.count, units))
        begins = [
            stretch.address + unit * UNIT_BYTES
            for stretch, count in zip(placed, whole, strict=True)
            for unit in range(count)
        ]
        found = self._accelerator.digests(numpy.array(begins, dtype=numpy.int64)) if begins else b""
        bad: list[tuple[int, int]] = []
        at = 0
        for stretch, count in zip(placed, whole, strict=True):
            expected = self._reader(stretch.holder).digests(stretch.first, count)
            differing = differing_units(found[at : at + len(expected)], expected)
            bad += [(stretch.holder, stretch.first + unit) for unit in differing]
            at += len(expected)
        self._accuse(bad)

    def _accuse(self, bad: Sequence[tuple[int, int]]) -> None:
        """Say whether the shard is damaged, or only what came of it to the device."""
        for holder in {holder for holder, _ in bad}:
            reader = self._reader(holder)
            units = [unit for rank, unit in bad if rank == holder]
            reader.verify([(unit * UNIT_BYTES, unit * UNIT_BYTES + 1) for unit in units])
        if bad:
            raise DeviceFailure(
                f"{len(bad)} units came to the device, or were digested there, otherwise than they "
                "are in memory"
            )

    def _refuse(self, bad: Sequence[tuple[int, int]]) -> None:
        if bad:
            holder = min(bad)[0]
            units = sorted(unit for rank, unit in bad if rank == holder)
            raise self._reader(holder).corrupt(units)

    def _wait(self, mark: Mark) -> None:
        deadline = time.monotonic() + _WAIT_S
        while not mark.query():
            if time.monotonic() >= deadline:
                raise DeviceFailure(f"the device has not finished a copy within {_WAIT_S:.0f} s")
            time.sleep(_POLL_S)


class _Turns:
    """Two buffers of a ring, used in turn by one thread."""

    def __init__(self, ring: Ring, wait: Callable[[Mark], None]) -> None:
        self._ring = ring
        self._wait = wait
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
                self._wait(mark)
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
                self._wait(mark)
            buffer.release()


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


def _overlaps(pieces: Iterable[Row], begin: int, end: int, source: int) -> Iterator[Row]:
    for target, offset, size in pieces:
        start, stop = max(begin, offset), min(end, offset + size)
        if start < stop:
            yield target + start - offset, source + start - begin, stop - start


def _table(rows: Sequence[Row]) -> Table:
    return numpy.array(rows, dtype=numpy.uint64).reshape(len(rows), 3)
