"""Spread state over several nodes of which some are lost: the ranks that are left have all of it.

Ranks are in this process, their agents are real. A restore that breaks off is here, too.
"""

from collections.abc import Callable, Iterator

import pytest
import torch.distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from everstep.proto import failpoint
from everstep.snapshot.placement import local_of

from .clusters import AgentCluster
from .conftest import AgentProcess
from .meshes import WORLD_LIMIT, Job, Plan, Reference

StartCluster = Callable[..., AgentCluster]
OPTIONS = "[parity]\nparities = 1\n[nvme]\ninterval = 'off'\nflush_on_exit = false"


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_LIMIT)
    yield
    torch.distributed.destroy_process_group()


def on(cluster: AgentCluster, *nodes: str) -> Callable[[int], str]:
    """Ranks to nodes, by turns as they are named: ("n1", "n1", "n2") has two ranks on n1."""
    return lambda rank: cluster[nodes[rank]].address


def train_and_lose(cluster: AgentCluster, plan: Plan, nodes: list[str], lost: str) -> None:
    """Two steps and a snapshot with parity; then a node is gone with all that it held."""
    with Job(plan, "job", agent_of=on(cluster, *nodes)) as job:
        job.train(2)
        job.snapshot(2, level="parity")
    cluster.kill(lost)
    cluster.wipe(lost, nvme=True)


def go_on(cluster: AgentCluster, plan: Plan, nodes: list[str]) -> set[str]:
    """The ranks that are left have every byte, and train on; the levels that it came from."""
    with Job(plan, "job", zeros=True, agent_of=on(cluster, *nodes)) as job:
        assert job.restore() == [2] * plan.world
        assert job.whole() == Reference(2).state
        levels = {level for rank in job.ranks for level in rank.client.restored_from}
        job.train(1)
        job.snapshot(3)
        assert job.whole() == Reference(3).state
    return levels


@pytest.mark.parametrize(("lost", "left"), [("n2", "n1"), ("n1", "n2")])
def test_hsdp_goes_on_without_the_node_of_a_replica(
    start_cluster: StartCluster, lost: str, left: str
) -> None:
    """Half of what was replicated was captured there alone: parity has it."""
    cluster = start_cluster(2, OPTIONS)
    train_and_lose(cluster, Plan(shards=2, replicas=2), ["n1", "n1", "n2", "n2"], lost)
    assert go_on(cluster, Plan(shards=2), [left, left]) == {"memory"}


def test_fsdp_over_three_nodes_goes_on_over_two(start_cluster: StartCluster) -> None:
    cluster = start_cluster(3, OPTIONS)
    train_and_lose(cluster, Plan(4), ["n1", "n2", "n2", "n3"], "n2")
    assert go_on(cluster, Plan(3), ["n1", "n3", "n3"]) == {"memory"}


def arm(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    point = failpoint._armed(f"client.restore.copied={setting}" if setting else "")
    monkeypatch.setattr("everstep.snapshot.restore.failpoint", point)


def break_off_and_restore(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some bytes are there, some are not; then all ranks do it again."""
    for setting in ("error:EIO", "error:EIO@2"):
        arm(monkeypatch, setting)
        with pytest.raises(OSError, match="Input/output error"):
            job.restore()
        for rank in job.ranks:
            for tensor in rank.held().values():
                local_of(tensor).detach().zero_()
    arm(monkeypatch, "")
    assert job.restore() == [2] * job.plan.world
    assert job.whole() == Reference(2).state


def test_a_restore_that_breaks_off_is_repeated(
    agent_process: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same processes, and by those that follow them."""
    with Job(Plan(2, 2), "job", agent=agent_process.address) as job:
        job.train(2)
        job.snapshot(2)
    with Job(Plan(3), "job", zeros=True, agent=agent_process.address) as job:
        arm(monkeypatch, "error:EIO@2")
        with pytest.raises(OSError, match="Input/output error"):
            job.restore()
    with Job(Plan(3), "job", zeros=True, agent=agent_process.address) as job:
        break_off_and_restore(job, monkeypatch)
        job.train(1)
        assert job.whole() == Reference(3).state


def test_a_restore_over_nodes_that_breaks_off_is_repeated(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was gathered and decoded for it is used again, or brought again."""
    cluster = start_cluster(3, OPTIONS)
    train_and_lose(cluster, Plan(3), ["n1", "n2", "n3"], "n3")
    nodes = on(cluster, "n1", "n2")
    with Job(Plan(2), "job", zeros=True, agent_of=nodes) as job:
        arm(monkeypatch, "error:EIO")
        with pytest.raises(OSError, match="Input/output error"):
            job.restore()
    with Job(Plan(2), "job", zeros=True, agent_of=nodes) as job:
        break_off_and_restore(job, monkeypatch)
    assert go_on(cluster, Plan(2), ["n1", "n2"]) == {"memory"}
