"""What goes wrong with a capture on a device, and what the update does then."""

from random import Random

import pytest
import torch

from everstep.snapshot.device import DeviceOptions

from .device_captures import MANY, Setting, begun

pytestmark = pytest.mark.usefixtures("small_pieces")


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


@pytest.mark.parametrize("budget", [1_200_000, 2_500_000, 3_300_000])
def test_clones_take_no_more_than_they_may(budget: int) -> None:
    """Of chunks of 1 MiB; there would be memory for more."""
    setting = Setting({f"t/{i}": torch.randn(MANY) for i in range(6)})
    setting.options = DeviceOptions(scratch_bytes=budget, digests="host")
    assert setting.device.used_bytes == 0
    taken = begun(setting)
    assert taken.capture.fence(1)
    assert budget - (1 << 20) < setting.device.used_bytes <= budget
    setting.update()
    taken.settle(setting.device)
    taken.check()
    stats = taken.capture.stats
    assert 0 < stats.scratch_bytes <= budget
    assert stats.direct_bytes + stats.scratch_bytes == 6 * 4 * MANY


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
