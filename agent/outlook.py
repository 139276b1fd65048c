"""What all nodes together hold of a job, and what can be recovered of it, as a message.

Owns the `JobOverview` that status, list and verify are made of. Pure: it is made from inventories
and plans, whether an agent gathered them or they were read from bare directories.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from everstep.agent.inventory import MEMORY, NVME, NodeInventory
from everstep.agent.sources import SnapshotPlan
from everstep.proto import peer_pb2 as wire
from everstep.proto.ids import SnapshotId


def job_overview(
    job: str,
    inventories: Iterable[NodeInventory],
    plans: Iterable[SnapshotPlan],
    *,
    silent: Iterable[str] = (),
    captured_unix_s: Mapping[SnapshotId, float] | None = None,
) -> wire.JobOverview:
    """What there is of a job.

    Args:
        job: The job.
        inventories: Of all nodes in reach.
        plans: What can be recovered from them, the most wanted first.
        silent: Members that did not answer.
        captured_unix_s: When snapshots were captured, as far as it is known.
    """
    found = list(inventories)
    return wire.JobOverview(
        job=job,
        plans=[without_sources(plan) for plan in plans],
        silent=silent,
        problems=problems_of(found),
        held=held_overviews(found, captured_unix_s or {}),
    )


def without_sources(plan: SnapshotPlan) -> wire.SnapshotPlan:
    """A plan as a message without what its thousands of ranks would take."""
    message = plan.encoded()
    del message.sources[:]
    del message.parities[:]
    return message


def problems_of(inventories: Iterable[NodeInventory]) -> list[str]:
    """What nodes could not read, in words."""
    return [f"{node.node_id}: {what}" for node in inventories for what in node.problems]


def held_overviews(
    inventories: Iterable[NodeInventory], captured_unix_s: Mapping[SnapshotId, float]
) -> list[wire.HeldOverview]:
    """What all nodes together hold, by snapshot and level, newest first."""
    shards: dict[tuple[SnapshotId, str], dict[int, int]] = defaultdict(dict)
    parities: dict[tuple[SnapshotId, str], set[str]] = defaultdict(set)
    for node in inventories:
        for held in node.snapshots:
            for shard in held.shards:
                shards[held.snapshot, shard.level][shard.rank] = shard.image_bytes
            for parity in held.parities:
                parities[held.snapshot, parity.level].add(node.node_id)
    snapshots = {snapshot for snapshot, _ in (*shards, *parities)}
    return [
        wire.HeldOverview(
            incarnation=snapshot.incarnation,
            step=snapshot.step,
            captured_unix_s=captured_unix_s.get(snapshot, 0.0),
            copies=[
                wire.CopiesOverview(
                    level=level,
                    ranks=sorted(shards.get((snapshot, level), ())),
                    parity_nodes=sorted(parities.get((snapshot, level), ())),
                    bytes=sum(shards.get((snapshot, level), {}).values()),
                )
                for level in (MEMORY, NVME)
                if (snapshot, level) in shards or (snapshot, level) in parities
            ],
        )
        for snapshot in sorted(snapshots, reverse=True)
    ]
