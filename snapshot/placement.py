"""Where the local part of a distributed tensor lies in the whole.

Owns the reading of DTensor, and of what the user says of plain tensors: the local memory, the boxes
of the global tensor that this is, and the ranks that hold the same. Promises that nothing is
communicated, and that every mesh and placement is understood or refused by name: uneven, empty and
padded shards, several mesh dimensions on one dimension of the tensor, and strided shards (FSDP over
tensor parallelism), which may be several boxes. Does not import `torch.distributed` unless somebody
has made a distributed tensor.
"""

import itertools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from everstep.proto.errors import Misplaced
from everstep.snapshot.reshard import Box

_MODULE = "torch.distributed.tensor"
Intervals = list[tuple[int, int]]
"""(from, to) each, ascending: of one dimension."""


@dataclass(frozen=True, slots=True)
class Portion:
    """A box of a global tensor, and its memory here."""

    tensor: torch.Tensor
    box: Box


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a plain tensor, or a box of it, lies in a global one: for what is not a DTensor.

    Attributes:
        tensor: The global tensor's name, as "model/experts.weight".
        global_shape: Its shape.
        offset: Where the box begins in it.
        local_offset: Where the box begins in the plain tensor; empty: at its beginning.
        shape: The box's lengths; empty: all of the plain tensor.
    """

    tensor: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    local_offset: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FlatExtent:
    """A range of a flattened global tensor: for partitions as ZeRO and flat parameters have them.

    Attributes:
        tensor: The global tensor's name.
        global_shape: Its shape.
        start: Which element of it, counted flat, comes first.
        local_start: Where that is in the plain tensor, which has one dimension.
        length: How many elements; None: all from there.
    """

    tensor: str
    global_shape: tuple[int, ...]
    start: int
    local_start: int = 0
    length: int | None = None


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes that a range of a flattened tensor is made of, in order: at most two a dimension.

    Each is contiguous: what the flattened tensor has there is the box, row by row.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield Box((start,), (stop - start,)) if shape else Box((), ())
        return
    row = Box.whole(shape[1:]).elements
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _within(
            start // row, flat_boxes(shape[1:], start % row, stop - start // row * row)
        )
        return
    if start % row:
        yield from _within(first - 1, flat_boxes(shape[1:], start % row, row))
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if stop % row:
        yield from _within(last, flat_boxes(shape[1:], 0, stop % row))


def _within(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    for box in boxes:
        yield Box((row, *box.offset), (1, *box.shape))


class Spread:
    """A plain tensor together with where it lies in a global one.

    Attributes:
        local: The plain tensor.
        shape: Of the global tensor.
        dtype: Of both.
        boxes: (where in the global tensor, where in the plain one) of each extent.
    """

    def __init__(
        self, name: str, local: torch.Tensor, extents: Sequence[Extent | FlatExtent]
    ) -> None:
        self.local = local
        self.dtype = local.dtype
        self.tensor, self.shape = extents[0].tensor, tuple(extents[0].global_shape)
        self.boxes = [pair for extent in extents for pair in _pairs(extent, local)]
        self._name = name
        self._wrong = self._problem(extents)

    def _problem(self, extents: Sequence[Extent | FlatExtent]) -> str:
        if len({(e.tensor, tuple(e.global_shape)) for e in extents}) > 1:
            return "its extents are of several tensors"
        for whole, boxes in ((self.shape, 0), (self.local.shape, 1)):
            for box in (pair[boxes] for pair in self.boxes):
                if len(box.offset) != len(whole):
                    return f"its extent {box} has another number of dimensions than {list(whole)}"
                if box.elements and Box.whole(whole).meet(box) != box:
                    return f"its extent {box} is outside of {list(whole)}"
        if sum(own.elements for _, own in self.boxes) != self.local.numel():
            return "its extents do not make up the local tensor"
        if len({at for at, _ in self.boxes}) < len(self.boxes):
            return "two of its extents are the same"
        return ""

    def numel(self) -> int:
        """Elements of the global tensor."""
        return Box.whole(self.shape).elements

    def portions(self) -> list[Portion]:
        """The boxes with their memory.

        Raises:
            Misplaced: If the extents are of several tensors, or do not make up the plain tensor.
        """
        if self._wrong:
            raise Misplaced(f"{self._name}: {self._wrong}")
        found = []
        for at, own in self.boxes:
            part = self.local
            for dimension, (begin, length) in enumerate(zip(own.offset, own.shape, strict=True)):
                if length != part.shape[dimension]:
                    part = part.narrow(dimension, begin, length)
            found.append(Portion(part if part.shape == at.shape else part.view(at.shape), at))
        return found


def _pairs(extent: Extent | FlatExtent, local: torch.Tensor) -> Iterator[tuple[Box, Box]]:
    """Where in the global tensor, and where in the plain one."""
    if isinstance(extent, Extent):
        shape = tuple(extent.shape or local.shape)
        own = tuple(extent.local_offset or (0,) * local.dim())
        yield Box(tuple(extent.offset), shape), Box(own, shape)
        return
    length = extent.length
    if length is None:
        length = local.numel() - extent.local_start
    at = extent.local_start
    for box in flat_boxes(extent.global_shape, extent.start, extent.start + length):
        yield box, Box((at,), (box.elements,))
        at += box.elements


Placed = torch.Tensor | Spread
"""A tensor of any kind: a plain one, a DTensor, or a plain one that is a part of a global one."""
Placement = Callable[[str, torch.Tensor], Sequence[Extent | FlatExtent] | None]
"""Says of a plain tensor, by its name, where it lies; None: it is a tensor of its own."""


def is_distributed(tensor: object) -> bool:
    """Whether it is a part of a global tensor."""
    if isinstance(tensor, Spread):
        return True
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def plain(tensor: Placed) -> torch.Tensor:
    """As torch's own functions know it: a DTensor, or the plain tensor."""
    return tensor.local if isinstance(tensor, Spread) else tensor


def local_of(tensor: Placed) -> torch.Tensor:
    """The memory that this rank has of a tensor: all of it, unless it is distributed."""
    if isinstance(tensor, Spread):
        return tensor.local
    if type(tensor) is torch.Tensor or not is_distributed(tensor):
        return tensor
    local: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return local


def portions(name: str, tensor: Placed) -> list[Portion]:
    """The boxes that this rank holds of a tensor; one, for all but strided shards.

    Raises:
        Misplaced: If mesh, placements and local shape contradict each other, or values are not
            reduced yet.
    """
    if isinstance(tensor, Spread):
        return tensor.portions()
    local = local_of(tensor)
    if local is tensor:
        return [Portion(tensor, Box.whole(tensor.shape))]
    along = _intervals(name, tensor)
    found = []
    starts = [itertools.accumulate((b - a for a, b in cut), initial=0) for cut in along]
    places = [list(zip(cut, start, strict=False)) for cut, start in zip(along, starts, strict=True)]
    for pieces in itertools.product(*places):
        part = local
        for dimension, ((begin, end), at) in enumerate(pieces):
            if end - begin != local.shape[dimension]:
                part = part.narrow(dimension, at, end - begin)
        box = Box(tuple(c[0] for c, _ in pieces), tuple(c[1] - c[0] for c, _ in pieces))
        found.append(Portion(part, box))
    return found


Dimensions = Mapping[Any, Collection[str]]
"""By a whole mesh, names of some of its dimensions."""


def dimensions_of(tensors: Iterable[Placed]) -> Dimensions:
    """Over which dimensions of whole meshes distributed tensors lie, all of them together."""
    found: dict[Any, set[str]] = {}
    for tensor in tensors:
        if not isinstance(tensor, Spread) and is_distributed(tensor):
            mesh, _ = _spec(tensor)
            found.setdefault(_root(mesh), set()).update(mesh.mesh_dim_names or ())
    return found


def group_of(tensor: Placed, beside: Dimensions = MappingProxyType({})) -> tuple[int, ...]:
    """The ranks that should hold the same as this one, ascending; none if it is not a DTensor.

    Args:
        tensor: Any.
        beside: Over which dimensions the model lies that it belongs to. Along those that its own
            mesh has not (a norm that is in no plan of tensor parallelism), all ranks have it.
    """
    if isinstance(tensor, Spread) or not is_distributed(tensor):
        return ()
    mesh, placements = _spec(tensor)
    return _ranks(mesh, [placement.is_replicate() for placement in placements], beside)


def mesh_ranks(tensor: torch.Tensor, beside: Dimensions = MappingProxyType({})) -> tuple[int, ...]:
    """All ranks that have some of a distributed tensor, ascending."""
    mesh, _ = _spec(tensor)
    return _ranks(mesh, [True] * mesh.ndim, beside)


def _root(mesh: Any) -> Any:
    """The mesh that another one is a part of."""
    return getattr(mesh, "_root_mesh", None) or mesh


def _ranks(mesh: Any, kept: Sequence[bool], beside: Dimensions) -> tuple[int, ...]:
    """Those at this rank's place in all dimensions but those that are kept."""
    root = _root(mesh)
    own, names = mesh.mesh_dim_names or (), root.mesh_dim_names or ()
    # A dimension that was made of several has another name than those.
    if own and set(own) <= set(names):
        known, others = dict(zip(own, kept, strict=True)), beside.get(root, ())
        mesh, kept = root, [known.get(name, name in others) for name in names]
    ranks, coordinate = mesh.mesh, mesh.get_coordinate()
    if coordinate is None:  # not of this mesh
        return tuple(sorted(ranks.flatten().tolist()))
    for dimension in reversed(range(mesh.ndim)):
        if not kept[dimension]:
            ranks = ranks.select(dimension, coordinate[dimension])
    return tuple(sorted(ranks.flatten().tolist()))


def like(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A tensor placed as another one, with local memory of its own."""
    mesh, placements = _spec(tensor)
    made: torch.Tensor = sys.modules[_MODULE].DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return made


def beside(tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
    """Memory for a tensor of another shape whose parts go with those of a distributed one.

    Such are codes and scales of an optimizer's state: they have the tensor's rows.

    Returns:
        None if the shape cannot be placed so.
    """
    mesh, placements = _spec(tensor)
    dims = [getattr(placement, "dim", None) for placement in placements]
    if not shape or shape[0] != tensor.shape[0]:
        return None
    for dim in dims:
        ranks = math.prod(mesh.size(at) for at, other in enumerate(dims) if other == dim)
        if dim and (dim >= len(shape) or shape[dim] % ranks):
            return None
    local = torch.empty(tuple(shape), dtype=dtype, device="meta")
    coordinate = mesh.get_coordinate()
    for at, placement in enumerate(placements):
        if dims[at] is not None and coordinate is not None:
            split = placement._split_tensor
            parts, _ = split(local, mesh.size(at), with_padding=False, contiguous=False)
            local = parts[coordinate[at]]
    strides = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    made: torch.Tensor = sys.modules[_MODULE].DTensor.from_local(
        torch.empty(local.shape, dtype=dtype, device=local_of(tensor).device),
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(strides),
    )
    return made


def _spec(tensor: Any) -> tuple[Any, Sequence[Any]]:
    return tensor.device_mesh, tensor.placements


def _intervals(name: str, tensor: torch.Tensor) -> list[Intervals]:
    """By dimension, which indices of the global tensor this rank has."""
    mesh, placements = _spec(tensor)
    coordinate = mesh.get_coordinate()
    local = local_of(tensor)
    if coordinate is None:  # not of this mesh: it holds nothing
        return [[(0, 0)] for _ in tensor.shape]
    if len(placements) != mesh.ndim:
        raise _mismatch(name, f"{len(placements)} placements on a mesh of {mesh.ndim} dimensions")
    along: list[Intervals] = [[(0, length)] for length in tensor.shape]
    for dimension, placement in enumerate(placements):
        if placement.is_partial():
            raise Misplaced(
                f"{name}: a partial sum, whose value no rank has; redistribute it first"
            )
        at = getattr(placement, "dim", None)
        if at is None or placement.is_replicate():
            continue
        if at >= len(along):
            raise _mismatch(name, f"{placement} of a tensor of {len(along)} dimensions")
        pieces = getattr(placement, "split_factor", 1)
        along[at] = _share(along[at], mesh.size(dimension), coordinate[dimension], pieces)
    shape = tuple(sum(b - a for a, b in cut) for cut in along)
    if shape != tuple(local.shape):
        raise _mismatch(name, f"a local shape of {list(local.shape)} where {list(shape)} belongs")
    return along


def _mismatch(name: str, what: str) -> Misplaced:
    return Misplaced(f"{name}: its mesh does not match its placements: {what}")


def _share(held: Intervals, ranks: int, rank: int, pieces: int) -> Intervals:
    """What one of the ranks gets of the indices: as `torch.chunk` deals, in each of the pieces
    that were dealt before (strided), which is one unless a later mesh dimension deals first."""
    length = sum(b - a for a, b in held)
    found: Intervals = []
    for begin, end in _dealt(0, length, pieces):
        chunks = list(_dealt(begin, end, ranks))
        found += _cut(held, *chunks[rank])
    kept = [(a, b) for a, b in found if a < b]
    joined: Intervals = []
    for a, b in kept:
        if joined and joined[-1][1] == a:
            a = joined.pop()[0]
        joined.append((a, b))
    return joined or [(held[-1][1], held[-1][1]) if held else (0, 0)]


def _dealt(begin: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    size = -(-(end - begin) // count)
    for index in range(count):
        yield min(begin + index * size, end), min(begin + (index + 1) * size, end)


def _cut(held: Intervals, begin: int, end: int) -> Intervals:
    """The indices at positions `begin` to `end` of those held."""
    found, at = [], 0
    for a, b in held:
        first, last = max(begin, at), min(end, at + b - a)
        if first < last:
            found.append((a + first - at, a + last - at))
        at += b - a
    return found
