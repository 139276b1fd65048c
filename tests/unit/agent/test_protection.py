"""The coordinator's side of parity rounds."""

import pytest

from everstep.agent import events
from everstep.agent.holdings import RoundFact
from everstep.agent.protection import ProtectionRules, groups_of, round_of
from everstep.proto.ids import SnapshotId

from .coordinating import S1, S2, Office, fact, part

RULES = ProtectionRules(parities=1, timeout_s=10.0, retry_s=5.0)


def committed(
    office: Office, snapshot: SnapshotId, rounds: dict[str, RoundFact | None] | None = None
) -> None:
    """All nodes report a commit, one rank each, and their part in a round."""
    nodes = sorted(office.members)
    for rank, node_id in enumerate(nodes):
        known = (rounds or {}).get(node_id)
        held = part(snapshot, "committed", [rank], len(nodes))
        office.reports(
            node_id,
            fact([rank], [held], world=len(nodes), rounds=[known] if known is not None else ()),
        )


def own(office: Office, plan: events.PrepareOrdered, stage: str) -> RoundFact:
    named = tuple(member.node_id for member in plan.plan.members)
    return RoundFact(plan.plan.plan_id, plan.plan.snapshot, stage, named)


def begun(office: Office) -> dict[str, events.PrepareOrdered]:
    found = {n: office.orders(n, events.PrepareOrdered) for n in office.members}
    return {n: orders[0] for n, orders in found.items() if orders}  # type: ignore[misc]


def orphan(stage: str, members: tuple[str, ...], plan_id: str = "7-1-1-1-0.1") -> RoundFact:
    return RoundFact(plan_id, S1, stage, members)


def test_a_commit_is_protected_by_all_who_live() -> None:
    office = Office(3, RULES)
    committed(office, S1)
    office.decide()
    plans = begun(office)
    assert plans.keys() == office.members
    (plan,) = {order.plan for order in plans.values()}
    assert [m.node_id for m in plan.members] == ["n1", "n2", "n3"] and plan.parities == 1


def test_a_round_commits_only_when_every_member_has_published() -> None:
    office = Office(3, RULES)
    committed(office, S1)
    office.decide()
    plans = begun(office)
    stages = {"n1": "prepared", "n2": "prepared", "n3": "encoding"}
    committed(office, S1, {n: own(office, plans[n], stage) for n, stage in stages.items()})
    office.decide(1.0)
    assert office.orders("n1", events.RoundEnded) == []
    committed(office, S1, {n: own(office, plans[n], "prepared") for n in stages})
    office.decide(1.0)
    for node_id in stages:
        (end,) = office.orders(node_id, events.RoundEnded)
        assert end.commit


def test_one_failure_and_the_deadline_give_a_round_up() -> None:
    for failed in (True, False):
        office = Office(2, RULES)
        committed(office, S1)
        office.decide()
        plans = begun(office)
        known = {"n1": own(office, plans["n1"], "prepared")}
        known["n2"] = own(office, plans["n2"], "failed" if failed else "encoding")
        committed(office, S1, dict(known))
        office.decide(1.0 if failed else 11.0)
        (end,) = office.orders("n1", events.RoundEnded)
        assert not end.commit and "n2" in end.reason


@pytest.mark.parametrize("stage", ["failed", "lost", "encoding", "mending"])
def test_a_member_that_has_lost_its_part_since_is_heard_before_the_commit(stage: str) -> None:
    office = Office(2, RULES)
    committed(office, S1)
    office.decide()
    plans = begun(office)
    committed(office, S1, {"n1": own(office, plans["n1"], "prepared"), "n2": None})
    office.decide(1.0)
    one, other = (own(office, plans[n], s) for n, s in (("n1", stage), ("n2", "prepared")))
    committed(office, S1, {"n1": one, "n2": other})
    office.decide(1.0)
    ends = office.orders("n2", events.RoundEnded)
    given_up = stage in ("failed", "lost")
    assert [end.commit for end in ends] == ([False] if given_up else [])
    committed(office, S1, {n: own(office, plans[n], "prepared") for n in plans})
    office.decide(1.0)
    assert [end.commit for end in office.orders("n2", events.RoundEnded)] == [not given_up]


def test_a_commit_that_comes_during_a_round_is_skipped() -> None:
    office = Office(2, RULES)
    committed(office, S1)
    office.decide()
    plans = begun(office)
    committed(office, S2, {n: own(office, plans[n], "encoding") for n in plans})
    office.decide(1.0)
    assert begun(office) == {}


def test_a_silent_member_does_not_hold_up_what_comes_after_a_round_that_was_given_up() -> None:
    office = Office(3, RULES)
    committed(office, S1)
    office.decide()
    plans = begun(office)
    committed(office, S1, {n: own(office, plans[n], "encoding") for n in plans})
    office.decide(11.0)
    office.live = frozenset({"n1", "n2"})
    for rank, node_id in enumerate(["n1", "n2"]):
        held = [part(S2, "committed", [rank, 2], 3)]
        office.reports(node_id, fact([rank], held, world=3))
    office.decide(1.0)
    office.decide(6.0)
    assert begun(office).keys() == {"n1", "n2"}
    (end,) = office.orders("n3", events.RoundEnded)
    assert not end.commit, "and it hears of the end when it speaks again"


def test_a_round_that_all_have_prepared_is_committed_by_the_next_coordinator() -> None:
    office = Office(2, RULES)
    committed(office, S1, dict.fromkeys(("n1", "n2"), orphan("prepared", ("n1", "n2"))))
    office.decide()
    assert all(office.orders(n, events.RoundEnded)[0].commit for n in ("n1", "n2"))


def test_a_round_that_nobody_can_have_committed_is_given_up() -> None:
    office = Office(2, RULES)
    rounds = {n: orphan(s, ("n1", "n2")) for n, s in (("n1", "prepared"), ("n2", "failed"))}
    committed(office, S1, dict(rounds))
    office.decide()
    assert not office.orders("n1", events.RoundEnded)[0].commit


def test_a_round_that_a_lost_member_may_have_committed_is_kept_until_a_newer_one_is() -> None:
    office = Office(2, RULES)
    committed(office, S1, {"n1": orphan("prepared", ("n1", "n2")), "n2": None})
    office.decide()
    assert office.orders("n1", events.RoundEnded) == []
    assert begun(office).keys() == {"n1", "n2"}, "and it holds up nothing"


def test_a_member_whose_parity_is_mended_may_have_committed_it() -> None:
    office = Office(2, RULES)
    mending = orphan("mending", ("n1", "n2"))
    committed(office, S1, {"n1": orphan("prepared", ("n1", "n2")), "n2": mending})
    office.decide()
    assert office.orders("n1", events.RoundEnded) == [] and begun(office) == {}, "it is waited for"
    office.live = frozenset({"n1"})
    office.decide()
    assert office.orders("n1", events.RoundEnded) == [], "and kept if nobody can say"
    office.live = office.members
    committed(office, S1, dict.fromkeys(("n1", "n2"), orphan("prepared", ("n1", "n2"))))
    office.decide()
    assert [one.commit for one in office.orders("n2", events.RoundEnded)] == [True]


@pytest.mark.parametrize("stage", ["lost", "mending"])
def test_a_damaged_part_says_nothing_of_what_others_have_committed(stage: str) -> None:
    """Though its member has committed another round: it had its part of this one."""
    office = Office(3, RULES)
    members = ("n1", "n2", "n3")
    older = RoundFact("6-1-1-1-0.1", S1, "committed", ("n2",))
    held = [part(S2, "committed", [1], 3)]
    rounds = [older, RoundFact("7-1-2-1-0.1", S2, stage, members)]
    office.reports("n2", fact([1], held, world=3, rounds=rounds))
    known = RoundFact("7-1-2-1-0.1", S2, "prepared", members)
    office.reports("n3", fact([2], [part(S2, "committed", [2], 3)], world=3, rounds=[known]))
    office.live = frozenset({"n2", "n3"} if stage == "lost" else {"n3"})
    office.decide()
    assert office.orders("n3", events.RoundEnded) == []


def test_a_live_member_that_has_not_reported_yet_is_waited_for() -> None:
    office = Office(3, RULES)
    known = orphan("prepared", ("n1", "n2", "n3"))
    office.reports("n1", fact([0], [part(S1, "committed", [0, 1, 2], 3)], world=3, rounds=[known]))
    office.reports("n2", fact([1], world=3, rounds=[known]))
    office.decide()
    assert office.orders("n1", events.RoundEnded) == [] and begun(office) == {}


def test_a_round_of_several_groups_ends_alike_for_all() -> None:
    office = Office(4, RULES)
    one = orphan("prepared", ("n1", "n2"), "7-1-1-1-0.2")
    other = orphan("failed", ("n3", "n4"), "7-1-1-1-1.2")
    committed(office, S1, {"n1": one, "n2": one, "n3": other, "n4": None})
    office.decide()
    assert [office.orders(n, events.RoundEnded)[0].commit for n in ("n1", "n2", "n3")] == [
        False
    ] * 3


def test_of_a_group_that_nobody_remembers_nothing_is_concluded() -> None:
    office = Office(4, RULES)
    one = orphan("prepared", ("n1", "n2"), "7-1-1-1-0.2")
    committed(office, S1, {"n1": one, "n2": one, "n3": None, "n4": None})
    office.decide()
    assert office.orders("n1", events.RoundEnded) == []


def test_parity_never_goes_back_to_an_older_snapshot() -> None:
    office = Office(2, RULES)
    newer = RoundFact("7-1-2-1-0.1", S2, "committed", ("n1", "n9"))
    committed(office, S1, {"n1": newer, "n2": None})
    office.decide()
    assert begun(office) == {}


def test_the_name_of_a_plan_says_what_round_it_is_of() -> None:
    assert round_of("7-1-2-1-0.12") == "7-1-2-1"
    assert groups_of("7-1-2-1-0.12") == 12
    assert groups_of("another name") == 1
