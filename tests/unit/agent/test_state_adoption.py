"""What an agent makes of what it finds, and what is restored."""

import pytest

from everstep.agent import actions, events
from everstep.agent.actions import Place
from everstep.proto.errors import RankClaimed
from everstep.proto.ids import SnapshotId

from .deciding import AGREED, JOB, Node, adoption, shard

CALLER = events.Caller(JOB, 0, 1, "first-0", 1)
"""As it is known when the agent has come back."""


def test_a_whole_snapshot_is_adopted_and_checked() -> None:
    node = Node()
    node.handle(adoption(shards=[shard(1, 5, 0), shard(1, 5, 1)]))
    assert node.committed() == [5]
    assert node.took(actions.VerifyAdopted) == [actions.VerifyAdopted(JOB, SnapshotId(1, 5))]
    assert not node.job.snapshots[SnapshotId(1, 5)].verified
    node.handle(events.AdoptedVerified(JOB, SnapshotId(1, 5)))
    assert node.job.snapshots[SnapshotId(1, 5)].verified
    assert node.job.snapshots[SnapshotId(1, 5)].pins == 0
    node.handle(events.AdoptedVerified(JOB, SnapshotId(1, 5)))
    assert node.job.snapshots[SnapshotId(1, 5)].pins == 0


def test_what_is_being_checked_stays() -> None:
    node = Node(world=1)
    shards = [shard(1, 5, 0, 1), shard(1, 6, 0, 1, slot=1)]
    node.handle(adoption(world=1, members=[0], shards=shards))
    node.attach(0, incarnation=1)
    assert node.offer(0, 7).startswith("busy: step 5 is being read")
    node.handle(events.AdoptedVerified(JOB, SnapshotId(1, 5)))
    assert node.offer(0, 8) == Place(1, 0)


def test_an_adopted_snapshot_that_is_damaged_is_dropped_and_the_next_one_stays() -> None:
    node = Node(world=1)
    shards = [shard(1, 5, 0, 1), shard(1, 6, 0, 1, slot=1)]
    node.handle(adoption(world=1, shards=shards))
    node.handle(events.AdoptedVerified(JOB, SnapshotId(1, 6), "unit 3 does not match"))
    assert node.committed() == [5]
    # Its record stays until the slot is needed: the next agent must know of it, too.
    assert not node.took(actions.DropRecord)
    assert "unit 3" in node.took(actions.NotifyDropped)[0].reason
    assert node.job.counters["damaged"] == 1
    node.attach(0, "second")
    assert node.offer(0, 7) == Place(1, 1)
    assert node.took(actions.DropRecord) == [actions.DropRecord(JOB, 0, Place(1, 1))]


def test_half_a_snapshot_of_an_ended_incarnation_is_dropped() -> None:
    node = Node()
    node.handle(adoption(incarnation=2, shards=[shard(1, 5, 0)]))
    assert node.committed() == []
    assert node.took(actions.DropRecord) == [actions.DropRecord(JOB, 0, Place(1, 0))]


def test_half_a_snapshot_may_still_be_completed() -> None:
    node = Node()
    node.handle(adoption(members=[0, 1], shards=[shard(1, 5, 0)]))
    node.attach(0, incarnation=1)
    node.attach(1, incarnation=1, in_flight=events.InFlight(5, Place(1, 0)))
    assert not node.took(actions.DropRecord)
    assert node.seal(1, 5) is None
    assert node.committed() == [5]


def test_half_a_snapshot_that_is_superseded_is_dropped() -> None:
    """The last agent died while it withdrew the records of an old one, to grant its slots."""
    node = Node()
    shards = [shard(1, 5, 1), shard(1, 6, 0, slot=1), shard(1, 6, 1, slot=1)]
    node.handle(adoption(members=[0, 1], shards=shards))
    assert node.committed() == [6]
    assert node.took(actions.DropRecord) == [actions.DropRecord(JOB, 1, Place(1, 0))]


def test_drifted_replicas_are_not_adopted() -> None:
    """The last agent died between the last record and the look at all of them."""
    node = Node()
    drifted = AGREED[:-8] + b"x" * 8
    node.handle(adoption(shards=[shard(1, 5, 0), shard(1, 5, 1, samples=drifted)]))
    assert node.committed() == []
    assert len(node.took(actions.DropRecord)) == 2


def test_adopted_members_are_not_attached_until_they_say_so() -> None:
    node = Node()
    node.handle(adoption(members=[0, 1]))
    node.attach(0, incarnation=1)
    assert node.offer(0, 1) == "rank 1 is not attached any more"
    node.attach(1, incarnation=1)
    assert isinstance(node.offer(0, 2), Place)


def test_a_new_process_after_the_agents_restart_begins_an_incarnation() -> None:
    node = Node()
    node.handle(adoption(members=[0, 1], shards=[shard(1, 5, 0)]))
    with pytest.raises(RankClaimed):
        node.attach(0, "second", holder_alive=True)
    assert node.attach(0, "second") == 2
    assert node.took(actions.DropRecord) == [actions.DropRecord(JOB, 0, Place(1, 0))]


def test_a_copy_under_way_keeps_its_slot_across_the_agents_restart() -> None:
    node = Node(world=1)
    node.handle(adoption(world=1, members=[0], shards=[shard(1, 5, 0, 1)]))
    node.attach(0, incarnation=1, in_flight=events.InFlight(6, Place(1, 1)))
    assert node.seal(0, 6) is None
    assert node.committed() == [5, 6]


def test_a_seal_may_come_before_its_rank_has_attached_again() -> None:
    """Two threads of a trainer look for the agent, each in its own time."""
    node = Node(world=1)
    node.callers[0] = CALLER
    node.handle(adoption(world=1, members=[0], shards=[shard(1, 5, 0, 1)]))
    assert node.seal(0, 6, Place(1, 1)) is None
    node.attach(0, incarnation=1)
    assert node.committed() == [5, 6]
    node.handle(events.AdoptedVerified(JOB, SnapshotId(1, 5)))
    assert node.offer(0, 7) == Place(1, 0)


def test_a_rank_that_has_closed_its_client_seals_nothing() -> None:
    node = Node(world=1)
    node.handle(adoption(world=1, members=[0], shards=[shard(1, 5, 0, 1)]))
    node.attach(0, incarnation=1)
    node.handle(events.Detach(node.callers[0]))
    assert node.seal(0, 6, Place(1, 1)) == "step 6 was not granted that slot"


@pytest.mark.parametrize("attaches", [True, False])
@pytest.mark.parametrize(
    ("step", "place"),
    [(6, Place(1, 0)), (6, Place(2, 1)), (4, Place(1, 1)), (6, Place(1, 2))],
    ids=["a record is there", "another arena", "superseded", "no such slot"],
)
def test_a_copy_that_cannot_have_been_granted_is_not_taken(
    step: int, place: Place, attaches: bool
) -> None:
    node = Node(world=1)
    node.handle(adoption(world=1, members=[0], shards=[shard(1, 5, 0, 1)]))
    node.callers[0] = CALLER
    if attaches:
        node.attach(0, incarnation=1, in_flight=events.InFlight(step, place))
    assert node.seal(0, step, place) == f"step {step} was not granted that slot"
    assert node.committed() == [5]


def test_a_seal_whose_answer_was_lost_with_the_agent_is_repeated() -> None:
    node = Node(world=1)
    node.handle(adoption(world=1, members=[0], shards=[shard(1, 5, 0, 1)]))
    node.attach(0, incarnation=1, in_flight=events.InFlight(5, Place(1, 0)))
    assert node.seal(0, 5) is None
    assert node.committed() == [5]


def test_a_job_can_be_adopted_from_nvme_alone() -> None:
    node = Node()
    node.handle(adoption(durable=[(SnapshotId(1, 10), 2)]))
    assert node.job.newest_durable() == SnapshotId(1, 10)
    # What is on NVMe has its number; two runs under one would give two snapshots the same id.
    assert node.attach(0) == 2
    assert node.attach(1) == 2


def test_those_who_may_still_read_what_was_restored_are_known_after_the_agents_restart() -> None:
    node = Node()
    shards = [shard(1, 5, 0), shard(1, 5, 1), shard(1, 8, 0, slot=1), shard(1, 8, 1, slot=1)]
    restored = SnapshotId(1, 5)
    node.handle(adoption(incarnation=2, members=[0, 1], shards=shards, restored=restored))
    for snapshot in (SnapshotId(1, 5), SnapshotId(1, 8)):
        node.handle(events.AdoptedVerified(JOB, snapshot))
    assert node.job.restoring == {0, 1}
    node.attach(0, incarnation=2)
    node.attach(1, incarnation=2)
    assert node.offer(0, 6) == Place(1, 1)
    assert restored in node.job.snapshots


def test_what_is_restored_stays_until_every_rank_has_offered_once() -> None:
    node = Node(world=2).launch(slots=3)
    node.commit(1)
    node.launch("second")
    node.handle(events.RestoreDecided(JOB, 2, SnapshotId(1, 1)))
    assert node.took(actions.WriteMembership)
    node.offer(0, 2)
    # It rots, but rank 1 may still be reading its sound shards.
    node.handle(events.Damaged(JOB, SnapshotId(1, 1), "rotten"))
    for step in (3, 4, 5, 6):
        node.handle(events.Abandon(node.callers[0], step - 1, "torn"))
        node.offer(0, step)
        assert SnapshotId(1, 1) in node.job.snapshots
    node.handle(events.Abandon(node.callers[0], 6, "torn"))
    for step in (7, 8, 9):
        node.commit(step)
    assert SnapshotId(1, 1) not in node.job.snapshots


def test_a_lost_session_may_still_be_reading() -> None:
    node = Node().launch()
    node.commit(1)
    node.launch("second")
    node.handle(events.RestoreDecided(JOB, 2, SnapshotId(1, 1)))
    node.lose(1)
    assert node.job.restoring == {0, 1}
    node.handle(events.Detach(node.callers[0]))
    assert node.job.restoring == {1}


def test_a_decision_for_an_ended_incarnation_is_nothing() -> None:
    node = Node().launch()
    node.commit(1)
    node.launch("second")
    node.handle(events.RestoreDecided(JOB, 1, SnapshotId(1, 1)))
    assert not node.job.restore_decided
    node.handle(events.RestoreDecided("other", 1, SnapshotId(1, 1)))
    node.handle(events.RestoreDecided(JOB, 2, None))
    assert node.job.restore_decided
    assert node.job.restoring == set()


def rewound() -> Node:
    """Steps 1 and 2 were committed, and the job goes on from 1."""
    node = Node(world=1).launch()
    node.commit(1)
    node.commit(2)
    node.attach(0, "second")
    node.handle(events.RestoreDecided(JOB, 2, SnapshotId(1, 1)))
    return node


def test_what_was_gone_back_to_is_not_granted_away() -> None:
    node = rewound()
    assert node.offer(0, 2) == Place(1, 1)
    assert set(node.job.snapshots) == {SnapshotId(1, 1), SnapshotId(2, 2)}


def test_what_was_left_behind_is_not_the_newest_again() -> None:
    node = rewound()
    newest = node.job.newest_committed()
    assert newest is not None
    assert newest.id == SnapshotId(1, 1)
    # Nor for the next incarnation, as long as this one has committed nothing.
    node.attach(0, "third")
    assert node.job.newest_committed() is newest
    # Nor does it survive in place of it.
    assert node.handle(events.PersistWanted(JOB)) == SnapshotId(1, 1)


def test_a_later_commit_ends_the_matter() -> None:
    node = rewound()
    node.commit(2)
    node.attach(0, "third")
    assert node.job.restored is None
    newest = node.job.newest_committed()
    assert newest is not None
    assert newest.id == SnapshotId(2, 2)


def test_retention_keeps_what_was_gone_back_to() -> None:
    node = Node(world=1, keep=1)
    left = SnapshotId(1, 9)
    node.handle(adoption(world=1, shards=[shard(1, 5, 0, 1)], durable=[(left, 1)]))
    node.attach(0, "second")
    node.handle(events.RestoreDecided(JOB, 2, SnapshotId(1, 5)))
    node.offer(0, 6)
    assert not node.job.restoring
    node.handle(events.PersistWanted(JOB))
    node.handle(events.FlushEnded(JOB, SnapshotId(1, 5)))
    assert SnapshotId(1, 5) in node.job.durable
    assert node.job.newest_durable() == SnapshotId(1, 5)
