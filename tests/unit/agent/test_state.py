"""Arenas, replicas, and whole jobs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from everstep.agent import actions, events
from everstep.agent.actions import Place
from everstep.proto.errors import Refused
from everstep.proto.ids import SnapshotId

from .deciding import JOB, QUIET, Node, flushed


def test_an_arena_that_is_replaced_is_released_after_a_commit_in_the_new_one() -> None:
    node = Node(world=2).launch()
    old = node.commit(1)
    node.reserve(0, 2, size=20)
    assert node.offer(0, 2) == Place(2, 0)
    assert node.offer(1, 2) == Place(1, 1)
    node.seal(0, 2, size=20)
    assert not node.took(actions.ReleaseArena)
    assert old in node.job.snapshots
    node.seal(1, 2)
    # Rank 1's shard of the old one takes a slot that is needed; it goes when that is.
    node.commit(3)
    node.commit(4)
    assert node.took(actions.ReleaseArena) == [actions.ReleaseArena(JOB, 0, 1)]
    assert old not in node.job.snapshots
    assert [arena.generation for arena in node.job.arenas[0]] == [2]


def test_an_arena_of_which_nothing_is_needed_is_released_at_once() -> None:
    node = Node(world=1).launch()
    node.commit(1)
    node.reserve(0, 2, size=20)
    node.offer(0, 2)
    node.done.clear()
    node.seal(0, 2, size=20)
    kinds = [type(action) for action in node.done]
    # The records go before the arena, and the commit is told before either.
    order = (actions.NotifyCommitted, actions.DropRecord, actions.ReleaseArena)
    assert sorted(order, key=kinds.index) == list(order)


def test_a_replaced_arena_stays_while_it_is_read() -> None:
    node = Node(world=1).launch()
    read = node.commit(1)
    node.handle(events.Pin(JOB, read))
    node.reserve(0, 2)
    node.commit(2)
    node.commit(3)
    assert not node.took(actions.ReleaseArena)
    node.handle(events.Unpin(JOB, read))
    node.commit(4)
    assert node.took(actions.ReleaseArena) == [actions.ReleaseArena(JOB, 0, 1)]


def test_snapshots_in_a_replaced_arena_take_no_slot_of_the_new_one() -> None:
    node = Node(world=1).launch()
    first = node.commit(1)
    second = node.commit(2)
    node.handle(events.Pin(JOB, first))
    node.handle(events.Pin(JOB, second))
    assert node.offer(0, 3).startswith("busy")
    node.reserve(0, 2)
    assert node.offer(0, 4) == Place(2, 0)


def test_an_arena_that_is_told_of_twice_is_one() -> None:
    node = Node(world=1).launch()
    node.reserve(0)
    node.commit(1)
    node.commit(2)
    assert not node.took(actions.ReleaseArena)
    assert len(node.job.arenas[0]) == 1


def test_an_arena_that_was_removed_takes_its_snapshots_along() -> None:
    node = Node().launch()
    node.commit(1)
    node.commit(2)
    node.done.clear()
    node.handle(events.ArenaGone(JOB, 1, 1))
    assert node.committed() == []
    assert [a.snapshot.step for a in node.took(actions.NotifyDropped)] == [1, 2]
    assert 1 not in node.job.arenas
    # They are not a reason to look like a new job.
    assert set(node.job.damaged) == {node.id(1), node.id(2)}
    node.handle(events.ArenaGone(JOB, 0, 1))
    assert not node.job.snapshots
    node.handle(events.ArenaGone("other", 0, 1))


def test_an_arena_of_a_job_that_was_removed_is_given_back() -> None:
    node = Node()
    node.reserve(0)
    assert node.took(actions.ReleaseArena) == [actions.ReleaseArena(JOB, 0, 1)]


def test_a_job_in_use_is_not_removed() -> None:
    node = Node(world=1).launch()
    with pytest.raises(Refused, match="attached"):
        node.handle(events.Removed(JOB))
    node.commit(1)
    node.handle(events.PersistWanted(JOB))
    node.lose(0)
    with pytest.raises(Refused, match="flushed"):
        node.handle(events.Removed(JOB))
    node.handle(events.FlushEnded(JOB, node.id(1)))
    node.handle(events.Removed(JOB))
    assert not node.state.jobs
    node.handle(events.Removed(JOB))


def test_late_news_of_a_removed_job_are_nothing() -> None:
    node = Node()
    late: Sequence[events.Event] = (
        events.SessionLost(JOB, 0, "p"),
        events.AdoptedVerified(JOB, SnapshotId(1, 1), "damaged"),
        events.Damaged(JOB, SnapshotId(1, 1), "damaged"),
        events.RestoreDecided(JOB, 1, None),
        events.Unpin(JOB, SnapshotId(1, 1)),
        events.PersistWanted(JOB),
    )
    for event in late:
        assert node.handle(event) is None
    assert not node.done


@pytest.mark.parametrize("refused", ["claimed", "stale", "removed"])
def test_what_is_refused_changes_nothing(refused: str) -> None:
    node = Node().launch()
    node.commit(1)
    attempts: dict[str, Callable[[], Any]] = {
        "claimed": lambda: node.attach(0, "second", holder_alive=True),
        "stale": lambda: node.attach(0, "second", incarnation=9),
        "removed": lambda: node.handle(events.Removed(JOB)),
    }
    before = repr(node.job)
    with pytest.raises(Refused):
        attempts[refused]()
    assert repr(node.job) == before


def test_the_same_events_give_the_same_actions() -> None:
    def story() -> list[actions.Action]:
        node = Node(replace(QUIET, nvme_interval_steps=2)).launch()
        flushed(node, range(1, 6))
        node.lose(1)
        node.attach(1, "second")
        return node.done

    assert story() == story()
