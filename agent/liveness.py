"""Who coordinates, and which members count as lost.

Owns the clock of every member that this agent judges. Promises: the coordinator is the smallest
node id that this agent does not take for lost; the coordinator judges all members, the others only
the smaller ids and believe the coordinator about the rest; nobody is judged before he had the time
to be heard; after a stall of this process nobody is late by its clock. Does not change places:
that is in agent/members.py. Pure: time is passed in.
"""

from collections.abc import Collection, Container, Iterable

from everstep.agent.view import View


class Liveness:
    """What one agent thinks of the members of its view."""

    def __init__(self, node_id: str, suspect_after_s: float) -> None:
        self.coordinator = ""
        """Empty while this agent has no place."""
        self._own = node_id
        self._suspect_after_s = suspect_after_s
        self._view = View()
        self._heard_s: dict[str, float] = {}
        self._watched_s: dict[str, float] = {}
        """Since when a member may be expected to be heard."""
        self._awake_s = float("-inf")
        self._silent: set[str] = set()
        """Lost by our own judgement."""
        self._told: frozenset[str] = frozenset()
        """Lost as the coordinator says."""
        self._reported: set[str] = set()
        """Members that reported since this agent coordinates."""
        self._deadline_s = float("-inf")
        """Nobody falls silent before."""
        self._unsure = True
        """The coordinator may be another one."""
        self._known: dict[str, tuple[str, ...]] = {}
        """Answers that hold until something changes."""
        self._waiting: dict[str, None] | None = None
        """Likewise, but for those that reported since."""

    def follow_view(self, view: View, now_s: float) -> None:
        """Another view holds. What an old boot did says nothing about the new one in its place."""
        for entry in view:
            known = self._view.get(entry.node_id)
            if known is None or known.boot_id != entry.boot_id:
                self._silent.discard(entry.node_id)
                self._told -= {entry.node_id}
                self._reported.discard(entry.node_id)
                self._heard_s.pop(entry.node_id, None)
                self._watched_s[entry.node_id] = now_s
        self._view = view
        self._reconsider()

    def leave(self) -> None:
        """This agent has no place any more."""
        self.coordinator = ""
        self._reported.clear()
        self._unsettle()

    def heard(self, node_id: str, now_s: float) -> None:
        """A message of the present holder of a place came."""
        self._heard_s[node_id] = now_s
        if node_id in self._silent:
            self._silent.discard(node_id)
            self._reconsider()

    def reported(self, node_id: str) -> None:
        """The message was a report, and this agent coordinates."""
        self._reported.add(node_id)
        if self._waiting is not None:
            self._waiting.pop(node_id, None)

    def told(self, suspected: Iterable[str]) -> None:
        """The coordinator says who is lost."""
        lost = frozenset(suspected) - {self._own}
        if lost != self._told:
            self._told = lost
            self._unsettle()

    def woke(self, now_s: float) -> None:
        """This process did not run for a while: others may have spoken meanwhile, and acted."""
        self._awake_s = now_s
        self._reported.clear()
        self._unsettle()

    def silent(self) -> tuple[str, ...]:
        """Whom this agent itself takes for lost, and as coordinator who was replaced, ascending."""
        if "silent" not in self._known:
            leads = self.coordinator == self._own
            self._known["silent"] = tuple(
                entry.node_id
                for entry in self._view
                if entry.node_id in self._silent or (leads and entry.replaced_by)
            )
        return self._known["silent"]

    def silence_s(self, node_id: str, now_s: float) -> float:
        """How long a member that this agent judges has been silent while it could be heard."""
        heard_s = self._heard_s.get(node_id, float("-inf"))
        return now_s - max(heard_s, self._watched_s.get(node_id, now_s), self._awake_s)

    def alive(self, node_id: str, now_s: float) -> bool:
        """Whether a member is alive, as far as this agent knows."""
        if node_id == self._own:
            return True
        if self.coordinator not in (self._own, node_id):
            return node_id not in self._silent | self._told
        if node_id in self._silent:
            return False
        return self.silence_s(node_id, now_s) < self._suspect_after_s

    def decider(self, claimant: str) -> str:
        """Who decides on a claim: the coordinator, or who would be if it is its place."""
        if self.coordinator != claimant:
            return self.coordinator
        return self._first({claimant} | self._silent | self._told)

    def _first(self, lost: Container[str]) -> str:
        """The smallest member that is not lost, this agent at the latest."""
        return next(
            entry.node_id
            for entry in self._view.members()
            if entry.node_id == self._own or entry.node_id not in lost
        )

    def advance(self, now_s: float) -> bool:
        """Let time pass for an agent that has a place; true if another one coordinates now."""
        before = self.coordinator
        if before and not self._unsure and now_s < self._deadline_s:
            return False
        while True:
            chosen = (
                self._first(self._silent)
                if self._unsure or not self.coordinator
                else self.coordinator
            )
            self._unsure = False
            if chosen != self.coordinator:
                self._follow(chosen, now_s)
            if chosen == self._own:
                self._judge(now_s)
                return chosen != before
            left_s = self._suspect_after_s - self.silence_s(chosen, now_s)
            if left_s > 0:
                self._deadline_s = now_s + left_s
                return chosen != before
            self._silent.add(chosen)
            self._reconsider()

    def suspected(self) -> tuple[str, ...]:
        """Members that count as lost, ascending."""
        if "suspected" not in self._known:
            lost = (self._silent | (self._told - {self.coordinator})) - {self._own}
            self._known["suspected"] = tuple(
                entry.node_id for entry in self._view.members() if entry.node_id in lost
            )
        return self._known["suspected"]

    def live(self) -> tuple[str, ...]:
        """Members that do not count as lost, ascending; without this one if it has no place."""
        if "live" not in self._known:
            lost = {*self.suspected(), *(() if self.coordinator else (self._own,))}
            self._known["live"] = tuple(
                entry.node_id for entry in self._view.members() if entry.node_id not in lost
            )
        return self._known["live"]

    def waiting_for(self) -> Collection[str]:
        """Live members that have not reported since this agent coordinates, ascending."""
        if self._waiting is None:
            there = self._reported | {self._own}
            self._waiting = dict.fromkeys(n for n in self.live() if n not in there)
        return self._waiting.keys()

    def _unsettle(self) -> None:
        self._known.clear()
        self._waiting = None

    def _reconsider(self) -> None:
        """Something changed: the coordinator may be another one."""
        self._unsettle()
        self._deadline_s = float("-inf")
        self._unsure = True

    def _follow(self, chosen: str, now_s: float) -> None:
        was_own = self.coordinator == self._own
        self.coordinator = chosen
        self._reported.clear()
        self._unsettle()
        self._deadline_s = float("-inf")
        if chosen == self._own:
            # All get the time to find out that this agent coordinates; the lost stay lost.
            self._silent |= self._told
            self._told = frozenset()
            self._watched_s = {entry.node_id: now_s for entry in self._view.members()}
            return
        self._watched_s[chosen] = now_s
        if was_own:
            self._told = frozenset(self._silent)
        self._silent = {node_id for node_id in self._silent if node_id < chosen}

    def _judge(self, now_s: float) -> None:
        # Hearing from a member only moves its own deadline on, so the earliest known is enough.
        if now_s < self._deadline_s:
            return
        self._deadline_s = float("inf")
        for entry in self._view.members():
            node_id = entry.node_id
            if node_id == self._own or node_id in self._silent:
                continue
            left_s = self._suspect_after_s - self.silence_s(node_id, now_s)
            if left_s <= 0:
                self._silent.add(node_id)
                self._reported.discard(node_id)
                self._unsettle()
            else:
                self._deadline_s = min(self._deadline_s, now_s + left_s)
