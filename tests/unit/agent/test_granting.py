"""Ranks with several captures under way: which slots they get, and what ends them."""

import pytest

from everstep.agent import actions, events
from everstep.agent.actions import Place
from everstep.agent.job import Stage

from .deciding import JOB, Node, adoption, shard


def two_under_way(*, world: int = 2, slots: int = 4) -> Node:
    """Step 1 is committed, 2 and 3 are copied by all ranks, which can have two at once."""
    node = Node(world=world).launch(slots=slots)
    for rank in range(world):
        node.offer(rank, 1, 2)
    for rank in range(world):
        node.seal(rank, 1)
    for step, copies in ((2, ()), (3, (2,))):
        for rank in range(world):
            assert isinstance(node.offer(rank, step, 2, copies=copies), Place)
    assert node.committed() == [1]
    node.done.clear()
    return node


def test_a_newer_step_does_not_drop_the_one_that_is_still_copied() -> None:
    node = two_under_way()
    assert node.stage(2) is node.stage(3) is Stage.OPEN
    for step in (2, 3):
        for rank in (0, 1):
            assert node.seal(rank, step) is None
    assert node.committed() == [1, 2, 3]
    assert not node.took(actions.NotifyDropped)


def test_no_more_steps_are_open_than_a_rank_can_have() -> None:
    node = two_under_way()
    assert node.offer(0, 4, 2, copies=(2, 3)) == (
        "busy: step 2 is still being copied by rank(s) 0, 1; "
        "step 3 is still being copied by rank(s) 0, 1"
    )
    for rank in (0, 1):
        node.seal(rank, 2)
    assert node.offer(1, 4, 2, copies=(3,)).startswith("busy"), "rank 0 was told so"
    assert isinstance(node.offer(0, 5, 2, copies=(3,)), Place)


def test_the_rank_with_the_fewest_captures_decides() -> None:
    """It would miss the step: with every rank busy at another time none would ever be whole."""
    node = Node().launch(slots=4)
    node.offer(0, 1, 2)
    node.offer(1, 1, 1)
    assert node.offer(0, 2, 2, copies=(1,)).startswith("busy: step 1 is still being copied")


@pytest.mark.parametrize("slots", [2, 3])
def test_slots_bound_the_captures_under_way(slots: int) -> None:
    """The newest commit keeps its slot, whoever asks."""
    node = Node().launch(slots=slots)
    for rank in (0, 1):
        node.offer(rank, 1, 3)
    for rank in (0, 1):
        node.seal(rank, 1)
    granted = [
        isinstance(node.offer(0, step, 3, copies=range(2, step)), Place)
        for step in range(2, 2 + slots)
    ]
    assert granted == [True] * (slots - 1) + [False]
    assert node.committed() == [1]


def test_a_step_that_is_not_named_any_more_is_given_up() -> None:
    """Its seal, or the answer to its offer, was lost: nothing else would end it."""
    node = two_under_way()
    node.seal(1, 2)
    assert isinstance(node.offer(0, 4, 2, copies=(3,)), Place)
    (dropped,) = node.took(actions.NotifyDropped)
    assert dropped.snapshot == node.id(2)
    assert dropped.reason == "rank 0 went on to step 4 without sealing it"
    assert node.stage(3) is Stage.OPEN


def test_a_step_that_was_granted_elsewhere_is_not_the_one_that_is_named() -> None:
    node = two_under_way()
    named = (events.InFlight(2, Place(1, 3)), events.InFlight(3, Place(1, 2)))
    caller = node.callers[0]
    node.handle(events.Offer(caller, 4, captures_in_flight=2, in_flight=named))
    assert node.stage(2) is Stage.DROPPED


def test_a_rank_that_skipped_a_step_does_not_hold_it_open_though_it_copies_another() -> None:
    node = Node().launch(slots=4)
    for rank in (0, 1):
        node.offer(rank, 1, 2)
    assert isinstance(node.offer(0, 2, 2, copies=(1,)), Place)
    assert isinstance(node.offer(0, 3, 2, copies=(1, 2)), str)
    assert isinstance(node.offer(1, 3, 2, copies=(1,)), str)
    assert node.stage(1) is Stage.OPEN
    assert node.stage(2) is Stage.DROPPED


def test_a_newer_commit_drops_what_is_older_and_open() -> None:
    """Also where seals come in another order; the slot that is still written stays the copy's."""
    node = two_under_way()
    written = node.job.snapshots[node.id(2)].granted[1]
    for rank, step in ((0, 2), (0, 3), (1, 3)):
        assert node.seal(rank, step) is None
    assert node.committed() == [1, 3]
    (dropped,) = node.took(actions.NotifyDropped)
    assert dropped.snapshot == node.id(2)
    for step in range(4, 9):
        assert node.offer(1, step, 2, copies=(2,)) != written
        node.handle(events.Abandon(node.callers[1], step, "torn"))
    assert node.seal(1, 2, written) == dropped.reason
    assert node.committed() == [1, 3]


def test_a_dropped_step_counts_for_as_long_as_it_is_written() -> None:
    node = two_under_way()
    node.handle(events.Abandon(node.callers[0], 2, "torn"))
    assert node.offer(0, 4, 2, copies=(3,)).startswith(
        "busy: step 2 is still being copied by rank(s) 1"
    )
    assert "torn" in str(node.seal(1, 2))
    assert isinstance(node.offer(0, 5, 2, copies=(3,)), Place)


def test_all_steps_of_a_lost_trainer_are_dropped() -> None:
    node = two_under_way()
    node.seal(0, 2)
    node.lose(1)
    reasons = {a.snapshot.step: a.reason for a in node.took(actions.NotifyDropped)}
    assert reasons == dict.fromkeys((2, 3), "the trainer of rank 1 is gone")
    assert node.committed() == [1]


def test_what_a_lost_trainer_had_sealed_may_still_commit() -> None:
    node = two_under_way()
    node.seal(1, 2)
    node.lose(1)
    assert node.seal(0, 2) is None
    assert node.committed() == [1, 2]
    assert node.stage(3) is Stage.DROPPED


def test_copies_under_way_keep_their_slots_across_the_agents_restart() -> None:
    node = Node(world=1)
    node.handle(adoption(world=1, members=[0], shards=[shard(1, 5, 0, 1)], slots=4))
    copies = (events.InFlight(6, Place(1, 1)), events.InFlight(7, Place(1, 3)))
    node.attach(0, incarnation=1, in_flight=copies)
    assert node.handle(
        events.Offer(node.callers[0], 8, captures_in_flight=3, in_flight=copies)
    ) == Place(1, 2)
    for step in (6, 7, 8):
        assert node.seal(0, step) is None
    assert node.committed() == [5, 6, 7, 8]


def test_a_place_that_is_written_is_not_granted_though_nothing_remembers_the_copy() -> None:
    """A copy that is older than what was adopted is not taken up again, and still goes on."""
    node = Node(world=1)
    node.handle(adoption(world=1, members=[0], shards=[shard(1, 7, 0, 1, slot=2)], slots=4))
    copies = (events.InFlight(6, Place(1, 0)), events.InFlight(8, Place(1, 1)))
    node.attach(0, incarnation=1, in_flight=copies)
    places = []
    for step in range(9, 14):
        asked = events.Offer(node.callers[0], step, captures_in_flight=3, in_flight=copies)
        places.append(node.handle(asked))
        node.handle(events.Abandon(node.callers[0], step, "torn"))
    assert places == [Place(1, 3)] * 5
    assert node.committed() == [7]


def test_a_copy_that_was_begun_with_the_answer_to_an_offer_from_before_keeps_its_slot() -> None:
    """The session broke while the answer was on its way: the step is dropped, and copied."""
    node = Node(world=1).launch(slots=3)
    node.commit(1)
    place = node.offer(0, 2, 2)
    node.lose(0)
    node.attach(0, incarnation=1)
    assert not node.job.snapshots[node.id(2)].copying
    assert node.offer(0, 3, 2, copies=(2,)) == Place(1, 2) != place
    assert node.offer(0, 4, 2, copies=(2, 3)).startswith("busy: step 2 is still being copied")


def test_a_sealed_copy_whose_answer_is_not_heard_yet_holds_no_slot() -> None:
    node = Node(world=1).launch(slots=2)
    for step in (1, 2):
        node.commit(step)
    copies = (events.InFlight(1, Place(1, 0)), events.InFlight(2, Place(1, 1)))
    asked = events.Offer(node.callers[0], 3, captures_in_flight=2, in_flight=copies)
    assert node.handle(asked) == Place(1, 0)
    assert node.committed() == [2]


def test_two_copies_cannot_have_one_slot() -> None:
    node = Node(world=1)
    node.handle(adoption(world=1, members=[0], shards=[shard(1, 5, 0, 1)], slots=4))
    copies = (events.InFlight(6, Place(1, 1)), events.InFlight(7, Place(1, 1)))
    node.attach(0, incarnation=1, in_flight=copies)
    assert node.seal(0, 7, Place(1, 1)) == "step 7 was not granted that slot"
    assert node.seal(0, 6, Place(1, 1)) is None


def test_a_new_process_copies_nothing_of_the_one_before() -> None:
    node = two_under_way()
    node.lose(0)
    node.lose(1)
    node.attach(0, "second")
    node.attach(1, "second")
    for step in (10, 11):
        copies = () if step == 10 else (10,)
        for rank in (0, 1):
            assert isinstance(node.offer(rank, step, 2, copies=copies), Place)
    assert [s.id.step for s in node.job.snapshots.values() if s.copying] == [10, 11]


def test_the_arena_that_is_gone_is_not_waited_for() -> None:
    node = two_under_way()
    node.handle(events.ArenaGone(JOB, 0, 1))
    assert [s.copying for s in node.job.snapshots.values()] == [set(), {1}, {1}]


def test_a_rank_that_asks_again_after_its_arena_was_replaced_gets_a_slot_of_the_new_one() -> None:
    """It asks before it knows whether its layout is still the same."""
    node = Node(world=2).launch()
    first = node.offer(0, 5)
    assert node.offer(0, 5) == first
    node.reserve(0, 2, size=20)
    assert node.offer(0, 5) == Place(2, 0)
    assert isinstance(node.offer(1, 5), Place)
    for rank in (0, 1):
        assert node.seal(rank, 5) is None
    assert node.committed() == [5]
