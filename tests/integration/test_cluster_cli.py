"""What people see of a cluster: status, plans and their outcome, verification, lists."""

from collections.abc import Callable

from .clusters import AgentCluster

StartCluster = Callable[..., AgentCluster]


def test_status_shows_the_membership(start_cluster: StartCluster) -> None:
    cluster = start_cluster(3)
    told = cluster.status("n2").cluster
    assert told.coordinator == "n1"
    assert [(m.node_id, m.state) for m in told.members] == [(f"n{i}", "live") for i in (1, 2, 3)]
    cluster.kill("n3")
    cluster.await_members(2)
    cluster.restart("n3")
    cluster.await_members(3)
    cluster.kill("n2")
    cluster.await_members(2)
    cluster.wipe("n2", nvme=True)
    cluster.replace("n2", "n4")
    cluster.await_members(3)
    states = {m.node_id: (m.state, m.replaced_by) for m in cluster.status("n1").cluster.members}
    assert states["n2"] == ("replaced", "n4")


def test_a_trainer_on_each_node(start_cluster: StartCluster) -> None:
    cluster = start_cluster(3)
    trainers = [
        cluster.trainer(f"n{rank + 1}", rank, 3, "--until", "5", "--no-restore", "--linger")
        for rank in range(3)
    ]
    ends = [trainer.until(event="end") for trainer in trainers]
    assert [end["step"] for end in ends] == [5, 5, 5]
    for trainer in trainers:
        assert all(fact["committed"] for fact in trainer.said if fact["event"] == "step")
        assert trainer.ended() == 0
