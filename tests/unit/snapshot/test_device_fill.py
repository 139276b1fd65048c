"""Bytes come to a device checked, with room for a staging copy and without."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch

from everstep.proto.errors import FormatInvalid, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.accelerator import DeviceFailure
from everstep.snapshot.device_fill import (
    BUFFER_BYTES,
    CHUNK_BYTES,
    DeviceFill,
    Pinned,
    Stretch,
    stretches,
)
from everstep.snapshot.reading import Shard, ShardReader
from everstep.snapshot.restore import Restoration, Wanted

from .fake_accelerator import FakeAccelerator
from .shards import Folder, Tensors, bits, flip, some

CPU = torch.device("cpu")
KINDS = {
    "staged": lambda: FakeAccelerator(),
    "staged, digests on the host": lambda: FakeAccelerator(can_digest=False),
    "direct": lambda: FakeAccelerator(room=UNIT_BYTES),
}


@pytest.fixture(params=["memory", "nvme"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(tmp_path, request.param)


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> FakeAccelerator:
    return KINDS[request.param]()


def restore(
    device: FakeAccelerator,
    shards: Mapping[int, Shard],
    wanted: Tensors,
    *,
    rank: int = 0,
    hinted: list[str] | None = None,
    pinned: Pinned | None = None,
) -> str:
    """What the client does, all tensors being on the device; returns the problem, if any."""
    devices = dict.fromkeys(wanted if hinted is None else hinted, CPU)
    with (
        ThreadPoolExecutor(3) as executor,
        Restoration(
            shards, rank, executor, pinned=pinned, accelerators=lambda _: device
        ) as restoration,
    ):
        restoration.verify(wanted, devices)
        assert all(not tensor.any() for tensor in wanted.values())
        restoration.plan([Wanted(name, tensor) for name, tensor in wanted.items()])
        restoration.run()
    assert not device.staging
    return restoration.problem


def zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same(left: Tensors, right: Tensors) -> bool:
    return {n: bits(t) for n, t in left.items()} == {n: bits(t) for n, t in right.items()}


def test_all_leaves(folder: Folder, device: FakeAccelerator) -> None:
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    assert restore(device, {0: shard}, live) == ""
    assert same(live, tensors)
    staged = device._room > UNIT_BYTES and device.can_digest
    assert device.digested == (shard.record.image_bytes // UNIT_BYTES if staged else 0)


def test_without_threads(folder: Folder, device: FakeAccelerator) -> None:
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    with Restoration({0: shard}, 0, accelerators=lambda _: device) as restoration:
        restoration.verify(live, dict.fromkeys(live, CPU))
        restoration.plan([Wanted(name, tensor) for name, tensor in live.items()])
        restoration.run()
    assert same(live, tensors)


def test_more_than_all_buffers_hold(folder: Folder, device: FakeAccelerator) -> None:
    """A buffer is not filled again before it was sent."""
    tensors = {"t/x": torch.arange(200 * UNIT_BYTES // 8)}
    live = zeros(tensors)
    assert restore(device, {0: folder.shard(tensors)}, live) == ""
    assert same(live, tensors)


def test_replicas_aliases_and_odd_strides(folder: Folder, device: FakeAccelerator) -> None:
    torch.manual_seed(1)
    replicas = {"t/w": torch.randn(900_001), "t/v": torch.randn(70_000).half()}
    shards = {}
    for rank in range(3):
        own = {"t/own": torch.full((6, 5), float(rank))}
        shards[rank] = folder.shard(
            {**replicas, **own}, rank, 3, tuple(replicas), {"t/tied": "t/own"}
        )
    for rank in range(3):
        live = {**zeros(replicas), "t/own": torch.zeros(5, 6).t(), "t/tied": torch.zeros(6, 5)}
        restore(device, shards, live, rank=rank)
        assert same({n: live[n] for n in replicas}, replicas)
        assert live["t/own"].unique().tolist() == live["t/tied"].unique().tolist() == [rank]


def damage(shard: Shard, name: str, at: int) -> int:
    leaf = next(leaf for leaf in shard.layout.leaves if leaf.name == name)
    flip(shard, leaf.offset + at)
    return (leaf.offset + at) // UNIT_BYTES


@pytest.mark.parametrize(("name", "at"), [("t/large", 17 * UNIT_BYTES), ("t/scalar", 0)])
def test_a_damaged_unit_is_found_before_anything_is_touched(
    folder: Folder, device: FakeAccelerator, name: str, at: int
) -> None:
    """Also in the last unit, which is not whole."""
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    units = [damage(shard, name, at)]
    with pytest.raises(ShardCorrupt) as raised:
        restore(device, {0: shard}, live)
    assert raised.value.units == tuple(units)
    assert shard.path in raised.value.where
    assert not any(tensor.any() for tensor in live.values())
    assert not device.staging


def test_all_damaged_units_of_a_shard_are_named(folder: Folder, device: FakeAccelerator) -> None:
    tensors = some()
    shard = folder.shard(tensors)
    units = [damage(shard, "t/large", at * UNIT_BYTES) for at in (3, 4, 30)]
    with pytest.raises(ShardCorrupt) as raised:
        restore(device, {0: shard}, zeros(tensors))
    assert raised.value.units == tuple(units)


def test_a_unit_that_is_not_wanted_may_be_damaged(folder: Folder, device: FakeAccelerator) -> None:
    tensors = some()
    shard = folder.shard(tensors)
    damage(shard, "t/large", 3 * UNIT_BYTES)
    live = {"t/odd": torch.zeros(7, 5, dtype=torch.float64)}
    restore(device, {0: shard}, live)
    assert bits(live["t/odd"]) == bits(tensors["t/odd"])


def test_what_is_overwritten_after_the_check(folder: Folder, device: FakeAccelerator) -> None:
    """What was staged does not change; what was not is checked again as it goes."""
    tensors = {"t/x": torch.randn(40 * UNIT_BYTES // 4)}
    live = zeros(tensors)
    shard = folder.shard(tensors)
    with Restoration({0: shard}, 0, accelerators=lambda _: device) as restoration:
        restoration.verify(["t/x"], {"t/x": CPU})
        damage(shard, "t/x", live["t/x"].nbytes - 1)
        restoration.plan([Wanted("t/x", live["t/x"])])
        if device._room > UNIT_BYTES:
            restoration.run()
            assert same(live, tensors)
        else:
            with pytest.raises(ShardCorrupt):
                restoration.run()
            assert not live["t/x"][-1000:].any()


def test_what_lies_beside_staged_leaves_is_staged_too(folder: Folder) -> None:
    device = FakeAccelerator()
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    restore(device, {0: shard}, live, hinted=["t/large"])
    assert same(live, tensors)
    # Nothing was read twice: what was sent is the units, and what came from there the leaves.
    sent = sum(size for *_, size in device.made)
    assert sent == shard.record.image_bytes + sum(tensor.nbytes for tensor in tensors.values())


def test_what_nobody_had_announced_goes_directly(folder: Folder) -> None:
    device = FakeAccelerator()
    tensors = some()
    live = zeros(tensors)
    restore(device, {0: folder.shard(tensors)}, live, hinted=[])
    assert same(live, tensors)
    assert not device.digested


def test_what_changes_on_the_way_is_not_blamed_on_the_shard(folder: Folder) -> None:
    device = FakeAccelerator()
    device.disturb = True
    tensors = {"t/x": torch.randn(20 * UNIT_BYTES // 4)}
    with Restoration({0: folder.shard(tensors)}, 0, accelerators=lambda _: device) as restoration:
        restoration.verify(["t/x"], {"t/x": CPU})
        assert "otherwise than they are in memory" in restoration.problem
        device.disturb = False
        live = zeros(tensors)
        restoration.plan([Wanted("t/x", live["t/x"])])
        restoration.run()
    assert same(live, tensors)


def test_a_device_that_fails_while_staging(folder: Folder) -> None:
    device = FakeAccelerator()
    device.copies_left = 2
    tensors = some()
    live = zeros(tensors)
    with Restoration({0: folder.shard(tensors)}, 0, accelerators=lambda _: device) as restoration:
        restoration.verify(live, dict.fromkeys(live, CPU))
        assert restoration.problem == "refused"
        device.copies_left = 1 << 30
        restoration.plan([Wanted(name, tensor) for name, tensor in live.items()])
        restoration.run()
    assert same(live, tensors)


def test_a_device_that_fails_for_good(folder: Folder) -> None:
    device = FakeAccelerator()
    device.copies_left = 0
    tensors = some()
    with pytest.raises(DeviceFailure, match="refused"):
        restore(device, {0: folder.shard(tensors)}, zeros(tensors))


def test_memory_that_is_pinned_is_sent_from_where_it_is(folder: Folder) -> None:
    """But not the last unit, which the host checks in a buffer of its own."""
    device = FakeAccelerator()
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    arena = numpy.frombuffer(bytearray(Path(shard.path).read_bytes()), dtype=numpy.uint8)
    begin = int(arena.ctypes.data)

    def pinned(path: str, offset: int, size: int) -> int | None:
        assert path == shard.path
        assert shard.offset <= offset < offset + size <= shard.offset + shard.record.image_bytes
        return begin + offset if offset - shard.offset < 24 * UNIT_BYTES else None

    restore(device, {0: shard}, live, pinned=pinned)
    assert same(live, tensors)
    straight = [made for made in device.made if begin <= made[1] < begin + arena.nbytes]
    assert len(straight) == 24 * UNIT_BYTES // BUFFER_BYTES


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    device = FakeAccelerator()
    tensors = some()
    shard = Folder(tmp_path, "nvme").shard(tensors)
    with ShardReader(shard) as reader:
        fill = DeviceFill(device, lambda _: reader)
        path = Path(shard.path)
        path.write_bytes(path.read_bytes()[: -4 * UNIT_BYTES])
        with pytest.raises(FormatInvalid, match="shorter"):
            fill.stage({0: [(0, shard.record.image_bytes)]})
        fill.close()
    assert not device.staging


def test_stretches() -> None:
    unit = UNIT_BYTES
    ranges = [
        (5 * unit, 6 * unit),
        (0, 1),
        (unit, unit),
        (10, 2 * unit + 1),
        (5 * unit + 3, 7 * unit),
    ]
    assert list(stretches(4, ranges)) == [Stretch(4, 0, 3), Stretch(4, 5, 2)]
    assert [(s.first, s.count) for s in stretches(0, [(0, 7 * unit)], 3)] == [
        (0, 3),
        (3, 3),
        (6, 1),
    ]
    assert list(stretches(0, [])) == []


def test_chunks_are_shared_by_short_stretches() -> None:
    device = FakeAccelerator()
    fill = DeviceFill(device, lambda _: pytest.fail("read"))
    most = CHUNK_BYTES // UNIT_BYTES
    wanted = [Stretch(0, 3 * unit, 1) for unit in range(5)]
    device.allocate = lambda size: sizes.append(size) or 1 << 40  # type: ignore[func-returns-value, method-assign]
    sizes: list[int] = []
    placed = fill._placed(wanted)
    assert placed is not None
    assert [stretch.address - (1 << 40) for stretch in placed] == [n * UNIT_BYTES for n in range(5)]
    fill._placed([Stretch(0, 0, most), Stretch(0, most, 2)])
    assert sizes == [5 * UNIT_BYTES, CHUNK_BYTES, 2 * UNIT_BYTES]
