"""What the agent knows of one job: members, snapshots in memory and on NVMe, slots.

Owns the facts and the rules that need only this job's facts: which snapshots must stay, which may
be evicted, which slot a rank may write. Promises that the newest committed snapshot, one that is
being copied, and one that is pinned are never evicted (P2). Does no I/O and never reads a clock.
"""

from dataclasses import dataclass, field
from enum import Enum

from everstep.agent.actions import Place
from everstep.proto.ids import SnapshotId

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


@dataclass(slots=True)
class Snapshot:
    """One step of one incarnation, in memory."""

    id: SnapshotId
    world: int
    stage: Stage = Stage.OPEN
    granted: dict[int, Place] = field(default_factory=dict)
    sealed: dict[int, SealedShard] = field(default_factory=dict)
    pins: int = 0
    verified: bool = True
    """False for an adopted snapshot whose digests have not been checked yet."""
    reason: str = ""

    def missing_ranks(self) -> list[int]:
        """The ranks that have not sealed."""
        return [rank for rank in range(self.world) if rank not in self.sealed]

    def drifted_replicas(self) -> tuple[int, ...] | None:
        """Which replicated leaves differ between ranks; None if even their plans do."""
        samples = [shard.replica_samples for shard in self.sealed.values()]
        first = samples[0]
        if any(len(other) != len(first) or other[:8] != first[:8] for other in samples):
            return None
        return tuple(
            index
            for index, at in enumerate(range(8, len(first), 8))
            if any(other[at : at + 8] != first[at : at + 8] for other in samples)
        )


@dataclass(slots=True)
class Member:
    """The process that holds a rank."""

    process_id: str
    pid: int
    pid_started_s: float
    attached: bool = True


@dataclass(slots=True)
class Arena:
    """A rank's reserved memory."""

    generation: int
    slot_count: int
    slot_bytes: int


@dataclass(slots=True)
class Declaration:
    """What the ranks have said about their replicated leaves in one round."""

    candidates: dict[int, tuple[str, ...]] = field(default_factory=dict)
    digests: dict[int, tuple[bytes, ...]] = field(default_factory=dict)

    def agreed(self) -> tuple[int, ...]:
        """Indices of the candidates that are byte for byte equal on all ranks."""
        lists = set(self.candidates.values())
        if len(lists) != 1:
            return ()
        columns = zip(*self.digests.values(), strict=True)
        return tuple(index for index, column in enumerate(columns) if len(set(column)) == 1)


@dataclass(slots=True)
class Job:
    """Everything about one job."""

    name: str
    world: int
    incarnation: int
    launch_id: str = ""
    members: dict[int, Member] = field(default_factory=dict)
    snapshots: dict[SnapshotId, Snapshot] = field(default_factory=dict)
    arenas: dict[int, list[Arena]] = field(default_factory=dict)
    """Per rank, oldest generation first; the last one is written, the others only hold."""
    durable: dict[SnapshotId, int] = field(default_factory=dict)
    """On NVMe, each with its world."""
    refused: dict[int, str] = field(default_factory=dict)
    """Steps of this incarnation that were refused, so that all ranks hear the same."""
    restoring: set[int] = field(default_factory=set)
    """Ranks that may still be reading the snapshot that was restored."""
    restored: SnapshotId | None = None
    restore_decided: bool = False
    declarations: dict[int, Declaration] = field(default_factory=dict)
    flushing: SnapshotId | None = None
    flush_wanted: bool = False
    flushed_at_s: float | None = None
    nvme_interval_steps: int | None = None
    counters: dict[str, int] = field(default_factory=dict)
    last_error: str = ""

    def count(self, name: str) -> None:
        """Add one to a counter that `everstep status` shows."""
        self.counters[name] = self.counters.get(name, 0) + 1

    def newest_committed(self) -> Snapshot | None:
        """The newest snapshot that is committed in memory."""
        committed = [s for s in self.snapshots.values() if s.stage is Stage.COMMITTED]
        return max(committed, key=lambda snapshot: snapshot.id, default=None)

    def must_stay(self, snapshot: Snapshot) -> bool:
        """Whether overwriting this snapshot would break a promise."""
        if snapshot.stage is Stage.DROPPED:
            return False
        being_restored = bool(self.restoring) and snapshot.id == self.restored
        newest = self.newest_committed()
        return (
            snapshot.stage is Stage.OPEN
            or snapshot.pins > 0
            or being_restored
            or (newest is not None and snapshot.id == newest.id)
        )

    def open_snapshots(self) -> list[Snapshot]:
        """Snapshots that some rank is still copying."""
        return [s for s in self.snapshots.values() if s.stage is Stage.OPEN]

    def evictable(self) -> list[Snapshot]:
        """Snapshots that may be overwritten, oldest first."""
        return sorted(
            (s for s in self.snapshots.values() if not self.must_stay(s)),
            key=lambda snapshot: snapshot.id,
        )

    def free_place(self, rank: int) -> Place | None:
        """A slot of the rank's present arena that no snapshot holds."""
        arena = self.arenas[rank][-1]
        held = {
            place
            for snapshot in self.snapshots.values()
            for place in (snapshot.granted.get(rank),)
            if place is not None
        }
        for slot in range(arena.slot_count):
            place = Place(arena.generation, slot)
            if place not in held:
                return place
        return None

    def idle_generations(self) -> list[tuple[int, int]]:
        """(rank, generation) of replaced arenas that hold no snapshot any more."""
        held = {
            (rank, place.generation)
            for snapshot in self.snapshots.values()
            for rank, place in snapshot.granted.items()
        }
        return [
            (rank, arena.generation)
            for rank, arenas in self.arenas.items()
            for arena in arenas[:-1]
            if (rank, arena.generation) not in held
        ]
