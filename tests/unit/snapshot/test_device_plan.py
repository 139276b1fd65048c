"""The tables of a device: every byte once, whole units only, addresses that hold the bytes."""

from random import Random

import numpy
import pytest

from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot import device_plan
from everstep.snapshot.device_plan import (
    BLOCK_BYTES,
    SMALL_BYTES,
    DeviceLeaf,
    cut_rows,
    plan_device,
    split_clones,
    table,
    without_units,
)

BASE = 1 << 50
FAR = 1 << 40
"""Leaf at image offset x lies at FAR + 2 * x, so that addresses tell where a byte belongs."""


def some_leaves(random: Random, multiple: int = 1) -> tuple[list[DeviceLeaf], int]:
    leaves = []
    end = 4096
    for _ in range(random.randrange(1, 30)):
        size = -(-int(4 ** random.uniform(1, 11)) // multiple) * multiple
        if random.random() < 0.8:
            ordered = random.random() < 0.8
            skip = random.choice([0, 64])
            address = FAR + 2 * end if ordered else 0
            guarded = random.random() < 0.7
            leaves.append(DeviceLeaf(end, size, address, guarded, skip, skip + size + 32))
        end += size
    return leaves, end


@pytest.mark.parametrize("seed", range(30))
def test_every_byte_leaves_the_device_once(seed: int) -> None:
    leaves, image_bytes = some_leaves(Random(seed))
    plan = plan_device(leaves, image_bytes, digest=True)
    covered = numpy.zeros(image_bytes, dtype=numpy.uint8)
    for offset, _, size in [*plan.live.tolist(), *plan.drains.tolist()]:
        covered[offset : offset + size] += 1
    wanted = numpy.zeros(image_bytes, dtype=numpy.uint8)
    for leaf in leaves:
        wanted[leaf.offset : leaf.offset + leaf.bytes] += 1
    assert (covered == wanted).all()


def image_offset(plan: device_plan.DevicePlan, leaves: list[DeviceLeaf], address: int) -> int:
    """Which byte of the image lies at an address, the clone block being at BASE."""
    if address < BASE:
        (found,) = {
            leaf.offset + address - leaf.address
            for leaf in leaves
            if leaf.address and leaf.address <= address < leaf.address + leaf.bytes
        }
        return found
    place = address - BASE
    for offset, start, size in plan.drains.tolist():
        if start <= place < start + size:
            return int(offset + place - start)
    for target, source, size in plan.seams.at(BASE).tolist():
        if target <= address < target + size:
            return image_offset(plan, leaves, source + address - target)
    raise AssertionError(f"nothing lies at {address}")


@pytest.mark.parametrize("seed", range(30))
def test_the_digests_read_the_bytes_of_the_unit(seed: int) -> None:
    leaves, image_bytes = some_leaves(Random(seed))
    plan = plan_device(leaves, image_bytes, digest=True)
    for units in plan.digested:
        step = BLOCK_BYTES if units.scattered else UNIT_BYTES
        addresses = units.addresses.at(BASE).reshape(len(units.units), -1)
        assert not (addresses % units.alignment).any()
        for unit, row in zip(units.units.tolist(), addresses.tolist(), strict=True):
            for index, address in enumerate(row):
                begin = unit * UNIT_BYTES + index * step
                for within in (0, step // 2, step - 1):
                    found = image_offset(plan, leaves, address + within)
                    assert found == begin + within


@pytest.mark.parametrize("seed", range(30))
def test_clones_are_made_once_by_one_of_two_passes(seed: int) -> None:
    random = Random(seed)
    leaves, image_bytes = some_leaves(random, 64 if seed % 3 else 1)
    plan = plan_device(leaves, image_bytes, digest=seed % 5 != 0)
    live = cut_rows(plan.live, random.choice([700_000, 2_500_000, 1 << 30]))
    live = live[random.randrange(len(live) + 1) :]
    sizes = -(-live[:, 2] // 256) * 256 + random.choice([0, 8])
    places = BASE + numpy.cumsum(sizes) - sizes
    rows = numpy.stack([live[:, 0], places, live[:, 1], live[:, 2]], axis=1)
    clones, left = split_clones(rows, plan.digested, len(plan.touched))
    copies = [tuple(row) for row in left.tolist()]
    for one, column in zip(plan.digested, clones, strict=True):
        if column is not None:
            assert not one.scattered
            assert not (column % 16).any()
            addresses = one.addresses.at(BASE)[column != 0].tolist()
            copies += [
                (to, by, UNIT_BYTES) for to, by in zip(column[column != 0], addresses, strict=True)
            ]
    made = numpy.zeros(int(sizes.sum()), dtype=numpy.uint8)
    sources = numpy.zeros(len(made), dtype=numpy.int64)
    for target, source, size in copies:
        made[target - BASE : target - BASE + size] += 1
        sources[target - BASE : target - BASE + size] = numpy.arange(source, source + size)
    for _, place, source, size in rows.tolist():
        inside = slice(place - BASE, place - BASE + size)
        assert (made[inside] == 1).all()
        assert (sources[inside] == numpy.arange(source, source + size)).all()
        made[inside] = 0
    assert not made.any()


@pytest.mark.parametrize("seed", range(30))
def test_units_that_are_whole_on_the_device_are_digested_there(seed: int) -> None:
    leaves, image_bytes = some_leaves(Random(seed))
    plan = plan_device(leaves, image_bytes, digest=True)
    held = numpy.zeros(-(-image_bytes // UNIT_BYTES) * UNIT_BYTES, dtype=bool)
    for leaf in leaves:
        held[leaf.offset : leaf.offset + leaf.bytes] = True
    by_unit = held.reshape(-1, UNIT_BYTES)
    assert sorted(plan.device_units.tolist()) == numpy.flatnonzero(by_unit.all(axis=1)).tolist()
    assert (plan.touched == by_unit.any(axis=1)).all()
    assert len(plan_device(leaves, image_bytes, digest=False).device_units) == 0


@pytest.mark.parametrize("seed", range(30))
def test_clones_have_places_of_their_own(seed: int) -> None:
    leaves, image_bytes = some_leaves(Random(seed))
    plan = plan_device(leaves, image_bytes, digest=True)
    assert plan.places.keys() == {i for i, leaf in enumerate(leaves) if not leaf.is_live}
    ends = 0
    for index, place in sorted(plan.places.items(), key=lambda entry: entry[1]):
        leaf = leaves[index]
        assert place >= ends
        ends = place + (leaf.bytes if leaf.address else leaf.value_bytes)
        skip = 0 if leaf.address else leaf.skip
        assert (place + skip - leaf.offset) % 16 == 0, "alignment in the image is kept"
    assert ends <= plan.block_bytes
    copied = [*plan.gathers.at(BASE).tolist(), *plan.copies.at(BASE).tolist()]
    assert sorted(source for _, source, _ in copied) == sorted(
        leaves[index].address for index in plan.places if leaves[index].address
    )


def test_small_unguarded_and_unordered_leaves_are_cloned() -> None:
    live = DeviceLeaf(0, SMALL_BYTES, FAR, True)
    assert live.is_live
    assert not DeviceLeaf(0, SMALL_BYTES - 1, FAR, True).is_live
    assert not DeviceLeaf(0, SMALL_BYTES, FAR, False).is_live
    assert not DeviceLeaf(0, SMALL_BYTES, 0, True).is_live


def test_pieces_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_plan, "PIECE_BYTES", 1000)
    plan = plan_device([DeviceLeaf(4096, 70_000, FAR, True)], 74_096, digest=False)
    assert plan.live[:, 2].max() == 1000
    assert plan.live[:, 2].sum() == 70_000
    assert plan.live[1].tolist() == [5096, FAR + 1000, 1000]


def test_rows_cut_and_without_units() -> None:
    rows = table([(0, 100, 3 * UNIT_BYTES), (3 * UNIT_BYTES, 9, 10)])
    cut = cut_rows(rows, UNIT_BYTES * 2)
    assert cut[:, 2].tolist() == [2 * UNIT_BYTES, UNIT_BYTES, 10]
    assert cut_rows(rows, 1 << 40) is rows
    skipped = numpy.array([False, True, False, True])
    assert without_units(rows, skipped).tolist() == [
        [0, 100, UNIT_BYTES],
        [2 * UNIT_BYTES, 100 + 2 * UNIT_BYTES, UNIT_BYTES],
    ]
    assert without_units(rows, ~skipped | True).tolist() == []
    assert without_units(rows, skipped & False).tolist() == rows.tolist()
