"""Nodes that hold a snapshot and protect it for each other: what the recovery tests begin with."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from everstep.agent.inventory import HeldParity, HeldShard, HeldSnapshot, NodeInventory
from everstep.agent.plans import ParityPlan, PlannedMember, PlannedShard
from everstep.proto.ids import UNIT_BYTES, SnapshotId

SNAPSHOT = SnapshotId(2, 40)
LAYOUT = "layout"


def digest(rank: int, version: int = 0) -> bytes:
    return bytes([version]) * 8 + rank.to_bytes(8)


def plan_of(
    sizes: Sequence[Sequence[int]],
    parities: int,
    *,
    first_node: int = 1,
    first_rank: int = 0,
    world: int | None = None,
    plan_id: str = "plan",
    version: int = 0,
    snapshot: SnapshotId = SNAPSHOT,
) -> ParityPlan:
    """A plan of nodes n1, n2, ... with ranks of these image sizes, in bytes."""
    members, rank = [], first_rank
    for index, images in enumerate(sizes):
        shards = []
        for image_bytes in images:
            shards.append(PlannedShard(rank, image_bytes, LAYOUT, digest(rank, version)))
            rank += 1
        members.append(PlannedMember(f"n{first_node + index}", tuple(shards)))
    return ParityPlan(plan_id, "gpt", snapshot, world or rank, parities, tuple(members))


def even(nodes: int, parities: int, chunk_units: int = 2, ranks: int = 1) -> ParityPlan:
    """Nodes with equally many ranks of equal size, less some bytes, and full chunks."""
    image_bytes = (nodes - parities) * chunk_units * UNIT_BYTES // ranks - 100
    return plan_of([[image_bytes] * ranks] * nodes, parities)


def shard_of(shard: PlannedShard, level: str = "memory") -> HeldShard:
    return HeldShard(shard.rank, level, shard.image_bytes, shard.layout_id, shard.record_digest)


def holding(
    plan: ParityPlan, index: int, levels: Collection[str] = ("memory",), *, parity: bool = True
) -> NodeInventory:
    """A member with all that the plan expects of it, at each of the levels."""
    member = plan.members[index]
    held = HeldSnapshot(
        plan.snapshot,
        plan.world,
        tuple(shard_of(shard, level) for level in levels for shard in member.shards),
        tuple(HeldParity(plan, level) for level in levels if parity),
    )
    return NodeInventory(member.node_id, (held,))


def all_nodes(plan: ParityPlan, levels: Collection[str] = ("memory",)) -> list[NodeInventory]:
    return [holding(plan, index, levels) for index in range(len(plan.members))]


def unprotected(
    node_id: str, shards: Collection[HeldShard], world: int, snapshot: SnapshotId = SNAPSHOT
) -> NodeInventory:
    return NodeInventory(node_id, (HeldSnapshot(snapshot, world, tuple(shards)),))


def also(inventory: NodeInventory, *shards: HeldShard) -> NodeInventory:
    """A node that holds these, too."""
    held = inventory.snapshots[0]
    return replace(inventory, snapshots=(replace(held, shards=held.shards + shards),))
