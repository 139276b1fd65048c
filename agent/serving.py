"""What other agents may ask of the data that is held here: what there is, is it sound, give it.

Owns the handlers `Inventory`, `Check`, `Describe` and `Open` of the service between agents.
Promises that what is sent is what record or manifest describe, or fails its digest at the receiver;
that a slot which is being sent is not overwritten meanwhile; and that every request is checked
against what is held before a file is sent from. Decides nothing: a copy found damaged is named, not
dropped.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from everstep.agent import events
from everstep.agent.feeds import parity_feed, shard_feed
from everstep.agent.inventory import LEVELS, MEMORY
from everstep.agent.job import Job, SealedShard, Snapshot
from everstep.agent.keeping import Keeping, known_of
from everstep.agent.pipeline import Pipeline, nvme_intact
from everstep.agent.rates import Rate
from everstep.agent.sending import BulkServer, Source
from everstep.proto import peer_pb2
from everstep.proto.agent_pb2 import RejectedCopy
from everstep.proto.errors import EverstepError, FormatInvalid, Refused, ShardCorrupt
from everstep.proto.ids import SnapshotId, checked_name
from everstep.snapshot.record import open_record
from everstep.storage.parity_memory import ParityMemory

_Answer = TypeVar("_Answer")
_REASON_CHARACTERS = 500


class Serving:
    """The data of one node, for all agents of the cluster. Lives on the agent's loop.

    Args:
        pipeline: Of this agent.
        bulk: What sends the bytes.
        parity: This node's parity in memory; None if it takes no part in parity.
        join_rate: How fast ranks that join may take from here; see `agent.rates.join_rate`.
    """

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        bulk: BulkServer,
        parity: ParityMemory | None,
        join_rate: Rate | None = None,
    ) -> None:
        self._join_rate = join_rate
        self.pipeline = pipeline
        self.bulk = bulk
        node_id = pipeline.config.agent.node_id
        self.keeping = Keeping(node_id, pipeline.memory, pipeline.nvme, parity)

    async def inventory(self, request: peer_pb2.InventoryRequest) -> peer_pb2.InventoryReply:
        """What this node holds of a job, in memory and on NVMe.

        Raises:
            InvalidName: If that is no job's name.
        """
        name = checked_name("job", request.job)
        known = known_of(self.pipeline.state.jobs.get(name))
        found = await self._in_thread(partial(self.keeping.inventory, name, known))
        return found.encoded()

    async def describe(self, request: peer_pb2.DescribeRequest) -> peer_pb2.DescribeReply:
        """Records and layouts of shards that are held here, or known from a parity manifest.

        Of ranks that nothing is known of nothing is said. Without ranks: of all that are known.

        Raises:
            InvalidName: If that is no job's name.
        """
        name, snapshot = _named(request)
        known = known_of(self.pipeline.state.jobs.get(name))
        ranks = frozenset(request.ranks)
        shards = await self._in_thread(
            lambda: list(self.keeping.describe(name, snapshot, ranks, known))
        )
        return peer_pb2.DescribeReply(shards=shards)

    async def check(self, request: peer_pb2.CheckRequest) -> peer_pb2.CheckReply:
        """Check the digests of copies held here; one that is not here counts as damaged.

        Raises:
            InvalidName: If that is no job's name.
            Refused: If there is no such level.
        """
        name, snapshot = _named(request)
        level = _level(request.level)
        reply = peer_pb2.CheckReply()
        for rank in sorted(set(request.ranks)):
            try:
                if level == MEMORY:
                    await self._check_memory(name, snapshot, rank)
                else:
                    await self._in_thread(partial(self._check_disk, name, snapshot, rank))
            except (EverstepError, OSError) as error:
                reply.damaged.append(_rejected(snapshot, rank, level, str(error)))
        if request.parity:
            check = partial(self._parity_problem, name, snapshot, level)
            reply.parity_problem = (await self._in_thread(check))[:_REASON_CHARACTERS]
        return reply

    async def open(self, request: peer_pb2.OpenRequest) -> peer_pb2.Ticket:
        """A ticket for units of a shard or of a row's parity.

        Raises:
            InvalidName: If that is no job's name.
            Refused: If nothing, or units that there cannot be, are asked for.
            FormatInvalid: If it is not held here, or what is held is damaged.
            PeerUnavailable: If too many tickets are outstanding.
        """
        name, snapshot = _named(request)
        level = _level(request.level)
        what = request.WhichOneof("what")
        if what == "parity":
            source = await self._source(partial(self._parity, name, snapshot, level, request))
        elif what == "shard" and level == MEMORY:
            source = await self._memory_shard(name, snapshot, request.shard)
        elif what == "shard":
            source = await self._source(partial(self._disk_shard, name, snapshot, request.shard))
        else:
            raise Refused("neither a shard nor parity was asked for. Nothing was sent.")
        rate = self._join_rate if request.joining else None
        issued = self.bulk.issue(source, rate=rate)
        return peer_pb2.Ticket(
            token=issued.token, address=issued.address, units=issued.units, bytes=issued.bytes
        )

    async def _check_memory(self, name: str, snapshot: SnapshotId, rank: int) -> None:
        job, held, _ = self._pinned(name, snapshot, rank)
        try:
            await self._in_thread(partial(self.pipeline.check_memory, job, held, rank))
        finally:
            self.pipeline.submit(events.Unpin(name, snapshot))

    def _check_disk(self, name: str, snapshot: SnapshotId, rank: int) -> None:
        nvme = self.pipeline.nvme
        if nvme is None:
            raise FormatInvalid(self._where(name, snapshot, rank), "this node has no NVMe level")
        nvme_intact(nvme, name, snapshot, rank, f"nvme, rank {rank} of {snapshot}")

    def _parity_problem(self, name: str, snapshot: SnapshotId, level: str) -> str:
        """What is wrong with this node's parity of a snapshot; empty if nothing is."""
        store = self.keeping.store_of(level)
        try:
            plans = [m.plan.plan_id for m in self.keeping.manifests(name, snapshot, level)]
            if store is None or not plans:
                return f"there is no parity of {snapshot} in {level} here"
            for plan_id in plans:
                bad = store.verify(name, plan_id)
                if bad:
                    raise ShardCorrupt(f"parity {plan_id} of {snapshot}, {level}", tuple(bad))
        except (EverstepError, OSError) as error:
            return str(error)
        return ""

    async def _memory_shard(
        self, name: str, snapshot: SnapshotId, wanted: peer_pb2.ShardUnits
    ) -> Source:
        """A shard in an arena.

        The slot is this snapshot's until the source is closed: it is pinned before the slot is
        looked up, in one step of the loop, and what is pinned is neither evicted nor its arena
        released, even if the snapshot is dropped meanwhile. See `Job.must_stay`.
        """
        _, _, shard = self._pinned(name, snapshot, wanted.rank)
        loop = asyncio.get_running_loop()

        def release() -> None:
            # From whatever thread ends the stream; after the loop's end nothing is overwritten.
            with suppress(RuntimeError):
                unpin = events.Unpin(name, snapshot)
                loop.call_soon_threadsafe(self.pipeline.submit, unpin)

        return await self._source(partial(self._open_slot, name, shard, wanted, release))

    def _pinned(
        self, name: str, snapshot: SnapshotId, rank: int
    ) -> tuple[Job, Snapshot, SealedShard]:
        where = self._where(name, snapshot, rank)
        if not self.pipeline.submit(events.Pin(name, snapshot)):
            raise FormatInvalid(where, "it is not in memory here")
        job = self.pipeline.state.jobs[name]
        held = job.snapshots[snapshot]
        if rank not in held.sealed:
            self.pipeline.submit(events.Unpin(name, snapshot))
            raise FormatInvalid(where, "it is not in memory here, other ranks' shards are")
        return job, held, held.sealed[rank]

    def _open_slot(
        self,
        name: str,
        shard: SealedShard,
        wanted: peer_pb2.ShardUnits,
        release: Callable[[], None],
    ) -> Source:
        rank = wanted.rank
        try:
            record = open_record(shard.envelope, f"record of rank {rank}")
            arena = self.pipeline.arena_file(name, rank, shard.place.generation)
        except FileNotFoundError as error:
            release()
            raise FormatInvalid(str(error), "somebody removed it") from error
        except BaseException:
            release()
            raise
        offset = shard.place.slot * arena.slot_bytes
        return shard_feed(arena.path, offset, record, wanted.units, release)

    def _disk_shard(self, name: str, snapshot: SnapshotId, wanted: peer_pb2.ShardUnits) -> Source:
        nvme = self.pipeline.nvme
        if nvme is None:
            where = self._where(name, snapshot, wanted.rank)
            raise FormatInvalid(where, "this node has no NVMe level")
        with nvme.open_shard(name, snapshot, wanted.rank) as shard:
            record = open_record(shard.record, str(shard.path))
            path, offset = shard.path, shard.offset
        return shard_feed(path, offset, record, wanted.units, lambda: None)

    def _parity(
        self, name: str, snapshot: SnapshotId, level: str, request: peer_pb2.OpenRequest
    ) -> Source:
        """Parity is not pinned: once deleted, its file may be another plan's, and digests tell."""
        store = self.keeping.store_of(level)
        if store is None:
            raise FormatInvalid(
                f"parity of {snapshot} of job {name}", f"there is no {level} for it"
            )
        with store.open(name, request.parity.plan_id) as image:
            return parity_feed(image, snapshot, request.parity)

    async def _source(self, make: Callable[[], Source]) -> Source:
        """Open a source in a thread. If the caller leaves meanwhile, it is closed again."""
        future = asyncio.get_running_loop().run_in_executor(self.pipeline.workers, make)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_close_unwanted)
            raise

    async def _in_thread(self, work: Callable[[], _Answer]) -> _Answer:
        return await asyncio.get_running_loop().run_in_executor(self.pipeline.workers, work)

    def _where(self, name: str, snapshot: SnapshotId, rank: int) -> str:
        node_id = self.pipeline.config.agent.node_id
        return f"rank {rank} of {snapshot} of job {name} on {node_id}"


def _named(
    request: peer_pb2.DescribeRequest | peer_pb2.CheckRequest | peer_pb2.OpenRequest,
) -> tuple[str, SnapshotId]:
    return checked_name("job", request.job), SnapshotId(request.incarnation, request.step)


def _level(level: str) -> str:
    if level not in LEVELS:
        raise Refused(f"there is no level {level!r}; levels are {' and '.join(LEVELS)}.")
    return level


def _rejected(snapshot: SnapshotId, rank: int, level: str, reason: str) -> RejectedCopy:
    return RejectedCopy(
        incarnation=snapshot.incarnation,
        step=snapshot.step,
        rank=rank,
        level=level,
        reason=reason[:_REASON_CHARACTERS],
    )


def _close_unwanted(future: "asyncio.Future[Source]") -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()
