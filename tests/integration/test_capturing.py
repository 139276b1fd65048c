"""Snapshots are lazy, and never anything but the state of their step."""

import gc
import logging
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim

import everstep
from everstep.client.limits import Limits
from everstep.proto.errors import DeadlineExceeded, Refused
from everstep.snapshot.capture import Capture

from .conftest import Hold, eventually
from .runs import make, one_step, restored
from .states import exact, states

Connect = Callable[..., everstep.Client]
Objects = dict[str, Any]
HoldPoint = Callable[..., Hold]


@pytest.fixture
def trained() -> Objects:
    objects = make()
    one_step(objects)
    return objects


def in_thread(action: Callable[[], Any]) -> tuple[threading.Thread, threading.Event]:
    finished = threading.Event()

    def run() -> None:
        action()
        finished.set()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, finished


def stuck(
    connect: Connect, hold: HoldPoint, objects: Objects
) -> tuple[everstep.Client, Hold, everstep.Snapshot]:
    """A snapshot whose copy is stuck in its first block."""
    client = connect()
    client.attach(**objects)
    point = hold()
    handle = client.snapshot(1)
    point.reached()
    return client, point, handle


def test_only_its_own_thread_says_that_it_carries_a_capture(
    connect: Connect, trained: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the user's must not be told to break no graph: it may be recording one."""
    entered: list[str] = []
    monkeypatch.setattr(
        Capture, "enter_thread", lambda self: entered.append(threading.current_thread().name)
    )
    client = connect()
    client.attach(**trained)
    assert client.snapshot(1).wait()
    assert [name.rpartition("_")[0] for name in entered] == ["everstep-capture"]


def test_snapshot_returns_before_the_copy_and_the_fence_completes_it(
    connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    client, point, handle = stuck(connect, hold, trained)
    assert handle.state == "copying"
    assert not handle.done()
    before = states(trained)

    thread, finished = in_thread(lambda: one_step(trained))
    # The update waits for the copy. Without a fence it would be over long before.
    assert not finished.wait(0.3)
    assert states(trained) == before
    point.open()
    thread.join(60)
    assert finished.is_set()
    assert states(trained) != before
    one_step(trained)
    assert handle.wait()
    assert client.stats.dropped == 0
    assert restored(connect, make(2), 1) == before


def test_only_what_the_optimizer_owns_is_copied_lazily(connect: Connect, hold: HoldPoint) -> None:
    """Buffers, averages and small things may change at once after snapshot()."""
    objects = make()
    objects["model"].register_buffer("running", torch.randn(96, 96))
    objects["average"] = {"weights": torch.randn(96, 96), "count": 1}
    one_step(objects)
    before = states(objects)
    _, point, handle = stuck(connect, hold, objects)
    objects["model"].running.add_(1)
    objects["average"]["weights"].mul_(2)
    objects["average"]["count"] = 2
    point.open()
    one_step(objects)
    assert handle.wait()
    other = make(2)
    other["model"].register_buffer("running", torch.zeros(96, 96))
    other["average"] = {"weights": torch.zeros(96, 96), "count": 0}
    assert restored(connect, other, 1) == before


def test_generators_are_stored_as_they_were_at_the_snapshot(
    connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    """They are encoded once everything is copied, when the training has long drawn from them."""
    _, point, handle = stuck(connect, hold, trained)
    expected = random.random(), exact(torch.rand(3))
    point.open()
    assert handle.wait()
    restored(connect, make(2), 1)
    assert (random.random(), exact(torch.rand(3))) == expected


WRITES: dict[str, Callable[[nn.Module, optim.Optimizer], Any]] = {
    "data": lambda model, _: model[0].weight.data.clamp_(-0.01, 0.01),
    "no_grad": lambda model, _: model[0].weight.detach().copy_(torch.zeros(96, 96)),
    "one element": lambda model, _: model[0].weight.detach()[7, 11:12].zero_(),
    "first element, unseen": lambda model, _: model[0].weight.data[0, :1].fill_(5.0),
    "moment": lambda model, opt: opt.state[model[0].weight]["exp_avg"].zero_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_we_were_not_told_of_costs_one_snapshot(
    connect: Connect,
    hold: HoldPoint,
    trained: Objects,
    write: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Torn, dropped, counted, the leaf named; copied at once from then on."""
    client = connect()
    client.attach(**trained)
    first = states(trained)
    assert client.snapshot(1).wait()
    one_step(trained)

    point = hold()
    handle = client.snapshot(2)
    point.reached()
    WRITES[write](trained["model"], trained["optimizer"])
    point.open()
    one_step(trained)
    assert not handle.wait()
    leaf = "optimizer/state/model.0.weight/exp_avg" if write == "moment" else "model/0.weight"
    assert leaf in handle.dropped
    assert handle.state == "dropped"
    assert client.stats.dropped == 1
    eventually(lambda: any(leaf in r.message for r in caplog.records), "a warning")
    assert [r.levelname for r in caplog.records if leaf in r.message] == ["WARNING"]

    point = hold()
    at_third = states(trained)
    handle = client.snapshot(3)
    point.reached()
    WRITES[write](trained["model"], trained["optimizer"])
    point.open()
    one_step(trained)
    assert handle.wait(), handle
    assert at_third != first
    assert restored(connect, make(2), 3) == at_third


def test_a_torn_snapshot_leaves_the_one_before_it(
    connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    client = connect()
    client.attach(**trained)
    before = states(trained)
    assert client.snapshot(1).wait()
    one_step(trained)
    point = hold()
    handle = client.snapshot(2)
    point.reached()
    trained["model"][0].weight.data.zero_()
    point.open()
    assert not handle.wait()
    assert restored(connect, make(2), 1) == before


def test_parameters_that_were_replaced_are_never_stale(connect: Connect, trained: Objects) -> None:
    """Hard case 2: a cached pointer would save the old weights for ever after."""
    client = connect()
    client.attach(**trained)
    assert client.snapshot(1).wait()
    weight = trained["model"][0].weight
    weight.data = torch.randn(96, 96)
    one_step(trained)
    assert client.snapshot(2).wait()
    expected = states(trained)
    assert restored(connect, make(2), 2) == expected

    # Between snapshot() and the update, too.
    client = connect()
    client.attach(**trained)
    expected = states(trained)
    handle = client.snapshot(3)
    weight.data = torch.randn(96, 96)
    one_step(trained)
    assert handle.wait(), handle
    assert restored(connect, make(2), 3) == expected


def test_state_that_was_made_anew_is_never_stale(connect: Connect, trained: Objects) -> None:
    client = connect()
    client.attach(**trained)
    assert client.snapshot(1).wait()
    optimizer = trained["optimizer"]
    optimizer.state.clear()
    one_step(trained)
    one_step(trained)
    assert client.snapshot(2).wait()
    expected = states(trained)
    assert restored(connect, make(2), 2) == expected


def test_state_that_grows_and_shrinks(connect: Connect, trained: Objects) -> None:
    """Another layout, then another arena; the newest is restored each time."""
    tree: Objects = {"history": [torch.randn(100)]}
    client = connect()
    client.attach(tree=tree, **trained)
    for step in range(1, 6):
        tree["history"] += [torch.randn(40_000 * step)]
        if step == 4:
            del tree["history"][2:]
        one_step(trained)
        assert client.snapshot(step).wait()
    expected = states({"tree": tree, **trained})
    live: Objects = {"history": [torch.zeros(100)]}
    assert restored(connect, {**make(2), "tree": live}, 5) == expected


def test_many_snapshots_in_a_row(connect: Connect, trained: Objects) -> None:
    """Every step, never waiting: each is skipped or right, and the last one is there."""
    client = connect()
    client.attach(**trained)
    by_step = {}
    handles = []
    for step in range(1, 60):
        one_step(trained)
        by_step[step] = states(trained)
        handles.append(client.snapshot(step))
    assert sum(not handle.skipped for handle in handles) >= 2
    assert all("busy" in handle.skipped for handle in handles if handle.skipped)
    last = max(handle.step for handle in handles if handle.wait())
    assert client.stats.dropped == 0
    assert restored(connect, make(2), last) == by_step[last]


def test_updating_without_an_optimizer(connect: Connect, hold: HoldPoint) -> None:
    weights = {"w": torch.randn(200, 200)}
    before = exact(weights)
    client, point, handle = stuck(connect, hold, {"guarded": {"weights": weights}})

    def update() -> None:
        with client.updating():
            weights["w"].mul_(2)

    thread, finished = in_thread(update)
    assert not finished.wait(0.3)
    assert exact(weights) == before
    point.open()
    thread.join(60)
    assert handle.wait(), handle
    other = {"w": torch.zeros(200, 200)}
    client = connect()
    client.attach(guarded={"weights": other})
    assert client.restore() == 1
    assert exact(other) == before


def test_guarded_state_changed_outside_updating_is_torn(connect: Connect, hold: HoldPoint) -> None:
    weights = {"w": torch.randn(200, 200)}
    _, point, handle = stuck(connect, hold, {"guarded": {"weights": weights}})
    weights["w"].mul_(2)
    point.open()
    assert not handle.wait()
    assert "weights/w" in handle.dropped


def test_a_view_larger_than_the_parameter_is_not_guarded(connect: Connect, hold: HoldPoint) -> None:
    """It begins where the parameter does; the rest of it is not the optimizer's."""
    flat = torch.randn(20_000)
    parameter = nn.Parameter(flat[:10_000])
    objects: Objects = {"optimizer": optim.SGD([parameter]), "flat": {"flat": flat}}
    before = exact(flat)
    client, point, handle = stuck(connect, hold, objects)
    flat[15_000:].zero_()
    point.open()
    assert handle.wait(), handle
    other = torch.zeros(20_000)
    client = connect()
    client.attach(
        optimizer=optim.SGD([nn.Parameter(other[:10_000])]), flat=(tree := {"flat": other})
    )
    assert client.restore() == 1
    assert exact(tree["flat"]) == before


def test_busy_skips_and_counts_and_warns_once(
    connect: Connect, hold: HoldPoint, trained: Objects, caplog: pytest.LogCaptureFixture
) -> None:
    client = connect()
    client.attach(**trained)
    point = hold()
    first = client.snapshot(1)
    point.reached()
    skipped = [client.snapshot(2), client.snapshot(3)]
    assert all(handle.state == "skipped" for handle in skipped)
    assert all("busy: step 1 is still being copied" in handle.skipped for handle in skipped)
    assert not skipped[0].wait(timeout=5)
    assert client.stats.skipped == {"busy": 2}
    assert [r.levelname for r in caplog.records if "busy" in r.message] == ["WARNING"]
    point.open()
    assert first.wait()
    assert client.snapshot(4).wait()


def test_busy_waits_if_asked(connect: Connect, hold: HoldPoint, trained: Objects) -> None:
    client = connect(on_busy="wait")
    client.attach(**trained)
    point = hold()
    first = client.snapshot(1)
    point.reached()
    seen: list[everstep.Snapshot] = []
    thread, finished = in_thread(lambda: seen.append(client.snapshot(2)))
    assert not finished.wait(0.3)
    point.open()
    thread.join(60)
    assert first.wait()
    assert seen[0].wait(), seen
    assert client.stats.skipped == {}
    assert client.stats.committed == 2


def test_interval_and_force(connect: Connect, trained: Objects) -> None:
    client = connect(interval=4)
    client.attach(**trained)
    handles = [client.snapshot(step) for step in range(1, 4)]
    assert [handle.skipped for handle in handles] == ["not due"] * 3
    assert client.stats.skipped == {}
    assert client.snapshot(4).wait()
    assert client.snapshot(6, force=True).wait()
    assert client.stats.taken == 2
    with pytest.raises(Refused, match="interval"):
        connect(interval=0)
    with pytest.raises(Refused, match="on_busy"):
        connect(on_busy="hope")


def test_a_step_that_was_captured_is_not_captured_again(connect: Connect, trained: Objects) -> None:
    client = connect()
    client.attach(**trained)
    assert client.snapshot(5).wait()
    assert "sealed already" in client.snapshot(5).skipped
    assert "step 5 was captured already" in client.snapshot(4).skipped
    assert client.snapshot(6).wait()


def test_handles_wait_with_a_deadline(connect: Connect, hold: HoldPoint, trained: Objects) -> None:
    client = connect(limits=Limits(seal_s=0.1))
    client.attach(**trained)
    point = hold()
    handle = client.snapshot(1)
    point.reached()
    with pytest.raises(DeadlineExceeded, match="step 1") as raised:
        handle.wait(timeout=0.2)
    assert raised.value.late == ("this rank",)
    with pytest.raises(Refused, match="there is no level"):
        handle.done("disk")
    point.open()


def test_a_copy_that_is_not_done_in_time_is_never_committed(
    connect: Connect, hold: HoldPoint, trained: Objects
) -> None:
    """Training goes on; a copy into which the update has bled is not sealed."""
    client = connect(limits=Limits(seal_s=5.0))
    client.attach(**trained)
    before = states(trained)
    assert client.snapshot(1).wait()
    client.close(timeout=0)
    client = connect(limits=Limits(seal_s=0.2))
    client.attach(**trained)
    point = hold()
    handle = client.snapshot(2)
    point.reached()
    one_step(trained)  # the fence gives up after 0.2 s
    point.open()
    assert not handle.wait()
    assert handle.dropped
    assert client.snapshot(3).wait()
    client.rewind()
    assert states(trained) != before


def test_handles_tell_the_levels(connect: Connect, trained: Objects) -> None:
    client = connect()
    client.attach(**trained)
    handle = client.snapshot(1)
    assert handle.wait("memory")
    assert handle.done()
    assert handle.state == "memory"
    assert not handle.done("nvme")
    assert handle.wait("nvme")
    assert handle.done("nvme")
    assert handle.state == "nvme"
    assert "nvme" in repr(handle)


def test_nothing_holds_on_to_state_that_was_replaced(connect: Connect, trained: Objects) -> None:
    """Neither handles nor plans keep an old copy of the state alive."""
    client = connect()
    client.attach(**trained)
    weight = trained["model"][0].weight
    old = weakref.ref(weight.data.untyped_storage())
    handles = []
    for step in range(1, 4):
        handles.append(client.snapshot(step))
        assert handles[-1].wait()
        weight.data = torch.randn(96, 96)
    assert client.snapshot(9).wait()
    gc.collect()
    assert old() is None


def test_stall_is_counted(connect: Connect, hold: HoldPoint, trained: Objects) -> None:
    client = connect()
    client.attach(**trained)
    point = hold()
    handle = client.snapshot(1)
    point.reached()
    alone = client.stats.last_stall_s
    assert 0 < client.stats.setup_s <= alone == client.stats.stall_s
    timer = threading.Timer(0.2, point.open)
    timer.start()
    one_step(trained)
    timer.join()
    assert client.stats.last_stall_s >= alone + 0.1
    assert handle.wait()


def test_optimizer_does_not_keep_a_client_alive(connect: Connect, trained: Objects) -> None:
    client = connect()
    client.attach(**trained)
    client.close(timeout=0)
    one_step(trained)
    logging.getLogger("everstep").debug("still here")
    assert client.snapshot(2).skipped == "the client is closed"
