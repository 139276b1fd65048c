"""A seeded world of agents that have nothing but `Members`: clock, network, processes."""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from everstep.agent.members import Contact, MemberRules, Members, Message
from everstep.proto.errors import StaleEpoch

TICK_S = 0.25


@dataclass(eq=False)
class Process:
    """One agent process."""

    members: Members
    stopped: bool = False
    epoch: int = 0

    @property
    def boot(self) -> tuple[str, str]:
        return self.members.rules.node_id, self.members.rules.boot_id


@dataclass
class World:
    """Processes at addresses, and a network between the addresses that is as bad as told."""

    random: random.Random
    seeds: tuple[tuple[str, str], ...]
    now_s: float = 0.0
    loss: float = 0.0
    delay_s: float = 0.05
    at: dict[str, Process] = field(default_factory=dict)
    side: dict[str, int] = field(default_factory=dict)
    _queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: "itertools.count[int]" = field(default_factory=itertools.count)

    def start(self, node_id: str, address: str, replaces: str = "") -> Process:
        """A new process listens at the address; whatever was there is gone."""
        rules = MemberRules(
            node_id=node_id,
            boot_id=f"{self.random.getrandbits(64):016x}",
            address=address,
            replaces=replaces,
        )
        process = self.at[address] = Process(Members(rules, self.seeds))
        self.later(self.random.uniform(0, TICK_S), lambda: self._tick(process))
        return process

    def list_also(self, address: str) -> None:
        """An operator adds an address to the list that all agents read."""
        self.seeds = (*self.seeds, ("", address))
        for process in self.at.values():
            process.members.seek(self.seeds)

    def later(self, delay_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._count), what))

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self._queue and self._queue[0][0] <= end_s:
            self.now_s, _, what = heapq.heappop(self._queue)
            what()
        self.now_s = end_s

    def alive(self) -> list[Process]:
        return [process for process in self.at.values() if not process.stopped]

    def _tick(self, process: Process) -> None:
        members = process.members
        if self.at.get(members.rules.address) is not process:
            return
        if not process.stopped:
            assert members.epoch >= process.epoch, "the epoch fell"
            process.epoch = members.epoch
            for contact in members.due(self.now_s):
                self._send(process, contact)
        self.later(TICK_S, lambda: self._tick(process))

    def _travel(self, source: str, target: str, what: Callable[[], None]) -> None:
        for _ in range(2 if self.random.random() < self.loss / 2 else 1):
            if self.random.random() < self.loss:
                continue
            if self.side.get(source, 0) != self.side.get(target, 0):
                continue
            self.later(self.random.uniform(0, 2 * self.delay_s), what)

    def _send(self, source: Process, contact: Contact) -> None:
        sender = source.members
        claim, view = sender.claim(), sender.view
        origin = sender.rules.address

        def arrive() -> None:
            target = self.at.get(contact.address)
            if target is None:
                return
            if target.stopped:  # it reads what came when it runs again
                self.later(TICK_S, arrive)
                return
            receiver = target.members
            if contact.message is Message.CLAIM:
                answer = receiver.claimed(claim, self.now_s)
                self._travel(
                    contact.address,
                    origin,
                    lambda: self._back(
                        source,
                        lambda: sender.claim_answered(contact, answer, self.now_s),
                    ),
                )
                return
            receiver.learned(view, self.now_s)
            refused = not receiver.joined  # whoever has no place does not answer for it
            try:
                receiver.heard(*source.boot, view.epoch, self.now_s, report=True)
            except StaleEpoch:
                refused = True
            boot, shown = target.boot, receiver.view
            coordinator = receiver.coordinator(self.now_s)
            suspected = receiver.suspected(self.now_s)

            def answered() -> None:
                sender.learned(shown, self.now_s)
                if refused:
                    return
                try:
                    sender.heard(*boot, shown.epoch, self.now_s)
                except StaleEpoch:
                    return
                sender.answered(coordinator, suspected, shown, self.now_s)

            self._travel(contact.address, origin, lambda: self._back(source, answered))

        self._travel(origin, contact.address, arrive)

    def _back(self, process: Process, what: Callable[[], None]) -> None:
        if self.at.get(process.members.rules.address) is process and not process.stopped:
            what()


def world(seed: int, count: int) -> World:
    """A world whose agents n1.. know each other by a static list."""
    return World(random.Random(seed), tuple((f"n{i}", f"h{i}:1") for i in range(1, count + 1)))


def check_converged(world: World) -> None:
    """Once a network has been whole for a while."""
    takers = [p for p in world.alive() if not p.members.expelled]
    assert takers
    views = {p.members.view for p in takers}
    assert len(views) == 1, views
    ids = [p.members.rules.node_id for p in takers]
    assert len(set(ids)) == len(ids), f"two unfenced boots: {ids}"
    for process in takers:
        entry = process.members.view.get(process.members.rules.node_id)
        assert entry is not None and entry.boot_id == process.members.rules.boot_id
        assert process.members.joined and not process.members.fenced_by
        assert process.members.live(world.now_s) == tuple(sorted(ids)), process.boot
    coordinators = {p.members.coordinator(world.now_s) for p in takers}
    assert coordinators == {min(ids)}
    (first,) = (p for p in takers if p.members.rules.node_id == min(ids))
    assert first.members.ready(world.now_s), first.members.waiting_for(world.now_s)
