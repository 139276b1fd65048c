"""The tensors of a snapshot put together from all its ranks, and their bytes, piece by piece.

Owns what a program needs that copies a snapshot out without having its tensors: which tensors
there are, as one rank sees them, and the bytes of each in order. Promises bounded memory whatever a
tensor's size and the number of ranks; that each unit is checked before a byte of it is handed out;
that bytes are read, never mapped (a bad sector is an error and not a SIGBUS); and that state which
differs between ranks is never merged: it is the asking rank's own, or left out. Needs no torch.
"""

import ctypes
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy

from everstep.kernels.capture import Pieces, restore_units
from everstep.proto.errors import FormatInvalid
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.layout import Layout, element_bytes
from everstep.snapshot.reading import Shard, ShardReader, units_of
from everstep.snapshot.reshard import Box, Holdings, Rows, Tensor

PIECE_BYTES = 4 << 20
_SCRATCH_UNITS = 2
_REMEMBERED_UNITS = 4
_OPEN_SHARDS = 64


@dataclass(frozen=True, slots=True)
class Whole:
    """The tensors of a snapshot, as one rank sees them.

    Attributes:
        tensors: By name; one that was saved under several names is there under each of them.
        left_out: Names of tensors that other ranks have for themselves, each a state of its own.
    """

    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, layouts: Mapping[int, Layout], rank: int, parts: Sequence[str] = ()) -> "Whole":
        """Put them together.

        Args:
            layouts: Of all shards, by rank.
            rank: Whose state, where ranks differ.
            parts: Only these; all if there are none.

        Raises:
            FormatInvalid: If what the ranks hold contradicts itself; names all of it.
        """
        holdings = Holdings(layouts)
        own = layouts[rank]
        ranks = {p.name for layout in layouts.values() for p in layout.parts if p.per_rank}
        names = dict.fromkeys([leaf.tensor for leaf in own.leaves])
        names |= dict.fromkeys([*own.aliases, *holdings.tensors, *holdings.aliases])
        found: dict[str, Tensor] = {}
        left_out = []
        for name in names:
            part = name.partition("/")[0]
            if parts and part not in parts:
                continue
            tensor = holdings.find(name)
            assert tensor is not None
            if rank not in tensor.leaves and (part in ranks or tensor.is_divergent):
                left_out.append(name)
            else:
                found[name] = tensor
        problems = holdings.check(found)
        if problems:
            raise FormatInvalid("the snapshot", "; ".join(problems))
        return cls(found, tuple(left_out))


def part_names(layouts: Mapping[int, Layout], rank: int) -> list[str]:
    """The parts that any rank has, one rank's first."""
    shown = [layouts[rank], *(layouts[other] for other in sorted(layouts))]
    return list(dict.fromkeys(part.name for layout in shown for part in layout.parts))


def tensor_bytes(tensor: Tensor) -> int:
    """How many bytes the whole tensor has."""
    return tensor.elements * element_bytes(tensor.dtype)


def boxes(box: Box, itemsize: int, limit_bytes: int) -> Iterator[Box]:
    """A box cut into boxes that follow each other in its memory, as large as a limit allows.

    Args:
        box: What to cut; stored row by row.
        itemsize: Bytes of an element.
        limit_bytes: At least one element's.
    """
    limit = max(1, limit_bytes // itemsize)
    if box.elements <= limit:
        yield box
        return
    shape, at = box.shape, 0
    while math.prod(shape[at + 1 :]) > limit:
        at += 1
    inner = shape[at + 1 :]
    step = limit // math.prod(inner)
    for outer in numpy.ndindex(*shape[:at]):
        for begin in range(0, shape[at], step):
            offset = (*outer, begin, *(0 for _ in inner))
            yield Box(
                tuple(a + b for a, b in zip(box.offset, offset, strict=True)),
                (*(1 for _ in outer), min(step, shape[at] - begin), *inner),
            )


class PieceReader:
    """Reads tensors out of shards. Use as a context manager, from one thread.

    Args:
        shards: All ranks' shards of a snapshot; none without a path.
        rank: Whose state, where ranks differ.
    """

    def __init__(self, shards: Mapping[int, Shard], rank: int) -> None:
        self._shards = shards
        self._rank = rank
        self._open: OrderedDict[int, tuple[ShardReader, ExitStack]] = OrderedDict()
        self._recent: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._scratch: Any = numpy.empty(_SCRATCH_UNITS * UNIT_BYTES, dtype=numpy.uint8)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, stack in self._open.values():
            stack.close()
        self._open.clear()

    def pieces(self, tensor: Tensor) -> Iterator[memoryview]:
        """All bytes of a tensor, in order. Each piece is good until the next is asked for.

        Raises:
            ShardCorrupt: If a unit does not match its digest.
            FormatInvalid: If the shards do not hold every byte.
        """
        itemsize = element_bytes(tensor.dtype)
        if not tensor.elements:
            return
        memory = numpy.empty(min(PIECE_BYTES, tensor_bytes(tensor)), dtype=numpy.uint8)
        for box in boxes(Box.whole(tensor.shape), itemsize, len(memory)):
            size = box.elements * itemsize
            self.read(tensor, box, int(memory.ctypes.data))
            yield memory.data[:size]

    def read(self, tensor: Tensor, box: Box, address: int) -> None:
        """Copy a box of a tensor into memory, row by row.

        Raises:
            ShardCorrupt: If a unit does not match its digest.
            FormatInvalid: If the shards do not hold every byte.
        """
        if not box.elements:
            return
        for holder, rows in tensor.rows(box, self._rank).items():
            self._copy(holder, rows + numpy.array([address, 0, 0]))

    def image(self, rank: int) -> Iterator[memoryview]:
        """A shard's image as it is, in order; each piece is good until the next is asked for."""
        reader = self._reader(rank)
        units = -(-reader.image_bytes // UNIT_BYTES)
        for first in range(0, units, _SCRATCH_UNITS):
            count = min(_SCRATCH_UNITS, units - first)
            self._take(reader, Pieces(()), first, count)
            yield self._scratch.data[: reader.size(first, count)]

    def _copy(self, holder: int, rows: Rows) -> None:
        reader = self._reader(holder)
        rows = rows[numpy.argsort(rows[:, 1], kind="stable")]
        ranges = numpy.stack([rows[:, 1], rows[:, 1] + rows[:, 2]], axis=1)
        spans = units_of(ranges, reader.image_bytes)
        if len(spans) == 1 and len(spans[0]) == 1:
            self._copy_from_one(reader, spans[0].start, rows)
            return
        pieces = Pieces(rows)
        for span in spans:
            for first in range(span.start, span.stop, _SCRATCH_UNITS):
                self._take(reader, pieces, first, min(_SCRATCH_UNITS, span.stop - first))

    def _take(self, reader: ShardReader, pieces: Pieces, first: int, count: int) -> None:
        """Read units, check them, and copy out the pieces that are in them."""
        address = int(self._scratch.ctypes.data)
        reader.into(address, first, count)
        image, size = address - first * UNIT_BYTES, reader.image_bytes
        digests = reader.shard.record.unit_digests
        bad = restore_units(pieces, image, size, UNIT_BYTES, first, count, digests)
        if bad:
            raise reader.corrupt(bad)

    def _copy_from_one(self, reader: ShardReader, unit: int, rows: Rows) -> None:
        """Many small tensors lie in one unit, which is not read for each of them."""
        key = reader.shard.rank, unit
        if key not in self._recent:
            memory = numpy.empty(UNIT_BYTES, dtype=numpy.uint8)
            reader.into(int(memory.ctypes.data), unit, 1)
            if reader.damaged(int(memory.ctypes.data), unit, 1):
                raise reader.corrupt((unit,))
            while len(self._recent) >= _REMEMBERED_UNITS:
                self._recent.popitem(last=False)
            self._recent[key] = memory
        self._recent.move_to_end(key)
        image = int(self._recent[key].ctypes.data) - unit * UNIT_BYTES
        for address, offset, size in rows.tolist():
            ctypes.memmove(address, image + offset, size)

    def _reader(self, rank: int) -> ShardReader:
        if rank not in self._open:
            while len(self._open) >= _OPEN_SHARDS:
                self._open.popitem(last=False)[1][1].close()
            stack = ExitStack()
            # Without a level: read, whatever it lies on.
            reader = stack.enter_context(ShardReader(replace(self._shards[rank], level="")))
            self._open[rank] = reader, stack
        self._open.move_to_end(rank)
        return self._open[rank][0]
