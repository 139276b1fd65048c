"""What a save plan comes to, and what is refused of what a snapshot says of its objects."""

import io
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from everstep.client.attachment import encode_torch_value
from everstep.client.dcp.catalogue import Catalogue, StoredBytes, catalogue_of
from everstep.client.dcp.packing import Packed, packed
from everstep.client.saved import Saved
from everstep.proto.errors import FormatInvalid, NotCapturable, StateMismatch
from everstep.proto.state_pb2 import Record, Value
from everstep.snapshot import values
from everstep.snapshot.layout import Block, LeafSpec, Part, pack
from everstep.snapshot.placement import Extent

Chunk = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


class Planner:
    """Resolves items to what it was given, in order."""

    def __init__(self, *things: Any) -> None:
        self.things = list(things)

    def resolve_data(self, _: WriteItem) -> Any:
        return self.things.pop(0)


def chunk_item(name: str, size: tuple[int, ...], offset: tuple[int, ...], shape: Any) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
    data = TensorWriteData(chunk, TensorProperties(), torch.Size(size))
    return WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data)


def packed_chunks(*chunks: Chunk) -> Packed:
    items = [chunk_item(name, size, at, tensor.shape) for name, size, at, tensor in chunks]
    planner: Any = Planner(*(tensor for *_, tensor in chunks))
    return packed(SavePlan(items), planner, rank=3, step=8)


def test_chunks_are_placed_in_their_tensors() -> None:
    whole, part = torch.ones(2, 3), torch.zeros(2, 3)
    found = packed_chunks(
        ("whole", (2, 3), (0, 0), whole),
        ("a.part", (4, 3), (2, 0), part),
        ("nothing", (4, 3), (4, 0), torch.zeros(0, 3)),
        ("empty", (0, 3), (0, 0), torch.zeros(0, 3)),
    )
    assert list(found.tensors) == ["whole", "a.part", "empty"]
    assert found.tensors["whole"].data_ptr() == whole.data_ptr()
    assert found.tensors["a.part"].data_ptr() == part.data_ptr()
    extent = Extent("state/a.part", (4, 3), (2, 0), (0, 0), (2, 3))
    assert found.extents == {"state/a.part": [extent]}
    assert [result.storage_data for result in found.results] == [8] * 4
    assert [result.size_in_bytes for result in found.results] == [24, 24, 0, 0]


def test_several_chunks_of_a_tensor_are_one_leaf() -> None:
    found = packed_chunks(
        ("w", (6, 2), (4, 0), torch.full((1, 2), 4.0)),
        ("w", (6, 2), (0, 0), torch.full((2, 2), 0.0)),
    )
    assert found.tensors["w"].tolist() == [[4, 4], [0, 0], [0, 0]]
    assert found.extents["state/w"] == [
        Extent("state/w", (6, 2), (4, 0), (0, 0), (1, 2)),
        Extent("state/w", (6, 2), (0, 0), (1, 0), (2, 2)),
    ]
    with pytest.raises(NotCapturable, match="several chunks"):
        packed_chunks(
            ("w", (6, 4), (0, 0), torch.zeros(1, 4)),
            ("w", (6, 4), (1, 0), torch.zeros(2, 2)),
        )


def test_memory_that_lies_in_two_places_is_two_leaves() -> None:
    """Else the second would be an alias of the first, and be loaded from where that lies."""
    memory = torch.ones(2)
    found = packed_chunks(
        ("a", (4,), (0,), memory),
        ("b", (4,), (0,), memory),
        ("c", (4,), (2,), memory),
        ("d", (2,), (0,), memory),
    )
    pointers = {name: tensor.data_ptr() for name, tensor in found.tensors.items()}
    assert pointers["a"] == pointers["b"] == memory.data_ptr()
    assert len({pointers["a"], pointers["c"], pointers["d"]}) == 3
    assert all(torch.equal(tensor, memory) for tensor in found.tensors.values())


def test_a_tensor_that_is_not_as_planned_is_refused() -> None:
    planner: Any = Planner(torch.zeros(3))
    with pytest.raises(StateMismatch, match="is not as planned"):
        packed(SavePlan([chunk_item("w", (2,), (0,), (2,))]), planner, rank=0, step=0)


def test_objects_lie_one_after_another() -> None:
    items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in ("a", "b", "c")]
    planner: Any = Planner(io.BytesIO(b"one"), io.BytesIO(b""), io.BytesIO(b"three"))
    paths = {"a": ("a",), "b": ("b", 0), "c": "no path", "other": ("other",)}
    found = packed(SavePlan(items, planner_data=paths), planner, rank=3, step=1)
    (share,) = found.objects.values()
    assert isinstance(share, dict)
    assert share["index"] == {"a": [0, 3], "b": [3, 3], "c": [3, 8]}
    assert share["mappings"] == {"a": ["a"], "b": ["b", 0]}
    assert bytes(share["bytes"].numpy()[:8]) == b"onethree"
    assert len(share["bytes"]) == 4096
    assert [result.size_in_bytes for result in found.results] == [3, 0, 5]


def saved_with(share: object, *, size: int = 4096, state: tuple[LeafSpec, ...] = ()) -> Saved:
    leaf = LeafSpec("dcp/0/bytes", "uint8", (size,), 0, size)
    parts = [Part("state", "tree", "builtins.dict"), Part("dcp", "tree", "builtins.dict")]
    layout = pack(parts, [*state, leaf], {}, {})
    record = Record()
    if isinstance(share, dict):
        for key, value in share.items():
            json = values.encode(value, key, hook=encode_torch_value)
            record.values.append(Value(path=f"dcp/0/{key}", json=json))
    return Saved.of({0: layout}, {0: record}, 0, 1)


def catalogue(**changes: object) -> Catalogue:
    share = {"format": 1, "index": {"a": [0, 10]}, "mappings": {"a": ["a", 0]}}
    return catalogue_of(saved_with(share | changes))


def test_objects_are_found_where_they_lie() -> None:
    found = catalogue()
    assert found.objects == {"a": StoredBytes("dcp/0/bytes", 0, 10)}
    assert found.paths == {"a": ("a", 0)}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": None},
        {"index": {"a": [0, 4097]}},
        {"index": {"a": [-1, 3]}},
        {"index": {"a": [3, 2]}},
        {"index": {"a": [0, 1, 2]}},
        {"index": {"a": [0.0, 1.0]}},
        {"index": {"a": "ab"}},
        {"index": {1: [0, 1]}},
        {"index": [0, 1]},
        {"index": None},
        {"mappings": {"a": "a"}},
        {"mappings": {"a": [1.5]}},
        {"mappings": [["a", "a"]]},
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(FormatInvalid, match="the objects of a checkpoint"):
        catalogue(**changes)


def test_blocks_of_a_tensor_are_its_chunks() -> None:
    def leaf(name: str, at: int, length: int) -> LeafSpec:
        return LeafSpec(
            name, "float32", (length,), 0, 4 * length, False, Block("state/w", (5,), (at,))
        )

    saved = saved_with(
        {"format": 1, "index": {}, "mappings": {}}, state=(leaf("x", 3, 2), leaf("y", 0, 3))
    )
    metadata = catalogue_of(saved).metadata(saved)
    entry: Any = metadata.state_dict_metadata["w"]
    assert tuple(entry.size) == (5,)
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks] == [
        ((0,), (3,)),
        ((3,), (2,)),
    ]
