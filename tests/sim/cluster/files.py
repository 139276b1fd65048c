"""What a node's memory and disk hold, in the place of bytes: who wrote them.

Owns the model files of one node and the inventory that they make. A shard's bytes are one token,
which names the launch that wrote it, too: two snapshots of one name are told apart. Memory survives
the agent, not the node; the disk survives both.
"""

import struct
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from everstep.agent import events
from everstep.agent.actions import Place
from everstep.agent.inventory import HeldParity, HeldShard, HeldSnapshot, NodeInventory
from everstep.agent.job import Job
from everstep.agent.plans import ParityPlan
from everstep.proto.ids import SnapshotId

JOB = "gpt"
LAYOUT = "layout"
Slot = tuple[int, Place]
"""Rank and place."""


class Token(NamedTuple):
    """A shard's bytes."""

    incarnation: int
    step: int
    rank: int
    launch: int

    @property
    def snapshot(self) -> SnapshotId:
        """What it is part of."""
        return SnapshotId(self.incarnation, self.step)

    @property
    def digest(self) -> bytes:
        """Of its record."""
        return struct.pack(">IIII", *self)


def token_of(digest: bytes) -> Token:
    """What a digest vouches for."""
    return Token(*struct.unpack(">IIII", digest))


@dataclass(slots=True)
class Record:
    """A record beside an arena or on disk."""

    token: Token
    world: int
    image_bytes: int
    envelope: bytes


@dataclass(slots=True)
class Membership:
    """What is kept of a job beside its arenas."""

    incarnation: int
    world: int
    launch_id: str
    members: tuple[events.AdoptedMember, ...]
    restored: SnapshotId | None
    restore_decided: bool


@dataclass(slots=True)
class Memory:
    """What lies in tmpfs."""

    arenas: dict[tuple[int, int], int] = field(default_factory=dict)
    """Slots, by rank and generation."""
    slots: dict[Slot, Token | None] = field(default_factory=dict)
    """None: somebody is writing."""
    records: dict[Slot, Record] = field(default_factory=dict)
    parities: dict[str, ParityPlan] = field(default_factory=dict)
    membership: Membership | None = None

    def sound(self, rank: int, digest: bytes) -> bool:
        """Whether this rank's shard with this record is there."""
        token = token_of(digest)
        for slot, record in self.records.items():
            if slot[0] == rank and record.token == token and self.slots[slot] == token:
                return True
        return False

    def keep_membership(self, job: Job) -> None:
        """As `WriteMembership` does."""
        self.membership = Membership(
            job.incarnation,
            job.world,
            job.launch_id,
            tuple(
                events.AdoptedMember(rank, m.process_id, m.pid, m.pid_started_s)
                for rank, m in job.members.items()
            ),
            job.restored,
            job.restore_decided,
        )


@dataclass(slots=True)
class OnDisk:
    """One snapshot's directory."""

    world: int
    records: dict[int, Record] = field(default_factory=dict)
    committed: bool = False
    parities: dict[str, ParityPlan] = field(default_factory=dict)


@dataclass(slots=True)
class Disk:
    """What lies on NVMe."""

    steps: dict[SnapshotId, OnDisk] = field(default_factory=dict)


def adoption(memory: Memory, disk: Disk, slot_bytes: int) -> events.Adopt | None:
    """What an agent finds at its start; None if there is nothing."""
    kept = memory.membership
    durable = {s: found for s, found in disk.steps.items() if found.committed}
    if kept is None and not memory.records and not memory.arenas and not durable:
        if not memory.parities:
            return None
    known = [r.token.incarnation for r in memory.records.values()]
    known += [s.incarnation for s in durable]
    known += [plan.snapshot.incarnation for plan in memory.parities.values()]
    worlds = [r.world for r in memory.records.values()] + [1]
    return events.Adopt(
        job=JOB,
        incarnation=max([kept.incarnation if kept else 0, *known]),
        world=kept.world if kept else max(worlds),
        launch_id=kept.launch_id if kept else "",
        members=kept.members if kept else (),
        arenas=tuple(
            events.ArenaReserved(JOB, rank, generation, slot_bytes, slots)
            for (rank, generation), slots in memory.arenas.items()
        ),
        shards=tuple(
            adopted_shard(record, rank, place) for (rank, place), record in memory.records.items()
        ),
        durable=tuple((s, found.world) for s, found in durable.items()),
        restored=kept.restored if kept else None,
        restore_decided=kept.restore_decided if kept else False,
        parities=tuple(memory.parities.values()),
        flushed_ranks={s: tuple(sorted(found.records)) for s, found in durable.items()},
    )


def adopted_shard(record: Record, rank: int, place: Place) -> events.AdoptedShard:
    """A record as an agent reads it."""
    return events.AdoptedShard(
        snapshot=record.token.snapshot,
        rank=rank,
        world=record.world,
        place=place,
        layout_id=LAYOUT,
        image_bytes=record.image_bytes,
        replica_samples=b"",
        captured_unix_s=0.0,
        envelope=record.envelope,
        record_digest=record.token.digest,
    )


def inventory(node_id: str, memory: Memory, disk: Disk) -> NodeInventory:
    """What a node can give."""
    shards: dict[SnapshotId, list[HeldShard]] = {}
    parities: dict[SnapshotId, list[HeldParity]] = {}
    worlds: dict[SnapshotId, int] = {}
    for slot, record in memory.records.items():
        if memory.slots[slot] == record.token:
            _add(shards, worlds, record, "memory")
    for plan in memory.parities.values():
        parities.setdefault(plan.snapshot, []).append(HeldParity(plan, "memory"))
        worlds[plan.snapshot] = plan.world
    for found in disk.steps.values():
        if found.committed:
            for record in found.records.values():
                _add(shards, worlds, record, "nvme")
            for plan in found.parities.values():
                parities.setdefault(plan.snapshot, []).append(HeldParity(plan, "nvme"))
                worlds[plan.snapshot] = plan.world
    return NodeInventory(
        node_id,
        tuple(
            HeldSnapshot(s, world, tuple(shards.get(s, ())), tuple(parities.get(s, ())))
            for s, world in worlds.items()
        ),
    )


def _add(
    shards: dict[SnapshotId, list[HeldShard]],
    worlds: dict[SnapshotId, int],
    record: Record,
    level: str,
) -> None:
    token = record.token
    held = HeldShard(token.rank, level, record.image_bytes, LAYOUT, token.digest)
    shards.setdefault(token.snapshot, []).append(held)
    worlds[token.snapshot] = record.world


class Files(Protocol):
    """What a node has."""

    memory: Memory
    disk: Disk


def held_tokens(node: Files, snapshot: SnapshotId | None = None) -> list[Token]:
    """Whatever a node's files vouch for, of one snapshot or of all."""
    found = [record.token for record in node.memory.records.values()]
    plans = list(node.memory.parities.values())
    for on_disk in node.disk.steps.values():
        found += [record.token for record in on_disk.records.values()]
        plans += on_disk.parities.values()
    found += [
        token_of(shard.record_digest)
        for plan in plans
        for member in plan.members
        for shard in member.shards
    ]
    return [token for token in found if snapshot is None or token.snapshot == snapshot]
