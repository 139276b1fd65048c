"""Bytes come to a device checked, with room for a staging copy and without."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch

from everstep.proto.errors import FormatInvalid, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot import device_fill
from everstep.snapshot.accelerator import DeviceFailure, Table
from everstep.snapshot.device_fill import CHUNK_BYTES, DeviceFill, Pinned
from everstep.snapshot.reading import Shard, ShardReader
from everstep.snapshot.restore import Restoration, Wanted
from everstep.snapshot.stretches import Stretch

from .fake_accelerator import FakeAccelerator
from .shards import Folder, Tensors, bits, flip, needs, some

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
    ahead: list[str] | None = None,
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
        if ahead is not None:
            restoration.begin(needs({n: wanted[n] for n in ahead}, devices))
        restoration.verify(needs(wanted, devices))
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
    assert device.digested == (-(-shard.record.image_bytes // UNIT_BYTES) if staged else 0)


def test_without_threads(folder: Folder, device: FakeAccelerator) -> None:
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    with Restoration({0: shard}, 0, accelerators=lambda _: device) as restoration:
        restoration.verify(needs(live, dict.fromkeys(live, CPU)))
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
        restoration.verify(needs(["t/x"], {"t/x": CPU}))
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
    # Nothing was read twice: what was sent is the units, and what came from there the leaves, and
    # once more the last unit, which the host digests.
    sent = sum(size for *_, size in device.made)
    end = shard.record.image_bytes % UNIT_BYTES
    leaves = sum(tensor.nbytes for tensor in tensors.values())
    assert sent == shard.record.image_bytes + end + leaves


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
        restoration.verify(needs(["t/x"], {"t/x": CPU}))
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
        restoration.verify(needs(live, dict.fromkeys(live, CPU)))
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


class Arena:
    """A shard's file in memory that counts as pinned, as far as `has` says so of a unit."""

    def __init__(self, shard: Shard, has: Callable[[int], bool] = lambda unit: True) -> None:
        self.shard = shard
        self.has = has
        self.asked = 0
        self.memory = numpy.frombuffer(bytearray(Path(shard.path).read_bytes()), dtype=numpy.uint8)

    def pinned(self, path: str, offset: int, size: int) -> int | None:
        self.asked += 1
        begin = offset - self.shard.offset
        assert path == self.shard.path
        assert 0 <= begin < begin + size <= self.shard.record.image_bytes
        units = range(begin // UNIT_BYTES, (begin + size - 1) // UNIT_BYTES + 1)
        here = all(self.has(unit) for unit in units)
        return int(self.memory.ctypes.data) + offset if here else None

    def sent(self, device: FakeAccelerator) -> list[int]:
        """The sizes of what was sent from here."""
        begin = int(self.memory.ctypes.data)
        return [n for _, source, n in device.made if 0 <= source - begin < self.memory.nbytes]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several copies of pinned memory a chunk, and several chunks."""
    monkeypatch.setattr(device_fill, "PINNED_BYTES", 8 * UNIT_BYTES)
    monkeypatch.setattr(device_fill, "CHUNK_BYTES", 16 * UNIT_BYTES)


def test_memory_that_is_pinned_needs_no_ring(folder: Folder) -> None:
    """Nor many copies, nor many questions; its last unit is not whole."""
    device = FakeAccelerator()
    tensors = {"t/x": torch.arange(70 * UNIT_BYTES // 8 + 5)}
    live = zeros(tensors)
    shard = folder.shard(tensors)
    arena = Arena(shard)
    assert restore(device, {0: shard}, live, pinned=arena.pinned) == ""
    assert same(live, tensors)
    assert not device.rings
    assert arena.sent(device) == [64 * UNIT_BYTES, shard.record.image_bytes - 64 * UNIT_BYTES]
    # One call for all of that, one for the last unit, and one that scatters.
    assert device.calls == 3
    assert arena.asked == 3


def test_pinned_memory_in_chunks(folder: Folder, small: None) -> None:
    device = FakeAccelerator()
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    arena = Arena(shard)
    assert restore(device, {0: shard}, live, pinned=arena.pinned) == ""
    assert same(live, tensors)
    assert not device.rings
    assert len(arena.sent(device)) == 6
    assert device.digested == 41


@pytest.mark.parametrize(("name", "at"), [("t/large", 17 * UNIT_BYTES), ("t/scalar", 0)])
def test_a_damaged_unit_in_pinned_memory(folder: Folder, small: None, name: str, at: int) -> None:
    """It is found before any tensor is touched, also where it is the last one and not whole."""
    device = FakeAccelerator()
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    unit = damage(shard, name, at)
    arena = Arena(shard)
    with pytest.raises(ShardCorrupt) as raised:
        restore(device, {0: shard}, live, pinned=arena.pinned)
    assert raised.value.units == (unit,)
    assert not any(tensor.any() for tensor in live.values())
    assert not device.staging
    assert not device.rings


@pytest.mark.parametrize("at", [3 * UNIT_BYTES, 40 * UNIT_BYTES + 5])
def test_pinned_memory_that_is_not_what_the_file_is(folder: Folder, small: None, at: int) -> None:
    """What was sent counts, not what the file holds: it comes again, checked another way."""
    device = FakeAccelerator()
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    arena = Arena(shard)
    arena.memory[shard.offset + at] ^= 1
    problem = restore(device, {0: shard}, live, pinned=arena.pinned)
    assert "otherwise than they are in memory" in problem
    assert same(live, tensors)


@pytest.mark.parametrize(
    "has", [lambda unit: unit < 22, lambda unit: unit >= 22, lambda unit: unit // 8 % 3 == 1]
)
def test_a_source_that_is_pinned_in_part(
    folder: Folder, small: None, has: Callable[[int], bool]
) -> None:
    device = FakeAccelerator()
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    arena = Arena(shard, has)
    assert restore(device, {0: shard}, live, pinned=arena.pinned) == ""
    assert same(live, tensors)
    assert len(device.rings) == 1
    straight = sum(arena.sent(device))
    assert 12 * UNIT_BYTES <= straight < 24 * UNIT_BYTES
    assert device.digested == 41


def test_a_damaged_unit_beside_pinned_memory(folder: Folder, small: None) -> None:
    device = FakeAccelerator()
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    units = (damage(shard, "t/large", 3 * UNIT_BYTES), damage(shard, "t/large", 30 * UNIT_BYTES))
    arena = Arena(shard, lambda unit: unit < 20)
    with pytest.raises(ShardCorrupt) as raised:
        restore(device, {0: shard}, live, pinned=arena.pinned)
    assert raised.value.units == units
    assert not any(tensor.any() for tensor in live.values())
    assert not device.staging


def test_memory_that_is_pinned_no_more_in_the_middle(folder: Folder, small: None) -> None:
    """As when the arena is being closed: the rest comes through a ring, made then."""
    device = FakeAccelerator()
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    arena = Arena(shard)
    arena.has = lambda unit: arena.asked < 4
    assert restore(device, {0: shard}, live, pinned=arena.pinned) == ""
    assert same(live, tensors)
    assert arena.sent(device) == [8 * UNIT_BYTES] * 2
    assert len(device.rings) == 1


def test_what_the_host_digests_is_not_sent_from_memory_of_others(folder: Folder) -> None:
    device = FakeAccelerator(can_digest=False)
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    arena = Arena(shard)
    restore(device, {0: shard}, live, pinned=arena.pinned)
    assert same(live, tensors)
    assert not arena.asked


def test_a_device_that_fails_among_pinned_copies(folder: Folder, small: None) -> None:
    device = FakeAccelerator()
    device.copies_left = 2
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    arena = Arena(shard)
    with Restoration(
        {0: shard}, 0, pinned=arena.pinned, accelerators=lambda _: device
    ) as restoration:
        restoration.verify(needs(live, dict.fromkeys(live, CPU)))
        assert restoration.problem == "refused"
        assert not device.staging
        device.copies_left = 1 << 30
        restoration.plan([Wanted(name, tensor) for name, tensor in live.items()])
        restoration.run()
    assert same(live, tensors)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("guess", ["all", "some", "none"])
def test_what_is_sent_ahead(
    folder: Folder, device: FakeAccelerator, small: None, guess: str, pinned: bool
) -> None:
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    arena = Arena(shard).pinned if pinned else None
    ahead = {"all": list(live), "some": ["t/scalar"], "none": []}[guess]
    assert restore(device, {0: shard}, live, ahead=ahead, pinned=arena) == ""
    assert same(live, tensors)
    units = -(-shard.record.image_bytes // UNIT_BYTES)
    if device._room > UNIT_BYTES and device.can_digest:
        # Once, but for the unit that was sent for nothing.
        assert device.digested == units + (guess == "some" and pinned)


def test_damage_in_what_is_sent_ahead(folder: Folder, device: FakeAccelerator) -> None:
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    unit = damage(shard, "t/large", 17 * UNIT_BYTES)
    with pytest.raises(ShardCorrupt) as caught:
        restore(device, {0: shard}, live, ahead=list(live), pinned=Arena(shard).pinned)
    assert caught.value.units == (unit,)
    assert same(live, zeros(tensors))
    assert not device.staging


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_a_device_that_fails_while_it_is_sent_ahead(
    folder: Folder, small: None, copies: int
) -> None:
    device = FakeAccelerator()
    device.copies_left = copies
    copy = device.copy

    def recovers(table: Table) -> None:
        try:
            copy(table)
        except DeviceFailure:
            device.copies_left = 1 << 30
            raise

    device.copy = recovers  # type: ignore[method-assign]
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    assert restore(device, {0: shard}, live, ahead=list(live), pinned=Arena(shard).pinned) == ""
    assert same(live, tensors)


@pytest.mark.parametrize("pieces", [0, 2])
def test_room_that_turns_out_to_be_none(folder: Folder, small: None, pieces: int) -> None:
    device = FakeAccelerator()
    allocate = device.allocate
    device.allocate = (  # type: ignore[method-assign]
        lambda size: allocate(size) if len(device.staging) < pieces else None
    )
    tensors = some()
    live = zeros(tensors)
    shard = folder.shard(tensors)
    assert restore(device, {0: shard}, live, pinned=Arena(shard).pinned) == ""
    assert same(live, tensors)


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


def test_chunks_are_shared_by_short_stretches() -> None:
    device = FakeAccelerator()
    fill = DeviceFill(device, lambda _: pytest.fail("read"))
    device.allocate = lambda size: sizes.append(size) or 1 << 40  # type: ignore[func-returns-value, method-assign]
    sizes: list[int] = []
    chunk = fill._placed([Stretch(0, 3 * unit, 1) for unit in range(5)])
    assert chunk is not None
    addresses = [stretch.address - (1 << 40) for stretch in chunk.stretches]
    assert addresses == [n * UNIT_BYTES for n in range(5)]
    assert sizes == [5 * UNIT_BYTES]
    assert CHUNK_BYTES % device_fill.PINNED_BYTES == 0
