"""Copy-on-update on a device whose lanes run when the test says so."""

import threading
from random import Random
from typing import Any

import pytest
import torch

from everstep.snapshot import device_capture, device_plan, device_scratch
from everstep.snapshot.device import DeviceOptions
from everstep.snapshot.window import FIRST_BIAS

from .device_captures import MANY, ROUNDS, Setting, Taken, begun, some_setting
from .fake_device import BANDWIDTH

pytestmark = pytest.mark.usefixtures("small_pieces")


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
    assert taken.capture.stats.update_wait_s == pytest.approx(2 * 4 * MANY / BANDWIDTH)


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
    assert taken.capture.stats.update_wait_s == 0.0


def test_digests_may_lie_in_the_updates_lane() -> None:
    """Before the update there, whoever enqueues them."""
    for polled in (True, False):
        setting = Setting({"t/x": torch.randn(MANY)})
        setting.device.lane_of_digests = "update"
        taken = begun(setting)
        if polled:
            taken.capture.poll()
            setting.device.run("update")
        assert taken.capture.fence(1)
        setting.update(lambda tensor: tensor.zero_())
        setting.device.run("update")
        assert not setting.tensors["t/x"].any(), "it waited for a lane that had nothing to do"
        assert not setting.device.lanes["digests"]
        taken.settle(setting.device)
        taken.check()


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
    window.observe_update(3.2 * 4 * MANY / 1e9, None)
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


def test_a_window_that_was_too_large_is_what_the_update_waits_for() -> None:
    setting = Setting({"t/x": torch.randn(4 * MANY)})
    setting.device.window.observe_update(1.0, None)
    setting.device.window.observe_bandwidth(10**9, 1)
    taken = begun(setting)
    taken.capture.poll()
    assert taken.capture.fence(1)
    setting.update()
    setting.device.run("update")
    taken.settle(setting.device)
    taken.check()
    stats = taken.capture.stats
    assert stats.direct_bytes == stats.scratch_bytes == 0
    assert stats.update_wait_s == pytest.approx(4 * 4 * MANY / BANDWIDTH)


def large(monkeypatch: pytest.MonkeyPatch, window_bytes: int) -> Setting:
    """State of which whole units lie in one piece, and of which so much leaves before an update."""
    monkeypatch.setattr(device_plan, "PIECE_BYTES", 3_300_000)
    monkeypatch.setattr(device_scratch, "CHUNK_BYTES", 32 << 20)
    setting = Setting({f"t/{i}": torch.randn(6 * MANY) for i in range(4)})
    setting.device.window.observe_update(window_bytes / 1e9 / FIRST_BIAS, None)
    setting.device.window.observe_bandwidth(10**9, 1)
    return setting


@pytest.mark.parametrize("has_kernels", [True, False])
def test_what_is_beyond_the_window_is_cloned_before_the_update_comes(
    monkeypatch: pytest.MonkeyPatch, has_kernels: bool
) -> None:
    setting = large(monkeypatch, 10_000_000)
    device = setting.device
    device.has_kernels = has_kernels
    taken = begun(setting)
    device.run("update", "digests")
    # Lanes that no update has passed yet: all the same, what was cloned leaves the device.
    for _ in range(ROUNDS):
        taken.capture.poll()
        device.run()
    assert device.copied_off == 24 * 4 * MANY
    assert taken.capture.fence(1)
    setting.update(lambda tensor: tensor.zero_())
    taken.settle(device)
    taken.check()
    stats = taken.capture.stats
    assert 6_000_000 < stats.window_bytes <= 10_000_000
    assert stats.window_bytes + stats.scratch_bytes == 24 * 4 * MANY
    assert stats.update_wait_s == 0.0
    # The digests' pass clones whole units on its way.
    assert (device.fused_clones > 8) == has_kernels


@pytest.mark.parametrize("seed", range(12))
def test_clones_by_two_passes_are_the_state_of_the_snapshot(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = Random(seed)
    setting = large(monkeypatch, random.randrange(28_000_000))
    setting.device.free_for_scratch = random.choice([0, 5 << 20, 1 << 40])
    taken = begun(setting, seed=seed)
    for _ in range(random.choice([0, 5, 50])):
        setting.device.random_step(random)
        taken.capture.poll() if random.random() < 0.5 else None
    assert taken.capture.fence(1)
    setting.update(lambda tensor: tensor.zero_())
    for _ in range(ROUNDS):
        setting.device.random_step(random)
        if random.random() < 0.3 and taken.capture.poll():
            break
    taken.check()
    setting.device.run()
    assert setting.device.used_bytes == 0


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


def test_the_first_captures_leave_without_waiting_for_an_update() -> None:
    """Of a window nothing is known: all is cloned at once, and is off the device before the next
    capture begins. Clones that are made at the update would keep the bus from it."""
    setting = Setting({f"t/{i}": torch.randn(MANY) for i in range(4)})
    taken = begun(setting)
    for _ in range(ROUNDS):
        taken.capture.poll()
        setting.device.run()
    assert setting.device.copied_off == 4 * 4 * MANY
    assert taken.capture.fence(1)
    setting.update(lambda tensor: tensor.zero_())
    taken.settle(setting.device)
    taken.check()
    stats = taken.capture.stats
    assert (stats.window_bytes, stats.scratch_bytes, stats.direct_bytes) == (0, 16 * MANY, 0)
    assert stats.update_wait_s == 0.0


def test_without_an_update_it_ends_by_itself_or_by_finish() -> None:
    setting = Setting({"t/x": torch.randn(MANY), "t/y": torch.randn(9)})
    setting.device.free_for_scratch = 0
    taken = begun(setting)
    setting.device.run()
    for part in taken.capture._parts:
        part.lift()
    taken.settle(setting.device)
    taken.check()
    assert taken.capture.fenced
    assert taken.capture.fence(1)
    assert taken.capture.stats.scratch_bytes == 0
    assert taken.capture.stats.window_bytes == 4 * MANY


def test_an_overdue_update_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_capture, "OVERDUE_S", 0.0)
    monkeypatch.setattr(device_capture, "TRICKLE_BYTES", 700_000)
    setting = Setting({f"t/{i}": torch.randn(MANY) for i in range(4)})
    setting.device.free_for_scratch = 0
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


def test_its_own_thread_enters_every_device() -> None:
    """Else what it does may break a graph that somebody records meanwhile."""
    setting = Setting({"t/x": torch.randn(MANY)})
    taken = begun(setting)
    assert not setting.device.entered
    taken.capture.enter_thread()
    assert setting.device.entered == {threading.get_ident()}
    assert taken.capture.fence(1)
    taken.settle(setting.device)
