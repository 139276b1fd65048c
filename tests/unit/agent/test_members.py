"""Places, claims, suspicion and fencing: one agent at a time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from everstep.agent.members import (
    CONTACTS_AT_ONCE,
    Claim,
    ClaimAnswer,
    Contact,
    MemberRules,
    Members,
    Message,
)
from everstep.agent.view import Entry, View
from everstep.proto.errors import StaleEpoch

SEEDS = (("n1", "h1:1"), ("n2", "h2:1"), ("n3", "h3:1"))


def rules(node_id: str, boot_id: str = "b", address: str = "", replaces: str = "") -> MemberRules:
    return MemberRules(
        node_id=node_id,
        boot_id=boot_id,
        address=address or f"h{node_id[1:]}:1",
        replaces=replaces,
    )


def entry(node_id: str, since: int, boot_id: str = "b", replaced_by: str = "") -> Entry:
    return Entry(node_id, since, boot_id, replaced_by, f"h{node_id[1:]}:1")


def claim(node_id: str, boot_id: str, view: View | None = None, **more: str) -> Claim:
    address = more.get("address", f"h{node_id[1:]}:1")
    replaces = more.get("replaces", "")
    return Claim(node_id, boot_id, address, (), replaces, View() if view is None else view)


THREE = View([entry("n1", 1), entry("n2", 2), entry("n3", 3)])


def member(node_id: str, now_s: float = 0.0, view: View = THREE) -> Members:
    """An agent that has its place in `view`."""
    members = Members(rules(node_id), SEEDS)
    members.learned(view, now_s)
    assert members.joined
    members.coordinator(now_s)
    return members


def messages(contacts: tuple[Contact, ...]) -> list[tuple[Message, str]]:
    return [(contact.message, contact.node_id or contact.address) for contact in contacts]


entries = some.builds(
    Entry,
    node_id=some.sampled_from(["n1", "n2", "n3"]),
    since_epoch=some.integers(1, 3),
    boot_id=some.sampled_from(["a", "b"]),
    replaced_by=some.sampled_from(["", "n2"]),
    address=some.sampled_from(["x:1", "y:1"]),
)
views = some.builds(View, some.lists(entries, max_size=6))


@given(views, views, views)
@settings(max_examples=300, deadline=None)
def test_merging_is_a_join(one: View, two: View, three: View) -> None:
    assert one.merge(two) == two.merge(one)
    assert one.merge(two).merge(three) == one.merge(two.merge(three))
    assert one.merge(one) == one
    assert one.merge(two).merge(two) == one.merge(two)
    merged = one.merge(two)
    assert merged.epoch == max(one.epoch, two.epoch)
    for mine in one:
        kept = merged.get(mine.node_id)
        assert kept is not None
        assert (kept.since_epoch, kept.boot_id) >= (mine.since_epoch, mine.boot_id)


def test_views_do_not_change_and_list_members_in_order() -> None:
    view = View([entry("n3", 1), entry("n1", 4), entry("n2", 2, replaced_by="n3")])
    assert [e.node_id for e in view.members()] == ["n1", "n3"]
    assert view.epoch == 4
    view.merge(View([entry("n9", 9)]))
    assert len(view) == 3
    assert "n2" in view and "n9" not in view
    assert entry("n1", 1).label == {}


def test_an_agent_without_others_is_a_cluster_of_one() -> None:
    members = Members(rules("n1"))
    assert members.joined
    assert members.view == View([entry("n1", 1)])
    assert members.coordinator(0) == "n1"
    assert members.live(0) == ("n1",)
    assert members.ready(0)
    assert members.due(0) == ()


def test_an_agent_with_others_has_no_place_at_first() -> None:
    members = Members(rules("n2"), SEEDS)
    assert not members.joined
    assert members.coordinator(0) == ""
    assert members.live(0) == ()
    assert not members.ready(0)
    assert messages(members.due(0)) == [(Message.CLAIM, "n1"), (Message.CLAIM, "n3")]


def test_claims_are_repeated_at_growing_intervals_and_not_all_at_once() -> None:
    seeds = tuple((f"n{i:03}", f"h{i}:1") for i in range(100))
    members = Members(rules("n999"), seeds)
    assert len(members.due(0)) == CONTACTS_AT_ONCE
    few = Members(rules("n9"), SEEDS[:1])
    tried = [now for now in range(29) if few.due(now)]
    assert tried == [0, 1, 3, 7, 12, 17, 22, 27]


def test_an_agent_that_reaches_nobody_goes_on_alone_and_keeps_looking() -> None:
    members = Members(rules("n2"), SEEDS)
    for now in range(30):
        members.due(now)
        assert not members.joined
    members.due(30)
    assert members.joined and members.view == View([entry("n2", 1)])
    later = [now for now in range(30, 200) if members.due(now)]
    assert 3 < len(later) < 12
    assert later[-1] > 150


def test_an_agent_that_hears_of_nobody_yet_waits() -> None:
    members = Members(rules("n2"), expects_others=True)
    assert not members.joined and members.due(0) == ()
    members.seek([("", "h2:1"), ("", "h1:1")])
    assert messages(members.due(1)) == [(Message.CLAIM, "h1:1")]
    members = Members(rules("n2"), expects_others=True)
    members.due(0)
    members.seek([("", "h2:1")])
    members.due(1)
    assert members.joined, "it is the only one that is listed"


def test_of_agents_that_start_together_the_smallest_founds_when_all_others_wait() -> None:
    one, two = Members(rules("n1", "x"), SEEDS), Members(rules("n2", "y"), SEEDS)
    to_two, to_three = one.due(0)
    (to_one, *_) = two.due(0)
    answer = one.claimed(two.claim(), 0.1)
    assert answer == ClaimAnswer(View(), coordinator="n1", joined=False)
    two.claim_answered(to_one, answer, 0.2)
    one.claim_answered(to_two, two.claimed(one.claim(), 0.1), 0.2)
    one.due(0.3)
    assert not one.joined, "the third has not answered"
    one.claim_answered(to_three, ClaimAnswer(View(), coordinator="n1"), 0.4)
    one.due(0.5)
    assert one.joined
    two.due(0.5)
    assert not two.joined, "it waits for the smaller one"
    two.claim_answered(to_one, one.claimed(two.claim(), 1), 1)
    assert two.view == one.view == View([entry("n1", 1, "x"), entry("n2", 2, "y")])
    assert two.coordinator(1) == "n1"


def test_a_founder_is_not_ready_before_those_that_answer_have_their_places() -> None:
    """What they hold may be all that is left."""
    agents = {f"h{i}:1": Members(rules(f"n{i}", f"b{i}"), SEEDS) for i in (1, 2, 3)}
    one, two, three = agents.values()

    def ask(sender: Members, now_s: float, *, only: str = "") -> None:
        for contact in sender.due(now_s):
            if contact.message is Message.CLAIM and only in ("", contact.address):
                answer = agents[contact.address].claimed(sender.claim(), now_s)
                sender.claim_answered(contact, answer, now_s)

    for now_s in (0.0, 0.1):
        ask(one, now_s)
    assert one.joined and not one.ready(0.2)
    ask(two, 0.2)
    one.heard("n2", "b2", one.epoch, 0.3, report=True)
    assert two.joined
    for tenths in range(3, 30):
        ask(one, tenths / 10)
        assert not three.joined and not one.ready(tenths / 10)
    ask(three, 3.0, only="h1:1")
    assert three.joined and not one.ready(3.1)
    one.heard("n3", "b3", one.epoch, 3.2, report=True)
    assert one.ready(3.2)


def test_only_the_coordinator_grants() -> None:
    answer = member("n2").claimed(claim("n4", "x"), 1)
    assert answer.coordinator == "n1" and "n4" not in answer.view
    answer = member("n1").claimed(claim("n4", "x"), 1)
    assert answer.view.get("n4") == entry("n4", 4, "x")
    again = member("n1", view=answer.view).claimed(claim("n4", "x"), 1)
    assert again.view == answer.view, "a claim that comes twice changes nothing"


def test_a_redirected_claim_goes_where_it_was_told() -> None:
    members = Members(rules("n4"), [("", "h2:1")])
    (contact,) = members.due(0)
    members.claim_answered(contact, ClaimAnswer(THREE, coordinator="n1"), 0.1)
    assert (Message.CLAIM, "n1") in messages(members.due(0.1))
    for contact in Members(rules("n4"), SEEDS).due(0):
        members = Members(rules("n4"), SEEDS)
        members.due(0)
        members.claim_answered(contact, ClaimAnswer(THREE, coordinator="n1"), 0.1)
        told = (Message.CLAIM, "n1") in messages(members.due(0.6))
        assert told == (contact.node_id != "n1"), "not again where it has just been"


def test_one_of_two_that_claim_the_same_id_wins() -> None:
    members = member("n1")
    members.heard("n3", "b", 3, 1.0)
    answer = members.claimed(claim("n3", "other", address="elsewhere:1"), 4.0)
    assert "n3 is held by another agent at h3:1, which is alive" in answer.refusal
    assert answer.view == THREE
    answer = members.claimed(claim("n3", "other", address="elsewhere:1"), 6.1)
    assert not answer.refusal
    granted = answer.view.get("n3")
    assert granted is not None and (granted.boot_id, granted.since_epoch) == ("other", 4)


def test_a_place_that_only_its_claimant_knows_of_does_not_win_against_a_live_one() -> None:
    members = member("n1")
    alone = View([Entry("n3", 3, "z", address="h9:1")])
    answer = members.claimed(claim("n3", "z", alone, address="h9:1"), 1)
    assert answer.refusal and answer.view == THREE


def test_a_place_that_was_granted_elsewhere_is_taken_as_it_is() -> None:
    other = View([entry("n4", 7, "x"), entry("n5", 8, "y")])
    answer = member("n1").claimed(claim("n4", "x", other), 1)
    assert answer.view == THREE.merge(other)


def test_an_agent_that_was_refused_founds_nothing_for_long() -> None:
    members = Members(rules("n1", "new"), SEEDS)
    (contact, *_) = members.due(0)
    for now in range(1, 60):
        members.claim_answered(contact, ClaimAnswer(THREE, "held", "n2"), now)
        members.due(now)
    for now in range(60, 89):
        members.due(now)
        assert not members.joined
    members.due(90)
    assert members.joined and members.view.get("n1") == entry("n1", 4, "new")


def test_whoever_coordinated_still_knows_who_is_lost() -> None:
    members = member("n2")
    assert members.coordinator(5) == "n2"
    assert members.suspected(10) == ("n1", "n3")
    members.heard("n1", "b", 3, 10)
    assert members.coordinator(10) == "n1"
    assert members.suspected(10) == ("n3",)


def test_a_restart_at_the_same_address_does_not_wait_for_suspicion() -> None:
    members = member("n1")
    members.heard("n3", "b", 3, 10.0)
    assert members.claimed(claim("n3", "new"), 11.9).refusal
    assert not members.claimed(claim("n3", "new"), 12.0).refusal


def test_nobody_takes_the_place_of_whoever_decides() -> None:
    answer = Members(rules("n1")).claimed(claim("n1", "other"), 100)
    assert "is alive" in answer.refusal


def test_a_restarted_coordinator_gets_its_place_from_the_next_one_that_lives() -> None:
    two, three = member("n2"), member("n3")
    three.answered("n1", ["n2"], None, 1)
    assert two.claimed(claim("n1", "new"), 0.5).refusal
    assert three.claimed(claim("n1", "new", address="h9:1"), 1).coordinator == "n3"
    answer = two.claimed(claim("n1", "new"), 2)
    assert answer.view.get("n1") == entry("n1", 4, "new")
    assert two.coordinator(2) == "n1"
    assert messages(two.due(2)) == [(Message.REPORT, "n1")]


def test_replacing_a_lost_node() -> None:
    members = member("n1")
    members.heard("n2", "b", 3, 1.0)
    answer = members.claimed(claim("n4", "x", replaces="n2"), 5.9)
    assert "n2, which n4 shall replace, is alive at h2:1; stop it first" in answer.refusal
    assert "n4" not in answer.view
    answer = members.claimed(claim("n4", "x", replaces="n2"), 6.0)
    assert answer.view.get("n2") == entry("n2", 4, replaced_by="n4")
    assert answer.view.get("n4") == entry("n4", 4, "x")
    assert [e.node_id for e in answer.view.members()] == ["n1", "n3", "n4"]
    again = members.claimed(claim("n4", "y", replaces="n2"), 30)
    assert not again.refusal, "a restart with the same flag"
    refused = members.claimed(claim("n5", "z", replaces="n2"), 30)
    assert "n2 was replaced by n4 already" in refused.refusal
    assert not members.claimed(claim("n6", "z", replaces="n77"), 30).refusal


def test_whoever_decides_for_the_coordinator_believes_it_about_the_replaced() -> None:
    asked = claim("n1", "new", replaces="n3")
    for lost, refusal in (([], "n3, which n1 shall replace, is alive"), (["n3"], "")):
        members = member("n2")
        members.heard("n1", "b", 3, 90)
        members.answered("n1", lost, None, 90)
        # Nothing was ever heard of n3 here: it reports to n1.
        assert refusal in members.claimed(asked, 94).refusal
        assert (members.epoch == 3) == bool(refusal)


def test_a_replaced_agent_is_fenced_for_good() -> None:
    members = member("n2")
    assert members.learned(View([entry("n2", 4, replaced_by="n4")]), 1)
    assert (members.fenced_by, members.expelled, members.joined) == ("n4", True, False)
    assert members.due(1) == ()
    assert members.live(1) == ("n1", "n3")
    coordinator = member("n1", view=members.view)
    assert "replaced by n4" in coordinator.claimed(claim("n2", "b"), 9).refusal
    assert not coordinator.claimed(claim("n2", "new"), 9).refusal, "a new boot joins anew"


def test_a_zombie_is_refused_and_fenced() -> None:
    newer = View([entry("n2", 4, "new")]).merge(THREE)
    others, zombie = member("n1", view=newer), member("n2")
    with pytest.raises(StaleEpoch, match="n2 speaks at epoch 3, the membership is at epoch 4"):
        others.heard("n2", "b", 3, 1)
    zombie.learned(others.view, 1)
    assert zombie.fenced_by == "n2 at h2:1"
    assert not zombie.joined and not zombie.ready(1)
    assert zombie.epoch == 4
    # It asks for its place, in case that the newer one is gone; alive, that one keeps it.
    for now in range(1, 30):
        others.heard("n2", "new", 4, now)
        for contact in zombie.due(now):
            if contact.node_id == "n1":
                zombie.claim_answered(contact, others.claimed(zombie.claim(), now), now)
    assert zombie.expelled
    assert zombie.due(31) == ()
    zombie.learned(View([entry("n2", 5)]), 32)
    assert zombie.joined and not zombie.fenced_by, (
        "a place is not left to one that does not fill it"
    )


def test_a_refusal_for_a_holder_that_died_lately_is_not_the_last_word() -> None:
    newer = View([Entry("n2", 4, "new", address="h9:1")]).merge(THREE)
    others, zombie = member("n1"), member("n2")
    others.learned(newer, 20)
    zombie.learned(newer, 20)
    contact = next(c for c in zombie.due(20) if c.node_id == "n1")
    zombie.claim_answered(contact, others.claimed(zombie.claim(), 21), 21)
    assert zombie.refusal and zombie.fenced_by and not zombie.expelled
    zombie.claim_answered(contact, others.claimed(zombie.claim(), 25), 25)
    assert zombie.joined


def test_a_zombie_takes_its_place_again_when_the_newer_one_is_gone() -> None:
    newer = View([entry("n2", 4, "new")]).merge(THREE)
    others, zombie = member("n1", view=newer), member("n2")
    zombie.learned(others.view, 20)
    contact = next(c for c in zombie.due(20) if c.node_id == "n1")
    zombie.claim_answered(contact, others.claimed(zombie.claim(), 20), 20)
    assert zombie.joined and not zombie.fenced_by
    assert others.view.get("n2") == entry("n2", 5)


@pytest.mark.parametrize("node_id", ["n2", "n4"])
def test_strangers_and_the_replaced_are_not_heard(node_id: str) -> None:
    members = member("n1", view=THREE.merge(View([entry("n2", 4, replaced_by="n3")])))
    with pytest.raises(StaleEpoch):
        members.heard(node_id, "b", 9, 1)


def test_the_coordinator_suspects_the_silent() -> None:
    members = member("n1")
    members.heard("n2", "b", 3, 3.0, report=True)
    assert members.suspected(4.9) == ()
    assert members.suspected(5.0) == ("n3",)
    assert members.live(5.0) == ("n1", "n2")
    members.heard("n3", "b", 3, 6.0)
    assert members.suspected(7.9) == ()
    assert members.suspected(8.0) == ("n2",)
    members.heard("n2", "b", 3, 8.5)
    assert members.suspected(10.9) == ()
    assert members.suspected(11.0) == ("n3",)


def test_a_member_judges_the_coordinator_only_and_believes_it_about_others() -> None:
    members = member("n3")
    members.answered("n1", ["n2"], None, 1)
    assert members.suspected(1) == ("n2",)
    members.heard("n1", "b", 3, 1)
    assert members.coordinator(5.9) == "n1"
    assert members.coordinator(6.0) == "n2", "it has not been heard yet, and gets time"
    assert members.coordinator(10.9) == "n2"
    assert members.coordinator(11.0) == "n3"
    assert members.suspected(11.0) == ("n1", "n2")


def test_a_new_coordinator_asks_the_others_first() -> None:
    members = member("n2")
    members.answered("n1", [], None, 0)
    assert members.is_coordinator(5.0)
    assert members.waiting_for(5.0) == ("n3",)
    members.heard("n3", "b", 3, 5.5)
    assert not members.ready(5.5), "not every message is a report"
    members.heard("n3", "b", 3, 6.0, report=True)
    assert members.ready(6.0)
    members.learned(View([entry("n3", 4, "new")]), 6.5)
    assert members.waiting_for(6.5) == ("n3",), "another boot holds other things"


def test_a_new_coordinator_does_not_wait_for_those_known_as_lost() -> None:
    members = member("n2")
    members.answered("n1", ["n3"], None, 0)
    assert members.ready(5.0)
    assert members.suspected(5.0) == ("n1", "n3")


def test_reports_follow_the_heartbeat_and_news() -> None:
    members = member("n3")
    assert messages(members.due(0)) == [(Message.REPORT, "n1")]
    assert members.due(0.9) == ()
    members.hurry()
    assert messages(members.due(0.95)) == [(Message.REPORT, "n1")]
    assert members.due(1.9) == ()
    assert messages(members.due(1.95)) == [(Message.REPORT, "n1")]


def test_a_suspected_smaller_id_is_probed_and_followed_when_it_answers() -> None:
    members = member("n2")
    for now in range(5):
        members.due(now)
    assert (Message.PROBE, "n1") in messages(members.due(5))
    tried = [now for now in range(6, 30) if (Message.PROBE, "n1") in messages(members.due(now))]
    assert tried == [10, 15, 20, 25]
    members.heard("n1", "b", 3, 29.5)
    assert members.coordinator(29.5) == "n1"
    assert messages(members.due(29.5)) == [(Message.REPORT, "n1")]


def test_one_whom_others_hear_is_probed_soon() -> None:
    members = member("n3")
    for now in range(6):
        members.due(now)
    assert members.coordinator(6) == "n2"
    members.answered("n1", ["n3"], None, 6.5)
    assert members.coordinator(6.5) == "n2", "our own clock says so"
    assert (Message.PROBE, "n1") in messages(members.due(6.5))


def test_the_coordinator_tells_the_lost_and_the_replaced_rarely() -> None:
    members = member("n1", view=THREE.merge(View([entry("n2", 4, replaced_by="n3")])))
    probes = [
        (now, contact.node_id)
        for now in range(200)
        for contact in members.due(now)
        if contact.message is Message.PROBE
    ]
    assert {node_id for _, node_id in probes} == {"n2", "n3"}
    assert len(probes) < 24


def test_after_a_stall_of_its_own_nobody_is_late_but_all_are_asked_again() -> None:
    members = member("n1")
    for node_id in ("n2", "n3"):
        members.heard(node_id, "b", 3, 0, report=True)
    members.due(0)
    assert members.ready(0)
    members.due(60)
    assert members.suspected(60) == ()
    assert members.waiting_for(60) == ("n2", "n3")
    for now in range(61, 66):
        members.due(now)
    assert members.suspected(65) == ("n2", "n3")


def test_a_founder_that_meets_its_old_cluster_asks_for_its_place() -> None:
    members = Members(rules("n1", "new"))
    members.learned(THREE, 5)
    assert not members.joined and not members.fenced_by
    assert members.view == THREE
    assert {c.node_id for c in members.due(5)} == {"n2", "n3"}


def test_an_agent_that_shall_replace_another_founds_nothing_and_keeps_nobody_waiting() -> None:
    members = Members(rules("n1", replaces="n3"), SEEDS)
    for now in range(100):
        members.due(now)
    assert not members.joined
    assert members.claimed(claim("n2", "x"), 100).coordinator == "n2"


def test_an_agent_that_finds_itself_by_another_name_does_not_wait() -> None:
    members = Members(rules("n1"), [("", "alias:1")])
    (contact,) = members.due(0)
    members.claim_answered(contact, members.claimed(members.claim(), 0), 0)
    members.due(0.1)
    assert members.joined
