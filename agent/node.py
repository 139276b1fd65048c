"""One agent among others: its own state, its place in the membership, and its turn as coordinator.

Owns the flow between the three: what changes here is reported to the coordinator, what others
report is turned into orders, and orders are events for this node's own state. Promises that orders
are taken only from the newest coordinator that this node knows of (`term`), that a fenced agent
neither reports nor obeys, and that everything here is a function of the events and times given.
Does no I/O: what is to be sent is returned, in order, among the actions.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from everstep.agent import events
from everstep.agent.actions import Action
from everstep.agent.coordination import Cluster, Coordination
from everstep.agent.holdings import JobFact, Orders, Report, job_fact
from everstep.agent.members import Claim, ClaimAnswer, Contact, Members, Message
from everstep.agent.protection import ProtectionRules
from everstep.agent.state import Outcome, State
from everstep.agent.view import View
from everstep.proto.errors import Fenced, StaleEpoch

_OWN_ROUNDS = 16
"""How often the coordinator's orders to itself may lead to further ones, at one time."""
_TERM_BITS = 32


@dataclass(frozen=True, slots=True)
class SendClaim:
    """Ask for a place; the answer goes to `Node.claim_answered`."""

    contact: Contact
    claim: Claim


@dataclass(frozen=True, slots=True)
class SendReport:
    """Report to whoever coordinates; the answer goes to `Node.answered`."""

    contact: Contact
    report: Report


@dataclass(frozen=True, slots=True)
class SendOrders:
    """Tell a member what it has to do, without being asked."""

    node_id: str
    address: str
    orders: Orders


Send = SendClaim | SendReport | SendOrders


@dataclass(slots=True)
class Step:
    """What one event leads to, here and elsewhere."""

    actions: list[Action] = field(default_factory=list)
    sends: list[Send] = field(default_factory=list)
    reply: object = None


class Node:
    """An agent with peers. Feed it from one thread."""

    def __init__(self, state: State, members: Members, rules: ProtectionRules) -> None:
        self.state = state
        self.members = members
        self.coordination = Coordination(rules)
        self._sequence = 0
        self._term = 0
        self._facts: tuple[JobFact, ...] | None = None
        """As they were reported last; None: not in this term."""
        self._changed = True
        """Whether the facts may be other ones since."""
        self._leads = False
        self._undecided = False
        self._boots: dict[str, str] = {}
        self._cluster: tuple[View, tuple[str, ...], Cluster] | None = None

    @property
    def node_id(self) -> str:
        """This node."""
        return self.members.rules.node_id

    def handle(self, event: events.Event, now_s: float) -> Step:
        """Something happened on this node. See `State.handle`.

        Raises:
            Refused: As `State.handle` does.
            Fenced: If a trainer wants to write, and this node's place is another's.
        """
        if self.members.fenced_by and isinstance(event, events.Offer | events.Seal):
            raise Fenced(self.node_id, self.members.fenced_by)
        outcome: Outcome = self.state.handle(event, now_s)
        self._changed = True
        step = Step(list(outcome.actions), reply=outcome.reply)
        self._go_on(step, now_s)
        return step

    def tick(self, now_s: float) -> Step:
        """Time passed: to be called several times a heartbeat, and soon after reports."""
        step = Step()
        self._lead(now_s)
        if self._leads:
            self._undecided = False
            self.coordination.decide(self.cluster(now_s), now_s)
        self._go_on(step, now_s)
        return step

    @property
    def undecided(self) -> bool:
        """Whether a report came since the last `tick`."""
        return self._undecided

    def ready(self, now_s: float) -> bool:
        """Whether this node coordinates and knows what every live member holds, itself included.

        The membership alone does not know that: a term that has begun anew has no reports.
        """
        self._lead(now_s)
        live = self.members.live(now_s)
        reported = all(node_id in self.coordination.reported for node_id in live)
        return self._leads and reported and self.members.ready(now_s)

    def cluster(self, now_s: float) -> Cluster:
        """Who takes part, as this node sees it."""
        view, live = self.members.view, self.members.live(now_s)
        known = self._cluster
        if known is None or known[0] is not view or known[1] is not live:
            entries = view.members()
            labels = {entry.node_id: dict(entry.labels) for entry in entries}
            ids = frozenset(entry.node_id for entry in entries)
            known = self._cluster = (view, live, Cluster(ids, frozenset(live), labels))
        return known[2]

    def _lead(self, now_s: float) -> None:
        leads = self.members.is_coordinator(now_s)
        if leads and not self._leads:
            self._begin_term(self._term)
        self._leads = leads

    def _begin_term(self, after: int) -> None:
        """A term that no other coordinator has: its number ends in a hash of this process."""
        own = zlib.crc32(self.members.rules.boot_id.encode())
        self._term = ((after >> _TERM_BITS) + 1 << _TERM_BITS) | own
        self.coordination.take_over(self._term)
        self._boots.clear()
        self._facts = None

    def _go_on(self, step: Step, now_s: float, *, quiet: bool = False) -> None:
        """Report what has changed here and, as coordinator, do what that leads to; `quiet` if what
        a coordinator has to send by time alone can wait for the next `tick`."""
        self._lead(now_s)
        for _ in range(_OWN_ROUNDS):
            if not self._changed and self._facts is not None:
                break
            self._changed = False
            facts = tuple(job_fact(job) for job in self.state.jobs.values())
            if facts == self._facts:
                break
            self._facts = facts
            self._sequence += 1
            if not self._leads:
                self.members.hurry()
                break
            self._undecided = True
            self.coordination.report(self.node_id, self._report())
            orders = self.coordination.orders(self.node_id, self.cluster(now_s))
            self._obey(orders, step, now_s)
        if self._leads:
            self._push(step, now_s, "")
            if quiet:
                return
        for contact in self.members.due(now_s):
            if contact.message is Message.CLAIM:
                step.sends.append(SendClaim(contact, self.members.claim()))
            else:
                step.sends.append(SendReport(contact, self._report()))

    def _report(self) -> Report:
        return Report(self._sequence, self._term, self._facts or ())

    def _obey(self, orders: Iterable[events.Event], step: Step, now_s: float) -> None:
        for order in orders:
            step.actions += self.state.handle(order, now_s).actions
            self._changed = True

    def _push(self, step: Step, now_s: float, but: str) -> None:
        changed = self.coordination.changed(but)
        if not changed:
            return
        if self.node_id in changed:
            orders = self.coordination.orders(self.node_id, self.cluster(now_s))
            self._obey(orders, step, now_s)
        coordinator, suspected = self.members.coordinator(now_s), self.members.suspected(now_s)
        cluster = self.cluster(now_s)
        for node_id in sorted(changed - {self.node_id}):
            entry = self.members.view.get(node_id)
            if entry is not None:
                told = self._orders_for(node_id, cluster, coordinator, suspected)
                step.sends.append(SendOrders(node_id, entry.address, told))

    def _orders_for(
        self, node_id: str, cluster: Cluster, coordinator: str, suspected: tuple[str, ...]
    ) -> Orders:
        counts = self._leads and node_id in self.coordination.reported
        return Orders(
            sequence=self.coordination.reported.get(node_id, 0),
            term=self._term,
            orders=self.coordination.orders(node_id, cluster) if counts else (),
            suspected=suspected,
            coordinator=coordinator,
        )

    def reported(
        self,
        node_id: str,
        boot_id: str,
        view: View,
        report: Report,
        now_s: float,
        *,
        epoch: int | None = None,
    ) -> tuple[Orders, Step]:
        """A member reports; the first value is the answer.

        Args:
            node_id: Which one.
            boot_id: Its process.
            view: The one that it has; empty if it takes ours for the same.
            report: What it holds.
            now_s: The time.
            epoch: Of its view, where that may be empty.

        Raises:
            StaleEpoch: If it does not hold its place, or reports to who held ours before.
        """
        if self.members.learned(view, now_s):
            self._forget_strangers()
        epoch = view.epoch if epoch is None else epoch
        if not self.members.known_to(view, epoch):
            # It set out before this agent had its place, and may say less than what whoever
            # was here before has decided upon.
            raise StaleEpoch(node_id, epoch, self.members.epoch)
        self.members.heard(node_id, boot_id, epoch, now_s, report=True)
        self._lead(now_s)
        step = Step()
        if self._leads:
            if report.term > self._term:
                self._begin_term(report.term)
            if self._boots.get(node_id, boot_id) != boot_id:
                self.coordination.forget(node_id)
            self._boots[node_id] = boot_id
            if report.term == self._term:
                # Else it may still do what an earlier coordinator says, or may say so itself: it
                # hears of this term in the answer, and what it reports then counts.
                self._undecided = True
                self.coordination.report(node_id, report)
            # Its orders are in the answer.
            self._push(step, now_s, node_id)
        orders = self._orders_for(
            node_id,
            self.cluster(now_s),
            self.members.coordinator(now_s),
            self.members.suspected(now_s),
        )
        self._go_on(step, now_s, quiet=True)
        return orders, step

    def _forget_strangers(self) -> None:
        present = {entry.node_id for entry in self.members.view.members()}
        for node_id in [n for n in self.coordination.reported if n not in present]:
            self.coordination.forget(node_id)
            self._undecided = True

    def answered(
        self, node_id: str, boot_id: str, view: View, orders: Orders, now_s: float
    ) -> Step:
        """Orders came, asked for by a report or not."""
        step = Step()
        try:
            if self.members.learned(view, now_s):
                self._forget_strangers()
            self.members.heard(node_id, boot_id, view.epoch, now_s)
        except StaleEpoch:
            return step  # of one that lost its place: its word counts for nothing
        self.members.answered(orders.coordinator, orders.suspected, None, now_s)
        obeys = orders.coordinator == node_id and orders.term >= self._term
        if obeys and node_id != self.node_id and self.members.joined:
            if orders.term > self._term:
                self._term = orders.term
                self.members.hurry()
            self._obey(orders.orders, step, now_s)
        self._go_on(step, now_s)
        return step

    def refused(self, view: View, now_s: float) -> Step:
        """A report was refused: the membership is another one than this node knew."""
        step = Step()
        if self.members.learned(view, now_s):
            self._forget_strangers()
        self._go_on(step, now_s)
        return step

    def claimed(self, claim: Claim, now_s: float) -> tuple[ClaimAnswer, Step]:
        """Another agent claims a place here; the first value is the answer."""
        answer = self.members.claimed(claim, now_s)
        self._forget_strangers()
        step = Step()
        self._go_on(step, now_s)
        return answer, step

    def claim_answered(self, contact: Contact, answer: ClaimAnswer, now_s: float) -> Step:
        """A claim of this agent was answered."""
        self.members.claim_answered(contact, answer, now_s)
        self._forget_strangers()
        step = Step()
        self._go_on(step, now_s)
        return step
