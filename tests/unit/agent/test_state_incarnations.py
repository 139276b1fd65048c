"""Which process belongs to which incarnation, and what ends one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from everstep.agent import actions, events
from everstep.proto.errors import InvalidName, RankClaimed, Refused, StaleIncarnation
from everstep.proto.ids import SnapshotId

from .deciding import JOB, QUIET, Node, adoption


def test_the_ranks_of_one_launch_share_an_incarnation() -> None:
    node = Node(world=3)
    assert [node.attach(rank) for rank in range(3)] == [1, 1, 1]
    assert len(node.took(actions.WriteMembership)) == 3


def test_a_rank_that_comes_again_from_a_new_process_begins_an_incarnation() -> None:
    node = Node().launch()
    assert node.attach(0, "second") == 2
    assert node.attach(1, "second") == 2
    assert node.attach(1, "third") == 3


def test_the_same_process_keeps_its_incarnation() -> None:
    node = Node().launch()
    node.lose(1)
    assert node.attach(1, incarnation=1) == 1
    # The answer to a first attach may have been lost: it comes again without an incarnation.
    assert node.attach(0, incarnation=0) == 1


def test_a_living_holder_keeps_its_rank() -> None:
    node = Node().launch()
    with pytest.raises(RankClaimed) as caught:
        node.attach(0, "second", holder_alive=True)
    assert caught.value.pid == 7
    assert node.job.incarnation == 1
    assert node.job.members[0].process_id == "first-0"


def test_another_launch_begins_an_incarnation() -> None:
    node = Node()
    assert node.attach(0, launch="a") == 1
    assert node.attach(1, launch="a") == 1
    # Rank 1 of the next launch happens to be first, and rank 0 follows.
    assert node.attach(1, "second", launch="b") == 2
    assert node.attach(0, "second", launch="b") == 2


def test_another_launch_needs_no_rank_twice() -> None:
    node = Node()
    assert node.attach(0, launch="a") == 1
    assert node.attach(1, "second", launch="b") == 2


def test_another_world_begins_an_incarnation() -> None:
    node = Node(world=2).launch()
    assert node.attach(2, "second", world=3) == 2
    assert node.job.world == 3
    assert set(node.job.members) == {2}


@pytest.mark.parametrize(
    "straggler",
    [
        {"launch": "a"},
        {"launch": "a", "world": 3},
        {"launch": ""},
    ],
)
def test_a_straggler_of_an_ended_incarnation_is_told_so(straggler: dict[str, Any]) -> None:
    node = Node()
    node.attach(0, launch="a")
    node.attach(1, launch="a")
    node.attach(0, "second", launch="b")
    with pytest.raises(StaleIncarnation) as caught:
        node.attach(1, incarnation=1, **straggler)
    assert (caught.value.mine, caught.value.current) == (1, 2)
    assert node.job.incarnation == 2
    assert node.attach(1, "second", launch="b") == 2


def test_a_process_that_was_replaced_is_told_so() -> None:
    node = Node().launch()
    node.attach(0, "second")
    with pytest.raises(StaleIncarnation):
        node.attach(0, "first", incarnation=1)
    with pytest.raises(StaleIncarnation):
        node.attach(0, "first", incarnation=2)


def test_calls_of_an_ended_incarnation_change_nothing() -> None:
    node = Node().launch()
    old = node.callers[0]
    node.commit(1)
    node.attach(0, "second")
    late: Sequence[events.Event] = (
        events.Offer(old, 2),
        events.Abandon(old, 1, "late"),
        events.Detach(old),
        events.Declare(old, 1, (), ()),
        events.Offer(replace(old, incarnation=2), 2),
        events.Offer(replace(node.callers[0], incarnation=1), 2),
    )
    for event in late:
        with pytest.raises(StaleIncarnation):
            node.handle(event)
    assert [s.id for s in node.job.snapshots.values()] == [SnapshotId(1, 1)]


def test_calls_for_an_unknown_job_are_stale() -> None:
    node = Node()
    with pytest.raises(StaleIncarnation) as caught:
        node.handle(events.Offer(events.Caller("other", 0, 1, "p", 4), 1))
    assert caught.value.current == 0


def test_the_end_of_a_replaced_process_is_no_news() -> None:
    node = Node().launch()
    node.attach(0, "second")
    node.handle(events.SessionLost(JOB, 0, "first-0"))
    assert node.job.members[0].attached
    node.handle(events.SessionLost("other", 0, "first-0"))


def test_trainers_that_outlived_the_agents_memory_keep_their_incarnation() -> None:
    node = Node()
    assert node.attach(0, incarnation=5) == 5
    assert node.attach(1, incarnation=5) == 5
    node.reserve(0)
    node.reserve(1)
    assert node.commit(40) == SnapshotId(5, 40)


def test_they_keep_it_too_where_only_nvme_is_left() -> None:
    node = Node()
    node.handle(adoption(incarnation=2, world=1, durable=[(SnapshotId(2, 10), 2)]))
    assert node.attach(1, incarnation=3, launch="a") == 3
    assert node.attach(0, incarnation=3, launch="a") == 3
    assert node.job.world == 2


def test_what_only_trainers_know_is_not_kept_for_the_next_agent() -> None:
    node = Node()
    node.attach(0, incarnation=5)
    node.handle(events.RestoreDecided(JOB, 5, None))
    assert not node.took(actions.WriteMembership)
    assert node.job.resumed
    node.attach(0, "second")
    assert node.took(actions.WriteMembership)
    assert not node.job.resumed


def test_a_new_process_does_not_join_those_that_outlived_the_agents_memory() -> None:
    """Its rank may have been among them, from another process and at another step."""
    node = Node()
    node.attach(0, incarnation=5)
    assert node.attach(1, "second") == 6
    with pytest.raises(StaleIncarnation):
        node.attach(0, incarnation=5)


def test_who_was_never_admitted_is_not_a_member_whatever_number_it_knows() -> None:
    """All memory was lost, and a new run has the number that a survivor of the old one knows."""
    node = Node()
    assert node.attach(0, "second") == 1
    with pytest.raises(StaleIncarnation):
        node.attach(1, "survivor", incarnation=1)
    assert node.attach(1, "second") == 1


def test_a_new_process_among_lost_memory_does_not_reuse_a_number() -> None:
    node = Node()
    node.handle(adoption(incarnation=2, durable=[(SnapshotId(4, 10), 2)]))
    assert node.attach(0) == 5


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0), (0, 5)])
def test_impossible_ranks_are_refused(rank: int, world: int) -> None:
    node = Node(replace(QUIET, max_ranks=4))
    caller = events.Caller(JOB, rank, world, "p", 0)
    with pytest.raises(Refused, match="not possible"):
        node.handle(events.Attach(caller, "", 7, 1.0, holder_alive=False))
    assert not node.state.jobs


def test_names_and_numbers_of_jobs_are_bounded() -> None:
    node = Node(replace(QUIET, max_jobs=1))
    with pytest.raises(InvalidName):
        node.handle(
            events.Attach(events.Caller("../x", 0, 1, "p", 0), "", 7, 1.0, holder_alive=False)
        )
    node.launch()
    with pytest.raises(Refused, match="max_jobs"):
        node.handle(
            events.Attach(events.Caller("two", 0, 1, "p", 0), "", 7, 1.0, holder_alive=False)
        )
    assert list(node.state.jobs) == [JOB]


def test_a_restart_drops_what_was_being_copied_and_keeps_what_is_committed() -> None:
    node = Node().launch()
    node.commit(1)
    node.offer(0, 2)
    place = node.offer(1, 2)
    node.seal(1, 2)
    node.done.clear()
    node.attach(0, "second")
    assert node.took(actions.DropRecord) == [actions.DropRecord(JOB, 1, place)]
    (dropped,) = node.took(actions.NotifyDropped)
    assert "restarted" in dropped.reason
    assert node.committed() == [1]


@pytest.mark.parametrize(
    ("incarnation", "launch", "is_live", "remaining"),
    [
        (0, "b", False, {1}),
        (0, "a", False, {0, 1}),
        (0, "", False, {0, 1}),
        (0, "b", True, {0, 1}),
        (3, "b", False, {0, 1}),
    ],
    ids=["another launch", "the same", "unnamed", "joins live", "comes again"],
)
def test_a_number_that_is_taken_again_begins_without_the_ranks_of_before(
    incarnation: int, launch: str, is_live: bool, remaining: set[int]
) -> None:
    """Two coordinators that could not hear one another have given it to two launches."""
    node = Node(replace(QUIET, clustered=True, node_id="n1"))
    for rank, number, name, live in ((0, 0, "a", False), (1, incarnation, launch, is_live)):
        caller = events.Caller(JOB, rank, 2, f"p{rank}", number)
        node.handle(events.Attach(caller, name, 7, 1.0, False, decided=3, live=live))
        if not rank:
            node.handle(events.SessionLost(JOB, 0, "p0"))
    assert node.job.incarnation == 3
    assert set(node.job.members) == remaining
    waits = node.job.why_not(SnapshotId(3, 1)) == "rank 0 is not attached any more"
    assert waits == (0 in remaining)
