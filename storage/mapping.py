"""Files as memory, for as long as a ``with`` block.

Owns mapping a range of an open file whatever its offset and length. Does not guard against a file
that is cut short while it is mapped: arenas never shrink, and shards are only ever replaced.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

from everstep.kernels import pages
from everstep.kernels.native import Bytes

_AT_ONCE_BYTES = 16 << 20
"""Threads that map something meanwhile wait for one piece."""


def map_range(
    descriptor: int, offset: int, length_bytes: int, *, writable: bool = False
) -> tuple[memoryview, mmap.mmap | None]:
    """Map part of a file; the view is exactly that part.

    Args:
        descriptor: The open file. It may be closed afterwards.
        offset: First byte; need not be aligned.
        length_bytes: How many. None at all needs no mapping, and gives an empty view.
        writable: Whether what is written to the view changes the file.

    Raises:
        OSError: If the kernel refuses.
    """
    if length_bytes == 0:
        return memoryview(bytearray() if writable else b""), None
    lead_bytes = offset % mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(
        descriptor,
        length_bytes + lead_bytes,
        flags=mmap.MAP_SHARED,
        prot=mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ,
        offset=offset - lead_bytes,
    )
    with memoryview(mapping) as whole:
        return whole[lead_bytes:], mapping


def populate(mapping: mmap.mmap) -> None:
    """Map every page of a writable mapping now: one by one, as they are written to, takes longer.

    Best effort: an older kernel does without.
    """
    for address, length_bytes in _pieces(Bytes(mapping)):
        if not pages.populate(address, length_bytes):
            return


def unmap(mapping: mmap.mmap) -> None:
    """Close a mapping of any size without holding up other threads; again is a no-op.

    Raises:
        BufferError: If a view of it is still held.
    """
    # Page by page for 15 GB takes a quarter of a second, in which nobody else can map anything.
    if not mapping.closed:
        for address, length_bytes in _pieces(Bytes(mapping)):
            pages.let_go(address, length_bytes)
    mapping.close()


def _pieces(memory: Bytes) -> Iterator[tuple[int, int]]:
    """Address and length of what is done at once; the mapping cannot be closed meanwhile."""
    for offset in range(0, memory.bytes, _AT_ONCE_BYTES):
        yield memory.address + offset, min(_AT_ONCE_BYTES, memory.bytes - offset)


@contextmanager
def writable_range(descriptor: int, offset: int, length_bytes: int) -> Iterator[memoryview]:
    """A writable view of part of a file, unmapped at the end of the block."""
    view, mapping = map_range(descriptor, offset, length_bytes, writable=True)
    try:
        yield view
    finally:
        try:
            view.release()
            if mapping is not None:
                unmap(mapping)
        except BufferError:
            # See ShardImage.__exit__: the mapping goes when the last view does.
            pass
