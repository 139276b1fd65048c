"""Whether this agent has a place in the cluster, who has the others, and who is alive.

Owns the view, the claims to places, fencing, and the schedule of what is to be sent.
Promises: an entry changes only when an agent joins under a new boot, joins anew or replaces
another; losing contact changes no entry; of two boots that hold one place one ends up fenced; the
epoch never falls. Does not promise one coordinator at all times: each side of a partition has one,
and what needs the other side does not happen. Pure: time is passed in, messages are sent by
whoever asks what is `due`.

On each message from another agent: first `learned` its view, if it shows one, then `heard` it.
"""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from everstep.agent.liveness import Liveness
from everstep.agent.searching import Search
from everstep.agent.view import Entry, View
from everstep.proto.errors import StaleEpoch

CONTACTS_AT_ONCE = 16
"""Claims, and probes, that are sent at one time, so that a large cluster's start is no storm."""
_RARELY = 6
"""The longest time between two tries where nobody waits for them, in times of suspicion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberRules:
    """This agent, and the times it keeps."""

    node_id: str
    boot_id: str
    address: str
    labels: tuple[tuple[str, str], ...] = ()
    replaces: str = ""
    heartbeat_s: float = 1.0
    suspect_after_s: float = 5.0
    join_timeout_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Claim:
    """An agent asks for a place."""

    node_id: str
    boot_id: str
    address: str
    labels: tuple[tuple[str, str], ...]
    replaces: str
    view: View


@dataclass(frozen=True, slots=True)
class ClaimAnswer:
    """What a claim led to; granted if the view has the claimant's boot."""

    view: View
    refusal: str = ""
    coordinator: str = ""
    """Whom to ask instead; the claimant itself: whoever answered has no place either."""
    joined: bool = True
    """Whether whoever answered has a place."""


class Message(enum.Enum):
    """What to send: a claim, a report, or a report to one that was silent."""

    CLAIM = "claim"
    REPORT = "report"
    PROBE = "probe"


@dataclass(frozen=True, slots=True)
class Contact:
    """A message to send now."""

    message: Message
    node_id: str
    """Empty if it is not known who answers there."""
    address: str


Contacts = tuple[Contact, ...]


@dataclass(slots=True)
class _Schedule:
    """When one address is tried next; waits longer each time, up to a bound."""

    wait_s: float
    next_s: float = float("-inf")
    last_s: float = float("-inf")

    def take(self, now_s: float, longest_s: float) -> None:
        self.last_s = now_s
        self.next_s = now_s + self.wait_s
        self.wait_s = min(2 * self.wait_s, longest_s)

    def soon(self, after_s: float) -> None:
        """Try again earlier, but not within `after_s` of the last time."""
        self.next_s = min(self.next_s, self.last_s + after_s)


class Members:
    """The membership as one agent knows it."""

    def __init__(
        self,
        rules: MemberRules,
        seeds: Iterable[tuple[str, str]] = (),
        *,
        expects_others: bool = False,
    ) -> None:
        """Start without a place, or with the only one if no others are there.

        Args:
            rules: This agent.
            seeds: Node id, or an empty text if that is unknown, and address of all agents.
            expects_others: Whether there may be others although there are no `seeds` yet.
        """
        self.rules = rules
        self.view = View()
        self.joined = False
        self.fenced_by = ""
        """Who holds this agent's place or has replaced it; empty while it is not fenced."""
        self.expelled = False
        """Fenced, and asking for nothing more: it was replaced, or its place's holder is alive."""
        self.refusal = ""
        """Why the last claim was refused; empty once this agent has joined."""
        self._seeds: tuple[tuple[str, str], ...] = ()
        self._search = Search(rules.suspect_after_s, rules.join_timeout_s)
        self._schedules: dict[str, _Schedule] = {}
        self._probing: dict[str, _Schedule] = {}
        self._met: set[str] = set()
        """Addresses of agents that have a place in this one's view, whatever they are called."""
        self._strange: dict[str, str] | None = None
        self._liveness = Liveness(rules.node_id, rules.suspect_after_s)
        self._due_s: float | None = None
        self._report_s = self._waits_until_s = float("-inf")
        self._unlisted = expects_others
        """Nobody is known at all, not even this agent: no reason to think that it is alone."""
        self.seek(seeds)
        if not self._seeds and not self._unlisted:
            self._found()

    @property
    def epoch(self) -> int:
        """The newest change of the membership that this agent knows."""
        return self.view.epoch

    def seek(self, seeds: Iterable[tuple[str, str]]) -> None:
        """Look for these agents from now on, instead of those named so far."""
        own, seeds = self.rules, tuple(seeds)
        self._unlisted = self._unlisted and not seeds
        # Another agent at the address that is listed for this one would be a duplicate of it.
        self._seeds = tuple(sorted({seed for seed in seeds if seed[1] != own.address}))
        self._strange = None
        # Names that move from address to address must not pile up here.
        kept = set(self._targets())
        self._schedules = {key: each for key, each in self._schedules.items() if key in kept}
        self._met &= kept

    def claim(self) -> Claim:
        """What this agent sends as a claim."""
        own = self.rules
        return Claim(own.node_id, own.boot_id, own.address, own.labels, self._replaces, self.view)

    def coordinator(self, now_s: float) -> str:
        """The acting coordinator as this agent sees it; empty while it has no place."""
        self._advance(now_s)
        return self._liveness.coordinator

    def is_coordinator(self, now_s: float) -> bool:
        """Whether this agent coordinates."""
        return self.coordinator(now_s) == self.rules.node_id

    def suspected(self, now_s: float) -> tuple[str, ...]:
        """Members that count as lost: by our clock if we judge them, else as we were told."""
        self._advance(now_s)
        return self._liveness.suspected()

    def live(self, now_s: float) -> tuple[str, ...]:
        """Members that do not count as lost, this one included while it has a place."""
        self._advance(now_s)
        return self._liveness.live()

    def waiting_for(self, now_s: float) -> tuple[str, ...]:
        """Live members that have not reported to this agent since it coordinates."""
        self._advance(now_s)
        return tuple(self._liveness.waiting_for())

    def ready(self, now_s: float) -> bool:
        """Whether this agent coordinates and knows what every live member holds."""
        waited = now_s >= self._waits_until_s  # who is slow to come may know more than all here
        known = self.is_coordinator(now_s) and not self._liveness.waiting_for()
        return known and (waited or not any(self._strangers().values()))

    def heard(
        self, node_id: str, boot_id: str, epoch: int, now_s: float, *, report: bool = False
    ) -> None:
        """A message came from a member; `report` if it was one.

        Raises:
            StaleEpoch: If the sender does not hold that place: take nothing, show it our view.
        """
        entry = self.view.get(node_id)
        if entry is None or entry.boot_id != boot_id or entry.replaced_by:
            raise StaleEpoch(node_id, epoch, self.epoch)
        self._liveness.heard(node_id, now_s)
        if report and self.is_coordinator(now_s):
            self._liveness.reported(node_id)

    def known_to(self, view: View, epoch: int) -> bool:
        """Whether who has this view, or if that is empty ours, knows that we have our place."""
        own = self.rules
        mine = (view if len(view) else self.view).get(own.node_id)
        if mine is None or mine.since_epoch > epoch:
            return False
        return mine.boot_id == own.boot_id

    def answered(
        self, coordinator: str, suspected: Sequence[str], view: View | None, now_s: float
    ) -> None:
        """The one we report to answered: whom it takes for coordinator, and for lost."""
        if view is not None:
            self.learned(view, now_s)
        if coordinator == self.coordinator(now_s) != self.rules.node_id:
            self._liveness.told(suspected)
        elif coordinator in self._probing:
            # Others hear one that we do not: look again soon, but not at every answer.
            self._probing[coordinator].soon(self.rules.heartbeat_s)

    def hurry(self) -> None:
        """There is news for the coordinator: the next report is due at once."""
        self._report_s = float("-inf")

    def _advance(self, now_s: float) -> None:
        if self.joined and self._liveness.advance(now_s):
            self.hurry()

    def learned(self, view: View, now_s: float) -> bool:
        """Take over what another agent's view has that is newer; true if ours changed."""
        own, before = self.rules, self.view
        theirs, mine = view.get(own.node_id), before.get(own.node_id)
        if (
            theirs is not None
            and mine is not None
            and theirs.boot_id != own.boot_id == mine.boot_id
            and theirs.since_epoch >= mine.since_epoch
            and before.members() == (mine,)
        ):
            # We founded a cluster of our own, and found the one that we had been in: ask there.
            before = before.without(own.node_id)
            self._leave(now_s)
        merged = before.merge(view)
        if merged == self.view:
            return False
        self._changed(merged, now_s)
        return True

    def _changed(self, view: View, now_s: float) -> None:
        led, leads = (each.get(self._liveness.coordinator) for each in (self.view, view))
        if led is not None and leads is not None and led.boot_id != leads.boot_id:
            self.hurry()  # the one that we report to knows nothing of us
        self.view = view
        self._strange = None
        self._liveness.follow_view(view, now_s)
        own = self.rules
        entry = view.get(own.node_id)
        if entry is None:
            return
        if entry.boot_id != own.boot_id:
            if self.joined:
                self._leave(now_s, fenced=True)
                self.fenced_by = entry.replaced_by or f"{own.node_id} at {entry.address}"
        elif entry.replaced_by:
            self._leave(now_s, fenced=True)
            self.fenced_by, self.expelled = entry.replaced_by, True
        elif not self.joined:
            # Even if it was given up: the place must not stay with one that does not fill it.
            self.joined, self.expelled = True, False
            self.fenced_by = self.refusal = ""
            self._schedules.clear()

    def _leave(self, now_s: float, *, fenced: bool = False) -> None:
        self.joined = False
        self._liveness.leave()
        self._search = self._search.anew(now_s, fenced=fenced)
        self._schedules.clear()
        self._met.clear()

    def _found(self) -> None:
        """Take the first place, or this agent's in the cluster of which nobody else is left."""
        self._waits_until_s = (self._search.started_s or 0.0) + self.rules.join_timeout_s
        own = self.rules
        entry = Entry(
            own.node_id, self.epoch + 1, own.boot_id, address=own.address, labels=own.labels
        )
        self._changed(self.view.merge(View([entry])), self._due_s or 0.0)

    def claimed(self, claim: Claim, now_s: float) -> ClaimAnswer:
        """Another agent claims a place here."""
        own = self.rules
        if (claim.node_id, claim.boot_id) == (own.node_id, own.boot_id):
            return ClaimAnswer(self.view, coordinator=own.node_id)
        theirs, ours = claim.view.get(claim.node_id), self.view.get(claim.node_id)
        granted = (
            theirs is not None
            and theirs.boot_id == claim.boot_id
            and (ours is None or theirs.since_epoch > ours.since_epoch)
        )
        # A place that nobody but the claimant knows of does not win against one that is held.
        self.learned(claim.view if granted else claim.view.without(claim.node_id), now_s)
        if not self.joined:
            return ClaimAnswer(self.view, "", self._first_of(claim, now_s), joined=False)
        self._advance(now_s)
        decides = self._liveness.decider(claim.node_id)
        if decides != own.node_id:
            return ClaimAnswer(self.view, coordinator=decides)
        refusal = self._refusal(claim, now_s)
        if not refusal:
            self._grant(claim, now_s)
        return ClaimAnswer(self.view, refusal, own.node_id)

    def _first_of(self, claim: Claim, now_s: float) -> str:
        """Who founds the cluster, if the claimant has no place either."""
        own, entry = self.rules.node_id, self.view.get(claim.node_id)
        if not self._may_lead or claim.node_id < own:
            return claim.node_id
        if entry is None or entry.boot_id != claim.boot_id:
            self._search.asked(now_s)
        return own

    def _refusal(self, claim: Claim, now_s: float) -> str:
        entry = self.view.get(claim.node_id)
        if entry is not None and entry.boot_id == claim.boot_id:
            if entry.replaced_by:
                return f"{claim.node_id} was replaced by {entry.replaced_by}"
        elif entry is not None and not entry.replaced_by and self._alive(entry, claim, now_s):
            return (
                f"{claim.node_id} is held by another agent at {entry.address}, which is alive; "
                "give this one a node id of its own, or stop the other one"
            )
        replaced = self.view.get(claim.replaces)
        if replaced is None or replaced.replaced_by == claim.node_id:
            return ""
        if replaced.replaced_by:
            return f"{claim.replaces} was replaced by {replaced.replaced_by} already"
        if self._alive(replaced, claim, now_s):
            return (
                f"{claim.replaces}, which {claim.node_id} shall replace, is alive at "
                f"{replaced.address}; stop it first"
            )
        return ""

    def _alive(self, entry: Entry, claim: Claim, now_s: float) -> bool:
        if entry.node_id == claim.node_id and entry.address == claim.address:
            # Two processes cannot listen at one address: the older one is most likely gone.
            if entry.node_id == self.rules.node_id:
                return True
            return self._liveness.silence_s(entry.node_id, now_s) < 2 * self.rules.heartbeat_s
        return self._liveness.alive(entry.node_id, now_s)

    def _grant(self, claim: Claim, now_s: float) -> None:
        # More than the claimant knows of, too, or it could not see that it has the place.
        since = max(self.epoch, claim.view.epoch) + 1
        entries = list[Entry]()
        entry, replaced = self.view.get(claim.node_id), self.view.get(claim.replaces)
        shown = claim.view.get(claim.node_id)
        if entry is None or entry.boot_id != claim.boot_id or (shown is not None and shown > entry):
            entries.append(
                Entry(
                    claim.node_id,
                    since,
                    claim.boot_id,
                    address=claim.address,
                    labels=claim.labels,
                )
            )
        if replaced is not None and not replaced.replaced_by:
            entries.append(replace(replaced, since_epoch=since, replaced_by=claim.node_id))
        self._changed(self.view.merge(View(entries)), now_s)
        self._liveness.heard(claim.node_id, now_s)

    def due(self, now_s: float) -> Contacts:
        """What to send now. To be asked several times a heartbeat."""
        if self._due_s is not None and now_s - self._due_s > self.rules.suspect_after_s / 2:
            # We did not run ourselves: others may have spoken, and nobody is late by our clock.
            self._liveness.woke(now_s)
        self._due_s = now_s
        if self.expelled:
            return ()
        if not self.joined and self._may_lead:
            addresses = None if self._unlisted else self._targets()
            if self._search.in_vain(addresses, now_s):
                self._found()
        if not self.joined:
            return self._claims(self._targets(), now_s, self.rules.suspect_after_s)
        self._advance(now_s)
        strangers = self._claims(self._strangers(), now_s, _RARELY * self.rules.suspect_after_s)
        return (*self._reports(now_s), *self._probes(now_s), *strangers)

    def _reports(self, now_s: float) -> Contacts:
        entry = self.view.get(self._liveness.coordinator)
        if entry is None or entry.node_id == self.rules.node_id or now_s < self._report_s:
            return ()
        self._report_s = now_s + self.rules.heartbeat_s
        return (Contact(Message.REPORT, entry.node_id, entry.address),)

    def _probes(self, now_s: float) -> Contacts:
        """Reports to those whom this agent itself takes for lost, the smallest ids first.

        One of them may coordinate again; and if it is this agent that the others have given up,
        their answers are how it finds out. Those that were replaced find out by it, too.
        """
        silent = self._liveness.silent()
        if not silent and not self._probing:
            return ()
        schedules = self._probing = {
            node_id: self._probing.get(node_id) or _Schedule(self.rules.suspect_after_s)
            for node_id in silent
        }
        contacts = list[Contact]()
        for entry in (self.view.get(node_id) for node_id in silent):
            if len(contacts) == CONTACTS_AT_ONCE:
                break
            if entry is None or now_s < schedules[entry.node_id].next_s:
                continue
            smaller = entry.node_id < self._liveness.coordinator and not entry.replaced_by
            longest_s = (1 if smaller else _RARELY) * self.rules.suspect_after_s
            schedules[entry.node_id].take(now_s, longest_s)
            contacts.append(Contact(Message.PROBE, entry.node_id, entry.address))
        return tuple(contacts)

    def _targets(self) -> Mapping[str, str]:
        """Addresses at which an agent without a place claims one, with node ids where known."""
        known = {
            entry.address: entry.node_id
            for entry in self.view.members()
            if entry.address != self.rules.address
        }
        return {address: node_id for node_id, address in self._seeds} | known

    def _strangers(self) -> Mapping[str, str]:
        """Agents that should be there and are not in the view."""
        if self._strange is None:
            own, known = self.rules.node_id, {entry.address for entry in self.view} | self._met
            self._strange = {
                address: node_id
                for node_id, address in self._seeds
                if address not in known and (node_id == own or node_id not in self.view)
            }
        return self._strange

    def _claims(self, targets: Mapping[str, str], now_s: float, longest_s: float) -> Contacts:
        if not targets:
            return ()
        first_s, known = self.rules.heartbeat_s, self._schedules
        schedules = {each: known.setdefault(each, _Schedule(first_s)) for each in targets}
        ripe = sorted(
            (schedule.next_s, targets[address], address)
            for address, schedule in schedules.items()
            if now_s >= schedule.next_s
        )[:CONTACTS_AT_ONCE]
        for _, _, address in ripe:
            schedules[address].take(now_s, longest_s)
        return tuple(Contact(Message.CLAIM, node_id, address) for _, node_id, address in ripe)

    def claim_answered(self, contact: Contact, answer: ClaimAnswer, now_s: float) -> None:
        """A claim that `due` asked for was answered. One that was not needs no word."""
        self.learned(answer.view, now_s)
        if self.joined:
            if answer.coordinator and not answer.refusal and answer.joined:
                self._met.add(contact.address)
                self._strange = None
            return
        schedule = self._schedules.setdefault(contact.address, _Schedule(0.0))
        schedule.wait_s = self.rules.heartbeat_s
        if answer.refusal:
            self.refusal = answer.refusal
            self.expelled |= self._search.refused(now_s)
        if answer.coordinator == self.rules.node_id:
            self._search.waits(contact.address, now_s)
            return
        self._search.answered(contact.address, now_s)
        named = answer.view.get(answer.coordinator)
        if named is not None and named.address != contact.address:
            other = self._schedules.setdefault(named.address, _Schedule(self.rules.heartbeat_s))
            other.soon(self.rules.heartbeat_s / 2)

    @property
    def _replaces(self) -> str:
        """Whose place it asks for; empty once it had one of its own."""
        return "" if self.joined or self.fenced_by else self.rules.replaces

    @property
    def _may_lead(self) -> bool:
        """Whether those that have no place either may wait for this agent to found a cluster."""
        return not self.expelled and not self._replaces
