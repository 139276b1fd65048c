"""What goes wrong around a capture on a device costs a snapshot at most, and never the training."""

import json
import logging
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import everstep
from everstep.client.limits import Limits
from everstep.kernels.cuda_runtime import CudaFailure, CudaRuntime
from tests.integration.conftest import DEADLINE_S, AgentProcess, eventually

from .images import as_bytes, differing, image_of
from .loops import Loop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),
]
Connect = Callable[..., everstep.Client]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def loop() -> Loop:
    made = Loop(11)
    made.warm()
    return made


def captured(
    agent: AgentProcess, job: str, client: everstep.Client, loop: Loop, step: int
) -> everstep.Snapshot:
    """Snapshot, update at once, and compare."""
    expected = loop.tensors()
    handle = client.snapshot(step)
    assert not handle.skipped, handle.skipped
    loop.step()
    assert handle.wait(timeout=60.0), handle.dropped
    image = image_of(agent, job, step)
    assert image is not None
    assert differing(image, expected) == []
    return handle


@pytest.fixture
def whole_memory() -> Iterator[None]:
    """Whatever a test did to the allocator is undone."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("whole_memory")
def test_no_memory_for_scratch(agent: AgentProcess, job: str, connect: Connect) -> None:
    """As if the training itself needed every byte: the update waits for the copy, on the device."""
    loop = Loop(12)
    ballast = torch.nn.Parameter(torch.randn(10_000_000, device="cuda"))
    loop.optimizers[0].add_param_group({"params": [ballast]})
    loop.network.register_parameter("ballast", ballast)

    def step() -> None:
        ballast.grad = torch.ones_like(ballast)
        loop.step()

    step()
    client = connect()
    client.attach(**loop.objects)
    for number in range(1, 7):
        step()
        assert client.snapshot(number).wait()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    step()
    torch.cuda.synchronize()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + (8 << 20)
    torch.cuda.set_per_process_memory_fraction(room / total)
    for number in range(7, 11):
        expected = loop.tensors(on_host=True)
        handle = client.snapshot(number)
        step()
        assert handle.wait(timeout=60.0), handle.dropped
        image = image_of(agent, job, number)
        assert image is not None
        assert differing(image, expected) == []


def test_pinning_refused(
    agent: AgentProcess,
    job: str,
    connect: Connect,
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Copies go through a small buffer then; said once."""

    def refuse(self: CudaRuntime, address: int, size: int) -> None:
        raise CudaFailure("cudaHostRegister", 2, "cudaErrorMemoryAllocation", "out of memory")

    monkeypatch.setattr(CudaRuntime, "register", refuse)
    client = connect()
    client.attach(**loop.objects)
    with caplog.at_level(logging.WARNING, "everstep"):
        for step in range(1, 7):
            captured(agent, job, client, loop, step)
    said = [record for record in caplog.records if "cudaErrorMemoryAllocation" in record.message]
    assert len(said) == 1, [record.message for record in caplog.records]
    expected = loop.tensors()
    assert client.snapshot(7).wait()
    loop.step()
    assert client.rewind() == 7
    found = loop.tensors()
    assert {k: as_bytes(t) for k, t in found.items()} == {
        k: as_bytes(t) for k, t in expected.items()
    }


def test_a_copy_that_fails_costs_one_snapshot(
    agent: AgentProcess,
    job: str,
    connect: Connect,
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = connect(limits=Limits(pause_s=0.1))
    client.attach(**loop.objects)
    captured(agent, job, client, loop, 1)
    copy_async = CudaRuntime.copy_async

    def fail(self: CudaRuntime, *_: Any) -> None:
        raise CudaFailure("cudaMemcpyAsync", 1, "cudaErrorInvalidValue", "invalid argument")

    monkeypatch.setattr(CudaRuntime, "copy_async", fail)
    handle = client.snapshot(2)
    loop.step()
    assert handle.skipped or not handle.wait(timeout=60.0)
    monkeypatch.setattr(CudaRuntime, "copy_async", copy_async)
    step = 2

    def taken() -> bool:
        nonlocal step
        step += 1
        handle = client.snapshot(step)
        return not handle.skipped and handle.wait(timeout=60.0)

    eventually(taken, "a snapshot once copies work again")
    loop.step()
    captured(agent, job, client, loop, step + 1)


def test_the_agent_returns(
    start_agent: Callable[..., AgentProcess], connect: Connect, loop: Loop, job: str
) -> None:
    """Killed between two snapshots and started again: the arena is still pinned, or is again."""
    own = start_agent("[memory]\nslots = 4\n")
    client = connect(agent=own.address)
    client.attach(**loop.objects)
    captured(own, job, client, loop, 1)
    own.restart()
    step = 1

    def taken() -> bool:
        nonlocal step
        step += 1
        handle = client.snapshot(step)
        return not handle.skipped and handle.wait(timeout=60.0)

    eventually(taken, "a snapshot after the restart")
    for _ in range(5):
        step += 1
        captured(own, job, client, loop, step)


WRITES: dict[str, Callable[[Loop], Any]] = {
    "clamp_": lambda loop: loop.network.wide.data.clamp_(-1e-6, 1e-6),
    "noted by the version": lambda loop: loop.network.wide.detach()[70, 11:12].zero_(),
    "moment": lambda loop: loop.optimizers[0].state[loop.network.wide]["exp_avg"].fill_(3.0),
    "merge": lambda loop: loop.network.wide.data.add_(
        torch.randn(320, 4, device="cuda") @ torch.randn(4, 160, device="cuda")
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_between_snapshot_and_update_is_noticed(
    agent: AgentProcess, job: str, connect: Connect, loop: Loop, write: str
) -> None:
    """Torn, dropped, named; from then on that leaf is copied at once, and the write is harmless."""
    client = connect()
    client.attach(**loop.objects)
    captured(agent, job, client, loop, 1)
    torch.cuda._sleep(100_000_000)  # the copy has not begun when the write comes
    handle = client.snapshot(2)
    WRITES[write](loop)
    loop.step()
    assert not handle.wait(timeout=60.0)
    leaf = "optimizer/state/model.wide/exp_avg" if write == "moment" else "model/wide"
    assert leaf in handle.dropped
    assert client.stats.dropped == 1
    expected = loop.tensors()
    handle = client.snapshot(3)
    WRITES[write](loop)
    loop.step()
    assert handle.wait(timeout=60.0), handle.dropped
    image = image_of(agent, job, 3)
    assert image is not None
    assert differing(image, expected) == []


def replaced_data(loop: Loop) -> None:
    loop.network.wide.data = torch.randn_like(loop.network.wide.data)


def swapped(loop: Loop) -> None:
    wide = loop.network.wide
    wide.grad = None
    other = torch.nn.Parameter(torch.randn_like(wide.data))
    torch.utils.swap_tensors(wide, other)


def state_made_anew(loop: Loop) -> None:
    loop.optimizers[0].state.clear()


REPLACE: dict[str, Callable[[Loop], None]] = {
    "p.data": replaced_data,
    "swap_tensors": swapped,
    "state": state_made_anew,
}


@pytest.mark.parametrize("replace", REPLACE)
def test_what_was_replaced_is_never_stale(
    agent: AgentProcess, job: str, connect: Connect, loop: Loop, replace: str
) -> None:
    """Before a snapshot the new is captured, after it the old: not what a pointer once meant."""
    client = connect()
    client.attach(**loop.objects)
    captured(agent, job, client, loop, 1)
    REPLACE[replace](loop)
    loop.step()
    captured(agent, job, client, loop, 2)
    expected = loop.tensors()
    handle = client.snapshot(3)
    REPLACE[replace](loop)
    loop.step()
    assert handle.wait(timeout=60.0), handle.dropped
    image = image_of(agent, job, 3)
    assert image is not None
    assert differing(image, expected) == []
    captured(agent, job, client, loop, 4)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_updates_without_a_snapshot_between(
    agent: AgentProcess, job: str, connect: Connect, loop: Loop, set_to_none: bool
) -> None:
    """optimizer.step() twice in a row, and steps without any gradient."""
    client = connect()
    client.attach(**loop.objects)
    optimizer = loop.optimizers[0]
    for step in range(1, 7):
        loop.gradients()
        expected = loop.tensors()
        handle = client.snapshot(step)
        optimizer.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
        assert handle.wait(timeout=60.0), handle.dropped
        image = image_of(agent, job, step)
        assert image is not None
        assert differing(image, expected) == []


@pytest.fixture
def start(agent: AgentProcess) -> Iterator[Start]:
    """Starts the script gpu_trainer.py; what runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def launched(*arguments: str) -> "subprocess.Popen[str]":
        script = str(Path(__file__).parent / "gpu_trainer.py")
        command = [sys.executable, "-W", "ignore", script, "--agent", agent.address, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield launched
    for process in started:
        process.kill()
        process.wait(DEADLINE_S)
        assert process.stdout is not None
        process.stdout.close()


def said(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def test_killed_in_the_middle_of_a_copy(start: Start, job: str) -> None:
    """At a random moment, several times; each time the next process goes on from a true state."""
    pick = random.Random(3)
    digests: dict[int, str] = {}
    for round_ in range(4):
        process = start("--job", job)
        lines = said(process)
        first = next(lines)
        if round_:
            assert first["restored"] in digests
            assert first["digest"] == digests[first["restored"]]
        most = (first["restored"] or 0) + 6
        for line in lines:
            digests[line["step"]] = line["digest"]
            if line["step"] >= most and line["committed"] > (first["restored"] or 0):
                break
        time.sleep(pick.random() * 0.05)  # the moment itself; nothing waits for it
        process.kill()
        for line in lines:  # what it said before it died
            digests[line["step"]] = line["digest"]
        process.wait(DEADLINE_S)


def test_two_processes_on_one_device(start: Start, job: str) -> None:
    """Two jobs side by side, each killed and restored."""
    running = [start("--job", f"{job}-{number}", "--until", "12") for number in range(2)]
    digests = [
        {line["step"]: line["digest"] for line in said(one) if "step" in line} for one in running
    ]
    assert [one.wait(DEADLINE_S) for one in running] == [0, 0]
    for number in range(2):
        again = start("--job", f"{job}-{number}", "--until", "12")
        first = next(said(again))
        assert first["restored"] == 12
        assert first["digest"] == digests[number][12]
