"""A rank that is gone is taken over while the others go on: on one agent, and over several nodes.

Measured on the others: their incarnation, their sessions, and what their snapshots made them wait.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.agent.asking import Agent
from everstep.proto.agent_pb2 import JobStatus

from .conftest import AgentProcess, eventually
from .live_ranks import LiveRank

JOB = "live"
STALL_S = 2.0
"""More than any snapshot call may take on a busy machine, and less than any wait for a rank."""


@pytest.fixture
def start_rank(tmp_path: Path) -> Iterator[Callable[..., LiveRank]]:
    """Starts ranks that end with the test."""
    started: list[LiveRank] = []

    def start(address: str, rank: int, world: int, *arguments: str) -> LiveRank:
        log = tmp_path / f"rank-{rank}-{len(started)}.log"
        started.append(LiveRank(address, rank, world, log, *arguments))
        return started[-1]

    yield start
    for rank in started:
        rank.close()


def job_of(address: str) -> JobStatus:
    with Agent(address) as agent:
        (job,) = agent.status().jobs
        return job


def committed(address: str, step: int) -> bool:
    return any(s.step == step and s.committed for s in job_of(address).snapshots)


def commit(address: str, ranks: list[LiveRank], step: int) -> dict[int, dict[str, Any]]:
    """All ranks do a step, and it is committed."""
    for rank in ranks:
        rank.begin(step)
    facts = {rank.rank: rank.says("step") for rank in ranks}
    assert not any(fact["why"] for fact in facts.values()), facts
    eventually(lambda: committed(address, step), f"the commit of step {step}: {facts}")
    return facts


def gone(address: str, rank: int) -> bool:
    return not job_of(address).ranks[rank].attached


def started(rank: LiveRank) -> tuple[dict[str, Any], dict[str, Any]]:
    return rank.says("attached"), rank.says("start")


def test_a_rank_leaves_and_joins_again_and_again_while_the_other_goes_on(
    agent_process: AgentProcess, start_rank: Callable[..., LiveRank]
) -> None:
    address = agent_process.address
    stayer, leaver = (start_rank(address, rank, 2, "--live") for rank in (0, 1))
    for rank in (stayer, leaver):
        attached, start = started(rank)
        assert (attached["joined"], attached["incarnation"], start["step"]) == (False, 1, None)
    step = 1
    for _ in range(5):
        at = commit(address, [stayer, leaver], step)
        assert at[0]["shared"] == at[1]["shared"]
        leaver.kill()
        eventually(lambda: gone(address, 1), "the agent noticed")
        alone = [stayer.step(step + 1), stayer.step(step + 2)]
        assert all("rank 1 is not attached" in fact["why"] for fact in alone), alone
        leaver = start_rank(address, 1, 2, "--live")
        attached, start = started(leaver)
        assert (attached["joined"], attached["incarnation"], start["step"]) == (True, 1, step)
        assert start["shared"] == at[0]["shared"], "the replicated state of that step, bit for bit"
        assert (start["own"], start["steps"]) == (at[1]["own"], step)
        alone.append(stayer.step(step + 3))
        assert "rank 1 is joining" in alone[-1]["why"]
        # It catches up by itself: a step is a function of its number.
        caught_up = [leaver.step(step + behind) for behind in (1, 2, 3)]
        assert caught_up[-1]["shared"] == alone[-1]["shared"], "the counters agree again"
        assert all(fact["stalled_s"] < STALL_S for fact in alone), alone
        assert {fact["incarnation"] for fact in alone} == {1}
        step += 4
    assert commit(address, [stayer, leaver], step)[0]["incarnation"] == 1
