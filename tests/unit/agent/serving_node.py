"""One node that serves, and shards and parity for it to hold.

What the tests of serving begin with.
"""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from everstep.agent.inventory import MEMORY, NVME
from everstep.kernels.digest import digest_units
from everstep.proto import state_pb2
from everstep.proto.envelope import seal
from everstep.proto.ids import UNIT_BYTES

from .small_nodes import Shards, SmallNode, small_nodes

LEVELS = (MEMORY, NVME)
Body = Callable[[SmallNode], Coroutine[Any, Any, None]]


def run(root: Path, body: Body, **overrides: Any) -> None:
    async def whole() -> None:
        async with small_nodes(root, ["n1"], **overrides) as nodes:
            await body(nodes["n1"])

    asyncio.run(whole())


def publish_parity(
    node: SmallNode, shards: Shards, member: int, data: bytes, parities: int = 1
) -> bytes:
    """Parity of some bytes, as if encoded; returns its manifest."""
    plan = shards.plan(parities)
    manifest = state_pb2.ParityManifest(
        plan=plan.encoded(),
        member=member,
        unit_digests=digest_units(data, UNIT_BYTES),
        records=[
            state_pb2.ShardRecord(rank=rank, record=record)
            for rank, record in shards.records.items()
        ],
    )
    envelope = seal("parity_manifest", manifest.SerializeToString())
    with node.parity.reserve(shards.job, plan.plan_id, len(data)) as room:
        room.view[:] = data
        node.parity.publish(shards.job, envelope)
    return envelope


ALONE = Shards({"n1": {0: 3 * UNIT_BYTES + 7, 1: UNIT_BYTES}})
GROUP = Shards({"n1": {0: UNIT_BYTES}, "n2": {1: 2 * UNIT_BYTES + 5}, "n3": {2: 3 * UNIT_BYTES}})


def pins(node: SmallNode) -> int:
    return sum(s.pins for job in node.state.jobs.values() for s in job.snapshots.values())
