"""What the agent knows of one job: members, snapshots in memory and on NVMe, slots.

Owns the facts and the rules that need only this job's facts: which snapshots must stay, which may
be evicted, which slot a rank may write. Promises that the newest committed snapshot, one that is
being copied, and one that is pinned are never evicted (P2). Does no I/O and never reads a clock.
"""

from collections.abc import Container
from dataclasses import dataclass, field
from enum import Enum

from everstep.agent.actions import Place
from everstep.agent.agreements import Agreements
from everstep.agent.events import (
    AdoptedShard,
    ArenaReserved,
    Caller,
    Seal,
)
from everstep.agent.plans import ParityPlan
from everstep.proto.ids import SnapshotId
from everstep.snapshot.samples import drifted

REMEMBERED_REFUSALS = 64


class Stage(Enum):
    """How far a snapshot in memory is."""

    OPEN = "open"
    """Granted to at least one rank, not sealed by all."""
    COMMITTED = "committed"
    DROPPED = "dropped"
    """Will never commit; kept only so that late ranks are told why."""


@dataclass(slots=True)
class SealedShard:
    """One rank's shard, complete in its slot."""

    place: Place
    layout_id: str
    image_bytes: int
    replica_samples: bytes
    captured_unix_s: float
    envelope: bytes = field(repr=False)
    record_digest: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, event: Seal | AdoptedShard) -> "SealedShard":
        """The shard that an event tells of."""
        return cls(
            event.place,
            event.layout_id,
            event.image_bytes,
            event.replica_samples,
            event.captured_unix_s,
            event.envelope,
            event.record_digest,
        )


@dataclass(slots=True)
class Snapshot:
    """One step of one incarnation, in memory."""

    id: SnapshotId
    world: int
    stage: Stage = Stage.OPEN
    granted: dict[int, Place] = field(default_factory=dict)
    copying: set[int] = field(default_factory=set)
    """Ranks that were granted a slot and, as far as is known, still write into it."""
    sealing: dict[int, SealedShard] = field(default_factory=dict)
    """Sealed as their trainers say; their records are not known to be visible yet."""
    sealed: dict[int, SealedShard] = field(default_factory=dict)
    pins: int = 0
    verified: bool = True
    """False for an adopted snapshot whose digests have not been checked yet."""
    withdrawn: bool = False
    """Whether its records were dropped."""
    reason: str = ""
    commit_id: bytes = b""
    """See `everstep.agent.events.CommitOrdered`; empty where this agent stands alone."""

    def missing_ranks(self) -> list[int]:
        """The ranks that have not sealed."""
        return [rank for rank in range(self.world) if rank not in self.sealed]

    def drifted_replicas(self) -> tuple[int, ...] | None:
        """Which replicated leaves differ between ranks; None if even their plans do."""
        return drifted(shard.replica_samples for shard in self.sealed.values())


@dataclass(slots=True)
class Member:
    """The process that holds a rank."""

    process_id: str
    pid: int
    pid_started_s: float
    attached: bool = True
    adopted: bool = False
    """Whether it is known from before this agent began, and has not attached to it yet."""
    captures_in_flight: int = 1
    """How many steps it copies at once, at most, as its last offer said."""
    detached: bool = False
    """Whether it has let go of the rank in good order; it may live on."""


@dataclass(slots=True)
class Arena:
    """A rank's reserved memory."""

    generation: int
    slot_count: int
    slot_bytes: int


class RoundStage(Enum):
    """How far this node's part of a parity round is."""

    ENCODING = "encoding"
    PREPARED = "prepared"
    """Whole and published: good for recovery, whatever becomes of the round."""
    COMMITTED = "committed"
    MENDING = "mending"
    """Was one of the two, was found damaged, and is encoded anew."""
    LOST = "lost"
    """Was one of the two, and cannot be encoded anew."""
    FAILED = "failed"


@dataclass(slots=True)
class Round:
    """This node's part of a parity round."""

    plan: ParityPlan
    stage: RoundStage = RoundStage.ENCODING
    problem: str = ""
    on_nvme: bool = False

    @property
    def is_encoding(self) -> bool:
        """Whether it is being encoded, for the first time or anew."""
        return self.stage in (RoundStage.ENCODING, RoundStage.MENDING)


@dataclass(slots=True)
class Job:
    """Everything about one job."""

    name: str
    world: int
    incarnation: int
    launch_id: str = ""
    members: dict[int, Member] = field(default_factory=dict)
    resumed: bool = False
    """Whether this incarnation is known from its trainers alone: the agent's memory was lost."""
    snapshots: dict[SnapshotId, Snapshot] = field(default_factory=dict)
    arenas: dict[int, list[Arena]] = field(default_factory=dict)
    """Per rank, oldest generation first; the last one is written, the others only hold."""
    durable: dict[SnapshotId, int] = field(default_factory=dict)
    """On NVMe, each with its world."""
    damaged: dict[SnapshotId, str] = field(default_factory=dict)
    """What was lost to damage since the last commit, and how: with nothing else left, the job
    must not look like a new one."""
    problems: tuple[str, ...] = ()
    """What the agent found at its start and could not read; as with `damaged`."""
    refused: dict[int, str] = field(default_factory=dict)
    """Steps of this incarnation that were refused, so that all ranks hear the same."""
    restoring: set[int] = field(default_factory=set)
    """Ranks that may still be reading the snapshot that was restored."""
    joining: dict[int, SnapshotId | None] = field(default_factory=dict)
    """Ranks that were taken over while the others go on and have not offered a step yet, each with
    what it may be reading."""
    restored: SnapshotId | None = None
    """What this incarnation goes on from or, until that is decided and as long as nothing newer
    was committed, what the one before it went on from."""
    restore_decided: bool = False
    committed_elsewhere: SnapshotId | None = None
    """The newest that this incarnation has committed, as far as this node was told, if it runs none
    of its ranks."""
    agreements: Agreements = field(default_factory=Agreements)
    """On replicated leaves, in this incarnation."""
    flushing: SnapshotId | None = None
    flush_wanted: bool = False
    flushed: dict[SnapshotId, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    """With peers: world, and ranks whose shards are on this node's NVMe, other nodes' maybe not."""
    durable_ranks: dict[SnapshotId, tuple[int, ...]] = field(default_factory=dict)
    """Of `durable`: the ranks whose shards are on this node's NVMe."""
    flush_failed: set[SnapshotId] = field(default_factory=set)
    rounds: dict[str, Round] = field(default_factory=dict)
    """Parity rounds by plan: at most the last committed one and the one under way."""
    parity_lost: str = ""
    """Why the last committed parity is gone; empty if it is not."""
    flushed_at_s: float | None = None
    nvme_interval_steps: int | None = None
    counters: dict[str, int] = field(default_factory=dict)
    last_error: str = ""

    def begin_incarnation(self, world: int, launch_id: str, number: int | None = None) -> None:
        """All ranks start anew, under a number that no snapshot has, or the one that is given."""
        known = [*self.snapshots, *self.durable]
        for snapshot in self.snapshots.values():
            snapshot.copying.clear()
        committed = [s.id for s in self.snapshots.values() if s.stage is Stage.COMMITTED]
        # A round is begun for what is committed, maybe on other nodes alone.
        begun = [r.plan.snapshot for r in self.rounds.values()]
        if any(s.incarnation == self.incarnation for s in [*committed, *begun, *self.durable]):
            self.restored = None
        following = max([0, self.incarnation, *(s.incarnation for s in known)]) + 1
        self.incarnation = following if number is None else number
        self.world = world
        self.launch_id = launch_id
        self.members.clear()
        self.resumed = False
        self.refused.clear()
        self.agreements.clear()
        self.restoring.clear()
        self.joining.clear()
        self.restore_decided = False
        self.committed_elsewhere = None

    def resume(self, caller: Caller, launch_id: str) -> None:
        """Go on under the number that a trainer knows, whose agent has lost its memory."""
        self.incarnation = caller.incarnation
        self.world = caller.world
        self.launch_id = launch_id
        self.resumed = True

    def has_member(self, caller: Caller) -> bool:
        """Whether a process that says so belongs to the present incarnation.

        Who is not remembered was never in it, unless it is known from its trainers alone: a
        number may have been taken again after all memory of it was lost.
        """
        if (caller.incarnation, caller.world) != (self.incarnation, self.world):
            return False
        holder = self.members.get(caller.rank)
        return self.resumed if holder is None else holder.process_id == caller.process_id

    def count(self, name: str) -> None:
        """Add one to a counter that `everstep status` shows."""
        self.counters[name] = self.counters.get(name, 0) + 1

    def left_behind(self, snapshot: SnapshotId) -> bool:
        """Whether the job has gone back to a step before this snapshot, and on from there."""
        return (
            self.restored is not None
            and self.restored < snapshot
            and snapshot.incarnation < self.incarnation
        )

    def preference(self, snapshot: SnapshotId) -> tuple[bool, SnapshotId]:
        """Orders snapshots by how much a restore wants them: newest last."""
        return not self.left_behind(snapshot), snapshot

    def newest_committed(self) -> Snapshot | None:
        """The newest snapshot that is committed in memory, as `preference` has it."""
        committed = [s for s in self.snapshots.values() if s.stage is Stage.COMMITTED]
        return max(committed, key=lambda snapshot: self.preference(snapshot.id), default=None)

    def newest_durable(self) -> SnapshotId | None:
        """The newest snapshot that is committed on NVMe, as `preference` has it."""
        return max(self.durable, key=self.preference, default=None)

    def last_flushed_step(self) -> int:
        """The step of this incarnation that NVMe has or gets, else the one that it began with."""
        flushed = [*self.durable, *([self.flushing] if self.flushing else [])]
        mine = [s.step for s in flushed if s.incarnation == self.incarnation]
        return max(mine, default=self.restored.step if self.restored else 0)

    def must_stay(self, snapshot: Snapshot) -> bool:
        """Whether overwriting this snapshot would break a promise."""
        read = snapshot.id in self.joining.values()
        if snapshot.pins > 0 or read or (self.restoring and snapshot.id == self.restored):
            # Somebody reads it, be it dropped since: other ranks' shards of it may be sound.
            return True
        if snapshot.stage is Stage.DROPPED:
            return bool(snapshot.copying)  # a slot that is written is nobody else's
        if self.in_round(snapshot.id):
            return True
        if snapshot.stage is Stage.OPEN:
            return True
        newest, elsewhere = self.newest_committed(), self.committed_elsewhere
        superseded = elsewhere is not None and snapshot.id < elsewhere
        return newest is not None and snapshot.id == newest.id and not superseded

    def protected(self) -> SnapshotId | None:
        """The newest snapshot whose parity is committed."""
        held = [r.plan.snapshot for r in self.rounds.values() if r.stage is RoundStage.COMMITTED]
        return max(held, key=self.preference, default=None)

    def in_round(self, snapshot: SnapshotId) -> bool:
        """Whether other nodes' parity depends on this snapshot, or is about to."""
        return any(
            r.plan.snapshot == snapshot and r.stage is not RoundStage.FAILED
            for r in self.rounds.values()
        )

    def sealed_here(self, snapshot: Snapshot) -> bool:
        """Whether every rank that is on this node has sealed it.

        What was sealed in an earlier incarnation is complete by the seals that there are: a rank
        that had not sealed is missing on all nodes then, and the coordinator sees that.
        """
        if not snapshot.sealed or snapshot.sealing:
            return False
        if snapshot.id.incarnation != self.incarnation:
            return True
        return all(rank in snapshot.sealed for rank in self.members)

    def holds(self, snapshot: Snapshot) -> bool:
        """Whether this node's shards of it are facts that other nodes may count on."""
        if snapshot.stage is Stage.COMMITTED:
            return True
        return snapshot.stage is Stage.OPEN and snapshot.verified and self.sealed_here(snapshot)

    def open_snapshots(self) -> list[Snapshot]:
        """Snapshots that some rank is still copying."""
        return [s for s in self.snapshots.values() if s.stage is Stage.OPEN]

    def present_open_snapshots(self) -> list[Snapshot]:
        """Those that a rank of the present incarnation can still fail to seal.

        What is open of earlier ones may be committed on other nodes, and has ranks that never ran
        here: who comes and goes now says nothing about it.
        """
        return [s for s in self.open_snapshots() if s.id.incarnation == self.incarnation]

    def evictable(self) -> list[Snapshot]:
        """Snapshots that may be overwritten: first those that will never commit, then by age."""
        return sorted(
            (s for s in self.snapshots.values() if not self.must_stay(s)),
            key=lambda s: (s.stage is not Stage.DROPPED, self.preference(s.id)),
        )

    def why_not(self, wanted: SnapshotId) -> str:
        """Why no rank may capture this step now; empty if all may."""
        newer = [s for s in self.snapshots if s.incarnation == self.incarnation and s > wanted]
        if newer:
            return f"step {newer[0].step} was captured already"
        gone = [rank for rank, member in sorted(self.members.items()) if not member.attached]
        if gone:
            return f"rank {gone[0]} is not attached any more"
        if self.joining:
            return f"rank {min(self.joining)} is joining, and has not offered a step yet"
        return self.why_busy()

    def why_busy(self) -> str:
        """Why no other step can be begun; empty if one can.

        While as many steps are copied as some rank can have in flight, none begins another: that
        rank would miss it, and with every rank busy at another time no step would ever be sealed
        by all.
        """
        at_work = [s for s in self.snapshots.values() if s.stage is Stage.OPEN or s.copying]
        written = [arenas[-1] for rank, arenas in self.arenas.items() if rank in self.members]
        slots = min((arena.slot_count for arena in written), default=0)
        # Snapshots in a replaced arena take no slot of the present one.
        staying = [
            s for s in self.snapshots.values() if self.must_stay(s) and self.in_present_arenas(s)
        ]
        full = len(staying) >= slots
        if full:
            newest = self.newest_committed()
            at_work += [s for s in staying if s is not newest and s not in at_work]
            if not at_work:
                return "busy: there is no slot beside the newest commit's"
        most = min((member.captures_in_flight for member in self.members.values()), default=1)
        busy = full or len(at_work) >= most
        return "busy: " + "; ".join(map(self._why_busy_with, at_work)) if busy else ""

    def in_present_arenas(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot takes a slot of the arenas that are written now.

        Nobody writes those of ranks that are not in the present incarnation, or not on this node.
        """
        return any(
            place.generation == self.arenas[rank][-1].generation
            for rank, place in snapshot.granted.items()
            if rank in self.arenas and rank in self.members
        )

    def _why_busy_with(self, snapshot: Snapshot) -> str:
        step = snapshot.id.step
        if snapshot.stage is Stage.OPEN or snapshot.copying:
            late = snapshot.missing_ranks() if snapshot.stage is Stage.OPEN else snapshot.copying
            return f"step {step} is still being copied by rank(s) {', '.join(map(str, late))}"
        if snapshot.id == self.flushing:
            return f"step {step} is being flushed to NVMe"
        if self.in_round(snapshot.id):
            return f"step {step} is being encoded, or is the newest that has parity"
        return f"step {step} is being read"

    def add_arena(self, found: ArenaReserved) -> None:
        """Take note of a rank's arena; of the same one again, if a call was tried again."""
        arenas = {arena.generation: arena for arena in self.arenas.get(found.rank, [])}
        arenas[found.generation] = Arena(found.generation, found.slot_count, found.slot_bytes)
        self.arenas[found.rank] = [arenas[generation] for generation in sorted(arenas)]

    def refuse(self, step: int, reason: str) -> None:
        """Remember why a step was refused, for the ranks that have not asked yet."""
        self.refused[step] = reason
        while len(self.refused) > REMEMBERED_REFUSALS:
            del self.refused[next(iter(self.refused))]

    def free_place(self, rank: int, written: Container[Place] = ()) -> Place | None:
        """A slot of the rank's present arena that no snapshot holds, and that is not `written`."""
        arena = self.arenas[rank][-1]
        held = {snapshot.granted.get(rank) for snapshot in self.snapshots.values()}
        for slot in range(arena.slot_count):
            place = Place(arena.generation, slot)
            if place not in held and place not in written:
                return place
        return None

    def remove_arena(self, rank: int, generation: int) -> None:
        """Forget one of a rank's arenas."""
        left = [arena for arena in self.arenas.get(rank, []) if arena.generation != generation]
        if left:
            self.arenas[rank] = left
        else:
            self.arenas.pop(rank, None)

    def next_generation(self, rank: int) -> int:
        """A generation that no arena of the rank has had, as far as anything here remembers."""
        arenas = [arena.generation for arena in self.arenas.get(rank, [])]
        places = [s.granted[rank].generation for s in self.snapshots.values() if rank in s.granted]
        return max([0, *arenas, *places]) + 1

    def idle_generations(self) -> list[tuple[int, int]]:
        """(rank, generation) of arenas that hold no snapshot any more, and that nobody writes: they
        were replaced, or their rank is not in the present incarnation, or not on this node."""
        held = {
            (rank, place.generation)
            for snapshot in self.snapshots.values()
            for rank, place in snapshot.granted.items()
        }
        return [
            (rank, arena.generation)
            for rank, arenas in self.arenas.items()
            for arena in (arenas[:-1] if rank in self.members else arenas)
            if (rank, arena.generation) not in held
        ]

    def problem_of_adopted(self, snapshot: Snapshot) -> str:
        """Why a snapshot found at the start will never commit; empty if it has, or still may."""
        newest = self.newest_committed()
        if snapshot.missing_ranks():
            superseded = newest is not None and snapshot.id < newest.id
            ended = superseded or snapshot.id.incarnation != self.incarnation
            return "not all ranks had sealed it" if ended else ""
        # The last agent may have died between the last record and the decision on the whole.
        return "the ranks' replicas differ" if snapshot.drifted_replicas() != () else ""
