"""A step is given up when a rank that has not sealed it is not there to."""

from dataclasses import replace

import pytest

from everstep.agent import events
from everstep.agent.holdings import JobFact, MemberFact

from .coordinating import JOB, S1, S2, Office, fact, part

SEALED = fact([0], [part(S1, "sealed", [0], 2)])


def without_parts(*members: MemberFact, incarnation: int = 1) -> JobFact:
    return replace(fact([], incarnation=incarnation), members=members)


HERE = MemberFact(1, "p1", True)
GONE = MemberFact(1, "p1", False)
JOINING = MemberFact(1, "p2", True, joining=True)


@pytest.mark.parametrize("member", [GONE, JOINING], ids=["gone", "joining"])
def test_nobody_waits_for_a_rank_that_is_not_there(member: MemberFact) -> None:
    office = Office(2)
    office.reports("n1", SEALED)
    office.reports("n2", without_parts(member))
    (order,) = office.orders("n1")
    assert isinstance(order, events.DropOrdered)
    assert (order.job, order.snapshot) == (JOB, S1)
    assert order.reason == "rank 1 is not attached, or is joining"


def test_a_rank_that_comes_back_is_waited_for() -> None:
    office = Office(2)
    office.reports("n1", SEALED)
    for member in (GONE, JOINING, HERE):
        office.reports("n2", without_parts(member))
    assert office.orders("n1") == []
    # It takes the rank on another node, which has reported first.
    office.reports("n3", without_parts(HERE))
    office.reports("n2", without_parts(GONE))
    assert office.orders("n1") == []


def test_a_rank_that_nobody_tells_of_is_waited_for() -> None:
    office = Office(2)
    office.reports("n1", SEALED)
    assert office.orders("n1") == []
    office.reports("n2", without_parts(GONE))
    office.coordination.forget("n2")
    assert office.orders("n1") == []


def test_what_a_rank_has_sealed_is_committed_though_it_is_gone_since() -> None:
    office = Office(2)
    office.reports("n1", SEALED)
    office.reports("n2", replace(fact([], [part(S1, "sealed", [1], 2)]), members=(GONE,)))
    assert all(isinstance(order, events.CommitOrdered) for order in office.orders("n1"))


def test_a_member_that_has_not_reported_may_have_what_is_missing() -> None:
    """Its numbers may even have been given again, and the step be committed."""
    office = Office(3)
    office.reports("n1", SEALED)
    office.reports("n2", without_parts(GONE))
    office.live = frozenset({"n1", "n2"})
    assert office.orders("n1") == []
    office.reports("n3", replace(fact([], [part(S1, "sealed", [1], 2)]), members=(GONE,)))
    assert isinstance(office.orders("n1")[0], events.CommitOrdered)


def test_what_a_node_still_checks_is_waited_for() -> None:
    office = Office(2)
    office.reports("n1", SEALED)
    office.reports("n2", replace(fact([], [part(S1, "open", [1], 2)]), members=(GONE,)))
    assert office.orders("n1") == []


def test_who_is_there_now_says_nothing_of_an_earlier_incarnation() -> None:
    office = Office(2)
    office.reports("n1", fact([0], [part(S2, "sealed", [0], 2)], incarnation=2))
    office.reports("n2", without_parts(GONE, incarnation=2))
    assert office.orders("n1", events.DropOrdered) == []
