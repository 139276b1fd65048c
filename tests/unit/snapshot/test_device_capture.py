"""Copy-on-update on a device whose lanes run when the test says so."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch

from everstep.kernels.digest import digest_units
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot import device_capture, device_plan, device_scratch, units
from everstep.snapshot.capture import Capture, CapturePlan, dtype_name
from everstep.snapshot.device import DeviceOptions
from everstep.snapshot.layout import Layout, LeafSpec, Part, pack
from everstep.snapshot.slot_digests import SlotDigests

from .fake_device import FakeArena, FakeDevice, FakeDevices

Tensors = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], object]
MANY = 300_000
ROUNDS = 20_000


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tensors of a test have many pieces and chunks."""
    monkeypatch.setattr(device_plan, "PIECE_BYTES", 333_000)
    monkeypatch.setattr(device_scratch, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(device_capture, "MEASURED_BYTES", 1 << 16)


def layout_of(tensors: Tensors, ranges: dict[str, tuple[int, int]]) -> Layout:
    specs = []
    for name, tensor in tensors.items():
        start, stop = ranges.get(name, (0, tensor.nbytes))
        shape = tuple(tensor.shape)
        specs.append(LeafSpec(name, dtype_name(tensor.dtype), shape, start, stop, name in ranges))
    return pack([Part("t", "tree", "builtins.dict")], specs, {}, {})


@dataclass
class Setting:
    """Tensors, the device that some of them are on, and what is asked of the capture."""

    tensors: Tensors
    device: FakeDevice = field(default_factory=FakeDevice)
    on_device: frozenset[str] | None = None
    guarded: frozenset[str] | None = None
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    options: DeviceOptions = field(default_factory=DeviceOptions)
    pinned: bool = True
    contents: SlotDigests | None = None

    def plan(self, device: FakeDevice | None = None) -> CapturePlan:
        devices = FakeDevices()
        for name, tensor in self.tensors.items():
            if tensor.numel() and (self.on_device is None or name in self.on_device):
                devices.put(tensor, device or self.device)
        arena: Any = FakeArena(pinned=self.pinned)
        guarded = frozenset(self.tensors) if self.guarded is None else self.guarded
        return CapturePlan(
            layout_of(self.tensors, self.ranges),
            self.tensors,
            guarded,
            options=self.options,
            arena=arena,
            devices=devices,
            contents=self.contents,
        )

    def image(self) -> bytes:
        """What a capture of this moment must give, by the CPU alone."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        plan = CapturePlan(layout_of(tensors, self.ranges), tensors, frozenset(tensors))
        slot = bytearray(plan.layout.image_bytes)
        capture = Capture(plan, memoryview(slot), seed=1)
        capture.begin()
        assert capture.finish(10)
        return bytes(slot)

    def update(self, change: Change = lambda tensor: tensor.add_(1)) -> None:
        """An optimizer's step, and whatever user code does behind it."""
        for tensor in self.tensors.values():
            self.device.train(tensor, change) if self.is_on(tensor) else change(tensor)

    def is_on(self, tensor: torch.Tensor) -> bool:
        names = [name for name, other in self.tensors.items() if other is tensor]
        return self.on_device is None or names[0] in self.on_device


@dataclass
class Taken:
    """A capture with its slot."""

    capture: Capture
    slot: bytearray
    expected: bytes

    def settle(self, device: FakeDevice) -> None:
        """Run everything to the end, without an update."""
        for _ in range(ROUNDS):
            device.run()
            if self.capture.poll():
                return
        raise AssertionError("it does not end")

    def check(self) -> None:
        assert self.capture.problem == ""
        assert self.capture.torn == ()
        assert self.capture.complete
        assert bytes(self.slot) == self.expected
        assert bytes(self.capture.digests) == digest_units(self.slot, UNIT_BYTES)


def begun(
    setting: Setting,
    *,
    seed: int = 7,
    plan: CapturePlan | None = None,
    slot: bytearray | None = None,
    slot_index: int = 0,
) -> Taken:
    # The state that the host knows: as if the device had done everything so far.
    setting.device.run("update")
    plan = plan or setting.plan()
    slot = bytearray(b"\xa5" * plan.layout.image_bytes) if slot is None else slot
    expected = setting.image()
    capture = Capture(plan, memoryview(slot), seed, slot_index=slot_index)
    capture.begin()
    return Taken(capture, slot, expected)


def some_tensors(random: Random) -> Tensors:
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
    tensors: Tensors = {}
    for number in range(random.randrange(1, 14)):
        dtype = random.choice(dtypes)
        size = int(4 ** random.uniform(0, 10))
        tensor = torch.randint(0, 100, (size,)).to(dtype)
        if random.random() < 0.2 and size > 4:
            tensor = tensor[: size // 2 * 2].view(-1, 2).t()
        tensors[f"t/{number}"] = tensor
    tensors["t/empty"] = torch.empty(0)
    return tensors


def some_setting(random: Random) -> Setting:
    tensors = some_tensors(random)
    names = list(tensors)
    device = FakeDevice(has_kernels=random.random() < 0.8)
    device.free_for_scratch = random.choice([0, 1 << 20, 1 << 40, 1 << 40])
    if random.random() < 0.7:
        device.window.observe_update(random.uniform(0, 0.01), None)
        device.window.observe_bandwidth(10**9, 1)
    ranges = {}
    for name in names:
        tensor = tensors[name]
        if random.random() < 0.15 and tensor.numel() > 1:
            cut = sorted(random.randrange(tensor.numel() + 1) for _ in range(2))
            element = tensor.element_size()
            ranges[name] = (cut[0] * element, cut[1] * element)
    return Setting(
        tensors,
        device,
        frozenset(name for name in names if random.random() < 0.85),
        frozenset(name for name in names if random.random() < 0.8),
        ranges,
        DeviceOptions(
            scratch_bytes=random.choice([None, None, 0, 1 << 20]),
            digests=random.choice(["device", "device", "host"]),
        ),
        pinned=random.random() < 0.8,
    )


@pytest.mark.parametrize("seed", range(60))
def test_a_capture_is_the_state_of_the_snapshot_however_the_lanes_run(seed: int) -> None:
    """Lanes run in random order and speed; the update comes when it wants to."""
    random = Random(seed)
    torch.manual_seed(seed)
    setting = some_setting(random)
    device = setting.device
    taken = begun(setting, seed=seed)
    for _ in range(random.choice([0, 1, 5, 50])):
        device.random_step(random)
        taken.capture.poll() if random.random() < 0.5 else None
    fence_or_run(setting, taken, random)
    setting.update()
    setting.update(lambda tensor: tensor.zero_())
    for _ in range(ROUNDS):
        device.random_step(random)
        if random.random() < 0.3 and taken.capture.poll():
            break
    taken.check()
    device.run()
    assert device.used_bytes == 0
    assert device.tenants == []


def fence_or_run(setting: Setting, taken: Taken, random: Random) -> None:
    """The fence, on a thread that the device does not wait for unless it has to."""
    device = setting.device
    needs_device = not setting.pinned
    if not needs_device:
        assert taken.capture.fence(10)
        assert taken.capture.fenced
        return
    # Without pinning the host may have to wait: let the lanes run meanwhile.
    pump = device.mark

    def mark_and_run(*arguments: Any, **keywords: Any) -> Any:
        mark = pump(*arguments, **keywords)
        device.run("update", "copies", "digests")
        return mark

    device.mark = mark_and_run  # type: ignore[method-assign]
    try:
        assert taken.capture.fence(10)
    finally:
        device.mark = pump  # type: ignore[method-assign]
    assert random is not None


def test_copies_that_run_late_make_the_update_wait() -> None:
    """The host does everything at once; then the update's lane runs as far as it can, first."""
    setting = Setting({"t/x": torch.randn(MANY), "t/y": torch.randn(MANY)})
    setting.options = DeviceOptions(scratch_bytes=0)
    taken = begun(setting)
    assert taken.capture.fence(1)
    setting.update(lambda tensor: tensor.zero_())
    setting.device.run("update")
    assert setting.tensors["t/x"].any(), "the update did not wait for the copy"
    taken.settle(setting.device)
    assert not setting.tensors["t/x"].any()
    taken.check()
    assert taken.capture.stats.direct_bytes == 2 * 4 * MANY


def test_with_scratch_the_update_waits_for_no_copy() -> None:
    setting = Setting({"t/x": torch.randn(MANY)})
    taken = begun(setting)
    assert taken.capture.fence(1)
    setting.update(lambda tensor: tensor.zero_())
    setting.device.run("update")
    assert setting.tensors["t/x"].any(), "the update did not wait for the digests"
    setting.device.run("update", "digests")
    assert not setting.tensors["t/x"].any()
    assert setting.device.copied_off == 0
    taken.settle(setting.device)
    taken.check()
    assert taken.capture.stats.scratch_bytes == 4 * MANY


def test_it_does_not_end_before_the_digests_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may become ready on the device between a look at them and the look whether all is."""
    setting = Setting({"t/x": torch.randn(4 * MANY)})
    taken = begun(setting)
    assert taken.capture.fence(1)
    with monkeypatch.context() as patched:
        patched.setattr(device_capture.DeviceCapture, "_look", lambda self: None)
        for _ in range(ROUNDS):
            setting.device.run()
            assert not taken.capture.poll()
    taken.settle(setting.device)
    taken.check()


def test_the_window_is_copied_before_the_update_and_the_rest_cloned() -> None:
    setting = Setting({f"t/{i}": torch.randn(MANY) for i in range(4)})
    window = setting.device.window
    window.observe_update(2.5 * 4 * MANY / 1e9, None)
    window.observe_bandwidth(10**9, 1)
    taken = begun(setting)
    taken.capture.poll()
    setting.device.run("copies")
    assert taken.capture.fence(1)
    stats = taken.capture._parts[0].stats
    total = 4 * 4 * MANY
    assert 2 * 4 * MANY < stats.window_bytes < 2.4 * 4 * MANY
    assert stats.window_bytes + stats.scratch_bytes == total
    setting.update()
    taken.settle(setting.device)
    taken.check()


def test_the_fence_fills_the_window_if_the_thread_did_not() -> None:
    """The host may be a whole step ahead of the device."""
    setting = Setting({f"t/{i}": torch.randn(MANY) for i in range(4)})
    setting.device.window.observe_update(1.0, None)
    setting.device.window.observe_bandwidth(10**9, 1)
    taken = begun(setting)
    assert taken.capture.fence(1)
    assert taken.capture._parts[0].stats.window_bytes == 4 * 4 * MANY
    setting.update(lambda tensor: tensor.zero_())
    setting.device.run("update")
    assert setting.tensors["t/0"].any()
    taken.settle(setting.device)
    taken.check()


def test_bandwidth_and_time_are_measured() -> None:
    setting = Setting({f"t/{i}": torch.randn(MANY) for i in range(4)})
    device = setting.device
    plan = setting.plan()
    for index in range(3):
        taken = begun(setting, plan=plan, seed=index)
        device.run()
        device.work(0.003)
        taken.capture.poll()
        assert taken.capture.fence(1)
        setting.update()
        taken.settle(device)
        taken.check()
    assert device.window.compute_s is not None
    assert device.window.bytes(1 << 40) > 0


def test_without_an_update_it_ends_by_itself_or_by_finish() -> None:
    setting = Setting({"t/x": torch.randn(MANY), "t/y": torch.randn(9)})
    taken = begun(setting)
    setting.device.run()
    for part in taken.capture._parts:
        part.lift()
    taken.settle(setting.device)
    taken.check()
    assert taken.capture.fenced
    assert taken.capture.fence(1)
    assert taken.capture.stats.scratch_bytes == 0


def test_an_overdue_update_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_capture, "OVERDUE_S", 0.0)
    monkeypatch.setattr(device_capture, "TRICKLE_BYTES", 700_000)
    setting = Setting({f"t/{i}": torch.randn(MANY) for i in range(4)})
    taken = begun(setting)
    taken.capture.poll()
    assert 0 < taken.capture._parts[0].stats.window_bytes <= 700_000
    taken.settle(setting.device)
    taken.check()


def test_the_second_fence_has_nothing_to_do() -> None:
    setting = Setting({"t/x": torch.randn(MANY)})
    taken = begun(setting)
    assert taken.capture.fence(1)
    before = len(setting.device.lanes["update"])
    assert taken.capture.fenced
    assert taken.capture.fence(1)
    assert len(setting.device.lanes["update"]) == before
    setting.update()
    setting.update()
    taken.settle(setting.device)
    taken.check()


def test_a_fence_while_a_graph_is_recorded_does_nothing() -> None:
    setting = Setting({"t/x": torch.randn(MANY)})
    taken = begun(setting)
    setting.device.recording = True
    assert taken.capture.fence(1)
    assert not taken.capture.fenced
    setting.device.recording = False
    assert taken.capture.fence(1)
    assert taken.capture.fenced


@pytest.mark.parametrize("memory", [0, 900_000, 1_500_000])
def test_scratch_that_cannot_be_had_makes_the_update_wait(memory: int) -> None:
    setting = Setting({f"t/{i}": torch.randn(MANY) for i in range(3)})
    setting.device.memory_bytes = memory
    setting.options = DeviceOptions(digests="host")
    taken = begun(setting)
    assert taken.capture.fence(1)
    setting.update()
    taken.settle(setting.device)
    taken.check()
    assert taken.capture.stats.direct_bytes > 0
    total = taken.capture.stats.direct_bytes + taken.capture.stats.scratch_bytes
    assert total == 3 * 4 * MANY


@pytest.mark.parametrize("lies", [0, 1 << 30])
def test_no_memory_for_what_may_change_drops_the_copy_with_the_reason(lies: int) -> None:
    setting = Setting({"t/x": torch.randn(MANY)}, guarded=frozenset())
    setting.device.memory_bytes = 1000
    setting.device.lies_about_room = lies
    taken = begun(setting)
    assert taken.capture.fenced
    assert taken.capture.fence(1)
    taken.settle(setting.device)
    assert not taken.capture.complete
    assert "bytes for clones" in taken.capture.problem


def test_a_copy_that_the_driver_refuses_drops_the_capture() -> None:
    setting = Setting({"t/x": torch.randn(MANY)})
    taken = begun(setting)
    setting.device.fail_copies = True
    assert taken.capture.fence(1)
    setting.update()
    taken.settle(setting.device)
    assert not taken.capture.complete
    assert "cudaErrorInvalidValue" in taken.capture.problem
    assert setting.device.used_bytes == 0


@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_write_that_the_version_shows_is_noticed(has_kernels: bool) -> None:
    setting = Setting({"t/x": torch.randn(MANY), "t/y": torch.randn(MANY)})
    setting.device.has_kernels = has_kernels
    taken = begun(setting)
    setting.tensors["t/y"].add_(0)
    assert taken.capture.fence(1)
    setting.update()
    taken.settle(setting.device)
    assert taken.capture.torn == ("t/y",)


def test_a_write_that_only_the_sample_shows_is_noticed() -> None:
    setting = Setting({"t/x": torch.randn(MANY), "t/y": torch.randn(MANY)})
    taken = begun(setting)
    setting.device.run("update")
    setting.tensors["t/x"].data.add_(1)
    assert taken.capture.fence(1)
    setting.update()
    taken.settle(setting.device)
    assert taken.capture.torn == ("t/x",)


def test_a_write_is_noticed_without_an_update_too() -> None:
    setting = Setting({"t/x": torch.randn(MANY), "t/y": torch.randn(MANY)})
    taken = begun(setting)
    taken.capture._parts[0].lift()
    taken.capture.poll()
    setting.device.run("update")
    setting.tensors["t/x"].data.add_(1)
    taken.settle(setting.device)
    assert taken.capture.torn == ("t/x",)


def test_replaced_data_is_still_that_of_the_snapshot() -> None:
    """`p.data = ...` leaves the old storage to the capture alone."""
    setting = Setting({"t/x": torch.nn.Parameter(torch.randn(MANY))})
    taken = begun(setting)
    setting.tensors["t/x"].data = torch.zeros(MANY)
    assert taken.capture.fence(1)
    taken.settle(setting.device)
    taken.check()


def test_two_captures_in_flight() -> None:
    setting = Setting({f"t/{i}": torch.randn(MANY) for i in range(3)})
    plan = setting.plan()
    first = begun(setting, plan=plan, seed=1)
    assert first.capture.fence(1)
    setting.update()
    # The first one's scratch has not left the device when the second snapshot is taken.
    setting.device.run("update", "digests")
    second = begun(setting, plan=plan, seed=2, slot_index=1)
    assert first.slot is not second.slot
    for _ in range(3):
        second.capture.poll()
    assert second.capture.fence(1)
    setting.update(lambda tensor: tensor.zero_())
    first.capture.poll()
    second.settle(setting.device)
    first.settle(setting.device)
    first.check()
    second.check()
    assert setting.device.used_bytes == 0


def test_given_up_at_any_moment() -> None:
    for moment in range(12):
        setting = Setting({"t/x": torch.randn(MANY), "t/y": torch.randn(9)})
        taken = begun(setting)
        random = Random(moment)
        for _ in range(moment):
            setting.device.random_step(random)
            taken.capture.poll()
        if moment % 2:
            assert taken.capture.fence(1)
        taken.capture.give_up()
        assert taken.capture.fence(1)
        setting.update()
        taken.settle(setting.device)
        assert taken.capture.done.is_set()
        assert not taken.capture.complete
        assert setting.device.used_bytes == 0


def test_it_is_not_done_while_the_device_may_write_to_the_slot() -> None:
    setting = Setting({"t/x": torch.randn(MANY)})
    taken = begun(setting)
    taken.capture._parts[0].lift()
    taken.capture.poll()
    taken.capture.give_up()
    assert not taken.capture.done.is_set()
    setting.device.run()
    assert taken.capture.poll()


def test_released_too_early_its_memory_is_kept_for_the_device() -> None:
    setting = Setting({"t/x": torch.randn(MANY)})
    taken = begun(setting)
    assert taken.capture.fence(1)
    taken.capture.poll()
    taken.capture.release()
    assert setting.device.used_bytes > 0
    setting.device.run()
    begun(setting)
    setting.device.run()
    assert len(setting.device.tenants) == 1


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
