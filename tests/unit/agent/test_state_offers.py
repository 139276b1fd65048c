"""Who gets which slot, and why not."""

from dataclasses import replace

import pytest

from everstep.agent import actions, events
from everstep.agent.actions import Place
from everstep.agent.job import Stage
from everstep.proto.errors import ArenaLost

from .deciding import JOB, QUIET, Node


def test_every_rank_gets_the_same_answer_for_the_same_step() -> None:
    node = Node().launch()
    assert node.offer(0, 1) == node.offer(1, 1) == Place(1, 0)
    node.seal(0, 1)
    refusal = node.offer(0, 2)
    assert refusal == "busy: step 1 is still being copied by rank(s) 1"
    node.seal(1, 1)
    # Not busy any more; but rank 0 was told that step 2 is not taken.
    assert node.offer(1, 2) == refusal
    assert node.job.counters["skipped"] == 1
    assert isinstance(node.offer(1, 3), Place)


def test_who_waits_for_a_busy_slot_is_not_refused_for_good() -> None:
    node = Node().launch()
    node.offer(0, 1)
    node.offer(1, 1)
    node.seal(0, 1)
    patient = events.Offer(node.callers[0], 2, patient=True)
    assert node.handle(patient).startswith("busy")
    node.seal(1, 1)
    assert isinstance(node.handle(patient), Place)
    assert isinstance(node.offer(1, 2), Place)


def test_an_offer_that_is_repeated_gets_the_same_slot() -> None:
    node = Node().launch()
    assert node.offer(0, 1) == node.offer(0, 1)
    node.seal(0, 1)
    assert node.offer(0, 1) == "step 1 is sealed already"


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_busy_while_another_step_is_open(slots: int) -> None:
    node = Node().launch(slots=slots)
    node.offer(0, 1)
    node.offer(1, 1)
    node.seal(0, 1)
    assert node.offer(0, 2).startswith("busy: step 1 is still being copied by rank(s) 1")


def test_busy_while_a_rank_still_copies_a_dropped_step() -> None:
    node = Node().launch()
    node.offer(0, 1)
    node.offer(1, 1)
    node.handle(events.Abandon(node.callers[0], 1, "torn"))
    assert node.offer(0, 2) == "busy: step 1 is still being copied by rank(s) 1"
    assert "torn" in str(node.seal(1, 1, Place(1, 0)))
    assert isinstance(node.offer(0, 3), Place)


def test_a_rank_that_goes_on_gives_up_its_older_step() -> None:
    """Its seal, or the answer to its offer, was lost: nothing else would ever end the step."""
    node = Node().launch()
    node.commit(1)
    node.offer(0, 2)
    node.offer(1, 2)
    node.seal(1, 2)
    assert isinstance(node.offer(0, 3), Place)
    assert node.took(actions.NotifyDropped)[0].snapshot == node.id(2)
    assert node.offer(1, 2) == "rank 0 went on to step 3 without sealing it"
    assert node.committed() == [1]


def test_a_rank_that_skipped_a_step_does_not_hold_it_open() -> None:
    node = Node().launch()
    node.offer(0, 1)
    node.seal(0, 1)
    assert node.offer(0, 2).startswith("busy")
    assert node.offer(1, 2).startswith("busy")
    assert node.stage(1) is Stage.DROPPED
    assert isinstance(node.offer(0, 3), Place)
    assert isinstance(node.offer(1, 3), Place)


def test_steps_are_taken_in_order() -> None:
    node = Node().launch()
    node.commit(5)
    assert node.offer(0, 4) == "step 5 was captured already"
    assert node.offer(1, 4) == "step 5 was captured already"


def test_nothing_is_granted_while_a_rank_is_gone() -> None:
    node = Node().launch()
    node.lose(1)
    assert node.offer(0, 1) == "rank 1 is not attached any more"
    node.attach(1, incarnation=1)
    assert node.offer(1, 1) == "rank 1 is not attached any more"
    assert isinstance(node.offer(1, 2), Place)


def test_no_arena_no_slot() -> None:
    node = Node(world=1)
    node.attach(0)
    with pytest.raises(ArenaLost):
        node.offer(0, 1)


def test_the_newest_commit_is_never_granted_away() -> None:
    node = Node().launch()
    newest = node.commit(1)
    for step in range(2, 40):
        place = node.offer(0, step)
        assert place != node.job.snapshots[newest].granted[0]
        node.handle(events.Abandon(node.callers[0], step, "torn"))
        assert node.committed() == [1]
    places = node.job.snapshots[newest].granted
    assert all(places[a.rank] != a.place for a in node.took(actions.DropRecord))


def test_the_record_of_what_is_overwritten_goes_first() -> None:
    node = Node(world=1).launch()
    node.commit(1)
    node.commit(2)
    node.done.clear()
    assert node.offer(0, 3) == Place(1, 0)
    assert node.took(actions.DropRecord) == [actions.DropRecord(JOB, 0, Place(1, 0))]
    # The loss of the oldest is remembered, so that nobody captures it anew.
    assert node.offer(0, 1) == "superseded"


def test_what_never_commits_is_overwritten_before_an_older_commit() -> None:
    node = Node(world=1).launch(slots=3)
    node.commit(1)
    node.commit(2)
    node.offer(0, 3)
    node.handle(events.Abandon(node.callers[0], 3, "torn"))
    node.offer(0, 4)
    assert node.committed() == [1, 2]


@pytest.mark.parametrize("slots", [2, 3])
def test_what_is_read_is_not_granted_away(slots: int) -> None:
    node = Node(world=1).launch(slots=slots)
    read = node.commit(1)
    assert node.handle(events.Pin(JOB, read))
    for step in range(2, slots + 1):
        node.commit(step)
    if slots == 2:
        assert node.offer(0, 9) == "busy: step 1 is being read"
    for step in range(10, 14):
        node.offer(0, step)
        node.handle(events.Abandon(node.callers[0], step, "torn"))
        assert read in node.job.snapshots
    node.handle(events.Unpin(JOB, read))
    for step in range(20, 20 + slots):
        node.commit(step)
    assert read not in node.job.snapshots


def test_only_what_is_committed_can_be_pinned() -> None:
    node = Node().launch()
    node.offer(0, 1)
    assert not node.handle(events.Pin(JOB, node.id(1)))
    assert not node.handle(events.Pin(JOB, node.id(7)))
    assert not node.handle(events.Pin("other", node.id(1)))
    node.handle(events.Unpin(JOB, node.id(1)))
    assert node.job.snapshots[node.id(1)].pins == 0


def test_what_is_flushed_is_not_granted_away() -> None:
    node = Node(replace(QUIET, nvme_interval_steps=1), world=1).launch()
    node.commit(1)
    node.commit(2)
    assert node.offer(0, 3) == "busy: step 1 is being flushed to NVMe"
    node.handle(events.FlushEnded(JOB, node.id(1)))
    assert isinstance(node.offer(0, 4), Place)


@pytest.mark.parametrize("reason", ["read", "flushed"])
def test_damage_does_not_free_what_is_in_use(reason: str) -> None:
    """Other ranks' shards of it may be sound, and are being read."""
    node = Node(world=1).launch(slots=3)
    used = node.commit(1)
    if reason == "read":
        node.handle(events.Pin(JOB, used))
    else:
        node.handle(events.PersistWanted(JOB))
    node.handle(events.Damaged(JOB, used, "rotten"))
    for step in range(2, 8):
        assert node.offer(0, step) != Place(1, 0)
        node.handle(events.Abandon(node.callers[0], step, "torn"))
    ended: events.Event = events.FlushEnded(JOB, used, "rotten")
    node.handle(events.Unpin(JOB, used) if reason == "read" else ended)
    node.done.clear()
    for step in (8, 9, 10):
        node.commit(step)
    assert used not in node.job.snapshots
    assert node.took(actions.DropRecord)[0] == actions.DropRecord(JOB, 0, Place(1, 0))


def test_what_is_remembered_of_refusals_is_bounded() -> None:
    node = Node(world=1).launch()
    for step in range(1, 300):
        node.commit(step)
    assert len(node.job.refused) == 64
    assert len(node.job.snapshots) == 2
