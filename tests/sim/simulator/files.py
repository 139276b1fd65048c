"""What outlives the simulated agent: arenas, records and the membership in memory, NVMe.

Owns the models that stand in for `MemoryLevel` and `NvmeLevel`, with the methods that
`agent.adoption` reads them by. A slot's content is a list of tokens, one for each unit, that say
what was captured there: so a torn or foreign unit is seen as such, without digests.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from everstep.agent.actions import Place
from everstep.proto.ids import SnapshotId

JOB = "job"

Token = tuple[int, int, int, int]
"""Incarnation, step, rank and unit that were captured."""
ROTTEN: Token = (-1, -1, -1, -1)
EMPTY: Token = (0, 0, 0, 0)


def tokens(snapshot: SnapshotId, rank: int, units: int) -> list[Token]:
    """What a whole image of this shard holds."""
    return [(snapshot.incarnation, snapshot.step, rank, unit) for unit in range(units)]


@dataclass(frozen=True, slots=True)
class Body:
    """What a record says. Sizes are in units."""

    incarnation: int
    step: int
    rank: int
    world: int
    layout_id: str
    image_bytes: int
    replica_samples: bytes
    captured_unix_s: float

    @property
    def snapshot(self) -> SnapshotId:
        return SnapshotId(self.incarnation, self.step)


@dataclass(frozen=True, slots=True)
class Held:
    """A slot's record."""

    rank: int
    generation: int
    slot: int
    envelope: bytes
    record: Body


@dataclass(slots=True)
class ArenaModel:
    """A reserved arena."""

    rank: int
    generation: int
    slot_bytes: int
    slot_count: int
    slots: list[list[Token]] = field(default_factory=list)


class MemoryFiles:
    """A job's directory on tmpfs."""

    def __init__(self) -> None:
        self.arena_files: dict[tuple[int, int], ArenaModel] = {}
        self.held: dict[tuple[int, Place], Held] = {}
        self.bodies: dict[bytes, Body] = {}
        """Every envelope that was ever made: what it says."""
        self.membership_data: bytes | None = None

    def seal(self, body: Body) -> bytes:
        """An envelope for a record."""
        envelope = repr(body).encode()
        self.bodies[envelope] = body
        return envelope

    def jobs(self) -> list[str]:
        there = self.arena_files or self.held or self.membership_data is not None
        return [JOB] if there else []

    def arenas(self, job: str) -> list[ArenaModel]:
        return [self.arena_files[key] for key in sorted(self.arena_files)]

    def records(self, job: str) -> list[Held]:
        return [
            self.held[key]
            for key in sorted(self.held, key=lambda key: (key[0], key[1].generation, key[1].slot))
        ]

    def membership(self, job: str) -> bytes | None:
        return self.membership_data

    def finish_removals(self) -> list[str]:
        return []

    def sweep(self, job: str) -> list[str]:
        return []

    def problems(self, job: str) -> Iterator[object]:
        return iter(())

    def reserve(self, rank: int, generation: int, slots: int, units: int) -> ArenaModel:
        """As `MemoryLevel.reserve`: the same reservation again returns the same arena."""
        key = (rank, generation)
        if key not in self.arena_files:
            content = [[EMPTY] * units for _ in range(slots)]
            self.arena_files[key] = ArenaModel(rank, generation, units, slots, content)
        return self.arena_files[key]

    def slot(self, rank: int, place: Place) -> list[Token] | None:
        """The content of a slot, for reading and writing; None if the arena is gone."""
        arena = self.arena_files.get((rank, place.generation))
        return arena.slots[place.slot] if arena is not None else None

    def release(self, rank: int, generation: int) -> None:
        """As `MemoryLevel.release`."""
        for key in [k for k in self.held if k[0] == rank and k[1].generation == generation]:
            del self.held[key]
        self.arena_files.pop((rank, generation), None)

    def holders(self, snapshot: SnapshotId) -> dict[int, tuple[Place, Body]]:
        """By rank, where a record says that this snapshot is."""
        return {
            rank: (place, held.record)
            for (rank, place), held in self.held.items()
            if held.record.step == snapshot.step and held.record.incarnation == snapshot.incarnation
        }

    def clear(self) -> None:
        """As `MemoryLevel.remove_job`."""
        self.arena_files.clear()
        self.held.clear()
        self.membership_data = None


@dataclass(slots=True)
class Durable:
    """A snapshot that is committed on NVMe; has what `Commit` has."""

    incarnation: int
    step: int
    world: int
    shards: dict[int, list[Token]]


class NvmeFiles:
    """A job's directory on NVMe: one committed snapshot for each step."""

    def __init__(self) -> None:
        self.by_step: dict[int, Durable] = {}

    def get(self, snapshot: SnapshotId) -> Durable | None:
        """The snapshot, if it is this one that has its step's directory."""
        found = self.by_step.get(snapshot.step)
        return found if found and found.incarnation == snapshot.incarnation else None

    def commit(self, snapshot: SnapshotId, shards: dict[int, list[Token]]) -> None:
        self.by_step[snapshot.step] = Durable(
            snapshot.incarnation, snapshot.step, len(shards), shards
        )

    def delete(self, snapshot: SnapshotId) -> None:
        if self.get(snapshot) is not None:
            del self.by_step[snapshot.step]

    def jobs(self) -> list[str]:
        return [JOB] if self.by_step else []

    def finish_removals(self) -> list[str]:
        return []

    def sweep(self, job: str) -> list[str]:
        return []

    def problems(self, job: str) -> Iterator[object]:
        return iter(())

    def commits(self, job: str) -> list[Durable]:
        return [self.by_step[step] for step in sorted(self.by_step)]
