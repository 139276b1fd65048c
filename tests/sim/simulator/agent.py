"""The simulated agent: `State`, and a pipeline that performs its actions on the model files.

Owns the process that can die between any two actions, and its longer tasks (flush, check,
restore, reserve), each a generator that is resumed at random moments. What it does follows
`agent.pipeline`, `agent.recovery` and `agent.server` step by step.
"""

import random
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from everstep.agent import actions, events
from everstep.agent.adoption import adoptions
from everstep.agent.job import Job, Stage
from everstep.agent.pipeline import membership_of
from everstep.agent.recovery import Wanted, candidates
from everstep.agent.state import Rules, State
from everstep.proto.envelope import seal
from everstep.proto.errors import (
    ArenaLost,
    FormatInvalid,
    NothingRecoverable,
    OutOfSpace,
    Refused,
    StaleIncarnation,
)
from everstep.proto.ids import SnapshotId
from everstep.storage.retention import Rule, expired

from .files import JOB, ArenaModel, Held, MemoryFiles, NvmeFiles, Token, tokens
from .promises import Promises

Task = Generator[None, None, None]


class AgentDied(Exception):
    """The agent was killed in the middle of what it was doing."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a rank's checked copy lies."""

    rank: int
    level: str
    place: actions.Place | None
    units: int


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to Restore."""

    snapshot: SnapshotId | None
    shards: tuple[Located, ...] = ()


@dataclass(slots=True)
class Faults:
    """How likely each kind of trouble is; zero in calm times."""

    flush_fails: float = 0.0
    record_fails: float = 0.0

    @classmethod
    def chosen(cls, chance: random.Random) -> "Faults":
        """Those of one simulation."""
        return cls(
            flush_fails=chance.choice((0.0, 0.15, 0.4)),
            record_fails=chance.choice((0.0, 0.01, 0.05)),
        )


class Agent:
    """One agent, from start to death."""

    def __init__(
        self,
        memory: MemoryFiles,
        nvme: NvmeFiles,
        promises: Promises,
        rules: Rules,
        keep: Rule,
        faults: Faults,
        chance: random.Random,
    ) -> None:
        self.memory = memory
        self.nvme = nvme
        self.promises = promises
        self.rules = rules
        self.keep = keep
        self.faults = faults
        self.chance = chance
        self.state: State | None = None
        self.tasks: list[Task] = []
        self.decisions: dict[int, Decision | Exception] = {}
        self.asked: dict[int, Wanted] = {}
        self.now_s = 0.0
        self.dies_in_actions: int | None = None
        self.trace: Callable[[str], None] = lambda line: None
        self._performers: dict[type, Callable[[Any], None]] = {
            actions.DropRecord: self._drop_record,
            actions.PublishRecord: self._publish_record,
            actions.WriteMembership: self._write_membership,
            actions.ReleaseArena: self._release_arena,
            actions.NotifyCommitted: self._notify_committed,
            actions.NotifyDropped: lambda action: self.promises.told_dropped(action.snapshot),
            actions.Flush: lambda action: self.tasks.append(self._flush(action)),
            actions.VerifyAdopted: lambda action: self.tasks.append(self._verify(action)),
            actions.DeleteDurable: lambda action: self.tasks.append(self._delete(action)),
        }

    @property
    def job(self) -> Job | None:
        return self.state.jobs.get(JOB) if self.state is not None else None

    def start(self) -> None:
        """Start, and adopt what the last one left."""
        self.state = State(self.rules, lambda known: expired(known, self.keep, set()))
        memory: Any = self.memory
        nvme: Any = self.nvme
        for event in list(adoptions(memory, nvme)):
            self.submit(event)

    def die(self) -> None:
        """Lose everything but the files."""
        self.state = None
        self.tasks.clear()
        self.decisions.clear()
        self.asked.clear()
        self.promises.reading.clear()
        self.promises.dropped.clear()
        self.dies_in_actions = None

    def submit(self, event: events.Event) -> Any:
        """As `Pipeline.submit`."""
        assert self.state is not None
        self.trace(f"  event {event}")
        outcome = self.state.handle(event, self.now_s)
        for action in outcome.actions:
            if self.dies_in_actions is not None:
                if self.dies_in_actions == 0:
                    self.trace(f"  the agent dies before {action}")
                    raise AgentDied
                self.dies_in_actions -= 1
            self.trace(f"  action {action}")
            self._performers[type(action)](action)
        return outcome.reply

    def advance(self, index: int) -> None:
        """Resume one of the tasks."""
        task = self.tasks[index]
        try:
            next(task)
        except StopIteration:
            self.tasks.remove(task)

    def _drop_record(self, action: actions.DropRecord) -> None:
        self.memory.held.pop((action.rank, action.place), None)

    def _publish_record(self, action: actions.PublishRecord) -> None:
        if self.chance.random() < self.faults.record_fails:
            raise OutOfSpace("tmpfs", 1, 0)
        place = action.place
        if self.memory.slot(action.rank, place) is None:
            raise FormatInvalid("a record", "has no arena")
        body = self.memory.bodies[action.envelope]
        self.memory.held[action.rank, place] = Held(
            action.rank, place.generation, place.slot, action.envelope, body
        )
        self.submit(events.Recorded(JOB, action.snapshot, action.rank))

    def _write_membership(self, action: actions.WriteMembership) -> None:
        assert self.job is not None
        body = membership_of(self.job).SerializeToString(deterministic=True)
        self.memory.membership_data = seal("membership", body)

    def _release_arena(self, action: actions.ReleaseArena) -> None:
        self.memory.release(action.rank, action.generation)

    def _notify_committed(self, action: actions.NotifyCommitted) -> None:
        assert self.job is not None
        known = self.job.snapshots.get(action.snapshot)
        self.promises.committed(action.snapshot, action.level, known.world if known else 0)

    def _read(
        self, rank: int, place: actions.Place, wanted: list[Token], who: str
    ) -> Generator[None, None, list[Token] | None]:
        """Read a slot unit by unit; None if it has rotted."""
        reading = self.promises.reading
        reading[rank, place] += 1
        found = []
        for unit, token in enumerate(wanted):
            yield
            content = self.memory.slot(rank, place)
            if content is None:
                break
            if not self.promises.check_unit(content[unit], token, who):
                break
            found.append(content[unit])
        reading[rank, place] -= 1
        return found if len(found) == len(wanted) else None

    def _flush(self, action: actions.Flush) -> Task:
        assert self.job is not None
        snapshot = self.job.snapshots[action.snapshot]
        shards = {}
        problem = ""
        for rank, shard in sorted(snapshot.sealed.items()):
            wanted = tokens(snapshot.id, rank, shard.image_bytes)
            content = yield from self._read(rank, shard.place, wanted, f"flush of {snapshot.id}")
            if content is None or self.chance.random() < self.faults.flush_fails:
                problem = "it failed"
                break
            shards[rank] = content
        if not problem:
            self.nvme.commit(snapshot.id, shards)
            yield
        self.submit(events.FlushEnded(JOB, snapshot.id, problem))

    def _verify(self, action: actions.VerifyAdopted) -> Task:
        assert self.job is not None
        snapshot = self.job.snapshots[action.snapshot]
        damaged = ""
        for rank, shard in sorted(snapshot.sealed.items()):
            wanted = tokens(snapshot.id, rank, shard.image_bytes)
            who = f"check of adopted {snapshot.id}"
            if (yield from self._read(rank, shard.place, wanted, who)) is None:
                damaged = "it has rotted"
                break
        self.submit(events.AdoptedVerified(JOB, snapshot.id, damaged))

    def _delete(self, action: actions.DeleteDurable) -> Task:
        yield
        self.nvme.delete(action.snapshot)

    def scrub(self, snapshot_id: SnapshotId) -> Task:
        """Check a committed snapshot, and report what has rotted."""
        if not self.submit(events.Pin(JOB, snapshot_id)):
            return
        assert self.job is not None
        snapshot = self.job.snapshots[snapshot_id]
        for rank, shard in sorted(snapshot.sealed.items()):
            wanted = tokens(snapshot_id, rank, shard.image_bytes)
            if (
                yield from self._read(rank, shard.place, wanted, f"scrub of {snapshot_id}")
            ) is None:
                self.submit(events.Damaged(JOB, snapshot_id, "it has rotted"))
                break
        self.submit(events.Unpin(JOB, snapshot_id))

    def ask_restore(self, incarnation: int, wanted: Wanted) -> Decision | Exception | None:
        """What an incarnation restores: the answer, or None while it is being looked for."""
        job = self.job
        if job is None or job.incarnation != incarnation:
            return StaleIncarnation(JOB, incarnation, job.incarnation if job else 0)
        if job.resumed and job.world > 1:
            return Refused("other ranks may have restored already")
        for ended in [known for known in self.decisions if known != incarnation]:
            del self.decisions[ended], self.asked[ended]
        answer = self.decisions.get(incarnation)
        if isinstance(answer, Exception):
            # The next to ask searches again.
            del self.decisions[incarnation], self.asked[incarnation]
        elif incarnation in self.asked and self.asked[incarnation] != wanted:
            return Refused("asked otherwise before")
        if answer is None and incarnation not in self.asked:
            self.asked[incarnation] = wanted
            self.tasks.append(self._search(job, incarnation, wanted))
        return answer

    def _search(self, job: Job, incarnation: int, wanted: Wanted) -> Task:
        decision: Decision | Exception = Decision(None)
        try:
            found = candidates(job, wanted)
        except Refused as error:
            self.decisions[incarnation] = error
            return
        for snapshot in found:
            held = job.snapshots.get(snapshot)
            world = held.world if held is not None else job.durable.get(snapshot, job.world)
            pinned = self.submit(events.Pin(JOB, snapshot))
            shards = yield from self._locate(job, snapshot, world)
            if pinned:
                self.submit(events.Unpin(JOB, snapshot))
            if shards is not None:
                decision = Decision(snapshot, shards)
                break
        else:
            if found or job.damaged or job.problems or wanted.to_step is not None:
                decision = NothingRecoverable(JOB, ())
        self.decisions[incarnation] = decision
        if isinstance(decision, Decision):
            if job.incarnation == incarnation:
                free = wanted.to_step is None and not wanted.levels
                self.promises.decision(incarnation, decision.snapshot, free=free)
            self.submit(events.RestoreDecided(JOB, incarnation, decision.snapshot))

    def _locate(
        self, job: Job, snapshot_id: SnapshotId, world: int
    ) -> Generator[None, None, tuple[Located, ...] | None]:
        found = []
        for rank in range(world):
            located = yield from self._from_memory(job, snapshot_id, rank)
            if located is None:
                durable = self.nvme.get(snapshot_id) if snapshot_id in job.durable else None
                if durable is None:
                    return None
                located = Located(rank, "nvme", None, len(durable.shards[rank]))
            found.append(located)
        return tuple(found)

    def _from_memory(
        self, job: Job, snapshot_id: SnapshotId, rank: int
    ) -> Generator[None, None, Located | None]:
        snapshot = job.snapshots.get(snapshot_id)
        if snapshot is None or snapshot.stage is not Stage.COMMITTED:
            return None
        shard = snapshot.sealed[rank]
        wanted = tokens(snapshot_id, rank, shard.image_bytes)
        content = yield from self._read(rank, shard.place, wanted, f"search of {snapshot_id}")
        if content is None:
            self.submit(events.Damaged(JOB, snapshot_id, "it has rotted"))
            return None
        return Located(rank, "memory", shard.place, shard.image_bytes)

    def check_arena(self, rank: int) -> None:
        """As `Pipeline.check_arena`."""
        present = self.job.arenas.get(rank) if self.job is not None else None
        if not present:
            return
        files = self.memory.arena_files
        gone = [arena.generation for arena in present if (rank, arena.generation) not in files]
        lost = present[-1].generation in gone
        for generation in gone:
            self.submit(events.ArenaGone(JOB, rank, generation))
        if lost:
            raise ArenaLost(JOB, rank)

    def reserve(self, caller: events.Caller, units: int, slots: int) -> ArenaModel | Task:
        """A rank's arena, or the task that reserves a larger one."""
        assert self.state is not None
        self.state.check(caller)
        with suppress(ArenaLost):
            self.check_arena(caller.rank)
        job = self.job
        assert job is not None
        present = job.arenas.get(caller.rank, [])
        if present and present[-1].slot_bytes >= units and present[-1].slot_count == slots:
            return self.memory.arena_files[caller.rank, present[-1].generation]
        return self._reserve(caller.rank, job.next_generation(caller.rank), slots, units)

    def _reserve(self, rank: int, generation: int, slots: int, units: int) -> Task:
        yield
        arena = self.memory.reserve(rank, generation, slots, units)
        if (arena.slot_bytes, arena.slot_count) != (units, slots):
            return
        yield
        self.submit(events.ArenaReserved(JOB, rank, generation, units, slots))
