"""Which bytes of which shards make up a box of a tensor: any layout in, any layout out.

Owns the arithmetic, which needs no communication: every rank computes from all ranks' layouts what
it has to read. Promises that each wanted byte is named exactly once, from its own rank's shard
wherever that has it; that what contradicts itself (blocks that overlap, shapes that differ between
ranks, bytes that nobody holds) is found and named, never read; and that leaves which differ between
ranks are never merged. Does not read anything, and knows no step and no digest.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy
from numpy.typing import NDArray

from everstep.proto.errors import FormatInvalid
from everstep.snapshot.layout import Layout, Leaf, element_bytes
from everstep.snapshot.replicas import Range, gather

Rows = NDArray[numpy.int64]
"""One row (offset in the wanted box, offset in the image, bytes) for each run of bytes."""


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: from an offset, as long as `shape` in each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """All of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def meet(self, other: "Box") -> "Box | None":
        """What two boxes have in common; None if that is nothing."""
        offset, shape = [], []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            begin, end = max(a, b), min(a + n, b + m)
            if begin >= end:
                return None
            offset.append(begin)
            shape.append(end - begin)
        return Box(tuple(offset), tuple(shape))

    def __str__(self) -> str:
        pairs = zip(self.offset, self.shape, strict=True)
        return "[" + ", ".join(f"{at}:{at + length}" for at, length in pairs) + "]"


def box_of(leaf: Leaf) -> Box:
    """Where a leaf lies in its tensor."""
    return Box(leaf.block_offset, leaf.shape)


def runs(source: Box, wanted: Box, itemsize: int) -> Rows:
    """The runs of bytes that two boxes of a tensor share, both stored row by row.

    Returns:
        Rows of (offset in `wanted`, offset in `source`, length), in bytes, ascending in `source`.
    """
    common = source.meet(wanted)
    if common is None or not common.elements:
        return _NO_ROWS
    first, length = len(common.shape), itemsize
    while first:
        first -= 1
        length *= common.shape[first]
        if common.shape[first] != source.shape[first] or common.shape[first] != wanted.shape[first]:
            break
    outer = common.shape[:first]
    at_wanted = _offsets(common, wanted, outer, itemsize)
    at_source = _offsets(common, source, outer, itemsize)
    rows = numpy.empty((at_source.size, 3), dtype=numpy.int64)
    rows[:, 0], rows[:, 1], rows[:, 2] = at_wanted, at_source, length
    return rows


_NO_ROWS = numpy.empty((0, 3), dtype=numpy.int64)


def _offsets(common: Box, box: Box, outer: tuple[int, ...], itemsize: int) -> NDArray[numpy.int64]:
    """Where each run begins in a box, in bytes: one for each index of the outer dimensions."""
    begin, stride, strides = 0, itemsize, []
    for at, own, length in zip(
        reversed(common.offset), reversed(box.offset), reversed(box.shape), strict=True
    ):
        begin += (at - own) * stride
        strides.append(stride)
        stride *= length
    offsets = numpy.array([begin], dtype=numpy.int64)
    for length, stride in zip(outer, reversed(strides), strict=False):
        if length > 1:
            steps = numpy.arange(length, dtype=numpy.int64) * stride
            offsets = (offsets[:, None] + steps).reshape(-1)
    return offsets


def clipped(rows: Rows, start: int, stop: int) -> Rows:
    """What of the runs lies in a flat range of the source."""
    begin = numpy.maximum(rows[:, 1], start)
    end = numpy.minimum(rows[:, 1] + rows[:, 2], stop)
    kept = begin < end
    begin, end, rows = begin[kept], end[kept], rows[kept]
    return numpy.stack([rows[:, 0] + begin - rows[:, 1], begin, end - begin], axis=1)


@dataclass
class Tensor:
    """All that the shards of a snapshot hold of one tensor. Once anything was asked of it, its
    leaves do not change: what costs is looked up once.

    Attributes:
        name: The same on all ranks.
        leaves: By rank.
        problems: What contradicts itself, in words.
    """

    name: str
    leaves: dict[int, list[Leaf]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    known_divergent: bool | None = None

    @cached_property
    def first(self) -> Leaf:
        """One of the leaves: type and global shape are those of all."""
        return next(iter(self.leaves.values()))[0]

    @property
    def dtype(self) -> str:
        """Torch's name of the type, without "torch."."""
        return self.first.dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.first.global_shape

    @cached_property
    def elements(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape)

    @property
    def is_sharded(self) -> bool:
        """Whether some rank has a part of it only."""
        return any(leaf.block is not None for leaf in self.leaves[min(self.leaves)])

    @cached_property
    def is_divergent(self) -> bool:
        """Whether ranks have states of their own of it, which must not be merged."""
        return self._diverges() if self.known_divergent is None else self.known_divergent

    @cached_property
    def places(self) -> dict[Box, list[tuple[int, Leaf]]]:
        """The leaves with their ranks, by where they lie."""
        places: dict[Box, list[tuple[int, Leaf]]] = {}
        for rank, leaves in self.leaves.items():
            for leaf in leaves:
                places.setdefault(box_of(leaf), []).append((rank, leaf))
        return places

    def of(self, rank: int) -> "Tensor":
        """As a rank may see it: all of it, or where ranks have states of their own, which may be of
        any form, that rank's and its replicas'."""
        own = self.leaves.get(rank)
        if own is None or not self.is_divergent:
            return self
        mine = {box_of(leaf): leaf for leaf in own}
        seen = {
            other: [leaf for leaf in leaves if _are_replicas(mine.get(box_of(leaf)), leaf)]
            for other, leaves in self.leaves.items()
        }
        seen[rank] = own
        return Tensor(self.name, {r: x for r, x in sorted(seen.items()) if x}, self.problems, True)

    @cached_property
    def is_private(self) -> bool:
        """Whether it is nothing but what every rank has for itself."""
        found = [leaf for leaves in self.leaves.values() for leaf in leaves]
        return not any(leaf.replicated or leaf.block is not None for leaf in found)

    def _diverges(self) -> bool:
        if len(self.leaves) > 1 and self.is_private:
            forms = {(x.dtype, x.shape) for leaves in self.leaves.values() for x in leaves}
            if len(forms) > 1:
                return True
        shared: set[Box] = set()
        for box, found in self.places.items():
            groups = {leaf.group for _, leaf in found if leaf.replicated and leaf.whole_bytes}
            if len(groups) > 1:
                return True  # stages that use the same names, each with replicas
            if groups:
                shared.add(box)
        if len(self.leaves) < 2:
            return False
        for box, found in self.places.items():
            alone = sum(not leaf.replicated and leaf.held_bytes > 0 for _, leaf in found)
            if alone > 1 or (alone and box in shared):
                return True
        return False

    @cached_property
    def contradictions(self) -> list[str]:
        """What contradicts itself, in words; nothing of it must be read then."""
        problems = list(self.problems)
        leaves = [leaf for found in self.leaves.values() for leaf in found]
        forms = {(leaf.dtype, leaf.global_shape) for leaf in leaves}
        if len(forms) > 1 and not self.is_private:
            shown = " and ".join(sorted(f"{dtype}{list(shape)}" for dtype, shape in forms))
            return [*problems, f"{self.name}: ranks have it as {shown}"]
        if self.is_divergent:
            return problems
        boxes = [box for box in self.places if box.elements]
        over = _overlap(boxes)
        if over is not None:
            problems.append(f"{self.name}: blocks {over[0]} and {over[1]} overlap")
        elif sum(box.elements for box in boxes) < self.elements:
            held = ", ".join(map(str, sorted(boxes, key=lambda box: box.offset)[:8]))
            problems.append(f"{self.name}: of {list(self.shape)} there is only {held or 'nothing'}")
        return problems

    def rows(self, wanted: Box, own_rank: int) -> dict[int, Rows]:
        """What to read for a box of it, by rank.

        Args:
            wanted: The box.
            own_rank: Whose shard is nearest; of a divergent tensor, the only one.

        Raises:
            FormatInvalid: If some of its bytes are held by nobody; they are named.
        """
        itemsize = element_bytes(self.dtype)
        for leaf in self.leaves.get(own_rank, ()):
            if leaf.shape == wanted.shape and leaf.block_offset == wanted.offset:
                size = leaf.held_bytes
                if size == leaf.whole_bytes:
                    return {own_rank: numpy.array([[0, leaf.offset, size]])} if size else {}
        found: dict[int, list[Rows]] = defaultdict(list)
        covered = 0
        missing: list[str] = []
        for box, holders in self._holders(own_rank):
            common = runs(box, wanted, itemsize)
            if not len(common):
                continue
            covered += len(common) * int(common[0, 2])  # runs are equally long
            try:
                for rank, rows in _taken(self.name, box, holders, common, own_rank, itemsize):
                    found[rank].append(rows)
            except FormatInvalid as error:
                missing.append(f"of block {box}: {error}")
        if not missing and covered < wanted.elements * itemsize:
            held = ", ".join(str(box) for box, _ in list(self._holders(own_rank))[:8])
            missing.append(f"of {wanted} only {covered} bytes are held, in {held or 'no block'}")
        if missing:
            raise FormatInvalid(self.name, "; ".join(missing))
        return {
            rank: parts[0] if len(parts) == 1 else numpy.concatenate(parts)
            for rank, parts in found.items()
        }

    def _holders(self, own_rank: int) -> Iterator[tuple[Box, list[tuple[int, Leaf]]]]:
        own = {box_of(leaf): leaf for leaf in self.leaves.get(own_rank, ())}
        for box, found in self.places.items():
            holders = [
                (rank, leaf)
                for rank, leaf in found
                if leaf.held_bytes
                and (rank == own_rank or not self.is_divergent or _are_replicas(own.get(box), leaf))
            ]
            if holders:
                yield box, holders


def _are_replicas(own: Leaf | None, other: Leaf) -> bool:
    """Whether two ranks' leaves of one box are equal."""
    if own is None or not own.replicated or not other.replicated:
        return False
    return own.group == other.group


def _taken(
    name: str,
    box: Box,
    holders: Sequence[tuple[int, Leaf]],
    common: Rows,
    own_rank: int,
    itemsize: int,
) -> Iterable[tuple[int, Rows]]:
    """Runs of one block, from those ranks that hold them; offsets in the ranks' images."""
    block_bytes = box.elements * itemsize
    if len(holders) == 1 and holders[0][1].held_bytes == block_bytes:
        rank, leaf = holders[0]
        yield rank, common + numpy.array([0, leaf.offset, 0])
        return
    leaves = dict(holders)
    ranges: dict[int, list[Range]] = {r: [(x.start, x.stop)] for r, x in holders}
    for rank, start, stop in gather(name, block_bytes, ranges, own_rank=own_rank):
        rows = clipped(common, start, stop)
        if len(rows):
            yield rank, rows + numpy.array([0, leaves[rank].offset - leaves[rank].start, 0])


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two of the boxes that have elements in common, if there are any."""
    if len(boxes) < 2 or not boxes[0].shape:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    begins = numpy.array([box.offset for box in boxes])
    ends = begins + numpy.array([box.shape for box in boxes])
    order = numpy.lexsort(begins.T[::-1])
    for dimension in range(begins.shape[1]):
        # Mostly one dimension tells them apart: sorted by it, each ends before the next begins.
        along = numpy.argsort(begins[:, dimension], kind="stable")
        if (ends[along[:-1], dimension] <= begins[along[1:], dimension]).all():
            return None
    for at, index in enumerate(order):
        others = order[at + 1 :]
        hits = (begins[others] < ends[index]) & (begins[index] < ends[others])
        hit = numpy.flatnonzero(hits.all(axis=1))
        if len(hit):
            return boxes[int(index)], boxes[int(others[hit[0]])]
    return None


class Holdings:
    """All tensors of a snapshot, as all its ranks hold them.

    Args:
        layouts: Of all shards, by rank.

    Attributes:
        tensors: By name.
        aliases: Further names of tensors, to the first.
        ranks: Of the snapshot.
    """

    def __init__(self, layouts: Mapping[int, Layout]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.ranks = tuple(sorted(layouts))
        for rank in self.ranks:
            names = {leaf.name: leaf.tensor for leaf in layouts[rank].leaves}
            for leaf in layouts[rank].leaves:
                tensor = self.tensors.setdefault(leaf.tensor, Tensor(leaf.tensor))
                tensor.leaves.setdefault(rank, []).append(leaf)
            for name, of in layouts[rank].aliases.items():
                first = self.aliases.setdefault(name, names[of])
                if first != names[of]:
                    said = f"{name}: stands for {first} on one rank, and for {names[of]} on another"
                    self.tensors[names[of]].problems.append(said)

    def origin(self, name: str) -> str:
        """The one name of a tensor that was saved under several."""
        return name if name in self.tensors else self.aliases.get(name, name)

    def find(self, name: str) -> Tensor | None:
        """The tensor of this name."""
        return self.tensors.get(self.origin(name))

    def held_by(self, rank: int, name: str) -> bool:
        """Whether a rank's own shard has anything of a tensor."""
        tensor = self.find(name)
        return tensor is not None and rank in tensor.leaves

    def check(self, names: Iterable[str]) -> list[str]:
        """What contradicts itself in these tensors, in words, all of it."""
        found = {self.origin(name) for name in names}
        return [
            problem
            for name in sorted(found)
            if name in self.tensors
            for problem in self.tensors[name].contradictions
        ]
