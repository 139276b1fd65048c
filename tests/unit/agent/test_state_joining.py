"""A rank that is taken over while the others go on, at an agent that stands alone."""

from dataclasses import replace

import pytest

from everstep.agent import actions, events
from everstep.agent.actions import Place
from everstep.agent.job import Stage
from everstep.proto.errors import RankClaimed, Refused

from .deciding import JOB, Node


def join(
    node: Node,
    rank: int,
    process: str = "second",
    *,
    world: int = 2,
    launch: str = "",
    holder_alive: bool = False,
    others_alive: bool = False,
) -> int:
    """Attach with the wish to join live."""
    caller = events.Caller(JOB, rank, world, f"{process}-{rank}", 0)
    attach = events.Attach(
        caller,
        launch,
        7,
        1.0,
        holder_alive=holder_alive,
        live=True,
        others_alive=others_alive,
    )
    answer: int = node.handle(attach)
    node.callers[rank] = replace(caller, incarnation=answer)
    return answer


def decided(node: Node, rank: int, step: int) -> None:
    node.handle(events.JoinDecided(JOB, rank, 1, node.id(step)))


def test_the_incarnation_goes_on() -> None:
    node = Node().launch()
    node.commit(1)
    node.lose(1)
    assert join(node, 1, launch="another") == 1
    assert (node.job.joining, node.job.counters["joined"]) == ({1: None}, 1)
    assert node.job.members[0].process_id == "first-0"
    assert isinstance(node.offer(1, 2), Place)
    assert node.job.joining == {}
    node.commit(2)


@pytest.mark.parametrize("launch", ["", "another"])
def test_with_nobody_there_it_is_an_ordinary_start(launch: str) -> None:
    node = Node().launch()
    node.commit(1)
    node.lose(0)
    node.lose(1)
    assert join(node, 1, launch=launch) == 2
    assert node.job.joining == {}
    assert join(node, 0, launch=launch) == 2, "of the same launch"
    assert node.job.joining == {}


def test_others_that_have_not_come_back_to_a_new_agent_are_there() -> None:
    node = Node().launch()
    node.lose(0)
    node.lose(1)
    assert join(node, 1, others_alive=True) == 1
    assert node.job.joining == {1: None}


def test_who_came_first_of_its_rank_has_taken_nothing_over() -> None:
    node = Node()
    assert node.attach(0) == 1
    assert join(node, 1, "first") == 1
    assert node.job.joining == {}


def test_nothing_else_is_changed_by_a_refusal() -> None:
    node = Node().launch()
    node.lose(1)
    with pytest.raises(Refused, match="a world of 3, and 2 rank"):
        join(node, 1, world=3)
    with pytest.raises(RankClaimed):
        join(node, 1, holder_alive=True)
    assert (node.job.incarnation, node.job.joining) == (1, {})
    assert node.job.members[1].process_id == "first-1"


def test_what_the_old_process_left_open_is_dropped_though_nobody_told_of_its_death() -> None:
    node = Node().launch()
    for rank in (0, 1):
        assert isinstance(node.offer(rank, 1), Place)
    node.seal(0, 1)
    join(node, 1)
    assert node.job.snapshots[node.id(1)].stage is Stage.DROPPED
    assert [dropped.snapshot for dropped in node.took(actions.NotifyDropped)] == [node.id(1)]


def test_what_the_old_process_had_sealed_may_still_be_committed() -> None:
    node = Node().launch()
    for rank in (0, 1):
        node.offer(rank, 1)
    node.seal(1, 1)
    node.lose(1)
    join(node, 1)
    node.seal(0, 1)
    assert node.job.snapshots[node.id(1)].stage is Stage.COMMITTED


def test_no_step_is_begun_for_a_rank_that_is_joining_and_none_is_waited_for() -> None:
    node = Node().launch()
    node.commit(1)
    node.lose(1)
    join(node, 1)
    patient = events.Offer(node.callers[0], 2, patient=True)
    assert node.handle(patient) == "rank 1 is joining, and has not offered a step yet"
    assert node.offer(1, 2) == "rank 1 is joining, and has not offered a step yet"
    assert isinstance(node.offer(0, 3), Place)
    assert isinstance(node.offer(1, 3), Place)


def test_what_it_reads_stays_until_it_offers_a_step() -> None:
    node = Node().launch()
    node.commit(1)
    for rank in (0, 1):
        node.offer(rank, 2)
    node.seal(1, 2)
    node.lose(1)
    join(node, 1)
    decided(node, 1, 1)
    node.seal(0, 2)  # the older process had sealed it: this commits, and 1 is not the newest now
    assert node.job.snapshots[node.id(2)].stage is Stage.COMMITTED
    assert node.job.must_stay(node.job.snapshots[node.id(1)])
    node.offer(1, 2)
    assert not node.job.must_stay(node.job.snapshots[node.id(1)])


@pytest.mark.parametrize("detaches", [False, True])
def test_one_that_is_gone_again_holds_nothing_up(detaches: bool) -> None:
    node = Node().launch()
    node.commit(1)
    node.lose(1)
    join(node, 1)
    decided(node, 1, 1)
    if detaches:
        node.handle(events.Detach(node.callers[1]))
    else:
        node.lose(1)
    assert node.job.joining == {}
    assert node.offer(0, 2) == "rank 1 is not attached any more"
    assert join(node, 1, "third") == 1


def test_a_decision_for_an_ended_incarnation_pins_nothing() -> None:
    node = Node().launch()
    node.commit(1)
    node.lose(1)
    join(node, 1)
    node.lose(1)
    node.attach(1, "third")
    decided(node, 1, 1)
    assert (node.job.incarnation, node.job.joining) == (2, {})


def test_what_was_agreed_on_is_remembered_for_one_incarnation() -> None:
    node = Node().launch()
    assert node.job.agreements.names(()) is None
    for rank in (0, 1):
        digests = (b"x", b"y%d" % rank, b"z")
        node.handle(events.Declare(node.callers[rank], 1, ("a", "b", "c"), digests))
    assert node.job.agreements.names(()) == ("a", "c")
    node.lose(1)
    join(node, 1)
    assert node.job.agreements.names(()) == ("a", "c")
    node.lose(1)
    node.attach(1, "third")
    assert node.job.agreements.names(()) is None
