"""A simulated trainer process: attach, restore, train, copy unit by unit, seal, abandon.

Follows `client.session` and `client.client`: which calls are retried, what is told to the agent
and what is not, how many captures a process has under way at most, and that they are sealed in
order, as a rule. Each process is several generators, its main thread and its captures, resumed at
random moments; the session's thread is `Process.reattach`.
"""

import random
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from everstep.agent import events
from everstep.agent.actions import Place
from everstep.agent.recovery import Wanted
from everstep.proto.errors import (
    AgentUnavailable,
    ArenaLost,
    DeadlineExceeded,
    EverstepError,
    Refused,
    Retryable,
    StaleIncarnation,
)
from everstep.proto.ids import SnapshotId
from everstep.snapshot.samples import GROUP_OF_ALL, Group, encode

from .agent import Decision
from .files import JOB, ArenaModel, Body, MemoryFiles, Token
from .promises import Promises, insist

Thread = Generator["Call | None", None, Any]


class Ended(Exception):
    """The process ends by itself."""


class Call:
    """One call on its way to the agent."""

    __slots__ = ("error", "kind", "perform", "reply", "settled", "stuck_until")

    def __init__(self, kind: str, perform: Callable[[], Any]) -> None:
        self.kind = kind
        self.perform = perform
        self.reply: Any = None
        self.error: EverstepError | None = None
        self.settled = False
        """Whether its caller still waits for it; it may arrive all the same."""
        self.stuck_until = 0

    def __repr__(self) -> str:
        return self.kind

    def fail(self, error: EverstepError) -> None:
        """End the caller's wait."""
        self.error = error
        self.settled = True


@dataclass(frozen=True, slots=True)
class Habits:
    """What trainers of one simulation do now and then."""

    tears: float = 0.0
    drifts: float = 0.0
    grows: float = 0.0
    gives_up_seal: float = 0.0
    gives_up_restore: float = 0.0

    @classmethod
    def chosen(cls, chance: random.Random) -> "Habits":
        """Those of one simulation."""
        return cls(
            tears=chance.choice((0.0, 0.05, 0.2)),
            drifts=chance.choice((0.0, 0.02, 0.2)),
            grows=chance.choice((0.0, 0.03, 0.1)),
            gives_up_seal=chance.choice((0.0, 0.3)),
            gives_up_restore=chance.choice((0.0, 0.5)),
        )


@dataclass(slots=True)
class Copy:
    """A capture under way."""

    in_flight: events.InFlight
    thread: Thread

    @property
    def name(self) -> str:
        """As `Process.runnable` has it."""
        return f"copy {self.in_flight.step}"


class Surroundings(Protocol):
    """What a process sees of the simulation."""

    chance: random.Random
    habits: Habits
    memory: MemoryFiles
    promises: Promises
    slots: int
    captures: int

    def send(self, call: Call) -> None: ...
    def submit(self, event: events.Event) -> Any: ...
    def ask_restore(self, incarnation: int, wanted: Wanted) -> Any: ...
    def reserve(self, caller: events.Caller, units: int) -> ArenaModel | None: ...
    def holder_alive(self, rank: int, process_id: str, pid: int) -> bool: ...
    def arena_locked(self, process: "Process") -> bool: ...
    def members(self) -> set[int]: ...
    def may_step(self, process: "Process") -> bool: ...
    def durable_unit(self, snapshot: SnapshotId, rank: int, unit: int) -> Any: ...
    def present_incarnation(self) -> int | None: ...


class Process:
    """One trainer process."""

    def __init__(
        self, around: Surroundings, rank: int, world: int, launch_id: str, pid: int, units: int
    ) -> None:
        self.around = around
        self.rank = rank
        self.world = world
        self.launch_id = launch_id
        self.pid = pid
        self.units = units
        self.renewals = 0
        self.incarnation = 0
        self.alive = True
        self.attached = False
        self.ended = False
        self.used = False
        self.ready = False
        """Training: past its restore."""
        self.rewinds: Wanted | None = None
        self.step = 0
        self.arena: ArenaModel | None = None
        """The arena that is mapped; it may be unlinked by now."""
        self.declared = False
        self.copies: list[Copy] = []
        """Oldest first."""
        self.reading: tuple[int, Place] | None = None
        self.main: Thread = self._live()
        self.waits: dict[str, Call | None] = {}

    @property
    def process_id(self) -> str:
        return f"p{self.pid}.{self.renewals}"

    @property
    def caller(self) -> events.Caller:
        return events.Caller(JOB, self.rank, self.world, self.process_id, self.incarnation)

    def __repr__(self) -> str:
        return f"{self.process_id}(rank {self.rank}, incarnation {self.incarnation})"

    def runnable(self) -> list[str]:
        """Its threads that can be resumed now."""
        if not self.alive:
            return []
        found = []
        for name in ("main", *(copy.name for copy in self.copies)):
            call = self.waits.get(name)
            if call is None or call.settled:
                found.append(name)
        return found

    def resume(self, name: str) -> None:
        """Let a thread run to its next pause."""
        threads = {"main": self.main} | {copy.name: copy.thread for copy in self.copies}
        self.waits[name] = None
        try:
            self.waits[name] = next(threads[name])
        except StopIteration:
            del self.waits[name]
            self.copies = [copy for copy in self.copies if copy.name != name]
        except Ended:
            self.alive = False

    def reattach(self) -> None:
        """The session's thread: attach, now that the agent is there."""
        in_flight = self._in_flight() if self.incarnation else ()
        claimed = self.around.holder_alive(self.rank, self.process_id, self.pid)
        try:
            incarnation = self.around.submit(
                events.Attach(
                    caller=self.caller,
                    launch_id=self.launch_id,
                    pid=self.pid,
                    pid_started_s=float(self.pid),
                    holder_alive=claimed,
                    in_flight=in_flight,
                )
            )
        except Refused as error:
            if isinstance(error, StaleIncarnation) and not self.used:
                self.incarnation = 0
            else:
                self.ended = True
            return
        insist(not claimed, f"{self} has taken the rank of a living process")
        self.around.promises.attached(incarnation, self, self.around.members())
        self.incarnation = incarnation
        self.attached = True

    def _in_flight(self) -> tuple[events.InFlight, ...]:
        return tuple(copy.in_flight for copy in self.copies)

    def _call(self, kind: str, perform: Callable[[], Any]) -> Thread:
        call = Call(kind, perform)
        self.around.send(call)
        while not call.settled:
            yield call
        if call.error is not None:
            raise call.error
        return call.reply

    def _submit(self, event: events.Event) -> Thread:
        return self._call(type(event).__name__, lambda: self.around.submit(event))

    def _wait_attached(self) -> Thread:
        while not self.attached:
            if self.ended:
                raise Ended
            yield None

    def _live(self) -> Thread:
        yield from self._wait_attached()
        yield from self._restore(Wanted())
        self.ready = True
        while True:
            yield None
            if self.rewinds is not None and not self.copies:
                yield from self._rewind(self.rewinds)
            elif self.around.may_step(self):
                self.step += 1
                if len(self.copies) < self.around.captures:
                    yield from self._snapshot()

    def _rewind(self, wanted: Wanted) -> Thread:
        self.rewinds = None
        with suppress(EverstepError):
            yield from self._submit(events.Detach(self.caller))
        self.ready = False
        self.arena = None
        self.declared = False
        self.incarnation = 0
        self.renewals += 1
        self.used = False
        self.attached = False
        yield from self._wait_attached()
        yield from self._restore(wanted)
        self.ready = True

    def _restore(self, wanted: Wanted) -> Thread:
        while True:
            yield from self._wait_attached()
            mine = self.incarnation

            def ask(incarnation: int = mine) -> Any:
                answer = self.around.ask_restore(incarnation, wanted)
                if isinstance(answer, Exception):
                    raise answer
                return answer

            try:
                decision = yield from self._call("Restore", ask)
                break
            except StaleIncarnation:
                if self.used:
                    raise Ended from None
                self.incarnation = 0
                self.attached = False
            except DeadlineExceeded:
                raise Ended from None
            except Retryable:
                continue
            except EverstepError as error:
                # All is rotten: some users start from scratch.
                if isinstance(error, Refused):
                    raise Ended from None
                if self.around.chance.random() < self.around.habits.gives_up_restore:
                    raise Ended from None
                self.used = True
                return
        self.used = True
        self.around.promises.restored(mine, decision.snapshot, wanted.to_step, wanted.levels)
        if decision.snapshot is not None:
            yield from self._load(decision)
            self.step = decision.snapshot.step

    def _load(self, decision: Decision) -> Thread:
        snapshot = decision.snapshot
        assert snapshot is not None
        for shard in decision.shards:
            for unit in range(shard.units):
                if shard.place is not None:
                    self.reading = (shard.rank, shard.place)
                yield None
                if shard.place is not None:
                    content = self.around.memory.slot(shard.rank, shard.place)
                    seen = content[unit] if content is not None else None
                else:
                    seen = self.around.durable_unit(snapshot, shard.rank, unit)
                self._check_read(snapshot, shard.rank, unit, seen)
        self.reading = None

    def _check_read(self, snapshot: SnapshotId, rank: int, unit: int, seen: Any) -> None:
        wanted = (snapshot.incarnation, snapshot.step, rank, unit)
        if seen == wanted:
            return
        present = self.around.present_incarnation()
        gone = seen is None and snapshot in self.around.promises.rotten
        if present is not None and present == self.incarnation and not gone:
            self.around.promises.check_unit(seen, wanted, f"restore by {self}")
        # Rotten, or of an ended incarnation: the digest does not match, and the trainer ends.
        raise Ended

    def _snapshot(self) -> Thread:
        chance = self.around.chance
        if not self.attached:
            return
        try:
            if self.declared and chance.random() < self.around.habits.grows:
                self.units += 1
                self.declared = False
            if not self.declared:
                yield from self._declare()
            captures, in_flight = self.around.captures, self._in_flight()
            place = yield from self._submit(
                events.Offer(
                    self.caller, self.step, captures_in_flight=captures, in_flight=in_flight
                )
            )
        except ArenaLost:
            yield from self._settle()
            self.arena = None
            self.declared = False
            return
        except EverstepError:
            return
        snapshot = SnapshotId(self.incarnation, self.step)
        if not isinstance(place, Place):
            self.around.promises.refused.add((snapshot, self.rank))
            return
        self.used = True
        assert self.arena is not None
        present = self.around.memory.arena_files.get((self.rank, place.generation))
        if present is not self.arena:
            yield from self._settle()
            self.arena = None
            self.declared = False
            yield from self._abandon(self.step, "another arena")
            return
        thread = self._copy(snapshot, place, self.arena.slots[place.slot], self.units)
        self.copies.append(Copy(events.InFlight(self.step, place), thread))

    def _settle(self) -> Thread:
        """The arena is given up only when nothing is copied into it any more."""
        while self.copies:
            yield None

    def _declare(self) -> Thread:
        yield from self._settle()
        caller = self.caller
        self.arena = yield from self._call(
            "Declare", lambda: self.around.reserve(caller, self.units)
        )
        while self.around.arena_locked(self):
            yield None
        self.declared = True

    def _copy(self, snapshot: SnapshotId, place: Place, slot: list[Token], units: int) -> Thread:
        for unit in range(units):
            yield None
            slot[unit] = (snapshot.incarnation, snapshot.step, self.rank, unit)
        yield None
        chance = self.around.chance
        if chance.random() < self.around.habits.tears:
            yield from self._abandon(snapshot.step, "torn")
            return
        while self.copies[0].in_flight.step != snapshot.step and chance.random() > 0.02:
            yield None
        yield from self._seal(snapshot, place, units)

    def _seal(self, snapshot: SnapshotId, place: Place, units: int) -> Thread:
        drift = self.around.chance.random() < self.around.habits.drifts
        own = b"%08d" % self.rank if drift else b"2" * 8
        samples = encode([Group(GROUP_OF_ALL, b"planplan", b"1" * 8 + own)])
        body = Body(
            snapshot.incarnation, snapshot.step, self.rank, self.world, "L", units, samples, 1.0
        )
        event = events.Seal(
            caller=self.caller,
            step=snapshot.step,
            place=place,
            layout_id="L",
            image_bytes=units,
            replica_samples=samples,
            captured_unix_s=1.0,
            envelope=self.around.memory.seal(body),
        )
        while True:
            try:
                yield from self._submit(event)
                return
            except Retryable:
                if self.ended or self.around.chance.random() < self.around.habits.gives_up_seal:
                    return
                while not self.attached and not self.ended:
                    yield None
            except EverstepError:
                return

    def _abandon(self, step: int, reason: str) -> Thread:
        try:
            yield from self._submit(events.Abandon(self.caller, step, reason))
        except EverstepError:
            return


NO_AGENT = AgentUnavailable("unix:/nowhere", "it is dead")
TOO_LATE = AgentUnavailable("unix:/nowhere", "deadline exceeded")
