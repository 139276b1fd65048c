"""Bit for bit: what was captured while training went on is what the device held at that step."""

import random
import time
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

import everstep
from everstep.kernels.cuda_runtime import CudaRuntime
from tests.integration.conftest import AgentProcess, eventually

from .images import as_bytes, differing, image_of
from .loops import LOOPS, Loop

# Warnings of whatever torch the machine with the device has are not ours to judge.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]
Connect = Callable[..., everstep.Client]
_MOST_CYCLES = 10_000_000
"""About five milliseconds: longer than such a small copy takes."""


class Delays:
    """Random waits on whatever stream is asked for."""

    def __init__(self, seed: int) -> None:
        self._pick = random.Random(seed)

    def here(self) -> None:
        """Maybe keep the current stream busy."""
        if self._pick.random() < 0.4:
            torch.cuda._sleep(self._pick.randrange(_MOST_CYCLES))


@pytest.fixture
def delays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Delays:
    """On the training's stream where a test says so, and before copies to the arena."""
    delays = Delays(len(request.node.name))
    copy_async = CudaRuntime.copy_async

    def delayed(self: CudaRuntime, table: Any, stream: int, *more: Any) -> None:
        if stream:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                delays.here()
        copy_async(self, table, stream, *more)

    monkeypatch.setattr(CudaRuntime, "copy_async", delayed)
    return delays


def attached(connect: Connect, loop: Loop, **options: Any) -> everstep.Client:
    client = connect(**{**loop.connect_options, **options})
    loop.warm()
    client.attach(**loop.objects)
    loop.ready(client)
    return client


def check(
    agent: AgentProcess, job: str, loop: Loop, client: everstep.Client, delays: Delays, count: int
) -> None:
    """Take so many snapshots, each followed by updates before it is looked at."""
    step, seen = 1, 0
    pick = random.Random(count)
    while seen < count:
        step += 1
        assert step < 20 * count + 100, client.stats
        for _ in range(pick.randint(1, 2)):
            loop.step()
            delays.here()
        taken: dict[int, tuple[everstep.Snapshot, dict[str, torch.Tensor]]] = {}
        for _ in range(pick.randint(1, 2)):  # the second while the first is under way
            step += 1
            expected = loop.tensors()
            taken[step] = (client.snapshot(step), expected)
            delays.here()
            loop.step()
        loop.step()
        for number, (handle, expected) in taken.items():
            if handle.skipped:
                assert handle.skipped.startswith("busy"), handle.skipped
                continue
            assert handle.wait(timeout=60.0), handle.dropped
            image = image_of(agent, job, number)
            if image is not None:
                assert differing(image, expected) == [], number
                seen += 1
    assert client.stats.dropped == 0


@pytest.mark.parametrize("name", LOOPS)
def test_every_byte_is_that_of_its_step_a_hundred_times(
    agent: AgentProcess, job: str, connect: Connect, delays: Delays, name: str
) -> None:
    loop = LOOPS[name](100 + len(name))
    client = attached(connect, loop)
    check(agent, job, loop, client, delays, 100)
    check_restored(connect, loop, client, name)


def check_restored(connect: Connect, loop: Loop, client: everstep.Client, name: str) -> None:
    """Into another model that has the same form and other numbers, on the device."""
    step = 1_000_000
    handle = eventually(lambda: _taken(client, step), "a snapshot")
    expected = loop.tensors()
    assert handle.wait(timeout=60.0), handle.dropped
    client.close(timeout=0)
    other = LOOPS[name](loop.seed)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.zero_()
    follower = connect()
    follower.attach(**other.objects)
    assert follower.restore() == step
    found = other.tensors()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert as_bytes(found[key]) == as_bytes(tensor), key
        assert found[key].device == tensor.device, key


def _taken(client: everstep.Client, step: int) -> everstep.Snapshot | None:
    handle = client.snapshot(step)
    return None if handle.skipped else handle


def test_rewind_on_the_device(connect: Connect, delays: Delays) -> None:
    loop = Loop(5)
    client = attached(connect, loop)
    for step in (1, 2):
        expected = loop.tensors()
        assert client.snapshot(step).wait()
        loop.step()
        delays.here()
    assert client.rewind() == 2
    found = loop.tensors()
    assert {k: as_bytes(t) for k, t in found.items()} == {
        k: as_bytes(t) for k, t in expected.items()
    }
    loop.step()
    assert client.snapshot(3).wait()


def test_nothing_on_the_step_path_waits_for_the_device(
    agent: AgentProcess, job: str, connect: Connect
) -> None:
    """snapshot() and the update return while the device has not even begun what is before them."""
    loop = Loop(7)
    client = attached(connect, loop)
    for step in range(1, 8):  # everything is compiled, every slot known
        loop.step()
        assert client.snapshot(step).wait()
    loop.step()
    loop.gradients()
    torch.cuda.synchronize()
    expected = loop.tensors()
    torch.cuda._sleep(2_000_000_000)  # about a second
    behind = torch.cuda.Event()
    behind.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = time.perf_counter()
        handle = client.snapshot(8)
        loop.optimizers[0].step()
        taken_s = time.perf_counter() - begun
        waited = behind.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not handle.skipped
    assert not waited, f"the device was done when snapshot() and step() came back, {taken_s} s"
    assert handle.wait(timeout=60.0), handle.dropped
    image = image_of(agent, job, 8)
    assert image is not None
    assert differing(image, expected) == []


def test_a_graph_can_be_recorded_while_a_snapshot_is_copied(
    agent: AgentProcess, job: str, connect: Connect
) -> None:
    loop = Loop(11)
    client = attached(connect, loop)
    for step in (1, 2):  # everything is compiled
        loop.step()
        assert client.snapshot(step).wait()
    static = torch.ones(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    expected = loop.tensors()
    handle = client.snapshot(3)
    with torch.cuda.graph(graph):  # forbids unsafe calls in all threads
        static.add_(1)
        # Without an update it is copied slowly, and without this thread's help.
        eventually(handle.done, "a commit")
        static.add_(1)
    graph.replay()
    assert static.sum().item() == 3000
    image = image_of(agent, job, 3)
    assert image is not None
    assert differing(image, expected) == []


def test_unchanged_units_are_not_copied(
    agent: AgentProcess, job: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights with an adapter: with incremental=True only what changed crosses PCIe."""
    base = torch.nn.Linear(2048, 2048, device="cuda").requires_grad_(False)
    adapter = torch.nn.Linear(64, 64, device="cuda")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    # Parameters of the optimizer's are what is copied lazily; the base belongs to it, frozen.
    optimizer.add_param_group({"params": [*base.parameters()]})
    model = torch.nn.ModuleDict({"base": base, "adapter": adapter})
    copied = [0]
    copy_async = CudaRuntime.copy_async

    def counted(self: CudaRuntime, table: Any, *more: Any) -> None:
        copied[0] += int(numpy.asarray(table)[:, 2].sum())
        copy_async(self, table, *more)

    monkeypatch.setattr(CudaRuntime, "copy_async", counted)
    client = connect(incremental=True)
    client.attach(model=model, optimizer=optimizer)
    for step in range(1, 13):
        adapter(torch.randn(8, 64, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        copied[0] = 0
        handle = client.snapshot(step)
        assert handle.wait(), handle.dropped
        image = image_of(agent, job, step)
        assert image is not None
        expected = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        assert differing(image, expected) == []
    assert copied[0] < 0.3 * base.weight.nbytes, copied
    with torch.no_grad():
        base.weight[1000, 1000] += 1.0  # in one unit, which must not be taken for the old one
    handle = client.snapshot(13)
    assert handle.wait()
    image = image_of(agent, job, 13)
    assert image is not None
    assert differing(image, {"model/base.weight": base.weight}) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_devices_in_one_process(agent: AgentProcess, job: str, connect: Connect) -> None:
    first = torch.nn.Linear(900, 900, device="cuda:0")
    second = torch.nn.Linear(900, 900, device="cuda:1")
    model = torch.nn.ModuleDict({"first": first, "second": second})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    client = connect()
    client.attach(model=model, optimizer=optimizer)
    for step in range(1, 9):
        hidden = first(torch.randn(8, 900, device="cuda:0"))
        second(hidden.to("cuda:1")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = {f"model/{name}": t.clone() for name, t in model.state_dict().items()}
        handle = client.snapshot(step)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert handle.wait(), handle.dropped
        image = image_of(agent, job, step)
        assert image is not None
        assert differing(image, expected) == []
