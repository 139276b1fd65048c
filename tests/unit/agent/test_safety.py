"""What `everstep status` and `list` say of how safe a job is, from what nodes hold."""

from collections.abc import Sequence
from typing import Any

import pytest

from everstep.agent.inventory import NodeInventory
from everstep.agent.outlook import job_overview
from everstep.agent.planning import plan_snapshots
from everstep.agent.plans import ParityPlan
from everstep.agent.safety import cluster_report, copies_in_words, held_report, job_report
from everstep.agent.showing_cluster import held_by_all_report, show_cluster, show_held_by_all
from everstep.proto import agent_pb2, peer_pb2
from everstep.proto.ids import SnapshotId

from .protected import holding, plan_of

OLD, NEW = SnapshotId(2, 100), SnapshotId(2, 120)


def plan(snapshot: SnapshotId, nodes: int = 3, parities: int = 1) -> ParityPlan:
    return plan_of([[3_000_000]] * nodes, parities, snapshot=snapshot, plan_id=f"p{snapshot.step}")


def merged(*parts: NodeInventory) -> NodeInventory:
    return NodeInventory(parts[0].node_id, tuple(s for part in parts for s in part.snapshots))


def overview(
    inventories: Sequence[NodeInventory], *, silent: Sequence[str] = ()
) -> peer_pb2.JobOverview:
    plans = plan_snapshots(inventories)
    times = {OLD: 1000.0, NEW: 1030.0}
    return job_overview("gpt", inventories, plans, silent=silent, captured_unix_s=times)


def surveyed(**newest: SnapshotId) -> peer_pb2.JobSurvey:
    return peer_pb2.JobSurvey(
        job="gpt",
        incarnation=2,
        world=3,
        newest=[
            peer_pb2.LevelSurvey(level=level, incarnation=one.incarnation, step=one.step)
            for level, one in newest.items()
        ],
    )


def report(
    inventories: Sequence[NodeInventory],
    gone: Sequence[str] = (),
    *,
    protects: bool = True,
    **newest: SnapshotId,
) -> dict[str, Any]:
    told = overview(inventories, silent=gone)
    return job_report(told, surveyed(**newest), gone, protects=protects)


def unprotected_newest() -> list[NodeInventory]:
    """The old step with parity and on disk, the new one in memory only."""
    old, new = plan(OLD), plan(NEW)
    return [
        merged(holding(old, index, ["memory", "nvme"]), holding(new, index, parity=False))
        for index in range(3)
    ]


def test_a_commit_without_parity_is_at_risk_until_it_has_some() -> None:
    found = report(unprotected_newest(), memory=NEW, parity=OLD, nvme=OLD)
    assert found["recoverable"] == {
        "step": 120,
        "incarnation": 2,
        "further_losses": 0,
        "memory_losses": 0,
    }
    assert found["at_risk"] == [
        "step 120 is in memory only, without parity; the loss of one node goes back to step 100",
        "step 120 is not on NVMe yet; the loss of all nodes' memory goes back to step 100",
    ]
    assert found["fallbacks"] == [
        {"losses": 1, "step": 100, "incarnation": 2},
        {"losses": 2, "step": None, "incarnation": None},
    ]


def test_lag_is_told_in_steps_and_seconds() -> None:
    found = report(unprotected_newest(), memory=NEW, parity=OLD, nvme=OLD)
    assert {
        level: (one["step"], one["lag_steps"], one["lag_s"])
        for level, one in found["newest"].items()
    } == {
        "memory": (120, 0, 0.0),
        "parity": (100, 20, 30.0),
        "nvme": (100, 20, 30.0),
    }
    other = report(unprotected_newest(), memory=SnapshotId(3, 90), nvme=OLD)["newest"]["nvme"]
    assert (other["lag_steps"], other["lag_s"]) == (None, None), "no time known, other steps"


def test_a_job_that_has_all_levels_is_at_no_risk() -> None:
    whole = [holding(plan(NEW), index, ["memory", "nvme"]) for index in range(3)]
    found = report(whole, memory=NEW, parity=NEW, nvme=NEW)
    assert found["at_risk"] == []
    assert found["recoverable"]["further_losses"] == 1


def test_with_a_member_missing_there_is_no_redundancy_left() -> None:
    left = [holding(plan(NEW), index, ["memory", "nvme"]) for index in (0, 2)]
    found = report(left, ["n2"], memory=NEW, parity=NEW, nvme=NEW)
    assert found["at_risk"] == [
        "step 120 has no redundancy left; the loss of one node leaves nothing to go back to"
    ]
    assert found["silent"] == ["n2"]


def test_what_cannot_be_recovered_comes_first() -> None:
    left = [holding(plan(NEW), 0)]
    (risk,) = report(left, ["n2", "n3"])["at_risk"]
    assert risk.startswith("nothing can be recovered now: step 120: rank")
    old = [merged(holding(plan(OLD), i), holding(plan(NEW), i, parity=False)) for i in (0, 1)]
    first = report(old, ["n3"], parity=OLD)["at_risk"][0]
    assert first.startswith("step 120 cannot be recovered now (rank 2: ")
    assert first.endswith("); step 100 can")


def test_parity_that_is_on_disk_alone_is_said_to_be_slow() -> None:
    inventories = []
    for index in range(3):
        memory = holding(plan(NEW), index, parity=False)
        disk = holding(plan(NEW), index, ["nvme"])
        held = memory.snapshots[0]
        both = type(held)(
            held.snapshot,
            held.world,
            held.shards + disk.snapshots[0].shards,
            disk.snapshots[0].parities,
        )
        inventories.append(NodeInventory(memory.node_id, (both,)))
    assert report(inventories, memory=NEW, nvme=NEW)["at_risk"] == [
        "step 120 has no parity in memory yet; the loss of one node is mended from NVMe only"
    ]
    assert report(inventories, memory=NEW, nvme=NEW, protects=False)["at_risk"] == []


def test_list_says_of_each_snapshot_what_is_missing() -> None:
    left = [merged(holding(plan(OLD), i), holding(plan(NEW), i, parity=False)) for i in (0, 1)]
    new, old = held_report(overview(left))
    assert (new["step"], new["recoverable"], new["further_losses"]) == (120, False, None)
    assert new["missing"] == ["rank 2: no intact copy is in reach, and no parity that protects it"]
    assert (old["step"], old["recoverable"], old["further_losses"]) == (100, True, 0)
    assert copies_in_words(old["copies"], old["world"]) == "memory 0-1 of 3 + parity on 2 nodes"
    assert copies_in_words(new["copies"], new["world"]) == "memory 0-1 of 3"


def told_cluster() -> tuple[agent_pb2.ClusterStatus, peer_pb2.OverviewReply]:
    status = agent_pb2.ClusterStatus(
        joined=True,
        epoch=7,
        coordinator="n1",
        refused_calls={"n2": 3, "strangers": 2},
        bulk_counters={"streams": 9, "refused_token": 1, "refused_replay": 0},
        members=[
            agent_pb2.MemberStatus(node_id="n1", address="h1:1", state="live", since_epoch=1),
            agent_pb2.MemberStatus(
                node_id="n2", address="h2:1", state="suspected", labels={"rack": "a"}
            ),
            agent_pb2.MemberStatus(
                node_id="n3", address="h3:1", state="replaced", replaced_by="n4"
            ),
        ],
    )
    survey = surveyed(memory=NEW, parity=OLD, nvme=OLD)
    survey.pending.add(incarnation=2, step=121, late_ranks=[1], late_nodes=["n2"])
    survey.round.incarnation, survey.round.step = 2, 120
    survey.round.waiting_for.append("n2")
    survey.round.running_s = 1.5
    survey.groups.add(plan_id="p", incarnation=2, step=100, members=["n1", "n2"], missing=["n2"])
    reply = peer_pb2.OverviewReply(jobs=[overview(unprotected_newest(), silent=["n2"])])
    reply.survey.jobs.append(survey)
    reply.survey.protects = True
    reply.survey.warnings.append("rack a holds two of a group")
    return status, reply


def test_the_report_of_a_cluster_names_who_is_gone_and_late() -> None:
    found = cluster_report("n1", *told_cluster())
    assert (found["coordinator"], found["suspected"], found["epoch"]) == ("n1", ["n2"], 7)
    assert [one["state"] for one in found["members"]] == ["live", "suspected", "replaced"]
    assert found["refused_calls"] == {"n2": 3, "strangers": 2}
    (job,) = found["jobs"]
    assert job["pending"] == [
        {"step": 121, "incarnation": 2, "late_ranks": [1], "late_nodes": ["n2"]}
    ]
    assert job["round"]["waiting_for"] == ["n2"]
    assert job["groups"][0]["missing"] == ["n2"]


@pytest.mark.parametrize(
    "said",
    [
        "epoch 7, coordinator n1",
        "rack=a",
        "replaced by n4",
        "calls refused to nodes that are none of these: 2",
        "streams refused on the bulk plane: token 1",
        "step 121 waits for rank 1 on n2",
        "parity of step 120 waits for n2 since 1.5 s",
        "the group of n1, n2 protects step 100 without n2",
        "gone: n2",
        "at risk: step 120 is in memory only, without parity; the loss of one node goes back to",
        "20 steps",
    ],
)
def test_people_are_shown_all_of_it(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_cluster(cluster_report("n1", *told_cluster()))
    shown = capsys.readouterr()
    assert said in shown.out
    assert "rack a holds two of a group" in shown.err


def test_a_coordinator_that_cannot_be_asked_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    status, reply = told_cluster()
    reply.ClearField("survey")
    reply.problem = "nobody coordinates"
    show_cluster(cluster_report("n1", status, reply))
    shown = capsys.readouterr()
    assert "the coordinator could not be asked: nobody coordinates" in shown.err
    assert "step 120" in shown.out, "what the nodes hold is known all the same"
    assert "NVMe" not in shown.out, "what is durable is not"


def test_a_fenced_agent_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    status, reply = told_cluster()
    status.joined, status.fenced_by = False, "n3 at h9:1"
    found = cluster_report("n3", status, reply)
    assert [one["state"] for one in found["members"]] == ["live", "suspected", "fenced"]
    show_cluster(found)
    assert "place is held by n3 at h9:1: it takes no snapshots" in capsys.readouterr().out


def test_the_list_over_all_nodes_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    _, reply = told_cluster()
    show_held_by_all(held_by_all_report("the agent", reply))
    shown = capsys.readouterr()
    assert "memory 0-2 of 3" in shown.out
    assert "0 nodes" in shown.out
    assert "counted as lost: n2" in shown.err
