"""The agent's own life: light at rest, killed and back again, stopped, asked to end."""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn, optim

import everstep
from everstep.client.limits import Limits
from everstep.proto.places import default_places

from .conftest import DEADLINE_S, AgentProcess, Trainer, eventually
from .states import states

Objects = dict[str, Any]
# A trainer that tries again soon, so that the tests do not wait for it.
LIMITS = Limits(pause_s=0.05)


def make(seed: int) -> Objects:
    torch.manual_seed(seed)
    model = nn.Linear(200, 200)
    return {"model": model, "optimizer": optim.AdamW(model.parameters())}


def one_step(objects: Objects) -> None:
    optimizer = objects["optimizer"]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.fixture
def objects() -> Objects:
    return make(1)


@pytest.fixture
def client(agent_process: AgentProcess, objects: Objects) -> Iterator[everstep.Client]:
    client = everstep.connect("job", agent=agent_process.address, limits=LIMITS)
    client.attach(**objects)
    yield client
    client.close(timeout=0)


def test_light_at_rest_and_without_torch(
    agent_process: AgentProcess, client: everstep.Client, objects: Objects
) -> None:
    for step in range(1, 4):
        one_step(objects)
        assert client.snapshot(step).wait("nvme")
    maps = Path(f"/proc/{agent_process.pid}/maps").read_text()
    assert "libpython" in maps or "python" in maps
    assert "torch" not in maps
    process = psutil.Process(agent_process.pid)
    assert process.memory_info().rss < 100e6
    eventually(lambda: at_rest(process), "a second without CPU time")


def at_rest(process: psutil.Process) -> bool:
    """Whether it needs no CPU time for a second; the clock counts hundredths."""
    before = process.cpu_times()
    time.sleep(1.0)
    after = process.cpu_times()
    return (after.user + after.system) - (before.user + before.system) <= 0.01


def test_killed_and_started_again_it_finds_everything(
    agent_process: AgentProcess,
    client: everstep.Client,
    objects: Objects,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A trainer that runs meanwhile skips, warns once, and goes on by itself."""
    one_step(objects)
    expected = states(objects)
    assert client.snapshot(1).wait()
    incarnation = client.incarnation
    agent_process.kill()
    skipped = []
    for step in range(2, 6):
        one_step(objects)
        begun = time.monotonic()
        skipped.append(client.snapshot(step).skipped)
        assert time.monotonic() - begun < 2.0
    assert all(reason.startswith("agent: ") for reason in skipped)
    assert client.stats.skipped == {"agent": 4}
    warnings = [
        r for r in caplog.records if r.levelno == logging.WARNING and "skipped" in r.message
    ]
    assert len(warnings) == 1

    agent_process.start()
    other = make(2)
    step = 6

    def captured() -> bool:
        nonlocal step, expected
        step += 1
        one_step(objects)
        expected = states(objects)
        handle = client.snapshot(step)
        return not handle.skipped and handle.wait()

    eventually(captured, "a snapshot by the new agent")
    assert client.incarnation == incarnation
    assert warnings_of_skips(caplog) == 1
    successor = everstep.connect("job", agent=agent_process.address)
    successor.attach(**other)
    assert successor.restore() == step
    assert successor.restored_from == ("memory",)
    assert states(other) == expected
    successor.close(timeout=0)


def warnings_of_skips(caplog: pytest.LogCaptureFixture) -> int:
    return sum(r.levelno >= logging.WARNING and "skipped" in r.message for r in caplog.records)


def test_what_was_committed_survives_agent_and_trainer(
    agent_process: AgentProcess, client: everstep.Client, objects: Objects
) -> None:
    """Both gone at once; memory is adopted by the next agent."""
    one_step(objects)
    expected = states(objects)
    assert client.snapshot(1).wait()
    agent_process.kill()
    client.close(timeout=0)
    agent_process.start()
    other = make(2)
    successor = everstep.connect("job", agent=agent_process.address)
    successor.attach(**other)
    assert successor.restore() == 1
    assert successor.restored_from == ("memory",)
    assert states(other) == expected
    successor.close(timeout=0)


def test_a_copy_under_way_when_the_agent_dies_still_commits(
    agent_process: AgentProcess,
    client: everstep.Client,
    objects: Objects,
    hold: Callable[..., Any],
) -> None:
    one_step(objects)
    assert client.snapshot(1).wait()
    one_step(objects)
    expected = states(objects)
    point = hold()
    handle = client.snapshot(2)
    point.reached()
    agent_process.restart()
    point.open()
    assert handle.wait(), handle
    other = make(2)
    successor = everstep.connect("job", agent=agent_process.address)
    successor.attach(**other)
    assert successor.restore() == 2
    assert states(other) == expected
    successor.close(timeout=0)


def test_a_stopped_agent_delays_nobody(
    agent_process: AgentProcess, client: everstep.Client, objects: Objects
) -> None:
    one_step(objects)
    assert client.snapshot(1).wait()
    agent_process.stop()
    begun = time.monotonic()
    handle = client.snapshot(2)
    assert handle.skipped.startswith("agent: ")
    one_step(objects)
    assert time.monotonic() - begun < 2.0
    agent_process.cont()
    step = 2

    def captured() -> bool:
        nonlocal step
        step += 1
        handle = client.snapshot(step)
        return not handle.skipped and handle.wait()

    eventually(captured, "a snapshot after the agent went on")


def test_asked_to_end_it_flushes_first(
    agent_process: AgentProcess, client: everstep.Client, objects: Objects
) -> None:
    one_step(objects)
    assert client.snapshot(1).wait()
    one_step(objects)
    assert client.snapshot(2).wait()
    assert agent_process.steps_on_nvme("job") == []
    assert agent_process.terminate() == 0
    assert agent_process.steps_on_nvme("job") == [2]
    assert not agent_process.socket.exists()


def test_without_nvme_close_still_ends(
    start_agent: Callable[..., AgentProcess], objects: Objects
) -> None:
    agent = start_agent("[nvme]\nflush_on_exit = false\nflush_on_sigterm = false\n")
    client = everstep.connect("job", agent=agent.address)
    client.attach(**objects)
    assert client.snapshot(1).wait()
    client.close(timeout=0)
    assert agent.terminate() == 0
    assert agent.steps_on_nvme("job") == []
    assert agent.steps_in_memory("job") == [1]


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An EVERSTEP_HOME; the agent that was started for it ends with the test."""
    home = tmp_path_factory.mktemp("h")
    yield home
    for process in agents_of(home):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE_S)
    memory_dir = places(home).memory_dir
    for path in sorted(memory_dir.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if memory_dir.exists():
        memory_dir.rmdir()


def places(home: Path) -> Any:
    return default_places({"EVERSTEP_HOME": str(home)}, os.getuid())


def agents_of(home: Path) -> list[psutil.Process]:
    """The agents that run on this home's socket."""
    wanted = str(places(home).socket)
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "everstep.agent" in (process.info["cmdline"] or ()) and wanted in process.info["cmdline"]
    ]


def test_the_embedded_agent(home: Path, start_trainer: Callable[..., Trainer]) -> None:
    """Two trainers that start at once get one agent, which outlives both."""
    trainers = [
        start_trainer(
            None, "--linger", "--cases", case, "--until", "5", "--snapshot-at", "5",
            EVERSTEP_HOME=str(home),
        )
        for case in ("adamw", "sgd")
    ]  # fmt: skip
    for trainer in trainers:
        (facts,) = trainer.facts().values()
        assert facts["start"] is None
        assert facts["committed"] == [5]
    # The one that lost the race for the socket has nothing to do but end.
    eventually(lambda: len(agents_of(home)) == 1, "one agent")
    (agent,) = agents_of(home)
    # In a session of its own: no terminal that closes takes it along.
    assert os.getsid(agent.pid) == agent.pid
    for trainer in trainers:
        trainer.kill()
    assert agent.is_running()
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(places(home).socket))

    again = everstep.connect("job-adamw", agent=places(home).address)
    assert again.incarnation == 2
    again.close(timeout=0)
    assert agents_of(home) == [agent]
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(DEADLINE_S) in (0, None)
    nvme = places(home).nvme_dir
    assert sorted(path.parent.name for path in nvme.glob("*/step-*")) == ["job-adamw", "job-sgd"]
