"""Nodes in one process: real stores and bulk planes, without gRPC, trainers or a coordinator.

What the tests of serving, encoding and fetching begin with.
"""

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.agent import events
from everstep.agent.actions import Place
from everstep.agent.config import load
from everstep.agent.pipeline import Pipeline
from everstep.agent.plans import ParityPlan, PlannedMember, PlannedShard
from everstep.agent.sending import BulkServer
from everstep.agent.serving import Serving
from everstep.agent.state import Rules, State
from everstep.kernels.digest import digest_units
from everstep.proto import state_pb2
from everstep.proto.envelope import seal
from everstep.proto.errors import PeerUnavailable
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.snapshot.record import record_digest, seal_record
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity_memory import ParityMemory

JOB = "gpt"
SNAPSHOT = SnapshotId(2, 40)
LAYOUT_BODY = state_pb2.Layout(image_bytes=1).SerializeToString()
LAYOUT_ID = hashlib.blake2b(LAYOUT_BODY, digest_size=16).hexdigest()
LAYOUT = seal("layout", LAYOUT_BODY)
STALL_TIMEOUT_S = 2.0


def image_of(rank: int, image_bytes: int, snapshot: SnapshotId = SNAPSHOT) -> bytes:
    return random.Random(f"{rank} {image_bytes} {snapshot}").randbytes(image_bytes)


def record_of(
    rank: int, image: bytes, world: int, snapshot: SnapshotId = SNAPSHOT, job: str = JOB
) -> bytes:
    return seal_record(
        state_pb2.Record(
            job=job,
            incarnation=snapshot.incarnation,
            step=snapshot.step,
            rank=rank,
            world=world,
            layout_id=LAYOUT_ID,
            image_bytes=len(image),
            unit_bytes=UNIT_BYTES,
            unit_digests=digest_units(image, UNIT_BYTES) if image else b"",
        )
    )


@dataclass(frozen=True)
class Shards:
    """Some nodes' shards of one snapshot, with records."""

    sizes: Mapping[str, Mapping[int, int]]
    """By node and rank: bytes of the image."""
    snapshot: SnapshotId = SNAPSHOT
    world: int = 0
    job: str = JOB
    commit_id: bytes = b""
    images: dict[int, bytes] = field(init=False, repr=False)
    records: dict[int, bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {rank: size for ranks in self.sizes.values() for rank, size in ranks.items()}
        world = self.world or max(sizes, default=0) + 1
        images = {rank: image_of(rank, size, self.snapshot) for rank, size in sizes.items()}
        object.__setattr__(self, "world", world)
        object.__setattr__(self, "images", images)
        records = {
            rank: record_of(rank, image, world, self.snapshot, self.job)
            for rank, image in images.items()
        }
        object.__setattr__(self, "records", records)

    def plan(self, parities: int, plan_id: str = "plan-1") -> ParityPlan:
        members = tuple(
            PlannedMember(
                node_id,
                tuple(
                    PlannedShard(rank, size, LAYOUT_ID, record_digest(self.records[rank]))
                    for rank, size in sorted(ranks.items())
                ),
            )
            for node_id, ranks in self.sizes.items()
        )
        return ParityPlan(plan_id, self.job, self.snapshot, self.world, parities, members)

    def commit(self, ranks: Sequence[int]) -> bytes:
        commit = state_pb2.Commit(
            job=self.job,
            incarnation=self.snapshot.incarnation,
            step=self.snapshot.step,
            world=self.world,
            commit_id=self.commit_id,
            shards=[
                state_pb2.CommittedShard(
                    rank=rank,
                    layout_id=LAYOUT_ID,
                    image_bytes=len(self.images[rank]),
                    record_digest=record_digest(self.records[rank]),
                )
                for rank in ranks
            ],
        )
        return seal("commit", commit.SerializeToString(), repairable=True)


class SmallNode:
    """One node. Made on the loop that it lives on."""

    def __init__(self, node_id: str, root: Path, **overrides: Any) -> None:
        self.node_id = node_id
        options = {
            "agent.node_id": node_id,
            "agent.memory_dir": str(root / node_id / "memory"),
            "agent.nvme_dir": str(root / node_id / "nvme"),
            "bulk.stall_timeout_s": STALL_TIMEOUT_S,
        }
        given = {name.replace("__", "."): value for name, value in overrides.items()}
        self.config = load(overrides=options | given, environ={})
        for level in ("memory", "nvme"):
            (root / node_id / level).mkdir(parents=True, exist_ok=True)
        self.memory = MemoryLevel(root / node_id / "memory", keep_free_bytes=0)
        self.nvme = NvmeLevel(root / node_id / "nvme")
        self.parity = ParityMemory(root / node_id / "memory", keep_free_bytes=0)
        rules = Rules(node_id=node_id, clustered=True)
        self.state = State(rules, lambda snapshots: [])
        self.pipeline = Pipeline(self.config, self.state, self.memory, self.nvme)
        self.bulk = BulkServer(
            "127.0.0.1",
            0,
            max_streams=64,
            max_tickets=64,
            ticket_timeout_s=30,
            stall_timeout_s=STALL_TIMEOUT_S,
        )
        self.bulk.start()
        self.serving = Serving(pipeline=self.pipeline, bulk=self.bulk, parity=self.parity)

    def hold(self, shards: Shards, slot: int = 0) -> None:
        """Have this node's shards in memory, committed."""
        for rank, size in shards.sizes.get(self.node_id, {}).items():
            slot_bytes = -(-max(size, 1) // 4096) * 4096
            arena = self.memory.reserve(shards.job, rank, 1, 2, slot_bytes)
            with self.memory.writable(arena, slot, size) as view:
                view[:] = shards.images[rank]
            self.memory.put_layout(shards.job, LAYOUT_ID, LAYOUT)
            envelope = shards.records[rank]
            self.memory.publish(shards.job, rank, 1, slot, envelope)
            shard = events.AdoptedShard(
                snapshot=shards.snapshot,
                rank=rank,
                world=shards.world,
                place=Place(1, slot),
                layout_id=LAYOUT_ID,
                image_bytes=size,
                replica_samples=b"",
                captured_unix_s=0.0,
                envelope=envelope,
                record_digest=record_digest(envelope),
                commit_id=shards.commit_id,
            )
            found = events.ArenaReserved(shards.job, rank, 1, slot_bytes, 2)
            self.pipeline.submit(events.Installed(shards.job, found, shard))

    def hold_on_disk(self, shards: Shards) -> None:
        """Have this node's shards on NVMe, committed."""
        ranks = sorted(shards.sizes.get(self.node_id, {}))
        self.nvme.put_layout(shards.job, LAYOUT_ID, LAYOUT)
        self.nvme.begin(shards.job, shards.snapshot)
        for rank in ranks:
            image = memoryview(shards.images[rank])
            self.nvme.store(shards.job, shards.snapshot, rank, image, shards.records[rank])
        self.nvme.commit(shards.job, shards.snapshot, shards.commit(ranks))

    def overwrite(self, rank: int, at: int, data: bytes, slot: int = 0) -> None:
        """Change bytes of a slot behind everybody's back."""
        arena = self.pipeline.arena_file(JOB, rank, 1)
        with self.memory.writable(arena, slot, at + len(data)) as view:
            view[at : at + len(data)] = data

    async def close(self) -> None:
        self.bulk.close()
        await asyncio.sleep(0)  # what the sources said to the loop
        self.pipeline.close()
        self.pipeline.digesters.shutdown()
        self.pipeline.workers.shutdown()
        self.nvme.close()


class InProcess:
    """The calls of one of several nodes in one process: no gRPC, but its own messages each."""

    def __init__(self, node_id: str, nodes: Mapping[str, SmallNode]) -> None:
        self._node_id = node_id
        self._nodes = nodes
        self._loop = asyncio.get_running_loop()
        self.handlers: dict[str, Any] = {}
        """Instead of the named method of all nodes: a coroutine of (node id, request)."""

    @property
    def node_id(self) -> str:
        return self._node_id

    async def call(self, node_id: str, method: str, request: Any, timeout_s: float) -> Any:
        copied = type(request).FromString(request.SerializeToString())
        async with asyncio.timeout(timeout_s):
            if method in self.handlers:
                return await self.handlers[method](node_id, copied)
            if node_id not in self._nodes:
                raise PeerUnavailable(node_id, "it is no member of the cluster")
            return await getattr(self._nodes[node_id].serving, method.lower())(copied)

    def call_blocking(self, node_id: str, method: str, request: Any, timeout_s: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(
            self.call(node_id, method, request, timeout_s), self._loop
        )
        return future.result(timeout_s + 1)


@contextlib.asynccontextmanager
async def small_nodes(
    root: Path, node_ids: Sequence[str], **overrides: Any
) -> AsyncIterator[dict[str, SmallNode]]:
    """Some nodes; closed at the end."""
    nodes = {node_id: SmallNode(node_id, root, **overrides) for node_id in node_ids}
    try:
        yield nodes
    finally:
        for node in nodes.values():
            await node.close()
