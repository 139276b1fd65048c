"""A rank that is gone is taken over while the others go on: on one agent, and over several nodes.

Measured on the others: their incarnation, their sessions, and what their snapshots made them wait.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from everstep.agent.asking import Agent
from everstep.proto.agent_pb2 import JobStatus
from everstep.storage.parity_memory import ParityMemory

from .clusters import AgentCluster
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
    return not any(r.attached for r in job_of(address).ranks if r.rank == rank)


def started(rank: LiveRank) -> tuple[dict[str, Any], dict[str, Any]]:
    return rank.says("attached"), rank.says("start")


@pytest.mark.timeout(600)  # a process with torch starts for each join
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


def sent(cluster: AgentCluster, node_id: str) -> int:
    """Bytes that a node has sent over the bulk plane."""
    return int(cluster.status(node_id).cluster.bulk_counters["bytes_sent"])


def protected(cluster: AgentCluster, step: int) -> bool:
    """Whether every node holds the parity of a step."""
    return all(
        any(
            m.plan.step == step
            for m in ParityMemory(node.memory_dir, keep_free_bytes=0).manifests(JOB)
        )
        for node in cluster.nodes.values()
    )


def ranks_on(
    cluster: AgentCluster, start_rank: Callable[..., LiveRank], *arguments: str
) -> list[LiveRank]:
    """One rank on each node, begun."""
    nodes = list(cluster.nodes.values())
    ranks = [
        start_rank(node.address, rank, len(nodes), "--live", *arguments)
        for rank, node in enumerate(nodes)
    ]
    for rank in ranks:
        attached, start = started(rank)
        assert (attached["joined"], attached["incarnation"], start["step"]) == (False, 1, None)
    return ranks


def go_on_without(ranks: list[LiveRank], steps: range) -> list[dict[str, Any]]:
    """Steps of the others, which must not be slowed."""
    facts = []
    for step in steps:
        for rank in ranks:
            rank.begin(step)
        facts += [rank.says("step") for rank in ranks]
    assert all(fact["stalled_s"] < STALL_S and fact["incarnation"] == 1 for fact in facts), facts
    return facts


def commit_soon(cluster: AgentCluster, ranks: list[LiveRank], step: int) -> int:
    """Steps until one is committed on all nodes again, within a few; which one it was."""
    first = cluster["n1"].address
    for tried in range(step, step + 4):
        go_on_without(ranks, range(tried, tried + 1))
        try:
            eventually(lambda at=tried: committed(first, at), f"the commit of {tried}", 3.0)
        except AssertionError:
            continue
        return tried
    raise AssertionError(f"nothing was committed from step {step} on: {job_of(first)}")


RATE_BYTES_S = 1_000_000


def test_a_rank_joins_over_the_network_no_faster_than_allowed(
    start_cluster: Callable[..., AgentCluster], start_rank: Callable[..., LiveRank]
) -> None:
    options = f"[parity]\nparities = 0\n[bulk]\njoin_rate_bytes_s = {RATE_BYTES_S}\n"
    cluster = start_cluster(3, options)
    ranks = ranks_on(cluster, start_rank, "--width", "1000")
    at = commit(cluster["n1"].address, ranks, 1)
    ranks[2].kill()
    eventually(lambda: gone(cluster["n3"].address, 2), "n3 noticed")
    before = {node_id: sent(cluster, node_id) for node_id in ("n1", "n2")}
    joiner = start_rank(cluster["n3"].address, 2, 3, "--live", "--width", "1000")
    go_on_without(ranks[:2], range(2, 5))
    attached, start = started(joiner)
    assert (attached["joined"], attached["incarnation"], start["step"]) == (True, 1, 1)
    assert (start["shared"], start["own"]) == (at[0]["shared"], at[2]["own"])
    for node_id, sent_before in before.items():
        count_bytes = sent(cluster, node_id) - sent_before
        assert count_bytes > RATE_BYTES_S, f"{node_id} has a third of the model"
        assert start["took_s"] >= (count_bytes - RATE_BYTES_S / 8) / RATE_BYTES_S
    for step in (2, 3, 4):
        joiner.step(step)
    commit_soon(cluster, [*ranks[:2], joiner], 5)


def test_a_rank_joins_from_what_the_others_remember_of_its_node(
    start_cluster: Callable[..., AgentCluster], start_rank: Callable[..., LiveRank]
) -> None:
    cluster = start_cluster(3, "[parity]\nparities = 1\n")
    ranks = ranks_on(cluster, start_rank)
    at = commit(cluster["n1"].address, ranks, 1)
    eventually(lambda: protected(cluster, 1), "the parity of step 1")
    ranks[2].kill()
    cluster.kill("n3")
    cluster.wipe("n3", nvme=True)
    go_on_without(ranks[:2], range(2, 4))
    cluster.restart("n3")
    joiner = start_rank(cluster["n3"].address, 2, 3, "--live")
    attached, start = started(joiner)
    assert (attached["joined"], attached["incarnation"], start["step"]) == (True, 1, 1)
    assert (start["shared"], start["own"]) == (at[0]["shared"], at[2]["own"])
    for step in (2, 3):
        joiner.step(step)
    commit_soon(cluster, [*ranks[:2], joiner], 4)


@pytest.mark.long
@pytest.mark.timeout(600)  # a process with torch starts for each join
def test_on_several_nodes_nobody_waits_for_one_that_leaves_and_joins_again_and_again(
    start_cluster: Callable[..., AgentCluster], start_rank: Callable[..., LiveRank]
) -> None:
    cluster = start_cluster(3, "[parity]\nparities = 0\n")
    # These would wait for a slot half a minute, if a step of theirs waited for the rank.
    ranks = ranks_on(cluster, start_rank, "--on-busy", "wait")
    stayers, leaver, step = ranks[:2], ranks[2], 1
    for _ in range(5):
        step = commit_soon(cluster, [*stayers, leaver], step)
        shared = leaver.facts["shared"]
        leaver.kill()
        eventually(lambda: gone(cluster["n3"].address, 2), "n3 noticed")
        alone = go_on_without(stayers, range(step + 1, step + 4))
        leaver = start_rank(cluster["n3"].address, 2, 3, "--live", "--on-busy", "wait")
        attached, start = started(leaver)
        assert (attached["joined"], attached["incarnation"], start["step"]) == (True, 1, step)
        assert start["shared"] == shared
        alone += go_on_without(stayers, range(step + 4, step + 6))
        caught_up = [leaver.step(step + behind) for behind in range(1, 6)]
        assert caught_up[-1]["shared"] == alone[-1]["shared"], "the counters agree again"
        step += 6
    commit_soon(cluster, [*stayers, leaver], step)
