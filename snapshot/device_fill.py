"""Moving units of shard images to a device, through pinned memory, checked on the way.

Owns the two ways to the tensors. *Staged*: units go to device memory of their own, are digested
there and compared with the record, and are scattered to the tensors by copies on the device once
all have matched (`stage`, then `scatter`). *Direct*, where there is no room for that: they go
straight into the tensors, each checked in the buffer that is sent (`direct`). And owns where units
come from: what lies in pinned memory is sent from there, in large pieces and by one thread;
everything else goes through `snapshot/ring_pump.py`.

Promises that `stage` touches no tensor; that a unit reaches a tensor only if its bytes, as they
came to the device or as they lay in the buffer, matched its digest; that memory is bounded by the
buffers and the staging copy; and that every wait for the device is bounded. Does not know torch or
CUDA (see `snapshot/accelerator.py`), which tensors want which bytes, or where shards lie.
"""

import ctypes
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace

from everstep.kernels.digest import differing_units
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.accelerator import Accelerator, DeviceFailure, Digests
from everstep.snapshot.digest import DIGEST_BYTES
from everstep.snapshot.reading import Range, ShardReader
from everstep.snapshot.ring_pump import BUFFER_BYTES, RingPump, Row, table, wait_for
from everstep.snapshot.stretches import Stretch, cut, packed, stretches

PINNED_BYTES = 64 * UNIT_BYTES
"""At most so much goes by one copy from pinned memory: 15 GB are some 230 copies, each of which
takes a millisecond to travel. In buffers' sizes they were 3541, by twelve threads, and with a ring
that was pinned and unpinned for nothing a rewind took 480 ms, of which PCIe needs 271 (H100). A
power of two, so that in an arena none crosses the border of two pieces that are registered apart
(`snapshot/pinning.py`)."""
CHUNK_BYTES = 1024 * UNIT_BYTES
"""Staging memory is allocated in such pieces: one large piece may not be free in one place. They
are also what is digested at once while the next one travels, 20 ms on PCIe 5 (estimated)."""
SPARE_BYTES = 512 * UNIT_BYTES
"""Device memory that staging leaves alone, for kernels and whatever runs beside it."""

Pinned = Callable[[str, int, int], int | None]
"""Where a piece of a file lies in pinned memory of this process: (path, offset, bytes)."""


@dataclass(slots=True)
class _Chunk:
    """Staging memory of one piece, and what lies in it, one after the other."""

    address: int
    stretches: list[Stretch]
    digests: Digests | None = None

    @property
    def count(self) -> int:
        return sum(stretch.count for stretch in self.stretches)


@dataclass(frozen=True, slots=True)
class _Sending:
    """Stretches on their way to the device: those that lie in pinned memory; the rest is `left`."""

    wanted: list[Stretch]
    chunks: list[_Chunk]
    left: list[Stretch]


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
        self._pinned = pinned
        self._pump = RingPump(accelerator, reader, executor)
        self._ahead: _Sending | None = None
        self._staged: dict[int, list[Stretch]] = {}

    def begin(self, ranges: Mapping[int, Iterable[Range]]) -> None:
        """Send what `stage` will probably be asked for, as far as it lies in pinned memory.

        A wrong guess costs the time that it takes, and nothing else.

        Raises:
            FormatInvalid: If a file is too short.
        """
        wanted = _wanted(ranges)
        if wanted and self._begins_pinned(wanted):
            with suppress(DeviceFailure):
                self._ahead = self._enqueued(wanted)
            if self._ahead is None:
                self._give_up()

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
        try:
            chunks = self._sent(_wanted(ranges))
        except DeviceFailure as failure:
            self.problem = str(failure)
            chunks = None
        if chunks is None:
            self._give_up()
            return False
        for chunk in chunks:
            for stretch in chunk.stretches:
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
            self._accelerator.copy(table(rows))
            wait_for(self._accelerator.mark())

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

        def rows(run: Stretch, source: int) -> list[Row]:
            begin = run.first * UNIT_BYTES
            end = begin + self._reader(run.holder).size(run.first, run.count)
            parts, starts = ordered[run.holder], begins[run.holder]
            at = max(0, bisect_right(starts, begin) - 1)
            return list(_overlaps(parts[at : bisect_left(starts, end)], begin, end, source))

        self._accelerator.follow()
        runs = [
            run
            for holder, parts in ordered.items()
            for stretch in stretches(holder, [(offset, offset + n) for _, offset, n in parts])
            for run in cut(stretch, BUFFER_BYTES // UNIT_BYTES)
        ]
        self._pump.send(runs, rows, check=True)

    def close(self) -> None:
        """Free buffers and staging memory."""
        self._staged.clear()
        with suppress(DeviceFailure):
            # After an error, copies may still be under way.
            wait_for(self._accelerator.mark())
        self._accelerator.free()
        self._pump.close()

    def _give_up(self) -> None:
        """Free what was to be staged; nothing of it was used."""
        with suppress(DeviceFailure):
            wait_for(self._accelerator.mark())
            self._accelerator.free()

    def _sent(self, wanted: list[Stretch]) -> list[_Chunk] | None:
        """Bring the stretches to new device memory, and check them; None if there is no room."""
        sending, self._ahead = self._ahead, None
        if sending is not None and sending.wanted != wanted:
            sending = None
            self._give_up()
        sending = sending or self._enqueued(wanted)
        if sending is None:
            return None
        on_device = self._accelerator.can_digest
        self._pump.send(sending.left, self._staging_rows, check=not on_device)
        if on_device:
            self._compare(sending.chunks)
        return sending.chunks

    def _enqueued(self, wanted: list[Stretch]) -> _Sending | None:
        """Have the stretches sent to new device memory; None if there is no room.

        Chunk by chunk, so that one is allocated (3 ms of the 47 that all took) while the one before
        travels. That allocating does not wait for copies is what CUDA does, not what it promises.
        """
        size = sum(stretch.count for stretch in wanted) * UNIT_BYTES
        fits = size + SPARE_BYTES <= self._accelerator.room()
        # What is checked on the host must be what is sent: others can write to shared memory.
        on_device = self._accelerator.can_digest
        if not (fits and on_device and self._begins_pinned(wanted)):
            # Needed for certain, here or else by `direct`.
            self._pump.prepare(size)
        if not fits:
            return None
        chunks: list[_Chunk] = []
        left: list[Stretch] = []
        for group in packed(wanted, CHUNK_BYTES // UNIT_BYTES):
            chunk = self._placed(group)
            if chunk is None:
                return None
            # After allocating: what torch has queued may still use memory that it gives out.
            self._accelerator.follow()
            rest = self._send_pinned(chunk, look=on_device)
            if on_device and not rest:
                chunk.digests = self._accelerator.digests(chunk.address, chunk.count)
            chunks.append(chunk)
            left += rest
        return _Sending(wanted, chunks, left)

    def _placed(self, wanted: Sequence[Stretch]) -> _Chunk | None:
        """The stretches with a place each in new device memory."""
        address = self._accelerator.allocate(sum(each.count for each in wanted) * UNIT_BYTES)
        if address is None:
            return None
        chunk = _Chunk(address, [])
        for stretch in wanted:
            chunk.stretches.append(replace(stretch, address=address))
            address += stretch.count * UNIT_BYTES
        return chunk

    def _begins_pinned(self, wanted: Sequence[Stretch]) -> bool:
        """Whether the first unit lies in pinned memory; the others may not, but probably do."""
        return not wanted or self._find(replace(wanted[0], count=1)) is not None

    def _send_pinned(self, chunk: _Chunk, *, look: bool) -> list[Stretch]:
        """Enqueue what lies in pinned memory; return the rest, as runs that each fit a buffer."""
        rows: list[Row] = []
        left: list[Stretch] = []
        for stretch in chunk.stretches:
            for large in cut(stretch, PINNED_BYTES // UNIT_BYTES):
                source = self._find(large) if look else None
                if source is not None:
                    rows += self._staging_rows(large, source)
                    continue
                for run in cut(large, BUFFER_BYTES // UNIT_BYTES):
                    source = self._find(run) if look else None
                    if source is None:
                        left.append(run)
                    else:
                        rows += self._staging_rows(run, source)
        if rows:
            self._accelerator.copy(table(rows))
        return left

    def _staging_rows(self, run: Stretch, source: int) -> list[Row]:
        return [(run.address, source, self._reader(run.holder).size(run.first, run.count))]

    def _find(self, run: Stretch) -> int | None:
        if self._pinned is None:
            return None
        reader = self._reader(run.holder)
        offset = reader.shard.offset + run.first * UNIT_BYTES
        return self._pinned(reader.shard.path, offset, reader.size(run.first, run.count))

    def _compare(self, chunks: Sequence[_Chunk]) -> None:
        """Compare what has come to the device with the record, while later chunks travel."""
        for chunk in chunks:
            # What was pumped has arrived.
            chunk.digests = chunk.digests or self._accelerator.digests(chunk.address, chunk.count)
        bad: list[tuple[int, int]] = []
        for chunk in chunks:
            assert chunk.digests is not None
            wait_for(chunk.digests)
            found = chunk.digests.read()
            for stretch in chunk.stretches:
                reader = self._reader(stretch.holder)
                whole = min(stretch.count, reader.image_bytes // UNIT_BYTES - stretch.first)
                expected = reader.digests(stretch.first, whole)
                differing = differing_units(found[: len(expected)], expected)
                bad += [(stretch.holder, stretch.first + unit) for unit in differing]
                found = found[stretch.count * DIGEST_BYTES :]
        wait_for(self._accelerator.mark())
        for chunk in chunks:
            for stretch in chunk.stretches:
                bad += self._damaged_end(stretch)
        self._accuse(bad)

    def _damaged_end(self, stretch: Stretch) -> list[tuple[int, int]]:
        """The last unit of an image, if it differs: not being whole, it is digested on the host,
        as it came to the device. All copies have been made, so that this one is made at once."""
        reader = self._reader(stretch.holder)
        unit, size = divmod(reader.image_bytes, UNIT_BYTES)
        place = unit - stretch.first
        if not size or not 0 <= place < stretch.count:
            return []
        end = (ctypes.c_ubyte * size)()
        address = ctypes.addressof(end)
        self._accelerator.copy(table([(address, stretch.address + place * UNIT_BYTES, size)]))
        wait_for(self._accelerator.mark())
        return [(stretch.holder, bad) for bad in reader.damaged(address, unit, 1)]

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


def _wanted(ranges: Mapping[int, Iterable[Range]]) -> list[Stretch]:
    return [
        stretch
        for holder, parts in ranges.items()
        for stretch in stretches(holder, parts, CHUNK_BYTES // UNIT_BYTES)
    ]


def _overlaps(pieces: Iterable[Row], begin: int, end: int, source: int) -> Iterator[Row]:
    for target, offset, size in pieces:
        start, stop = max(begin, offset), min(end, offset + size)
        if start < stop:
            yield target + start - offset, source + start - begin, stop - start
