"""Digests, units that are left out, and several devices."""

import time
from typing import Any

import pytest
import torch

from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot import capture, units
from everstep.snapshot.capture_plan import CapturePlan
from everstep.snapshot.device import DeviceOptions
from everstep.snapshot.device_capture import DeviceCapture
from everstep.snapshot.slot_digests import SlotDigests
from everstep.snapshot.window import FIRST_BIAS, Window

from .device_captures import MANY, ROUNDS, Setting, Taken, begun, layout_of
from .fake_device import FakeArena, FakeDevice, FakeDevices

pytestmark = pytest.mark.usefixtures("small_pieces")


class Incremental:
    """Snapshots of a frozen and a changing tensor, into two slots in turn."""

    def __init__(self) -> None:
        self.frozen, self.changing = torch.randn(4 * MANY), torch.randn(4 * MANY)
        tensors = {"t/frozen": self.frozen, "t/changing": self.changing}
        self.setting = Setting(tensors, contents=SlotDigests())
        self.setting.options = DeviceOptions(incremental=True)
        self.device = self.setting.device
        self.plan = self.setting.plan()
        self.slots = [bytearray(self.plan.layout.image_bytes) for _ in range(2)]
        self.most = 4 * 4 * MANY // UNIT_BYTES

    def take(self, step: int, *, digests_first: bool, polls: int = 1) -> Taken:
        """One snapshot, up to its end, with an update."""
        number = step % 2
        slot = self.slots[number]
        taken = begun(self.setting, seed=step, plan=self.plan, slot=slot, slot_index=number)
        if digests_first:
            taken.capture.poll()
            self.device.run("update", "digests")
        for _ in range(polls):
            taken.capture.poll()
        assert taken.capture.fence(1)
        self.device.train(self.changing, lambda tensor: tensor.add_(1))
        taken.settle(self.device)
        return taken


@pytest.mark.parametrize("digests_first", [True, False])
@pytest.mark.parametrize("polls", [0, 1, 2])
def test_unchanged_units_are_left_out(digests_first: bool, polls: int) -> None:
    steps = Incremental()
    for step in range(6):
        steps.device.copied_off = 0
        taken = steps.take(step, digests_first=digests_first, polls=polls)
        taken.check()
        stats = taken.capture.stats
        if step < 2:
            assert stats.skipped_units == 0
            continue
        assert steps.most - 2 <= stats.skipped_units <= steps.most
        assert steps.device.copied_off < 4 * 4 * MANY + 2 * UNIT_BYTES
        if step >= 2:
            # Expected to be equal, they are not even cloned.
            assert stats.scratch_bytes < 4 * 4 * MANY + 2 * UNIT_BYTES


def test_digests_that_copies_wait_for_are_not_behind_the_training() -> None:
    steps = Incremental()
    steps.device.lane_of_digests = "update"
    for step in range(2):
        steps.take(step, digests_first=True)
    taken = begun(steps.setting, seed=2, plan=steps.plan, slot=steps.slots[0], slot_index=0)
    steps.device.run("update")
    steps.device.work(1.0)
    taken.capture.poll()
    steps.device.run("digests", "copies")
    taken.capture.poll()
    (part,) = steps.device.tenants
    assert isinstance(part, DeviceCapture)
    assert part.digests
    assert taken.capture.fence(1)
    taken.settle(steps.device)
    taken.check()
    assert taken.capture.stats.skipped_units >= steps.most - 2


@pytest.mark.parametrize("period", [2.2, 4.0])
def test_what_cannot_leave_ahead_of_the_update_has_the_window_that_it_needs(period: float) -> None:
    """Else the bus pauses before the update, and the next captures find it taken."""
    steps = Incremental()
    for step in range(2):
        steps.take(step, digests_first=True)
    size = 4 * 4 * MANY
    window = steps.device.window = Window()
    window.observe_update(size / 1e9, None)
    window.observe_bandwidth(10**9, 1)
    for at_s in (-1000.0, -1000.0 + period * size / 1e9):
        window.began(time.monotonic() + at_s)
    usual = FIRST_BIAS * size
    taken = steps.take(2, digests_first=True)
    taken.check()
    if period > 3:
        assert 0.8 * usual < taken.capture.stats.window_bytes <= usual
    else:
        assert usual < taken.capture.stats.window_bytes <= 0.81 * size


@pytest.mark.parametrize("digests_first", [True, False])
@pytest.mark.parametrize("position", [0, 2 * MANY, 4 * MANY - 1])
def test_a_changed_unit_is_never_left_out(digests_first: bool, position: int) -> None:
    """If it was expected to be equal, and the update came before the digests, there is no copy."""
    steps = Incremental()
    outcomes = []
    for step in range(9):
        if step == 5:
            steps.frozen.view(torch.int32)[position] ^= 1
        taken = steps.take(step, digests_first=digests_first)
        outcomes.append(taken.capture.complete)
        if taken.capture.complete:
            taken.check()
        else:
            assert "units changed" in taken.capture.problem
    lost = [] if digests_first or position != 2 * MANY else [5]
    if position == 2 * MANY:
        assert [step for step, complete in enumerate(outcomes) if not complete] == lost
    else:
        assert outcomes.count(False) <= 1


def test_a_slot_that_somebody_wrote_to_is_copied_again() -> None:
    setting = Setting({"t/x": torch.randn(4 * MANY)})
    setting.options = DeviceOptions(incremental=True)
    setting.contents = SlotDigests()
    plan = setting.plan()
    slot = bytearray(plan.layout.image_bytes)
    for step in range(2):
        taken = begun(setting, seed=step, plan=plan, slot=slot)
        assert taken.capture.fence(1)
        taken.settle(setting.device)
        taken.check()
        slot[UNIT_BYTES:] = bytes(len(slot) - UNIT_BYTES)
    assert taken.capture.stats.skipped_units <= 1


def test_a_unit_that_differs_in_the_slot_is_found_by_the_check() -> None:
    setting = Setting({"t/x": torch.randn(4 * MANY)})
    setting.options = DeviceOptions(check_units=1 << 20)
    taken = begun(setting)
    assert taken.capture.fence(1)
    copy = setting.device._moving

    def flipped(lane: Any, target: int, source: int, size: int) -> Any:
        return copy(lane, target, source, size - 1 if lane == "copies" else size)

    setting.device._moving = flipped  # type: ignore[method-assign]
    taken.settle(setting.device)
    assert not taken.capture.complete
    assert "is not what fake:0 held" in taken.capture.problem


def test_several_devices() -> None:
    first, second = FakeDevice(), FakeDevice()
    tensors = {f"t/{i}": torch.randn(MANY) for i in range(4)}
    setting = Setting(tensors, first)
    devices = FakeDevices()
    for number, tensor in enumerate(tensors.values()):
        devices.put(tensor, [first, second][number % 2])
    arena: Any = FakeArena(pinned=True)
    plan = CapturePlan(
        layout_of(tensors, {}), tensors, frozenset(tensors), arena=arena, devices=devices
    )
    taken = begun(setting, plan=plan)
    assert taken.capture.fence(1)
    for number, tensor in enumerate(tensors.values()):
        [first, second][number % 2].train(tensor, lambda tensor: tensor.zero_())
    second.run()
    first.run()
    for _ in range(ROUNDS):
        first.run()
        second.run()
        if taken.capture.poll():
            break
    taken.check()


def test_replica_samples_are_of_the_snapshot_and_in_the_order_of_the_layout() -> None:
    tensors = {"t/a": torch.randn(MANY), "t/b": torch.randn(100), "t/c": torch.randn(MANY)}
    ranges = {name: (0, tensor.nbytes // 8 * 4) for name, tensor in tensors.items()}
    found = []
    for changed in ["", "t/b", "t/c"]:
        if changed:
            tensors[changed].data[-1] += 1
        setting = Setting(tensors, on_device=frozenset({"t/a", "t/c"}), ranges=ranges)
        taken = begun(setting)
        assert taken.capture.fence(1)
        setting.device.train(tensors["t/a"], lambda tensor: tensor.zero_())
        taken.settle(setting.device)
        samples = taken.capture.replica_samples()
        found.append([samples[start : start + 8] for start in range(0, 24, 8)])
        setting.tensors["t/a"].copy_(torch.ones(MANY))
        tensors["t/a"] = torch.ones(MANY)
    assert [one == two for one, two in zip(found[1], found[2], strict=True)] == [True, True, False]
    assert found[0][1] != found[1][1]


def test_the_carrying_thread_ends_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting({"t/x": torch.randn(MANY)})
    taken = begun(setting)
    assert taken.capture.fence(1)
    taken.capture.carry(0.01)
    assert not taken.capture.done.is_set()
    poll = taken.capture.poll

    def run_and_poll() -> bool:
        setting.device.run()
        return poll()

    monkeypatch.setattr(taken.capture, "poll", run_and_poll)
    assert taken.capture.finish(10)
    taken.check()


@pytest.mark.parametrize("awaited", [False, True])
def test_looks_that_nothing_comes_of_are_fewer_unless_somebody_waits(
    awaited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting({"t/x": torch.randn(MANY)}, pinned=False)
    taken = begun(setting)
    pauses: list[float] = []

    def wait(timeout_s: float) -> bool:
        pauses.append(timeout_s)
        if not len(pauses) % 10:
            setting.device.run()
        return False

    monkeypatch.setattr(taken.capture.done, "wait", wait)
    taken.capture.finish(10) if awaited else taken.capture.carry(10)
    taken.check()
    shortest, longest = capture._SHORTEST_PAUSE_S, capture._LONGEST_PAUSE_S
    assert len(pauses) > 10
    if awaited:
        assert set(pauses) == {shortest}
    else:
        assert pauses[9] == longest
        assert pauses[10] == shortest, "something came of it"


def test_digests_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "DIGEST_THREADS", 3)
    monkeypatch.setattr(units, "DIGEST_UNITS", 1)
    setting = Setting({"t/x": torch.randn(8 * MANY)})
    setting.options = DeviceOptions(digests="host")
    taken = begun(setting)
    assert taken.capture.fence(1)
    setting.update()
    taken.settle(setting.device)
    taken.check()
