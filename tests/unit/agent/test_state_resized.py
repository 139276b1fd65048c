"""A launch of another size: what the one before it has saved stays until it has saved itself, and
what nobody writes any more goes then by itself."""

from everstep.agent import actions, events
from everstep.agent.actions import Place, ReleaseArena
from everstep.agent.job import Stage
from everstep.agent.plans import ParityPlan, PlannedMember
from everstep.agent.state import Rules, State
from everstep.proto.ids import UNIT_BYTES, SnapshotId

from .deciding import JOB, Node, adoption, shard


def resized(node: Node, world: int, process: str = "second", slots: int = 2) -> Node:
    """All ranks start anew, in another number, and restore."""
    node.world = world
    newest = node.job.newest_committed()
    node.launch(process, slots=slots)
    assert newest is not None
    node.handle(events.RestoreDecided(JOB, node.job.incarnation, newest.id))
    return node


def dropped(node: Node) -> list[int]:
    return sorted(action.rank for action in node.took(actions.DropRecord))


def test_what_four_ranks_saved_stays_until_three_have_saved() -> None:
    node = Node(world=4).launch()
    saved = node.commit(1)
    resized(node, 3)
    for rank in range(3):
        assert isinstance(node.offer(rank, 2), Place)
        assert not node.took(actions.DropRecord)
    for rank in range(3):
        assert node.job.snapshots[saved].stage is Stage.COMMITTED
        assert sorted(node.job.snapshots[saved].sealed) == [0, 1, 2, 3]
        node.seal(rank, 2)
    assert node.committed() == [1, 2]
    assert not node.took(actions.DropRecord), "a copy more, as long as its slot is not needed"
    assert isinstance(node.offer(0, 3), Place)
    assert dropped(node) == [0, 1, 2, 3]
    for rank in (1, 2):
        node.offer(rank, 3)
    assert not node.took(ReleaseArena)
    for rank in range(3):
        node.seal(rank, 3)
    assert node.took(ReleaseArena) == [ReleaseArena(JOB, 3, 1)]
    assert sorted(node.job.arenas) == [0, 1, 2]


def test_what_two_ranks_saved_stays_until_four_have_saved() -> None:
    node = Node(world=2).launch()
    saved = node.commit(1)
    resized(node, 4)
    for rank in range(4):
        assert isinstance(node.offer(rank, 2), Place)
    for rank in range(3):
        node.seal(rank, 2)
    assert node.job.snapshots[saved].stage is Stage.COMMITTED and not dropped(node)
    node.seal(3, 2)
    assert node.committed() == [1, 2]
    node.commit(3)
    assert node.committed() == [2, 3]
    assert not node.took(ReleaseArena)


def test_a_smaller_launch_that_never_commits_costs_nothing() -> None:
    node = Node(world=3).launch()
    saved = node.commit(1)
    for number in range(4):
        resized(node, 1, f"p{number}")
        node.offer(0, 2)
        node.lose(0)
    assert node.job.snapshots[saved].stage is Stage.COMMITTED
    assert not node.took(ReleaseArena)
    resized(node, 3, "last")
    assert len(node.job.snapshots[saved].sealed) == 3


def test_ranks_that_are_gone_take_no_slots() -> None:
    """What only they hold is in nobody's way, and their arenas' sizes say nothing."""
    node = Node(world=2, rules=Rules(nvme=False)).launch(slots=3)
    for rank in range(2):
        node.reserve(rank, 2, slots=4)
    node.commit(1)
    node.took(ReleaseArena)
    resized(node, 1)
    node.handle(events.ArenaReserved(JOB, 1, 3, 10, 1))
    assert node.job.why_busy() == ""
    node.commit(2)
    released = {(gone.rank, gone.generation) for gone in node.took(ReleaseArena)}
    assert released == {(1, 3)}, "the other holds what was saved"


def test_what_the_agent_finds_of_a_larger_launch_goes_likewise() -> None:
    node = Node(world=2)
    shards = [shard(1, 5, rank, 4, slot=0) for rank in range(4)]
    node.handle(adoption(world=4, members=range(4), shards=shards))
    node.handle(events.AdoptedVerified(JOB, SnapshotId(1, 5), ""))
    node.took(actions.VerifyAdopted)
    resized(node, 2)
    for step in (6, 7):
        assert isinstance(node.commit(step), SnapshotId)
    assert {gone.rank for gone in node.took(ReleaseArena)} == {2, 3}


class Bystander:
    """A node with ranks 2 and 3 of four, of which the next launch runs none."""

    def __init__(self) -> None:
        self.state = State(Rules(clustered=True, node_id="n2"), lambda known: [])
        for rank in (2, 3):
            caller = events.Caller(JOB, rank, 4, f"p{rank}", 1)
            self.feed(events.Attach(caller, "first", 1, 0.0, False, decided=1))
            self.feed(events.ArenaReserved(JOB, rank, 1, UNIT_BYTES, 2))
        for rank in (2, 3):
            caller = events.Caller(JOB, rank, 4, f"p{rank}", 1)
            place = self.state.handle(events.Offer(caller, 1), 0.0).reply
            assert isinstance(place, Place)
            seal = events.Seal(caller, 1, place, "layout", 1, b"", 0.0, bytes(16), bytes(16))
            self.feed(seal)
            self.feed(events.Recorded(JOB, SnapshotId(1, 1), rank))
        self.feed(events.CommitOrdered(JOB, SnapshotId(1, 1), b"id"))
        self.feed(events.BeginOrdered(JOB, 2, 2, "second"))

    def feed(self, event: events.Event) -> list[actions.Action]:
        return self.state.handle(event, 0.0).actions

    def protect(self, snapshot: SnapshotId, world: int) -> list[actions.Action]:
        members = (PlannedMember("n1", ()), PlannedMember("n2", ()))
        plan = ParityPlan(f"plan-{snapshot.step}", JOB, snapshot, world, 1, members)
        self.feed(events.PrepareOrdered(plan))
        self.feed(events.Encoded(JOB, plan.plan_id))
        return self.feed(events.RoundEnded(JOB, plan.plan_id, commit=True))

    def releases(self, done: list[actions.Action]) -> bool:
        """Whether that gave everything of the earlier launch free; else it all must be there."""
        dropped = {a.rank for a in done if isinstance(a, actions.DropRecord)}
        released = {a.rank for a in done if isinstance(a, ReleaseArena)}
        assert dropped == released
        assert dropped in ({2, 3}, set())
        job = self.state.jobs[JOB]
        assert bool(job.arenas) == bool(job.snapshots) == (not dropped)
        return bool(dropped)


def test_a_node_without_ranks_keeps_what_it_has_until_others_have_committed() -> None:
    node = Bystander()
    assert not node.releases(node.feed(events.CommitOrdered(JOB, SnapshotId(1, 2), b"id")))
    assert not node.releases(node.feed(events.CommitOrdered(JOB, SnapshotId(1, 1), b"id")))
    assert node.releases(node.feed(events.CommitOrdered(JOB, SnapshotId(2, 2), b"id")))
    assert node.feed(events.CommitOrdered(JOB, SnapshotId(2, 2), b"id")) == []


def test_a_node_without_ranks_keeps_what_parity_needs() -> None:
    node = Bystander()
    node.protect(SnapshotId(1, 1), 4)
    assert not node.releases(node.feed(events.CommitOrdered(JOB, SnapshotId(2, 2), b"id")))
    assert node.releases(node.protect(SnapshotId(2, 3), 2))


def test_a_rank_that_comes_to_such_a_node_has_it_all_again() -> None:
    node = Bystander()
    caller = events.Caller(JOB, 0, 2, "q0", 2)
    node.feed(events.Attach(caller, "second", 1, 0.0, False, decided=2))
    assert not node.releases(node.feed(events.CommitOrdered(JOB, SnapshotId(2, 2), b"id")))


def test_on_disk_the_earlier_launch_goes_by_the_rule_that_holds_everywhere() -> None:
    node = Bystander()
    job = node.state.jobs[JOB]
    job.flushed[SnapshotId(1, 1)] = (4, (2, 3))
    node.feed(events.DurableOrdered(JOB, SnapshotId(1, 1)))
    kept: list[list[SnapshotId]] = []
    node.state.expired = lambda known: kept.append(known) or [(s, "old") for s in known[:-1]]  # type: ignore[func-returns-value]
    done = node.feed(events.DurableOrdered(JOB, SnapshotId(2, 4)))
    assert kept == [[SnapshotId(1, 1), SnapshotId(2, 4)]]
    assert actions.DeleteDurable(JOB, SnapshotId(1, 1), "old") in done
    assert node.feed(events.DurableOrdered(JOB, SnapshotId(2, 4))) == []


def test_parity_of_other_nodes_shards_goes_to_disk_as_well() -> None:
    node = Bystander()
    node.protect(SnapshotId(2, 4), 2)
    done = node.feed(events.DurableOrdered(JOB, SnapshotId(2, 4)))
    assert [a.plan.snapshot for a in done if isinstance(a, actions.FlushParity)] == [
        SnapshotId(2, 4)
    ]


def test_what_others_have_committed_since_is_what_the_next_launch_wants() -> None:
    """Known here by its parity, or because the coordinator has said so."""
    node = Bystander()
    node.feed(events.RestoreDecided(JOB, 2, SnapshotId(1, 1)))
    job = node.state.jobs[JOB]
    node.protect(SnapshotId(2, 4), 2)
    node.feed(events.BeginOrdered(JOB, 3, 2, "third"))
    assert job.restored is None
    assert job.preference(SnapshotId(2, 4)) > job.preference(SnapshotId(1, 1))
    node = Bystander()
    node.feed(events.RestoreDecided(JOB, 2, SnapshotId(1, 1)))
    node.feed(events.BeginOrdered(JOB, 3, 2, "third"))
    assert node.state.jobs[JOB].restored == SnapshotId(1, 1), "nothing was committed"
