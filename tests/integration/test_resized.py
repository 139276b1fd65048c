"""Launches of other sizes, on one agent: what it keeps, what it gives, what it says."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import everstep
from everstep.agent.cli import app
from everstep.client.limits import Limits
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import FormatInvalid, Refused

from .conftest import AgentProcess, eventually

JOB = "job"
SIZE = 400_000
KEEP = {"own": "keep"}
LIMITS = Limits(pause_s=0.05)


class Launch:
    """All ranks of one launch, in one process."""

    def __init__(self, agent: AgentProcess, world: int) -> None:
        self.clients = [
            everstep.connect(JOB, rank=rank, world=world, agent=agent.address, limits=LIMITS)
            for rank in range(world)
        ]
        self.own = [{"data": torch.zeros(SIZE)} for _ in range(world)]
        for client, own in zip(self.clients, self.own, strict=True):
            client.attach(per_rank={"own": own})

    def all(self, work: Callable[[everstep.Client], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.clients)) as pool:
            return list(pool.map(work, self.clients))

    def step(self, step: int, level: str = "memory") -> None:
        for rank, own in enumerate(self.own):
            own["data"].fill_(100 * step + rank)
        handles = self.all(lambda client: client.snapshot(step, force=True))
        for handle in handles:
            assert handle.wait(level, timeout=20), handle

    def restore(self, **rules: str) -> list[float]:
        """What ranks have for themselves then."""
        self.all(lambda client: client.restore(on_resize=rules or KEEP))
        assert all(len(own["data"].unique()) == 1 for own in self.own)
        return [own["data"][0].item() for own in self.own]

    def close(self) -> None:
        self.all(lambda client: client.close(timeout=0))


@pytest.fixture
def agent(start_agent: Callable[..., AgentProcess]) -> AgentProcess:
    return start_agent(
        "[nvme]\ninterval = 'off'\nflush_on_exit = false\nflush_on_sigterm = false\n"
    )


def saved(agent: AgentProcess, world: int, step: int = 1, level: str = "memory") -> None:
    launch = Launch(agent, world)
    launch.step(step, level)
    launch.close()


def ranks_with_arenas(agent: AgentProcess) -> set[int]:
    return {arena.rank for arena in agent.memory.arenas(JOB)}


def test_a_launch_that_commits_nothing_costs_nothing(agent: AgentProcess) -> None:
    """Whether the agent goes on or another one finds what is there."""
    saved(agent, 4)
    smaller = Launch(agent, 3)
    assert smaller.restore() == [100, 101, 102]
    smaller.close()
    agent.restart()
    again = Launch(agent, 2)
    assert again.restore() == [100, 101]
    again.close()
    larger = Launch(agent, 5)
    assert larger.restore() == [100, 101, 102, 103, 100]
    larger.close()
    whole = Launch(agent, 4)
    assert whole.restore() == [100, 101, 102, 103]
    whole.close()


def test_memory_of_ranks_that_are_gone_is_released(agent: AgentProcess) -> None:
    saved(agent, 4)
    smaller = Launch(agent, 2)
    smaller.restore()
    smaller.step(2)
    assert ranks_with_arenas(agent) == {0, 1, 2, 3}, "it may be needed, if the new one rots"
    for step in (3, 4):
        smaller.step(step)
    eventually(lambda: ranks_with_arenas(agent) == {0, 1}, "the arenas' release")
    smaller.close()
    agent.restart()
    last = Launch(agent, 2)
    assert last.restore() == [400, 401]
    last.close()


def test_from_disk_alone(agent: AgentProcess) -> None:
    saved(agent, 3, 5, "nvme")
    agent.kill()
    for arena in agent.memory.arenas(JOB):
        agent.memory.release(JOB, arena.rank, arena.generation)
    agent.start()
    launch = Launch(agent, 2)
    assert launch.restore() == [500, 501]
    assert {level for client in launch.clients for level in client.restored_from} == {"nvme"}
    launch.step(6, "nvme")
    launch.close()
    assert agent.steps_on_nvme(JOB) == [5, 6]
    last = Launch(agent, 4)
    assert last.restore() == [600, 601, 600, 601]
    last.close()


def test_a_rank_alone_finds_what_is_damaged_of_others(agent: AgentProcess) -> None:
    saved(agent, 3, 1, "nvme")
    agent.flip(JOB, 1, rank=2)
    alone = Launch(agent, 1)
    assert alone.restore(own="sum") == [100 + 101 + 102]
    (client,) = alone.clients
    assert any("rank 2, memory" in line for line in client.rejected), client.rejected
    alone.close()


def test_several_ranks_are_told_what_is_damaged_of_others(agent: AgentProcess) -> None:
    saved(agent, 3, 1, "nvme")
    agent.flip(JOB, 1, rank=2)
    launch = Launch(agent, 2)
    assert launch.restore(own="sum") == [100 + 102, 101]
    for client in launch.clients:
        assert any("rank 2, memory" in line for line in client.rejected), client.rejected
    launch.close()


def test_gather_of_what_is_here(agent: AgentProcess) -> None:
    saved(agent, 3)
    launch = Launch(agent, 2)
    client = launch.clients[1]

    def gather(step: int = 1, **need: int) -> wire.GatherReply:
        unit = wire.UnitSpan(first=need.get("unit", 0), count=1)
        request = wire.GatherRequest(session=client._session.identity, incarnation=1, step=step)
        request.needs.append(wire.Need(rank=need.get("rank", 2), units=[unit]))
        reply: wire.GatherReply = client._channel.call("Gather", request, 10)
        return reply

    with pytest.raises(Refused, match="nothing that is known yet"):
        gather()
    launch.restore()
    (found,) = gather().shards
    assert (found.rank, found.level) == (2, "memory") and Path(found.path).exists()
    with pytest.raises(Refused, match="not step 2"):
        gather(step=2)
    with pytest.raises(FormatInvalid, match="no rank 3"):
        gather(rank=3)
    with pytest.raises(FormatInvalid, match="unit 7"):
        gather(unit=7)
    launch.step(2)
    with pytest.raises(Refused, match="gone on"):
        gather()
    launch.close()


def test_the_verbs_with_snapshots_of_several_sizes(
    agent: AgentProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved(agent, 3, 1, "nvme")
    launch = Launch(agent, 2)
    launch.restore()
    launch.step(2, "nvme")
    monkeypatch.setenv("EVERSTEP_AGENT", agent.address)
    monkeypatch.setenv("EVERSTEP_HOME", str(tmp_path / "home"))

    def run(*words: str) -> Any:
        result = CliRunner().invoke(app, [*words, "--json"])
        assert result.exit_code == 0, (words, result.stdout, result.stderr)
        return json.loads(result.stdout)

    (job,) = run("status")["jobs"]
    assert job["world"] == 2
    for words in (("list",), ("verify", "--job", JOB), ("verify", "--job", JOB, "--step", "1")):
        assert run(*words)
    report = run("recover", "--job", JOB, "--dry-run")
    assert report["chosen"]["step"] == 2
    assert {one["step"]: one["world"] for one in report["snapshots"]} == {1: 3, 2: 2}
    launch.close()
