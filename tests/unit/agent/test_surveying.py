"""What the coordinator tells people of a job, from what the members reported."""

import pytest

from everstep.agent.coordination import Cluster, Coordination
from everstep.agent.holdings import (
    FlushedFact,
    JobFact,
    MemberFact,
    Report,
    RoundFact,
    ShardFact,
    SnapshotFact,
)
from everstep.agent.protection import ProtectionRules
from everstep.agent.surveying import survey
from everstep.proto.ids import SnapshotId
from everstep.proto.peer_pb2 import JobSurvey

NODES = ("n1", "n2", "n3")
SAMPLES = b"\x00" * 8
OLD, NEW, LATE = SnapshotId(1, 10), SnapshotId(1, 20), SnapshotId(1, 30)


class World:
    """Three nodes with a rank each, of which the coordinator has heard."""

    def __init__(self, rules: ProtectionRules | None = None) -> None:
        self.coordination = Coordination(rules or ProtectionRules(parities=1))
        self.coordination.take_over(1)
        self.live = set(NODES)
        self._sequence = 0

    def tell(self, node: str, **facts: object) -> None:
        self._sequence += 1
        rank = NODES.index(node)
        base = {"incarnation": 1, "members": (MemberFact(rank, f"p{rank}", attached=True),)}
        fact = JobFact(job="gpt", world=3, **{**base, **facts})  # type: ignore[arg-type]
        self.coordination.report(node, Report(self._sequence, 1, (fact,)))

    def cluster(self) -> Cluster:
        return Cluster(frozenset(NODES), frozenset(self.live))

    def decide(self, now_s: float) -> None:
        self.coordination.decide(self.cluster(), now_s)

    def survey(self, now_s: float = 0.0) -> JobSurvey:
        (found,) = survey(self.coordination, self.cluster(), now_s)
        return found


def part(
    node: str, snapshot: SnapshotId, stage: str = "committed", samples: bytes = SAMPLES
) -> SnapshotFact:
    rank = NODES.index(node)
    shard = ShardFact(rank, "layout", 3_000_000, bytes([rank]) * 16, samples)
    return SnapshotFact(snapshot, 3, stage, (shard,))


def parity(snapshot: SnapshotId, stage: str = "committed", problem: str = "") -> RoundFact:
    return RoundFact(f"p-{snapshot.step}", snapshot, stage, NODES, problem)


@pytest.fixture
def world() -> World:
    world = World()
    for node in NODES:
        world.tell(
            node,
            snapshots=(part(node, OLD), part(node, NEW)),
            rounds=(parity(OLD),),
            flushed=(FlushedFact(OLD, 3, (NODES.index(node),)),),
        )
    return world


def newest(found: JobSurvey) -> dict[str, int]:
    return {one.level: one.step for one in found.newest}


def test_the_newest_step_at_each_level(world: World) -> None:
    found = world.survey()
    assert newest(found) == {"memory": 20, "parity": 10, "nvme": 10}
    assert [(r.rank, r.node_id, r.attached) for r in found.ranks] == [
        (0, "n1", True),
        (1, "n2", True),
        (2, "n3", True),
    ]
    assert [(list(g.members), list(g.missing)) for g in found.groups] == [(list(NODES), [])]


def test_what_only_some_have_flushed_is_not_durable(world: World) -> None:
    world.tell("n2", snapshots=(part("n2", OLD), part("n2", NEW)), rounds=(parity(OLD),))
    assert "nvme" not in newest(world.survey())


def test_a_snapshot_that_waits_for_ranks_names_them(world: World) -> None:
    for node in ("n1", "n3"):
        world.tell(node, snapshots=(part(node, NEW), part(node, LATE, "sealed")))
    (pending,) = world.survey().pending
    assert (pending.step, list(pending.late_ranks), list(pending.late_nodes)) == (30, [1], ["n2"])
    refused = SnapshotFact(LATE, 3, "dropped", reason="busy")
    world.tell("n2", snapshots=(part("n2", NEW), refused))
    assert not world.survey().pending, "it will never commit"
    world.tell("n2", snapshots=(part("n2", NEW), part("n2", LATE, "sealed")))
    assert not world.survey().pending
    assert newest(world.survey())["memory"] == 30


def test_a_lost_member_is_missing_in_its_group(world: World) -> None:
    world.live.discard("n2")
    found = world.survey()
    assert [list(group.missing) for group in found.groups] == [["n2"]]
    assert newest(found)["parity"] == 10


def test_failed_parity_is_a_problem_and_no_protection(world: World) -> None:
    for node in NODES:
        world.tell(node, snapshots=(part(node, NEW),), rounds=(parity(NEW, "failed", "no room"),))
    found = world.survey()
    assert "parity" not in newest(found)
    assert found.problems[0] == f"n1: parity of {NEW}: no room"


def test_a_round_under_way_names_whom_it_waits_for(world: World) -> None:
    world.decide(100.0)
    found = world.survey(102.5)
    assert (found.round.step, list(found.round.waiting_for)) == (20, list(NODES))
    assert found.round.running_s == pytest.approx(2.5)


def test_without_a_round_there_is_none(world: World) -> None:
    assert not world.survey().HasField("round")


def test_what_drifted_apart_is_excluded(world: World) -> None:
    for node in NODES:
        samples = SAMPLES + bytes([NODES.index(node)]) * 8
        world.tell(node, snapshots=(part(node, NEW), part(node, LATE, "sealed", samples)))
    found = world.survey()
    assert [one.step for one in found.excluded] == [30]
    assert newest(found)["memory"] == 20


def test_where_a_rank_ran_is_known_after_it_is_gone(world: World) -> None:
    world.tell("n2", incarnation=1, members=(MemberFact(1, "p1", attached=False),))
    (rank,) = [one for one in world.survey().ranks if one.rank == 1]
    assert (rank.node_id, rank.attached) == ("n2", False)
    world.tell("n3", incarnation=2, members=(MemberFact(1, "p9", attached=True),), restored=OLD)
    (rank,) = [one for one in world.survey().ranks if one.rank == 1]
    assert (rank.node_id, rank.attached) == ("n3", True)
    assert world.survey().restored.step == 10


def test_only_the_job_that_is_asked_for(world: World) -> None:
    assert survey(world.coordination, world.cluster(), 0.0, "other") == []
