"""Agents that lost their place to one that is gone: late messages of the dead, and what they undo.

All agents of a cluster are killed at once and started again. They have found each other, or are
about to, when a message arrives that one of the dead had sent.
"""

from everstep.agent.members import ClaimAnswer, Contact, MemberRules, Members, Message
from everstep.agent.view import Entry, View
from everstep.proto.errors import StaleEpoch

SEEDS = (("n1", "h1:1"), ("n2", "h2:1"))


def rules(node_id: str, boot_id: str) -> MemberRules:
    return MemberRules(node_id=node_id, boot_id=boot_id, address=f"h{node_id[1:]}:1")


def entry(node_id: str, since: int, boot_id: str) -> Entry:
    return Entry(node_id, since, boot_id, address=f"h{node_id[1:]}:1")


DEAD = View([entry("n1", 1, "z-dead"), entry("n2", 2, "z-dead")])
"""The cluster before. Of two claims of one epoch the larger boot holds: here, that of the dead."""


def exchange(agents: dict[str, Members], now_s: float) -> None:
    """All that is due arrives, and so do the answers."""
    for sender in agents.values():
        for contact in sender.due(now_s):
            receiver = agents.get(contact.address)
            if receiver is not None:
                deliver(sender, receiver, contact, now_s)


def deliver(sender: Members, receiver: Members, contact: Contact, now_s: float) -> None:
    if contact.message is Message.CLAIM:
        sender.claim_answered(contact, receiver.claimed(sender.claim(), now_s), now_s)
        return
    receiver.learned(sender.view, now_s)
    one, other = sender.rules, receiver.rules
    try:
        receiver.heard(one.node_id, one.boot_id, sender.epoch, now_s, report=True)
        sender.learned(receiver.view, now_s)
        sender.heard(other.node_id, other.boot_id, receiver.epoch, now_s)
    except StaleEpoch:
        sender.learned(receiver.view, now_s)


def started(boot_id: str = "new") -> dict[str, Members]:
    return {address: Members(rules(node_id, boot_id), SEEDS) for node_id, address in SEEDS}


def run(agents: dict[str, Members], from_s: int, to_s: int) -> None:
    for now_s in range(from_s, to_s):
        exchange(agents, float(now_s))


def check(agents: dict[str, Members], now_s: float) -> None:
    one, two = agents["h1:1"], agents["h2:1"]
    assert one.joined and two.joined, (one.view, two.view)
    assert not one.fenced_by and not two.fenced_by
    assert one.view == two.view
    assert {each.coordinator(now_s) for each in (one, two)} == {"n1"}
    assert one.ready(now_s)


def fenced() -> dict[str, Members]:
    """Both have joined a new cluster, and both are told of the one before."""
    agents = started()
    run(agents, 0, 3)
    check(agents, 2.0)
    for members in agents.values():
        members.learned(DEAD, 3.0)
        assert members.fenced_by and not members.joined
    return agents


def test_agents_that_the_dead_have_fenced_found_a_cluster_again() -> None:
    agents = fenced()
    run(agents, 3, 8)
    assert not any(each.joined for each in agents.values()), "the holder gets time to be heard"
    run(agents, 8, 20)
    check(agents, 20.0)
    assert not any(each.expelled for each in agents.values())
    assert agents["h1:1"].epoch > DEAD.epoch


def test_a_fenced_agent_that_is_alone_founds_nothing() -> None:
    one = fenced()["h1:1"]
    # It is listed once more, by another name: what it says to itself is no company.
    one.seek((*SEEDS, ("", "alias:1")))
    for now_s in range(3, 200):
        for contact in one.due(now_s):
            if contact.address == "alias:1":
                one.claim_answered(contact, one.claimed(one.claim(), now_s), now_s)
    assert one.fenced_by and not one.joined and not one.expelled
    agents = {"h1:1": one, "h2:1": Members(rules("n2", "later"), SEEDS)}
    run(agents, 200, 250)
    check(agents, 250.0)


def test_a_fenced_agent_waits_for_whoever_has_a_place() -> None:
    agents = fenced()
    one, elsewhere = agents["h1:1"], Contact(Message.CLAIM, "", "h3:1")
    for now_s in range(3, 100):
        exchange(agents, now_s)
        one.claim_answered(elsewhere, ClaimAnswer(DEAD, coordinator="n3"), now_s)
    assert not one.joined


def test_a_place_is_granted_anew_to_one_that_knows_of_a_higher_claim() -> None:
    agents = started()
    one, two = agents["h1:1"], agents["h2:1"]
    run({"h1:1": one}, 0, 31)
    assert one.joined
    lost = one.claimed(two.claim(), 31)
    assert not lost.refusal and lost.view.epoch == 2
    # Before the answer comes, somebody tells it that a dead process has its place, since later.
    two.learned(View([entry("n2", 70, "z-dead")]), 31)
    two.claim_answered(Contact(Message.CLAIM, "n1", "h1:1"), lost, 31)
    assert not two.joined
    run(agents, 32, 40)
    check(agents, 40.0)
    assert two.view.get("n2") == entry("n2", 71, "new")
    again = one.claimed(two.claim(), 40)
    assert again.view == one.view == two.view, "nothing is given twice"


def test_refusals_before_a_silence_are_not_the_last_word() -> None:
    members = fenced()["h1:1"]
    contact = Contact(Message.CLAIM, "n2", "h2:1")
    held = ClaimAnswer(DEAD, "n1 is held by another agent", "n2")
    for now_s in (5.0, 6.0, 60.0, 64.0, 68.0):
        members.claim_answered(contact, held, now_s)
        assert members.refusal and not members.expelled, now_s
    members.claim_answered(contact, held, 70.0)
    assert members.expelled


def test_a_new_process_of_the_coordinator_is_reported_to_at_once() -> None:
    two = Members(rules("n2", "new"), SEEDS)
    two.learned(View([entry("n1", 1, "before"), entry("n2", 2, "new")]), 0)
    assert [contact.message for contact in two.due(0)] == [Message.REPORT]
    assert two.due(0.1) == ()
    two.learned(View([entry("n1", 3, "after")]), 0.2)
    assert [contact.message for contact in two.due(0.2)] == [Message.REPORT]
