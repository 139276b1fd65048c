"""Boxes of distributed tensors, as torch itself has dealt the values."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from everstep.proto.errors import Misplaced
from everstep.snapshot.placement import (
    Extent,
    FlatExtent,
    Spread,
    flat_boxes,
    group_of,
    like,
    local_of,
    mesh_ranks,
    portions,
)

WORLD = 8
MESHES = [((8,), ("a",)), ((2, 4), ("a", "b")), ((4, 2), ("a", "b")), ((2, 2, 2), ("a", "b", "c"))]
SHAPES = [(), (1,), (5,), (8,), (16, 3), (7, 9), (3, 0), (2, 5, 9)]


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    yield
    torch.distributed.destroy_process_group()


def at(mesh: DeviceMesh, rank: int) -> contextlib.AbstractContextManager[object]:
    """As that rank sees the mesh."""
    coordinate = (mesh.mesh == rank).nonzero()[0].tolist()
    return mock.patch.object(mesh, "get_coordinate", return_value=coordinate)


def dealt(
    whole: torch.Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...], rank: int
) -> torch.Tensor:
    """What a rank gets, by torch's own splitting: left to right, one mesh dimension at a time."""
    coordinate = (mesh.mesh == rank).nonzero()[0].tolist()
    local = whole
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Shard | _StridedShard):
            shards, _ = placement._split_tensor(
                local, mesh.size(dimension), with_padding=False, contiguous=True
            )
            local = shards[coordinate[dimension]]
    return local


def combinations(shape: tuple[int, ...], dimensions: int) -> Iterator[tuple[Placement, ...]]:
    choices: list[Placement] = [Replicate(), *map(Shard, range(len(shape)))]
    choices += [_StridedShard(dim, split_factor=2) for dim in range(len(shape))]
    yield from itertools.product(choices, repeat=dimensions)


@pytest.mark.parametrize(("mesh_shape", "names"), MESHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_what_torch_deals(
    mesh_shape: tuple[int, ...], names: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    mesh = DeviceMesh("cpu", torch.arange(WORLD).reshape(mesh_shape), mesh_dim_names=names)
    whole = torch.arange(max(1, torch.Size(shape).numel())).reshape(-1)
    whole = whole[: torch.Size(shape).numel()].reshape(shape)
    for placements in combinations(shape, len(mesh_shape)):
        same: dict[tuple[int, ...], list[int]] = {}
        groups = {}
        for rank in range(WORLD):
            local = dealt(whole, mesh, placements, rank)
            tensor = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
            )
            with at(mesh, rank):
                found = portions("t", tensor)
                groups[rank] = group_of(tensor)
            filled = torch.full_like(local, -1)
            for portion in found:
                where = tuple(
                    slice(a, a + n)
                    for a, n in zip(portion.box.offset, portion.box.shape, strict=True)
                )
                assert torch.equal(portion.tensor, whole[where]), (placements, rank)
            assert sum(p.tensor.numel() for p in found) == filled.numel()
            if local.numel():
                same.setdefault(tuple(local.flatten().tolist()), []).append(rank)
        for together in same.values():
            covering = set().union(*(groups[rank] for rank in together))
            assert covering == set(together), (placements, together, groups)
        assert mesh_ranks(tensor) == tuple(range(WORLD))


def test_a_tensor_of_its_own() -> None:
    tensor = torch.ones(3, 4)
    (portion,) = portions("t", tensor)
    assert portion.tensor is tensor
    assert local_of(tensor) is tensor
    assert (portion.box.offset, portion.box.shape) == ((0, 0), (3, 4))
    assert group_of(tensor) == ()


def test_what_contradicts_itself_is_refused() -> None:
    mesh = DeviceMesh("cpu", torch.arange(WORLD))
    wrong = DTensor.from_local(
        torch.ones(3), mesh, [Shard(0)], run_check=False, shape=torch.Size([64]), stride=(1,)
    )
    with pytest.raises(Misplaced, match=r"local shape of \[3\] where \[8\] belongs"):
        portions("t", wrong)
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    with pytest.raises(Misplaced, match="partial sum"):
        portions("t", partial)


def test_memory_placed_alike() -> None:
    mesh = DeviceMesh("cpu", torch.arange(WORLD))
    tensor = DTensor.from_local(
        torch.ones(2, 3), mesh, [Shard(0)], run_check=False, shape=torch.Size([9, 3]), stride=(3, 1)
    )
    made = like(tensor, torch.zeros(2, 3))
    assert isinstance(made, DTensor)
    assert made.shape == tensor.shape
    assert made.placements == tensor.placements
    assert local_of(made).sum() == 0


@given(st.data())
def test_ranges_of_flat_tensors_are_few_boxes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), max_size=4)))
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = torch.arange(size).reshape(shape)
    boxes = list(flat_boxes(shape, start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    found = []
    for box in boxes:
        where = tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))
        found += whole[where].flatten().tolist()
    assert found == list(range(start, stop))


def test_a_flat_partition_is_views_of_its_memory() -> None:
    whole = torch.arange(60).reshape(5, 4, 3)
    local = whole.flatten()[7:41].clone()
    spread = Spread("t", local, [FlatExtent("t", (5, 4, 3), 7)])
    for portion in portions("t", spread):
        where = tuple(
            slice(a, a + n) for a, n in zip(portion.box.offset, portion.box.shape, strict=True)
        )
        assert torch.equal(portion.tensor, whole[where])
        assert portion.tensor.untyped_storage().data_ptr() == local.data_ptr()
        assert portion.tensor.is_contiguous()
    with pytest.raises(Misplaced, match="outside"):
        portions("t", Spread("t", local, [FlatExtent("t", (5, 4, 3), 40)]))
    with pytest.raises(Misplaced, match="make up"):
        portions("t", Spread("t", local, [FlatExtent("t", (5, 4, 3), 7, length=3)]))
    with pytest.raises(Misplaced, match="several"):
        portions("t", Spread("t", local, [FlatExtent("t", (60,), 0), FlatExtent("u", (60,), 0)]))
    with pytest.raises(Misplaced, match="dimensions"):
        portions("t", Spread("t", local, [Extent("t", (5, 4, 3), (0,))]))
