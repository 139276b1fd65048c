"""Reading one located shard: mapped once, every wanted unit checked, then copied out.

Owns how a shard's file is read, and the spread of the work over threads. An arena is mapped, which
is three times as fast as reading tmpfs; a file on a disk is read, because a bad sector is then an
error and not a SIGBUS. Promises that `verify` looks at every unit that holds a wanted byte, and
that `copy` checks each unit again right before its bytes go out (memory is shared, and another
process could have written to it meanwhile). `into` and `damaged` are the same in two steps, for
buffers that are sent elsewhere: see `snapshot/ring_pump.py`. Does not know which bytes are wanted
by whom: see `snapshot/restore.py`.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy
from numpy.typing import NDArray

from everstep.kernels.capture import Pieces, restore_units
from everstep.kernels.digest import verify_units
from everstep.proto.errors import FormatInvalid, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record
from everstep.snapshot.digest import DIGEST_BYTES, unit_count
from everstep.snapshot.layout import Layout

_BLOCK_UNITS = 16
_LIBC = ctypes.CDLL(None)
_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22
_SECTOR_BYTES = 4096
Range = tuple[int, int]
"""Offsets in the image, from and to."""
Table = NDArray[numpy.int64]


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's shard, located: a file, where the image lies in it, and what it should be."""

    rank: int
    path: str
    offset: int
    layout: Layout
    record: Record
    level: str = ""


class ShardReader:
    """A shard's file, open for reading. Use as a context manager.

    Args:
        shard: Where it is and what it should be.
        executor: Spreads the work, which runs without the GIL, over its threads.

    Raises:
        FormatInvalid: If the file is shorter than the image, or the record has not one digest a
            unit.

    Attributes:
        shard: What was given.
        image_bytes: The image's length.
    """

    def __init__(self, shard: Shard, executor: Executor | None = None) -> None:
        self.shard = shard
        self.image_bytes = shard.record.image_bytes
        self._executor = executor
        self._units = unit_count(self.image_bytes)
        digests = shard.record.unit_digests
        if shard.record.unit_bytes != UNIT_BYTES or len(digests) != self._units * DIGEST_BYTES:
            raise FormatInvalid(shard.path, "its record does not have one digest a unit")
        self._digests = digests
        self._source: _Mapped | _File = _Mapped(shard) if shard.level == "memory" else _File(shard)

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._source.close()

    def verify(self, ranges: Iterable[Range] | Table) -> None:
        """Return only if every unit with a byte of these ranges matches its digest.

        Raises:
            ShardCorrupt: With the units that differ.
        """
        self._restore(_NOTHING, _spans(ranges))

    def copy(self, pieces: Sequence[tuple[int, int, int]] | Table) -> None:
        """Copy out, each unit checked once more right before.

        Args:
            pieces: (address, offset in the image, bytes) of each destination.

        Raises:
            ShardCorrupt: With the units that differ. Some destinations may be filled then.
        """
        table = _table(pieces, 3)
        for rows in _apart(table[numpy.argsort(table[:, 1], kind="stable")]):
            ranges = numpy.stack([rows[:, 1], rows[:, 1] + rows[:, 2]], axis=1)
            self._restore(Pieces(rows), _spans(ranges))

    def size(self, first: int, count: int) -> int:
        """How many bytes these units have: the last one of an image may not be whole."""
        return min(count * UNIT_BYTES, self.image_bytes - first * UNIT_BYTES)

    def into(self, address: int, first: int, count: int) -> None:
        """Copy units into memory, unchecked. Threads may do so at once.

        Args:
            address: Of the memory, which has room for whole units. Where it begins with a page, a
                file is read past the page cache.
            first: The first unit.
            count: How many.

        Raises:
            FormatInvalid: If the file became shorter.
        """
        self._source.into(address, first * UNIT_BYTES, self.size(first, count))

    def damaged(self, address: int, first: int, count: int) -> list[int]:
        """Which of these units, as they lie in memory at an address, do not match their digest."""
        data = memoryview((ctypes.c_ubyte * self.size(first, count)).from_address(address))
        bad = verify_units(data, UNIT_BYTES, self.digests(first, count))
        return [first + unit for unit in bad]

    def digests(self, first: int, count: int) -> bytes:
        """What the record says of these units."""
        return self._digests[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]

    def corrupt(self, units: Sequence[int]) -> ShardCorrupt:
        """The error that says that these units differ."""
        return ShardCorrupt(f"{self.shard.path}, rank {self.shard.rank}", tuple(units))

    def _restore(self, pieces: Pieces, spans: list[range]) -> None:
        size = self.image_bytes

        def restore(span: range) -> list[int]:
            first, count = span.start, len(span)
            with self._source.address(first * UNIT_BYTES, count * UNIT_BYTES) as address:
                return restore_units(pieces, address, size, UNIT_BYTES, first, count, self._digests)

        apply: Callable[..., Iterable[list[int]]] = self._executor.map if self._executor else map
        bad = [unit for part in apply(restore, spans) for unit in part]
        if bad:
            raise self.corrupt(bad)


def units_of(ranges: Iterable[Range] | Table, image_bytes: int) -> list[range]:
    """All units that `ShardReader` looks at for these ranges, and no others, ascending."""
    found: list[range] = []
    for span in _spans(ranges):
        assert span.stop <= unit_count(image_bytes)
        if found and found[-1].stop == span.start:
            span = range(found.pop().start, span.stop)
        found.append(span)
    return found


_NOTHING = Pieces(())


def _table(rows: Iterable[Sequence[int]] | Table, columns: int) -> Table:
    if isinstance(rows, numpy.ndarray):
        return rows
    return numpy.array(list(rows), dtype=numpy.int64).reshape(-1, columns)


def _apart(rows: Table) -> Iterator[Table]:
    """Rows ascending by offset, in groups in which none overlaps another: mostly one."""
    rows = rows[rows[:, 2] > 0]
    while len(rows):
        ends = rows[:, 1] + rows[:, 2]
        if (ends[:-1] <= rows[1:, 1]).all():
            yield rows
            return
        end, chosen = 0, numpy.zeros(len(rows), dtype=bool)
        for index, (offset, stop) in enumerate(
            zip(rows[:, 1].tolist(), ends.tolist(), strict=True)
        ):
            if offset >= end:
                chosen[index], end = True, stop
        yield rows[chosen]
        rows = rows[~chosen]


def _spans(ranges: Iterable[Range] | Table) -> list[range]:
    """The units that hold a byte of these ranges, ascending, none of them across two blocks."""
    table = _table(ranges, 2)
    table = table[table[:, 0] < table[:, 1]]
    if not len(table):
        return []
    first, last = table[:, 0] // UNIT_BYTES, (table[:, 1] - 1) // UNIT_BYTES + 1
    length = int(last.max()) + 1
    change = numpy.bincount(first, minlength=length) - numpy.bincount(last, minlength=length)
    units = numpy.flatnonzero(numpy.cumsum(change))
    breaks = numpy.flatnonzero((numpy.diff(units) != 1) | (units[1:] % _BLOCK_UNITS == 0)) + 1
    begins = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), len(units)]
    return [range(int(units[a]), int(units[b - 1]) + 1) for a, b in zip(begins, ends, strict=True)]


class _Mapped:
    """An arena's slot in this process's memory."""

    def __init__(self, shard: Shard) -> None:
        begin = shard.offset - shard.offset % mmap.ALLOCATIONGRANULARITY
        descriptor = _open(shard)
        try:
            # MAP_PRIVATE for a writable buffer, which frombuffer wants; nothing is written.
            self._memory = mmap.mmap(
                descriptor,
                shard.offset - begin + shard.record.image_bytes,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=begin,
            )
        finally:
            os.close(descriptor)
        self._bytes = numpy.frombuffer(self._memory, dtype=numpy.uint8)
        self._address = int(self._bytes.ctypes.data) + shard.offset - begin
        self._populated: set[int] = set()

    @contextmanager
    def address(self, begin: int, size: int) -> Iterator[int]:
        if begin not in self._populated:
            # Mapping the pages of a block in one call is a quarter faster than a fault for every
            # sixteen. Where the kernel does not know the advice, they fault.
            _LIBC.madvise(
                ctypes.c_void_p(_page(self._address + begin)),
                ctypes.c_size_t(min(size, len(self._bytes) - begin)),
                _MADV_POPULATE_READ,
            )
            self._populated.add(begin)
        yield self._address

    def into(self, target: int, begin: int, size: int) -> None:
        page = _page(self._address + begin)
        length = self._address + begin + size - page
        _LIBC.madvise(ctypes.c_void_p(page), ctypes.c_size_t(length), _MADV_POPULATE_READ)
        ctypes.memmove(target, self._address + begin, size)
        # Here by many threads, or else by one when all is unmapped: a tenth of a second in 15 GB.
        _LIBC.madvise(ctypes.c_void_p(page), ctypes.c_size_t(length), _MADV_DONTNEED)

    def close(self) -> None:
        del self._bytes
        self._memory.close()


class _File:
    """A shard's file on a disk, read block by block into buffers that are used again."""

    def __init__(self, shard: Shard) -> None:
        self._descriptor = _open(shard)
        self._shard = shard
        self._buffers: list[Any] = []
        self._direct = _open_direct(shard)

    @contextmanager
    def address(self, begin: int, size: int) -> Iterator[int]:
        """An address at which the image would begin, good for this range only."""
        buffer = self._buffers.pop() if self._buffers else _buffer()
        size = min(size, self._shard.record.image_bytes - begin)
        done = 0
        while done < size:
            count = os.preadv(
                self._descriptor, [buffer[done:size]], self._shard.offset + begin + done
            )
            if not count:
                raise FormatInvalid(self._shard.path, "became shorter while it was read")
            done += count
        yield int(buffer.ctypes.data) - begin
        self._buffers.append(buffer)

    def into(self, target: int, begin: int, size: int) -> None:
        """Read past the page cache where that is possible: it would be one more copy."""
        rounded = -(-size // _SECTOR_BYTES) * _SECTOR_BYTES
        aligned = not (target % _SECTOR_BYTES or (self._shard.offset + begin) % _SECTOR_BYTES)
        try:
            if aligned and self._direct is not None:
                self._read(self._direct, target, begin, size, rounded)
                return
        except OSError as error:
            # Some file systems refuse only now; some pinned memory cannot be read into.
            if error.errno not in (errno.EINVAL, errno.EFAULT):
                raise
        self._read(self._descriptor, target, begin, size, size)

    def _read(self, descriptor: int, target: int, begin: int, size: int, length: int) -> None:
        """Read at least `size` bytes, asking for `length`, which O_DIRECT wants to be round."""
        memory = memoryview((ctypes.c_ubyte * length).from_address(target))
        done = 0
        while done < size:
            count = os.preadv(descriptor, [memory[done:]], self._shard.offset + begin + done)
            if not count:
                raise FormatInvalid(self._shard.path, "became shorter while it was read")
            done += count

    def close(self) -> None:
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)


def _page(address: int) -> int:
    return address - address % mmap.PAGESIZE


def _buffer() -> Any:
    return numpy.empty(_BLOCK_UNITS * UNIT_BYTES, dtype=numpy.uint8)


def _open_direct(shard: Shard) -> int | None:
    try:
        return os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None


def _open(shard: Shard) -> int:
    descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(descriptor).st_size < shard.offset + shard.record.image_bytes:
        os.close(descriptor)
        raise FormatInvalid(shard.path, "is shorter than the image it should hold")
    return descriptor
