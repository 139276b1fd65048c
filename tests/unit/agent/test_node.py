"""State, membership and coordination put together: who obeys whom, and when."""

import pytest

from everstep.agent import events
from everstep.agent.holdings import JobFact, Orders, Report, RoundFact
from everstep.agent.members import MemberRules, Members
from everstep.agent.node import Node, SendOrders, SendReport, Step
from everstep.agent.protection import ProtectionRules
from everstep.agent.state import Rules, State
from everstep.agent.view import Entry, View
from everstep.proto.errors import Fenced, StaleEpoch

from .coordinating import JOB, S1, fact, part

VIEW = View([Entry(f"n{i}", 1, f"boot{i}", address=f"n{i}:1") for i in (1, 2, 3)])
SINCE_S = 100.0


def node(index: int) -> Node:
    rules = MemberRules(node_id=f"n{index}", boot_id=f"boot{index}", address=f"n{index}:1")
    members = Members(rules, [("", "n1:1"), ("", "n3:1")])
    members.learned(VIEW, SINCE_S)
    state = State(Rules(clustered=True, node_id=f"n{index}", nvme=False), lambda known: [])
    return Node(state, members, ProtectionRules(enabled=False))


def orders(sender: int, term: int, *, coordinator: str = "") -> Orders:
    begin = events.BeginOrdered(JOB, term, 2, "launch")
    return Orders(0, term, (begin,), (), coordinator or f"n{sender}")


def with_job(index: int) -> Node:
    made = node(index)
    caller = events.Caller(JOB, 0, 2, "p0", 0)
    made.handle(events.Attach(caller, "launch", 1, 0.0, False, decided=1), SINCE_S)
    return made


def told(made: Node, sender: int, term: int, *, boot: str = "", coordinator: str = "") -> int:
    """Orders to begin the incarnation of the term's number; the one that the job is in then."""
    given = orders(sender, term, coordinator=coordinator)
    made.answered(f"n{sender}", boot or f"boot{sender}", VIEW, given, SINCE_S + 0.1)
    return made.state.jobs[JOB].incarnation


def reported(made: Node, index: int, *held: JobFact, sequence: int = 1) -> tuple[Orders, Step]:
    """A member says what it holds, having heard of the term."""
    report = Report(sequence, made.coordination.term, held)
    return made.reported(f"n{index}", f"boot{index}", VIEW, report, SINCE_S)


def test_orders_of_an_older_term_are_not_obeyed() -> None:
    made = with_job(2)
    assert told(made, 1, 5) == 5
    late = Orders(0, 4, (events.BeginOrdered(JOB, 9, 2, "launch"),), (), "n1")
    made.answered("n1", "boot1", VIEW, late, SINCE_S + 0.1)
    assert made.state.jobs[JOB].incarnation == 5
    assert told(made, 1, 6) == 6


def test_orders_of_one_that_does_not_coordinate_or_lost_its_place_are_not_obeyed() -> None:
    made = with_job(2)
    assert told(made, 1, 5, coordinator="n3") == 1
    assert told(made, 1, 5, boot="another") == 1


def test_a_fenced_node_obeys_nobody() -> None:
    made = with_job(2)
    taken = View([Entry("n2", 9, "another", address="n2:2")])
    made.refused(VIEW.merge(taken), SINCE_S)
    assert made.members.fenced_by
    assert told(made, 1, 5) == 1


def test_a_fenced_node_grants_nothing() -> None:
    made = with_job(2)
    made.refused(VIEW.merge(View([Entry("n2", 9, "another", address="n2:2")])), SINCE_S)
    with pytest.raises(Fenced):
        made.handle(events.Offer(events.Caller(JOB, 0, 2, "p0", 1), 1), SINCE_S)


def test_whatever_changes_is_reported_at_once() -> None:
    made = with_job(2)
    made.tick(SINCE_S)
    step = made.handle(
        events.Attach(events.Caller(JOB, 1, 2, "p1", 0), "launch", 2, 0.0, False, decided=1),
        SINCE_S + 0.1,
    )
    (send,) = step.sends
    assert isinstance(send, SendReport) and send.contact.node_id == "n1"
    assert len(send.report.jobs[0].members) == 2


def test_the_coordinator_answers_who_reports_and_tells_the_others() -> None:
    made = node(1)
    made.tick(SINCE_S)
    for index in (2, 3):
        held = fact([index - 2], [part(S1, "sealed", [index - 2], 2)])
        answer, step = reported(made, index, held)
    assert [type(order) for order in answer.orders] == [events.CommitOrdered]
    (send,) = (send for send in step.sends if isinstance(send, SendOrders))
    assert send.node_id == "n2" and send.orders.orders == answer.orders


def test_a_report_of_a_boot_that_lost_its_place_is_refused() -> None:
    made = node(1)
    with pytest.raises(StaleEpoch):
        made.reported("n2", "another", VIEW, Report(1, 0, ()), SINCE_S)


def test_a_report_to_the_process_before_is_refused() -> None:
    made = node(1)
    made.tick(SINCE_S)
    before = VIEW.without("n1").merge(View([Entry("n1", 0, "before", address="n1:1")]))
    held = Report(1, 0, (fact([0], [part(S1, "open", [0], 1)]),))
    for view, epoch in ((before, 1), (VIEW.without("n1"), 1), (View(), 0)):
        with pytest.raises(StaleEpoch):
            made.reported("n2", "boot2", view, held, SINCE_S, epoch=epoch)
    assert "n2" not in made.coordination.reported
    assert made.members.waiting_for(SINCE_S) == ("n2", "n3")
    made.reported("n2", "boot2", View(), held, SINCE_S, epoch=1)
    assert made.members.waiting_for(SINCE_S) == ("n3",)


def test_a_coordinator_is_ready_once_all_have_reported_in_its_term() -> None:
    made = node(1)
    made.tick(SINCE_S)
    for index in (2, 3):
        assert not made.ready(SINCE_S)
        reported(made, index)
    assert made.ready(SINCE_S)
    # Somebody obeyed a newer coordinator: this one begins anew, and knows nothing yet.
    made.reported("n2", "boot2", VIEW, Report(2, made._term + (1 << 40), ()), SINCE_S)
    assert not made.ready(SINCE_S)


def test_what_was_reported_to_an_earlier_coordinator_does_not_count() -> None:
    """It may be over by the time it comes: that one's decision may follow it on its way."""
    made = node(1)
    made.tick(SINCE_S)
    begun = fact([], rounds=[RoundFact("1-1-1-1-0.1", S1, "encoding", ("n2",))])
    for index, sequence in ((2, 1), (3, 1), (2, 2)):
        earlier = Report(sequence, 0, (begun,) if index == 2 else ())
        answer, _ = made.reported(f"n{index}", f"boot{index}", VIEW, earlier, SINCE_S)
        made.tick(SINCE_S)
        assert not answer.orders and answer.term == made.coordination.term > 0
    reported(made, 3, sequence=2)
    reported(made, 2, begun, sequence=3)
    made.tick(SINCE_S)
    answer, _ = reported(made, 2, begun, sequence=4)
    assert [order.commit for order in answer.orders] == [False]  # type: ignore[union-attr]


def test_who_hears_of_a_new_term_reports_in_it_at_once() -> None:
    made = with_job(2)
    made.tick(SINCE_S)
    assert not made.tick(SINCE_S + 0.01).sends
    step = made.answered("n1", "boot1", VIEW, Orders(0, 7, (), (), "n1"), SINCE_S + 0.02)
    (send,) = step.sends
    assert isinstance(send, SendReport) and send.report.term == 7
    again = made.answered("n1", "boot1", VIEW, Orders(0, 7, (), (), "n1"), SINCE_S + 0.03)
    assert not again.sends


def test_no_two_coordinators_have_the_same_term() -> None:
    terms = set()
    for index in (1, 2, 3):
        made = node(index)
        for late_s in range(40):
            made.tick(SINCE_S + late_s)
        terms.add(made._term)
    assert len(terms) == 3 and 0 not in terms
