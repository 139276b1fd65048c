"""Reading one located shard: mapped once, every wanted unit checked, then copied out.

Owns the mapping of a shard's file and the spread of the work over threads. Promises that `verify`
looks at every unit that holds a wanted byte, and that `copy` checks each unit again right before
its bytes go out (the memory is shared, and another process could have written to it meanwhile).
Does not know which bytes are wanted by whom: see `snapshot/restore.py`.
"""

import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from types import TracebackType

import torch

from everstep.kernels.capture import Pieces, restore_units
from everstep.proto.errors import FormatInvalid, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import Record
from everstep.snapshot.digest import DIGEST_BYTES, unit_count
from everstep.snapshot.layout import Layout

_BLOCK_UNITS = 16
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
        self._memory = _map(shard)
        self._image = torch.frombuffer(self._memory, dtype=torch.uint8)

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._image
        self._memory.close()

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
        address = self._image.data_ptr() + shard.offset % mmap.ALLOCATIONGRANULARITY

        def restore(block: int) -> list[int]:
            first = block * _BLOCK_UNITS
            count = min(_BLOCK_UNITS, self._units - first)
            size = shard.record.image_bytes
            return restore_units(pieces, address, size, UNIT_BYTES, first, count, self._digests)

        apply: Callable[..., Iterable[list[int]]] = self._executor.map if self._executor else map
        bad = [unit for part in apply(restore, blocks) for unit in part]
        if bad:
            raise ShardCorrupt(f"{shard.path}, rank {shard.rank}", tuple(bad))


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


def _map(shard: Shard) -> mmap.mmap:
    begin = shard.offset - shard.offset % mmap.ALLOCATIONGRANULARITY
    descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_size < shard.offset + shard.record.image_bytes:
            raise FormatInvalid(shard.path, "is shorter than the image it should hold")
        # MAP_PRIVATE for a writable buffer, which torch.frombuffer wants; nothing is written.
        return mmap.mmap(
            descriptor,
            shard.offset - begin + shard.record.image_bytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=begin,
        )
    finally:
        os.close(descriptor)
