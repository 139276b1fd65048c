"""What nodes hold of a job's snapshots, as plain data.

Owns the inventory of a node, and its form on the wire. Promises that one that was parsed is within
bounds: names are harmless, ranks lie in their world, digests have their length; an entry that is
not is left out and named among the problems. Whether the bytes are sound it does not know: copies
are checked where they lie.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from everstep.agent import plans
from everstep.agent.plans import MAX_IMAGE_BYTES, ParityPlan
from everstep.proto import peer_pb2
from everstep.proto.errors import FormatInvalid
from everstep.proto.ids import MAX_RANKS, SnapshotId, checked_name

MEMORY, NVME = "memory", "nvme"
LEVELS = (MEMORY, NVME)
"""Fastest first."""
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class HeldShard:
    """A copy of one rank's shard."""

    rank: int
    level: str
    image_bytes: int
    layout_id: str
    record_digest: bytes = field(repr=False)
    commit_id: bytes = field(default=b"", repr=False)
    """Of what it was committed with, see `events.CommitOrdered`; empty if that is not known."""


@dataclass(frozen=True, slots=True)
class HeldParity:
    """A node's own parity of one round, with its manifest: prepared or committed alike."""

    plan: ParityPlan
    level: str


@dataclass(frozen=True, slots=True)
class HeldSnapshot:
    """What a node holds of one snapshot."""

    snapshot: SnapshotId
    world: int
    shards: tuple[HeldShard, ...] = ()
    parities: tuple[HeldParity, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeInventory:
    """What a node holds of a job."""

    node_id: str
    snapshots: tuple[HeldSnapshot, ...] = ()
    problems: tuple[str, ...] = ()
    """What it could not read, in words."""

    def without(self, plan_ids: Collection[str]) -> "NodeInventory":
        """The same, lacking the parity of these plans."""
        kept = [
            replace(
                held, parities=tuple(p for p in held.parities if p.plan.plan_id not in plan_ids)
            )
            for held in self.snapshots
        ]
        # What a node knows by that parity alone, it does not have.
        return replace(self, snapshots=tuple(h for h in kept if h.shards or h.parities))

    def encoded(self) -> peer_pb2.InventoryReply:
        """As a message."""
        return peer_pb2.InventoryReply(
            node_id=self.node_id,
            snapshots=[_snapshot_message(held) for held in self.snapshots],
            problems=self.problems,
        )


def _snapshot_message(held: HeldSnapshot) -> peer_pb2.HeldSnapshot:
    return peer_pb2.HeldSnapshot(
        incarnation=held.snapshot.incarnation,
        step=held.snapshot.step,
        world=held.world,
        shards=[
            peer_pb2.HeldShard(
                rank=shard.rank,
                level=shard.level,
                image_bytes=shard.image_bytes,
                layout_id=shard.layout_id,
                record_digest=shard.record_digest,
                commit_id=shard.commit_id,
            )
            for shard in held.shards
        ],
        parities=[
            peer_pb2.HeldParity(plan=parity.plan.encoded(), level=parity.level)
            for parity in held.parities
        ],
    )


def parsed(message: peer_pb2.InventoryReply) -> NodeInventory:
    """The inventory in a message, checked.

    Raises:
        InvalidName: If the node's name is no name.
    """
    node_id = checked_name("node", message.node_id)
    problems = list(message.problems)
    snapshots = tuple(_snapshot(node_id, held, problems) for held in message.snapshots)
    return NodeInventory(node_id, snapshots, tuple(problems))


def _snapshot(node_id: str, message: peer_pb2.HeldSnapshot, problems: list[str]) -> HeldSnapshot:
    snapshot = SnapshotId(message.incarnation, message.step)
    where = f"{node_id}, {snapshot}"
    world = message.world
    if world > MAX_RANKS:
        problems.append(f"{where}: a world of {world} ranks is not possible")
        return HeldSnapshot(snapshot, 0)
    shards = tuple(_shards(where, message, problems))
    parities = tuple(_parities(where, node_id, message, problems))
    return HeldSnapshot(snapshot, world, shards, parities)


def _shards(where: str, message: peer_pb2.HeldSnapshot, problems: list[str]) -> Iterator[HeldShard]:
    for shard in message.shards:
        problem = _problem_of(shard, message.world)
        if problem:
            problems.append(f"{where}, rank {shard.rank}: {problem}")
            continue
        yield HeldShard(
            shard.rank,
            shard.level,
            shard.image_bytes,
            shard.layout_id,
            shard.record_digest,
            shard.commit_id,
        )


def _problem_of(shard: peer_pb2.HeldShard, world: int) -> str:
    if shard.rank >= world:
        return f"beyond the world of {world}"
    if shard.level not in LEVELS:
        return f"there is no level {shard.level!r}"
    if shard.image_bytes > MAX_IMAGE_BYTES or len(shard.record_digest) != DIGEST_BYTES:
        return "no possible size or digest"
    if len(shard.commit_id) not in (0, DIGEST_BYTES):
        return "no possible commit id"
    return ""


def _parities(
    where: str, node_id: str, message: peer_pb2.HeldSnapshot, problems: list[str]
) -> Iterator[HeldParity]:
    for parity in message.parities:
        try:
            plan = plans.parsed(parity.plan, f"{where}, parity")
        except FormatInvalid as error:
            problems.append(str(error))
            continue
        problem = _problem_of_parity(plan, node_id, parity.level, message)
        if problem:
            problems.append(f"{where}, parity {plan.plan_id}: {problem}")
            continue
        yield HeldParity(plan, parity.level)


def _problem_of_parity(
    plan: ParityPlan, node_id: str, level: str, message: peer_pb2.HeldSnapshot
) -> str:
    if plan.snapshot != SnapshotId(message.incarnation, message.step):
        return f"it is of {plan.snapshot}"
    if plan.world != message.world:
        return f"it is of a world of {plan.world}, not {message.world}"
    if level not in LEVELS:
        return f"there is no level {level!r}"
    if all(member.node_id != node_id for member in plan.members):
        return f"{node_id} is no member of its group"
    return ""
