"""Which bytes of an image leave one device how: tables, made once for a layout.

Owns the split of a device's leaves into those that are copied from where they are until the next
update (*live*), and those that are cloned at once (*clones*: small ones, ones that may change at
any time, ones whose memory does not hold their value in order). Owns the places of the clones in
one block of device memory, and the tables of addresses from which the device digests whole units.
Promises that the tables cover every byte of the device's leaves exactly once, and that a unit is
listed for the device only if all of its bytes are there. Pure: numbers in, numpy out.

Addresses in a clone block are not known before it is allocated. A table with such addresses comes
as two: numbers, and a factor of 0 or 1 for each that says whether the block's address is added.

A *seam* is a 1 KiB block of a unit whose bytes come from more than one place. Seams are gathered
into the clone block too, so that the digest's kernel finds each block at one address.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from everstep.proto.ids import UNIT_BYTES

SMALL_BYTES = 64 * 1024
"""Leaves below this are gathered at once: fewer, larger copies."""
PIECE_BYTES = 64 << 20
"""Copies are cut to this, so that the window can end between them."""
BLOCK_BYTES = 1024
_BLOCKS = UNIT_BYTES // BLOCK_BYTES
_PLACE_BYTES = 256
_ALIGNMENTS = (16, 8, 1)
"""The kernel knows no others."""

Table = NDArray[numpy.int64]
_Row = tuple[tuple[int, int, int], tuple[int, int, int]]
"""Numbers and their factors, see `Relative`."""


@dataclass(frozen=True, slots=True)
class DeviceLeaf:
    """A leaf with bytes on the device.

    Attributes:
        offset: Of its first byte in the image.
        bytes: How many this shard holds.
        address: Of the first of them; 0 if its memory does not hold its value in order.
        guarded: Whether it changes only after a fence.
        skip: Bytes of its value before the first one held here.
        value_bytes: Of its whole value.
    """

    offset: int
    bytes: int
    address: int
    guarded: bool
    skip: int = 0
    value_bytes: int = 0

    @property
    def is_live(self) -> bool:
        """Whether it is copied from where it is."""
        return self.guarded and self.address != 0 and self.bytes >= SMALL_BYTES


@dataclass(frozen=True, slots=True)
class Relative:
    """A table some of whose numbers count from the clone block."""

    numbers: Table
    factors: Table

    def at(self, base: int) -> Table:
        """The table for a clone block at this address."""
        return self.numbers + base * self.factors

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True)
class UnitTable:
    """Units that the device digests by one launch.

    Attributes:
        units: Their numbers.
        addresses: [n] of units in one piece, or [n, 1024] of blocks.
        alignment: What all addresses are multiples of.
    """

    units: Table
    addresses: Relative
    alignment: int

    @property
    def scattered(self) -> bool:
        """Whether there is an address for each block."""
        return self.addresses.numbers.ndim == 2


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The tables of one device.

    Attributes:
        live: (offset in the image, address, bytes) of live leaves, cut, in image order.
        drains: (offset in the image, place in the clone block, bytes) of the clones, cut.
        places: Where each leaf's clone lies in the block, by the leaf's index. Of one whose
            memory does not hold its value in order, the whole value's.
        gathers: (target, source, bytes) of small clones.
        copies: The same of large ones.
        seams: The same of seams; the clones must be there before.
        block_bytes: Of the clone block, seams included.
        digested: Units that the device digests, by launch.
        touched: Of each unit of the image, whether a byte of it is on the device.
    """

    live: Table
    drains: Table
    places: dict[int, int]
    gathers: Relative
    copies: Relative
    seams: Relative
    block_bytes: int
    digested: tuple[UnitTable, ...]
    touched: NDArray[numpy.bool_]

    @property
    def device_units(self) -> Table:
        """The units that the device digests, in the order of its accumulators."""
        return numpy.concatenate([_NONE, *(table.units for table in self.digested)])


_NONE = numpy.empty(0, dtype=numpy.int64)


@dataclass(frozen=True, slots=True)
class _Segment:
    """A run of the image that lies in one piece on the device."""

    offset: int
    bytes: int
    start: int
    relative: bool

    @property
    def end(self) -> int:
        return self.offset + self.bytes


def plan_device(leaves: Sequence[DeviceLeaf], image_bytes: int, *, digest: bool) -> DevicePlan:
    """Make the tables.

    Args:
        leaves: With bytes on this device; none empty, in image order, not overlapping.
        image_bytes: The image's length.
        digest: Whether the device digests units.
    """
    places, runs, end = _place(leaves)
    live = [
        _Segment(leaf.offset, leaf.bytes, leaf.address, False) for leaf in leaves if leaf.is_live
    ]
    segments = sorted([*live, *runs], key=lambda segment: segment.offset)
    gathers: list[_Row] = []
    copies: list[_Row] = []
    for index, place in places.items():
        leaf = leaves[index]
        if leaf.address:
            rows = gathers if leaf.bytes < SMALL_BYTES else copies
            rows.append(((place, leaf.address, leaf.bytes), (1, 0, 0)))
    touched = numpy.zeros(-(-image_bytes // UNIT_BYTES), dtype=bool)
    for segment in segments:
        touched[segment.offset // UNIT_BYTES : -(-segment.end // UNIT_BYTES)] = True
    seams = _Seams(end)
    digested = _unit_tables(segments, image_bytes, seams) if digest else ()
    return DevicePlan(
        live=_cut(live),
        drains=_cut(runs),
        places=places,
        gathers=_relative(gathers),
        copies=_relative(copies),
        seams=_relative(seams.rows),
        block_bytes=seams.end,
        digested=digested,
        touched=touched,
    )


def without_units(rows: Table, skipped: NDArray[numpy.bool_]) -> Table:
    """The rows (offset, address, bytes) less what lies in these units."""
    kept: list[tuple[int, int, int]] = []
    borders = numpy.flatnonzero(
        numpy.diff(numpy.concatenate([[True], skipped, [True]]).astype(int))
    )
    starts, stops = borders[0::2] * UNIT_BYTES, borders[1::2] * UNIT_BYTES
    for offset, address, size in rows.tolist():
        end = offset + size
        first = int(numpy.searchsorted(stops, offset, "right"))
        for run in range(first, len(starts)):
            begin, stop = max(offset, int(starts[run])), min(end, int(stops[run]))
            if begin >= stop:
                break
            kept.append((begin, address + begin - offset, stop - begin))
    return table(kept)


def split_clones(
    rows: Table, tables: Sequence[UnitTable], unit_count: int
) -> tuple[list[Table | None], Table]:
    """Which clones the pass that digests whole units makes on its way, and which are left.

    Args:
        rows: (offset in the image, target, source, bytes), each within one leaf.
        tables: The units that the device digests.
        unit_count: Of the image.

    Returns:
        For each table the targets of its units, 0 for those that are not cloned so, or None if
        none of them is; and the copies that are left, (target, source, bytes).
    """
    table_of = numpy.full(unit_count, -1)
    position = numpy.zeros(unit_count, dtype=numpy.int64)
    for number, one in enumerate(tables):
        if not one.scattered and one.alignment == _ALIGNMENTS[0]:
            table_of[one.units] = number
            position[one.units] = numpy.arange(len(one.units))
    offsets, targets, sources, sizes = rows.T
    first, last = -(-offsets // UNIT_BYTES), (offsets + sizes) // UNIT_BYTES
    fused = (first < last) & ((targets - offsets) % _ALIGNMENTS[0] == 0)
    # Whole units of a row are digested alike: they lie in one leaf.
    fused[fused] &= table_of[first[fused]] >= 0
    counts = numpy.where(fused, last - first, 0)
    ends = numpy.cumsum(counts)
    units = numpy.arange(counts.sum()) + numpy.repeat(first - ends + counts, counts)
    places = numpy.repeat(targets - offsets, counts) + units * UNIT_BYTES
    clones: list[Table | None] = []
    for number, one in enumerate(tables):
        mine = table_of[units] == number
        clones.append(numpy.zeros(len(one.units), dtype=numpy.int64) if mine.any() else None)
        if (column := clones[-1]) is not None:
            column[position[units[mine]]] = places[mine]
    heads = numpy.where(fused, first * UNIT_BYTES - offsets, sizes)
    rest = numpy.where(fused, last * UNIT_BYTES - offsets, sizes)
    left = [
        numpy.stack([targets, sources, heads], axis=1),
        numpy.stack([targets + rest, sources + rest, sizes - rest], axis=1),
    ]
    joined = numpy.concatenate(left)
    return clones, joined[joined[:, 2] > 0]


def cut_rows(rows: Table, most_bytes: int) -> Table:
    """The rows (offset, address, bytes) cut to at most so many bytes each."""
    if not len(rows) or int(rows[:, 2].max()) <= most_bytes:
        return rows
    return table(
        (offset + done, address + done, min(most_bytes, size - done))
        for offset, address, size in rows.tolist()
        for done in range(0, size, most_bytes)
    )


def table(rows: Iterable[tuple[int, int, int]]) -> Table:
    """Rows as an array, also if there are none."""
    return numpy.array(list(rows), dtype=numpy.int64).reshape(-1, 3)


def _place(leaves: Sequence[DeviceLeaf]) -> tuple[dict[int, int], list[_Segment], int]:
    """Places of the clones, the runs of the image that they make up, and the block's end.

    Neighbours in the image become neighbours in the block, as long as they fit one another, and
    addresses keep the alignment that offsets have: the kernels read wide words.
    """
    places: dict[int, int] = {}
    runs: list[_Segment] = []
    end = 0
    for index, leaf in enumerate(leaves):
        if leaf.is_live:
            continue
        skip = 0 if leaf.address else leaf.skip
        whole = leaf.bytes if leaf.address else leaf.value_bytes
        last = runs[-1] if runs else None
        joins = last is not None and last.end == leaf.offset and last.start + last.bytes == end
        if last is not None and joins and not skip:
            start = end
            runs[-1] = _Segment(last.offset, last.bytes + leaf.bytes, last.start, True)
        else:
            start = end + skip
            start += (leaf.offset - start) % _PLACE_BYTES
            runs.append(_Segment(leaf.offset, leaf.bytes, start, True))
        places[index] = start - skip
        end = start - skip + whole
    return places, runs, end


def _cut(segments: Iterable[_Segment]) -> Table:
    return table(
        (segment.offset + done, segment.start + done, min(PIECE_BYTES, segment.bytes - done))
        for segment in segments
        for done in range(0, segment.bytes, PIECE_BYTES)
    )


def _relative(rows: Sequence[_Row]) -> Relative:
    return Relative(table(numbers for numbers, _ in rows), table(factors for _, factors in rows))


class _Seams:
    """The gathered blocks, at the end of the clone block."""

    def __init__(self, start: int) -> None:
        self._start = -(-start // BLOCK_BYTES) * BLOCK_BYTES
        self.end = start
        self.rows: list[_Row] = []

    def add(self, begin: int, segments: Sequence[_Segment]) -> int:
        """Gather the block of the image that begins there; return its place."""
        place, self._start = self._start, self._start + BLOCK_BYTES
        self.end = self._start
        for segment in segments:
            first, last = max(begin, segment.offset), min(begin + BLOCK_BYTES, segment.end)
            if first < last:
                source = segment.start + first - segment.offset
                row = (place + first - begin, source, last - first)
                self.rows.append((row, (1, int(segment.relative), 0)))
        return place


def _unit_tables(
    segments: Sequence[_Segment], image_bytes: int, seams: _Seams
) -> tuple[UnitTable, ...]:
    """The tables of all whole units that the segments cover, by shape and alignment."""
    whole: dict[tuple[bool, int], list[tuple[Table, Table, Table]]] = {}
    mixed: dict[int, list[_Segment]] = {}
    for segment in segments:
        first, last = -(-segment.offset // UNIT_BYTES), segment.end // UNIT_BYTES
        if first < last:
            units = numpy.arange(first, last, dtype=numpy.int64)
            addresses = segment.start + units * UNIT_BYTES - segment.offset
            factors = numpy.full_like(units, int(segment.relative))
            key = (False, _alignment(addresses))
            whole.setdefault(key, []).append((units, addresses, factors))
        # The units at both ends, which it shares with its neighbours.
        for unit in {segment.offset // UNIT_BYTES, (segment.end - 1) // UNIT_BYTES}:
            if not first <= unit < last:
                mixed.setdefault(unit, []).append(segment)
    for unit, parts in sorted(mixed.items()):
        begin, end = unit * UNIT_BYTES, (unit + 1) * UNIT_BYTES
        covered = sum(min(end, part.end) - max(begin, part.offset) for part in parts)
        if covered == UNIT_BYTES and end <= image_bytes:
            blocks, factors = _blocks(begin, parts, seams)
            key = (True, _alignment(blocks))
            row = numpy.array([unit], dtype=numpy.int64)
            whole.setdefault(key, []).append((row, blocks[None], factors[None]))
    return tuple(_joined(alignment, rows) for (_, alignment), rows in sorted(whole.items()))


def _joined(alignment: int, rows: Sequence[tuple[Table, Table, Table]]) -> UnitTable:
    units, addresses, factors = (numpy.concatenate(column) for column in zip(*rows, strict=True))
    return UnitTable(units, Relative(addresses, factors), alignment)


def _blocks(begin: int, parts: Sequence[_Segment], seams: _Seams) -> tuple[Table, Table]:
    """The address of each block of a unit that several segments cover."""
    numbers = numpy.zeros(_BLOCKS, dtype=numpy.int64)
    factors = numpy.ones(_BLOCKS, dtype=numpy.int64)
    found = numpy.zeros(_BLOCKS, dtype=bool)
    for part in parts:
        first = max(0, -(-(part.offset - begin) // BLOCK_BYTES))
        last = min(_BLOCKS, (part.end - begin) // BLOCK_BYTES)
        if first >= last:
            continue
        offsets = begin + numpy.arange(first, last, dtype=numpy.int64) * BLOCK_BYTES
        numbers[first:last] = part.start + offsets - part.offset
        factors[first:last] = int(part.relative)
        found[first:last] = True
    for block in numpy.flatnonzero(~found).tolist():
        start = begin + block * BLOCK_BYTES
        numbers[block] = seams.add(start, list(_near(parts, start)))
    return numbers, factors


def _near(parts: Sequence[_Segment], start: int) -> Iterator[_Segment]:
    return (part for part in parts if part.offset < start + BLOCK_BYTES and part.end > start)


def _alignment(addresses: Table) -> int:
    bits = int(numpy.bitwise_or.reduce(addresses, axis=None)) if addresses.size else 0
    return next(alignment for alignment in _ALIGNMENTS if bits % alignment == 0)
