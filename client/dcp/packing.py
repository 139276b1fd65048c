"""What a save plan comes to as the state of a snapshot, and the words that a reader needs for it.

Owns the form: tensors in a part `state`, each under its fully qualified name and placed in its
global tensor; everything else in a part `dcp`, under the rank that saved it:

    format    1
    index     name -> [begin, end] in `bytes`
    mappings  name -> the keys that lead to it in the nested state dict
    bytes     a tensor of bytes: what the planner made of the objects, one after another

Promises that objects are bytes here and nowhere opened: they are pickles that the trainer's own
planner has made, and the reader's planner is given back. Copies no tensor, except chunks of one
that a rank has several of, and memory that is given twice, in different places.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from everstep.client.attachment import place
from everstep.proto.errors import NotCapturable, StateMismatch
from everstep.snapshot.placement import Extent
from everstep.snapshot.reshard import Box
from everstep.snapshot.tree import join

STATE_PART = "state"
OBJECTS_PART = "dcp"
FORMAT = 1
_ALIGNMENT_BYTES = 4096
"""A layout is made anew when the length of a tensor changes: with this, it seldom does."""


@dataclass(slots=True)
class Packed:
    """One rank's share of a save.

    Attributes:
        tensors: By key in the part `state`.
        extents: By name of the leaf: where it lies in its global tensor, unless it is all of it.
        objects: The content of the part `dcp`.
        results: For the planner, one for each item.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    extents: dict[str, list[Extent]] = field(default_factory=dict)
    objects: dict[str, object] = field(default_factory=dict)
    results: list[WriteResult] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Chunk:
    box: Box
    tensor: torch.Tensor


def packed(plan: SavePlan, planner: SavePlanner, rank: int, step: int) -> Packed:
    """Resolve all items of a plan.

    Args:
        plan: This rank's.
        planner: Its.
        rank: Which one.
        step: Told to the coordinator with the results.

    Raises:
        StateMismatch: If a tensor is not as large as its plan says.
    """
    packing = _Packing()
    for item in plan.items:
        if item.type is WriteItemType.BYTE_IO:
            size = packing.add_object(item, planner.resolve_data(item))
        else:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor)
            size = packing.add_tensor(item, tensor.detach())
        packing.packed.results.append(WriteResult(item.index, size, step))
    packing.finish(plan, rank)
    return packing.packed


class _Packing:
    def __init__(self) -> None:
        self.packed = Packed()
        self._chunks: dict[str, tuple[tuple[int, ...], list[_Chunk]]] = {}
        self._places: dict[tuple[object, ...], object] = {}
        self._index: dict[str, list[int]] = {}
        self._bytes = bytearray()

    def add_object(self, item: WriteItem, stream: Any) -> int:
        begin = len(self._bytes)
        self._bytes += stream.getbuffer()
        self._index[item.index.fqn] = [begin, len(self._bytes)]
        return len(self._bytes) - begin

    def add_tensor(self, item: WriteItem, tensor: torch.Tensor) -> int:
        data = item.tensor_data
        assert data is not None
        box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        fqn, shape = item.index.fqn, tuple(data.size)
        if tuple(tensor.shape) != box.shape:
            change = f"{fqn}{box}: planned {list(box.shape)} -> found {list(tensor.shape)}"
            raise StateMismatch("a tensor is not as planned. Nothing was saved.", (), (), (change,))
        # Of an empty share nothing is kept: that the tensor exists is known from the others.
        if box.elements or box == Box.whole(shape):
            self._chunks.setdefault(fqn, (shape, []))[1].append(_Chunk(box, tensor))
        return int(tensor.nbytes)

    def _add(self, fqn: str, shape: tuple[int, ...], chunks: list[_Chunk]) -> None:
        if len(chunks) == 1 and chunks[0].box == Box.whole(shape):
            self.packed.tensors[fqn] = self._own(chunks[0].tensor, None)
            return
        local = chunks[0].tensor if len(chunks) == 1 else _joined(fqn, chunks)
        name, at, extents = join(STATE_PART, fqn), 0, []
        for box in (chunk.box for chunk in chunks):
            begin = (at, *(0 for _ in box.shape[1:]))
            extents.append(Extent(name, shape, box.offset, begin, box.shape))
            at += box.shape[0]
        self.packed.tensors[fqn] = self._own(local, [(e.global_shape, e.offset) for e in extents])
        self.packed.extents[name] = extents

    def _own(self, tensor: torch.Tensor, placed: object) -> torch.Tensor:
        """Two names of one memory are one leaf, so it must lie at one place of both tensors."""
        if not tensor.numel():
            return tensor
        first = self._places.setdefault(place(tensor), placed)
        return tensor if first == placed else tensor.clone()

    def finish(self, plan: SavePlan, rank: int) -> None:
        for fqn, (shape, chunks) in self._chunks.items():
            self._add(fqn, shape, chunks)
        objects: dict[str, object] = {"format": FORMAT, "index": self._index}
        objects["mappings"] = _mappings(plan)
        if self._bytes:
            self._bytes += bytes(-len(self._bytes) % _ALIGNMENT_BYTES)
            objects["bytes"] = torch.frombuffer(self._bytes, dtype=torch.uint8)
        self.packed.objects[str(rank)] = objects


def _joined(fqn: str, chunks: list[_Chunk]) -> torch.Tensor:
    """Several chunks of one tensor are one leaf's memory; only legacy sharded tensors have them."""
    if not chunks[0].box.shape or len({chunk.box.shape[1:] for chunk in chunks}) > 1:
        detail = "a rank has several chunks of it, of different lengths beyond the first dimension"
        raise NotCapturable(fqn, "sharded tensor", detail)
    return torch.cat([chunk.tensor for chunk in chunks])


def _mappings(plan: SavePlan) -> dict[str, list[str | int]]:
    """Of the default planner; another planner's data may be anything, and is not kept."""
    data = plan.planner_data
    if not isinstance(data, Mapping):
        return {}
    wanted = dict.fromkeys(item.index.fqn for item in plan.items)
    return {
        name: list(path)
        for name in wanted
        if isinstance(path := data.get(name), tuple)
        and all(type(element) in (str, int) for element in path)
    }
