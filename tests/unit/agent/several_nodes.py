"""Nodes that hold a protected snapshot with real layouts, and can decode for each other."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from everstep.agent import events
from everstep.agent.actions import Place
from everstep.agent.executing import Executing
from everstep.agent.fetching import Fetching
from everstep.agent.inventory import parsed
from everstep.agent.job import Round, RoundStage
from everstep.agent.planning import Erasure, SnapshotPlan, plan_snapshots
from everstep.agent.plans import ParityPlan, PlannedMember, PlannedShard
from everstep.erasure.codec import Codec
from everstep.kernels.digest import digest_units
from everstep.proto import peer_pb2, state_pb2
from everstep.proto.envelope import seal
from everstep.proto.errors import PeerUnavailable
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.snapshot import layout
from everstep.snapshot.layout import LeafSpec, Part
from everstep.snapshot.record import record_digest, seal_record

from .small_nodes import InProcess, SmallNode

JOB = "gpt"
SNAPSHOT = SnapshotId(2, 40)
PLAN = "plan-1"
UNEQUAL: dict[str, dict[int, int]] = {
    "n1": {0: 2 * UNIT_BYTES + 300_000, 3: UNIT_BYTES + 5},
    "n2": {1: 400_000},
    "n3": {2: 3 * UNIT_BYTES, 4: 10_000, 6: UNIT_BYTES},
    "n4": {5: 2 * UNIT_BYTES + 1},
}
"""By node and rank: bytes of the leaves."""


class Shard:
    """A rank's shard: a private leaf, and part of a replicated one."""

    def __init__(self, rank: int, world: int, size: int, snapshot: SnapshotId) -> None:
        replicated = size // 4
        leaves = [
            LeafSpec("m/own", "uint8", (size - replicated,), 0, size - replicated),
            LeafSpec("m/shared", "uint8", (replicated * 2,), 0, replicated, replicated=True),
        ]
        self.layout = layout.pack([Part("m", "tree", "dict")], leaves, {}, {})
        self.layout_envelope = layout.encode(self.layout)
        body = random.Random(f"{rank} {size} {snapshot}").randbytes(size)
        self.image = self.layout.header + body
        assert len(self.image) == self.layout.image_bytes
        self.record = state_pb2.Record(
            job=JOB,
            incarnation=snapshot.incarnation,
            step=snapshot.step,
            rank=rank,
            world=world,
            layout_id=self.layout.layout_id,
            image_bytes=len(self.image),
            unit_bytes=UNIT_BYTES,
            unit_digests=digest_units(self.image, UNIT_BYTES),
        )
        self.envelope = seal_record(self.record)

    @property
    def units(self) -> int:
        return -(-len(self.image) // UNIT_BYTES)


class Group:
    """Several nodes, their shards of one snapshot, and their parity."""

    def __init__(
        self,
        nodes: dict[str, SmallNode],
        sizes: Mapping[str, Mapping[int, int]],
        parities: int,
        snapshot: SnapshotId = SNAPSHOT,
    ) -> None:
        self.nodes = nodes
        self.sizes = sizes
        self.snapshot = snapshot
        self.world = sum(map(len, sizes.values()))
        self.shards = {
            rank: Shard(rank, self.world, size, snapshot)
            for ranks in sizes.values()
            for rank, size in ranks.items()
        }
        self.plan = self._plan(parities)
        self.calls = {name: InProcess(name, nodes) for name in nodes}
        self.down: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.executing = {
            name: Executing(self.calls[name], self.stores(node), node.bulk, node.config.bulk)
            for name, node in nodes.items()
        }
        self.fetching = {
            name: Fetching(self.calls[name], node.config.bulk) for name, node in nodes.items()
        }
        for calls in self.calls.values():
            for method in ("Open", "Describe", "Rebuild"):
                calls.handlers[method] = self._handler(method)

    @staticmethod
    def stores(node: SmallNode) -> Any:
        # A stand-in for the daemon, which gives the pipeline its parity.
        node.pipeline.parity = node.parity
        return node.pipeline

    def _handler(self, method: str) -> Any:
        async def handle(node_id: str, request: Any) -> Any:
            self.asked.append((node_id, method))
            if node_id in self.down or node_id not in self.nodes:
                raise PeerUnavailable(node_id, "it is down")
            if method == "Rebuild":
                return await self.executing[node_id].rebuild(request)
            return await getattr(self.nodes[node_id].serving, method.lower())(request)

        return handle

    def _plan(self, parities: int) -> ParityPlan:
        members = tuple(
            PlannedMember(
                name,
                tuple(
                    PlannedShard(
                        rank,
                        len(self.shards[rank].image),
                        self.shards[rank].layout.layout_id,
                        record_digest(self.shards[rank].envelope),
                    )
                    for rank in sorted(ranks)
                ),
            )
            for name, ranks in self.sizes.items()
        )
        return ParityPlan(PLAN, JOB, self.snapshot, self.world, parities, members)

    def hold(self, name: str, ranks: Collection[int] | None = None) -> None:
        """Have shards in a node's memory, committed: its own, or these."""
        node = self.nodes[name]
        for rank in self.sizes.get(name, {}) if ranks is None else ranks:
            shard = self.shards[rank]
            slot_bytes = -(-len(shard.image) // 4096) * 4096
            arena = node.memory.reserve(JOB, rank, 1, 2, slot_bytes)
            with node.memory.writable(arena, 0, len(shard.image)) as view:
                view[:] = shard.image
            node.memory.put_layout(JOB, shard.layout.layout_id, shard.layout_envelope)
            node.memory.publish(JOB, rank, 1, 0, shard.envelope)
            found = events.AdoptedShard(
                self.snapshot,
                rank,
                self.world,
                Place(1, 0),
                shard.layout.layout_id,
                len(shard.image),
                b"",
                0.0,
                shard.envelope,
                record_digest(shard.envelope),
            )
            reserved = events.ArenaReserved(JOB, rank, 1, slot_bytes, 2)
            node.pipeline.submit(events.Installed(JOB, reserved, found))

    def hold_on_disk(self, name: str) -> None:
        node = self.nodes[name]
        commit = state_pb2.Commit(
            job=JOB,
            incarnation=self.snapshot.incarnation,
            step=self.snapshot.step,
            world=self.world,
        )
        node.nvme.begin(JOB, self.snapshot)
        for rank in sorted(self.sizes[name]):
            shard = self.shards[rank]
            node.nvme.put_layout(JOB, shard.layout.layout_id, shard.layout_envelope)
            image = memoryview(shard.image)
            node.nvme.store(JOB, self.snapshot, rank, image, shard.envelope)
            commit.shards.add(
                rank=rank,
                layout_id=shard.layout.layout_id,
                image_bytes=len(shard.image),
                record_digest=record_digest(shard.envelope),
            )
        sealed = seal("commit", commit.SerializeToString(), repairable=True)
        node.nvme.commit(JOB, self.snapshot, sealed)

    def stream(self, member: int) -> bytes:
        shards = [self.shards[shard.rank] for shard in self.plan.members[member].shards]
        return b"".join(s.image + bytes(s.units * UNIT_BYTES - len(s.image)) for s in shards)

    def parity_of(self, member: int) -> bytes:
        """By the reference: whole chunks, one row after the other."""
        rows = self.plan.rows()
        codec = Codec(rows.data_symbols, rows.parities)
        found = b""
        for row, parity in rows.rows_of(member):
            target = bytearray(rows.parity_units(row) * UNIT_BYTES)
            sources = []
            for other in rows.contributors(row):
                units = rows.contribution(other, row)
                stream = self.stream(other)
                sources.append(stream[units.start * UNIT_BYTES : units.stop * UNIT_BYTES])
            if target:
                codec.encode(parity, sources, target)
            found += target
        return found

    def manifest(self, member: int, parity: bytes) -> bytes:
        manifest = state_pb2.ParityManifest(
            plan=self.plan.encoded(),
            member=member,
            unit_digests=digest_units(parity, UNIT_BYTES) if parity else b"",
            records=[
                state_pb2.ShardRecord(rank=rank, record=shard.envelope)
                for rank, shard in sorted(self.shards.items())
            ],
        )
        return seal("parity_manifest", manifest.SerializeToString())

    def protect(self, name: str, change: Any = None) -> None:
        """Have a node's parity in its memory; `change` makes it another."""
        node = self.nodes[name]
        member = self.plan.index_of(name)
        parity = self.parity_of(member)
        parity = change(parity) if change else parity
        with node.parity.reserve(JOB, PLAN, len(parity)) as room:
            room.view[:] = parity
            node.parity.publish(JOB, self.manifest(member, parity))
        for shard in self.shards.values():
            node.memory.put_layout(JOB, shard.layout.layout_id, shard.layout_envelope)
        job = node.state.jobs.get(JOB)
        if job is None:
            job = node.state.jobs[JOB] = events_job(self.world)
        job.rounds[PLAN] = Round(self.plan, RoundStage.COMMITTED)

    async def plan_of(
        self, lost: Collection[str] = (), erasures: Sequence[Erasure] = ()
    ) -> SnapshotPlan:
        """As the coordinator plans it, without the lost nodes, who are down from then on."""
        self.down |= set(lost)
        inventories = [
            parsed(await node.serving.inventory(peer_pb2.InventoryRequest(job=JOB)))
            for name, node in self.nodes.items()
            if name not in self.down
        ]
        (plan,) = plan_snapshots(inventories, erasures=erasures)
        return plan

    def erase(self, name: str, rank: int) -> Erasure:
        return Erasure(name, self.snapshot, rank, "memory")


def events_job(world: int) -> Any:
    from everstep.agent.job import Job

    return Job(JOB, world, SNAPSHOT.incarnation)


@contextlib.asynccontextmanager
async def group_of(
    root: Path,
    parities: int,
    sizes: Mapping[str, Mapping[int, int]] = UNEQUAL,
    *,
    spare: Sequence[str] = (),
    hold: bool = True,
    **overrides: Any,
) -> AsyncIterator[Group]:
    """Nodes that hold and protect a snapshot, and some that hold nothing."""
    nodes = {name: SmallNode(name, root, **overrides) for name in [*sizes, *spare]}
    group = Group(nodes, sizes, parities)
    if hold:
        for name in sizes:
            group.hold(name)
            group.protect(name)
    try:
        yield group
    finally:
        for executing in group.executing.values():
            executing.close()
        for node in nodes.values():
            await node.close()
        await asyncio.sleep(0)


def run(
    root: Path, parities: int, body: Callable[[Group], Coroutine[Any, Any, None]], **how: Any
) -> None:
    """Give a test such nodes, and a spare one that holds nothing."""

    async def whole() -> None:
        async with group_of(root, parities, spare=["spare"], **how) as group:
            await body(group)

    asyncio.run(whole())
