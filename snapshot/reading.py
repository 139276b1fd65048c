"""Reading one located shard: mapped once, every wanted unit checked, then copied out.

Owns how a shard's file is read, and the spread of the work over threads. An arena is mapped, which
is three times as fast as reading tmpfs; a file on a disk is read, because a bad sector is then an
error and not a SIGBUS. Promises that `verify` looks at every unit that holds a wanted byte, and
that `copy` checks each unit again right before its bytes go out (memory is shared, and another
process could have written to it meanwhile). Does not know which bytes are wanted by whom: see
`snapshot/restore.py`.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy

from everstep.kernels.capture import Pieces, restore_units
from everstep.proto.errors import FormatInvalid, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record
from everstep.snapshot.digest import DIGEST_BYTES, unit_count
from everstep.snapshot.layout import Layout

_BLOCK_UNITS = 16
_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_READ = 22
Range = tuple[int, int]
"""Offsets in the image, from and to."""


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
    """

    def __init__(self, shard: Shard, executor: Executor | None = None) -> None:
        self._shard = shard
        self._executor = executor
        self._units = unit_count(shard.record.image_bytes)
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

    def verify(self, ranges: Iterable[Range]) -> None:
        """Return only if every unit with a byte of these ranges matches its digest.

        Raises:
            ShardCorrupt: With the units that differ.
        """
        self._restore(_NOTHING, _blocks(ranges))

    def copy(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Copy out, each unit checked once more right before.

        Args:
            pieces: (address, offset in the image, bytes) of each destination.

        Raises:
            ShardCorrupt: With the units that differ. Some destinations may be filled then.
        """
        ordered = sorted(pieces, key=lambda piece: piece[1])
        ranges = ((offset, offset + size) for _, offset, size in ordered)
        self._restore(Pieces(ordered), _blocks(ranges))

    def _restore(self, pieces: Pieces, blocks: list[int]) -> None:
        shard = self._shard
        size = shard.record.image_bytes

        def restore(block: int) -> list[int]:
            first = block * _BLOCK_UNITS
            count = min(_BLOCK_UNITS, self._units - first)
            with self._source.address(first * UNIT_BYTES, count * UNIT_BYTES) as address:
                return restore_units(pieces, address, size, UNIT_BYTES, first, count, self._digests)

        apply: Callable[..., Iterable[list[int]]] = self._executor.map if self._executor else map
        bad = [unit for part in apply(restore, blocks) for unit in part]
        if bad:
            raise ShardCorrupt(f"{shard.path}, rank {shard.rank}", tuple(bad))


def units_read(ranges: Iterable[Range], image_bytes: int) -> list[range]:
    """The units that `ShardReader` looks at for these ranges: whole blocks, ascending."""
    units = unit_count(image_bytes)
    return [
        range(block * _BLOCK_UNITS, min((block + 1) * _BLOCK_UNITS, units))
        for block in _blocks(ranges)
    ]


_NOTHING = Pieces(())


def _blocks(ranges: Iterable[Range]) -> list[int]:
    """The blocks of units that hold a byte of these ranges."""
    block_bytes = UNIT_BYTES * _BLOCK_UNITS
    return sorted(
        {
            block
            for start, stop in ranges
            if start < stop
            for block in range(start // block_bytes, (stop - 1) // block_bytes + 1)
        }
    )


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

    def close(self) -> None:
        del self._bytes
        self._memory.close()


class _File:
    """A shard's file on a disk, read block by block into buffers that are used again."""

    def __init__(self, shard: Shard) -> None:
        self._descriptor = _open(shard)
        self._shard = shard
        self._buffers: list[Any] = []

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

    def close(self) -> None:
        os.close(self._descriptor)


def _page(address: int) -> int:
    return address - address % mmap.PAGESIZE


def _buffer() -> Any:
    return numpy.empty(_BLOCK_UNITS * UNIT_BYTES, dtype=numpy.uint8)


def _open(shard: Shard) -> int:
    descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(descriptor).st_size < shard.offset + shard.record.image_bytes:
        os.close(descriptor)
        raise FormatInvalid(shard.path, "is shorter than the image it should hold")
    return descriptor
