"""What makes a commit, what drops a step, and the end of sessions."""

from dataclasses import replace

import pytest

from everstep.agent import actions, events
from everstep.agent.actions import Place
from everstep.agent.job import Stage
from everstep.proto.errors import OutOfSpace
from everstep.proto.ids import SnapshotId

from .deciding import AGREED, JOB, QUIET, Node, samples_of


def test_a_snapshot_is_committed_when_all_ranks_sealed_it() -> None:
    node = Node(world=3).launch()
    for rank in range(3):
        node.offer(rank, 1)
    for rank in (2, 0):
        assert node.seal(rank, 1) is None
        assert not node.took(actions.NotifyCommitted)
    node.seal(1, 1)
    assert node.took(actions.NotifyCommitted) == [
        actions.NotifyCommitted(JOB, SnapshotId(1, 1), "memory")
    ]
    published = node.took(actions.PublishRecord)
    assert [(a.rank, a.envelope) for a in published] == [(2, b"2/1"), (0, b"0/1"), (1, b"1/1")]


def test_a_seal_counts_once_its_record_is_visible() -> None:
    """A tmpfs without room for the record: the step stays open, the one before stays newest."""
    node = Node(world=1).launch()
    node.commit(1)
    place = node.offer(0, 2)
    seal = events.Seal(node.callers[0], 2, place, "layout", 10, AGREED, 5.0, b"0/2")
    outcome = node.state.handle(seal, 0.0)
    assert [type(action) for action in outcome.actions] == [actions.PublishRecord]
    assert node.stage(2) is Stage.OPEN
    assert node.job.newest_committed() is node.job.snapshots[node.id(1)]
    # The trainer tries again, and now there is room.
    assert node.handle(seal) is None
    assert node.committed() == [1, 2]


def test_a_seal_that_is_repeated_changes_nothing() -> None:
    node = Node(world=1).launch()
    node.commit(1)
    node.done.clear()
    assert node.seal(0, 1) is None
    assert not node.took(actions.NotifyCommitted)
    assert node.job.counters["committed"] == 1


def test_a_seal_in_another_slot_is_refused() -> None:
    node = Node().launch()
    node.offer(0, 1)
    for place in (Place(1, 1), Place(2, 0)):
        assert node.seal(0, 1, place) == "step 1 was not granted that slot"
    assert node.seal(1, 1, Place(1, 0)) == "step 1 was not granted that slot"
    assert node.seal(0, 2, Place(1, 0)) == "step 2 was not granted that slot"
    assert not node.took(actions.PublishRecord)


def test_a_seal_of_a_dropped_step_says_why_it_was() -> None:
    node = Node().launch()
    node.offer(0, 1)
    node.offer(1, 1)
    node.handle(events.Abandon(node.callers[1], 1, "layer.weight changed"))
    assert node.seal(0, 1) == "rank 1: layer.weight changed"
    assert node.offer(0, 1) == "rank 1: layer.weight changed"
    assert not node.took(actions.PublishRecord)


def test_an_image_larger_than_its_slot_is_refused() -> None:
    node = Node(world=1).launch()
    node.offer(0, 1)
    with pytest.raises(OutOfSpace):
        node.seal(0, 1, size=11)
    assert node.stage(1) is Stage.OPEN


def test_drifted_replicas_are_dropped_and_named() -> None:
    node = Node(world=3).launch()
    for rank in range(3):
        node.offer(rank, 1)
    one, two, other = b"1" * 8, b"2" * 8, b"x" * 8
    node.seal(0, 1, samples=samples_of(one + one + two))
    node.seal(1, 1, samples=samples_of(one + one + other))
    node.seal(2, 1, samples=samples_of(other + one + two))
    assert not node.took(actions.NotifyCommitted)
    (dropped,) = node.took(actions.NotifyDropped)
    assert dropped.drifted == (0, 2)
    assert "drifted apart" in dropped.reason
    assert {a.rank for a in node.took(actions.DropRecord)} == {0, 1, 2}


def test_groups_drift_apart_from_each_other() -> None:
    """Ranks 0 and 2 have the same leaves, and ranks 1 and 3."""
    node = Node(world=4).launch()
    for step in (1, 2):
        for rank in range(4):
            node.offer(rank, step)
        for rank in range(4):
            drift = b"x" * 8 if (rank, step) == (3, 2) else b"2" * 8
            leaves = b"%08d" % (rank % 2) + drift
            node.seal(rank, step, samples=samples_of(leaves, group_id=5 + rank % 2))
    assert node.committed() == [1]
    (dropped,) = node.took(actions.NotifyDropped)
    assert dropped.drifted == (6 << 32 | 1,)


@pytest.mark.parametrize(
    "samples", [samples_of(AGREED[16:], b"otherpla"), samples_of(AGREED[16:-8]), AGREED[:-8], b""]
)
def test_plans_that_disagree_are_dropped(samples: bytes) -> None:
    node = Node().launch()
    node.offer(0, 1)
    node.offer(1, 1)
    node.seal(0, 1)
    node.seal(1, 1, samples=samples)
    (dropped,) = node.took(actions.NotifyDropped)
    assert dropped.drifted == ()
    assert "disagree" in dropped.reason


def test_abandoning_drops_the_step_for_all_ranks() -> None:
    node = Node().launch()
    node.commit(1)
    node.offer(0, 2)
    place = node.offer(1, 2)
    node.seal(1, 2)
    node.done.clear()
    node.handle(events.Abandon(node.callers[0], 2, "torn"))
    assert node.took(actions.DropRecord) == [actions.DropRecord(JOB, 1, place)]
    assert node.took(actions.NotifyDropped)[0].reason == "rank 0: torn"
    assert node.committed() == [1]
    assert node.job.counters["dropped"] == 1


def test_what_is_committed_cannot_be_abandoned() -> None:
    node = Node().launch()
    node.commit(1)
    node.handle(events.Abandon(node.callers[0], 1, "too late"))
    node.handle(events.Abandon(node.callers[0], 9, "unknown"))
    assert node.committed() == [1]


def test_a_lost_trainer_drops_what_it_had_not_sealed() -> None:
    node = Node().launch()
    node.commit(1)
    node.offer(0, 2)
    node.offer(1, 2)
    node.seal(0, 2)
    node.done.clear()
    node.lose(1)
    assert node.took(actions.NotifyDropped)[0].reason == "the trainer of rank 1 is gone"
    assert node.committed() == [1]


def test_what_a_lost_trainer_had_sealed_still_commits() -> None:
    node = Node().launch()
    node.offer(0, 1)
    node.offer(1, 1)
    node.seal(0, 1)
    node.lose(0)
    assert node.seal(1, 1) is None
    assert node.committed() == [1]


@pytest.mark.parametrize("flushes", [True, False])
def test_flush_on_exit(flushes: bool) -> None:
    node = Node(replace(QUIET, flush_on_exit=flushes)).launch()
    node.commit(1)
    node.lose(0)
    expected = [actions.Flush(JOB, node.id(1))] if flushes else []
    assert node.took(actions.Flush) == expected
    node.lose(1)
    assert not node.took(actions.Flush)


def test_a_trainer_that_leaves_in_good_order_is_not_lost() -> None:
    node = Node(replace(QUIET, flush_on_exit=True)).launch()
    node.commit(1)
    node.offer(1, 2)
    node.handle(events.Detach(node.callers[0]))
    node.lose(0)
    assert not node.took(actions.Flush)
    assert node.took(actions.NotifyDropped)[0].reason == "rank 0 closed its client"
    assert node.offer(1, 3) == "rank 0 is not attached any more"
