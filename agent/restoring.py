"""A restore on one node of several: bring here what this node's trainers need, and say where it is.

Owns the way from the coordinator's decision to local paths. Promises that a trainer is given local
copies only, of one snapshot; that shards of this node's own ranks are held here again, as committed
as before, when it answers; and that of other ranks' shards no more is fetched than the units that
hold replicated leaves. What is fetched or decoded was verified on arrival (see `agent.fetching`).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from everstep.agent import events
from everstep.agent.describing import Described
from everstep.agent.fetching import Fetching
from everstep.agent.job import Job
from everstep.agent.mending import Mending, wanted_units
from everstep.agent.pipeline import Pipeline
from everstep.agent.recovery import Wanted
from everstep.agent.sources import Held, SnapshotPlan, parsed
from everstep.proto.agent_pb2 import RestoreReply, ShardLocation
from everstep.proto.errors import DeadlineExceeded, FormatInvalid, StaleIncarnation
from everstep.proto.failpoint import failpoint
from everstep.proto.peer_pb2 import DecideReply, DecideRequest
from everstep.snapshot.layout import decode
from everstep.snapshot.record import open_record

log = logging.getLogger("everstep.agent")
Records = dict[int, Described]
Ask = Callable[[str, DecideRequest, float], Awaitable[DecideReply]]


class Restoring:
    """All restores of this node's trainers."""

    def __init__(
        self,
        pipeline: Pipeline,
        node_id: str,
        ask: Ask,
        fetching: Fetching,
        mending: Mending,
    ) -> None:
        self._pipeline = pipeline
        self._node_id = node_id
        self._ask = ask
        self._fetching = fetching
        self._mending = mending
        self._timeout_s = pipeline.config.limits.restore_timeout_s
        self._staged_for: set[str] = set()
        self._dropping = asyncio.Lock()
        self._under_way: dict[tuple[str, int, object], asyncio.Task[object]] = {}

    async def restore(self, job: Job, rank: int, wanted: Wanted) -> RestoreReply:
        """What a rank loads, and where on this node it lies.

        Raises:
            EverstepError: If the coordinator finds nothing, or a shard cannot be had.
            DeadlineExceeded: If it takes longer than `restore_timeout_s`.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._restore(job, rank, wanted)
        except TimeoutError:
            what = f"bringing what rank {rank} of {job.name} restores to {self._node_id}"
            raise DeadlineExceeded(what, self._timeout_s) from None

    async def _restore(self, job: Job, rank: int, wanted: Wanted) -> RestoreReply:
        decided, plan = await self._decided(job, wanted, live=False)
        snapshot = plan.snapshot if plan is not None else None
        self._pipeline.submit(events.RestoreDecided(job.name, job.incarnation, snapshot))
        failpoint("agent.restore.decided")
        if plan is None:
            return RestoreReply(found=False)
        return await self._found(job, rank, decided, plan)

    async def _decided(
        self, job: Job, wanted: Wanted, *, live: bool
    ) -> tuple[DecideReply, SnapshotPlan | None]:
        incarnation = job.incarnation
        request = DecideRequest(
            job=job.name, incarnation=incarnation, levels=sorted(wanted.levels), live=live
        )
        if wanted.to_step is not None:
            request.to_step = wanted.to_step
        decided = await self._ask("Decide", request, self._timeout_s)
        if job.incarnation != incarnation:
            raise StaleIncarnation(job.name, incarnation, job.incarnation)
        if not decided.found:
            return decided, None
        return decided, parsed(decided.plan, "the coordinator's decision")

    async def _found(
        self, job: Job, rank: int, decided: DecideReply, plan: SnapshotPlan
    ) -> RestoreReply:
        damaged = any(
            (copy.incarnation, copy.step, copy.rank, copy.level)
            == (plan.snapshot.incarnation, plan.snapshot.step, rank, "memory")
            for copy in decided.rejected
        )
        locations = await self._located(job, rank, plan, damaged=damaged)
        return RestoreReply(
            found=True,
            incarnation=plan.snapshot.incarnation,
            step=plan.snapshot.step,
            shards=locations,
            rejected=decided.rejected,
        )

    async def _located(
        self, job: Job, rank: int, plan: SnapshotPlan, *, damaged: bool
    ) -> list[ShardLocation]:
        records = await self._once(
            job, (plan.snapshot, "records"), partial(self._records, job.name, plan)
        )
        assert isinstance(records, dict)
        found = []
        for source in plan.sources:
            described = records[source.rank]
            layout = described.layout_envelope
            if isinstance(source, Held) and source.node_id == self._node_id:
                found.append(self._local(job, source.rank, source.level, plan, layout))
            elif source.rank == rank:
                # Held here from now on: the next failure finds it where it belongs.
                mend = partial(self._mended, job, plan, rank, damaged)
                await self._once(job, (plan.snapshot, rank), mend)
                found.append(self._local(job, rank, "memory", plan, layout))
            else:
                staged = await self._once(
                    job,
                    (plan.snapshot, "staged", source.rank),
                    partial(self._staged, job, plan, source.rank, described),
                )
                if staged is not None:
                    envelope = described.record_envelope
                    path = str(staged)
                    found.append(_location(source.rank, "memory", path, 0, envelope, layout))
        return found

    async def _once(self, job: Job, what: object, work: Callable[[], Awaitable[object]]) -> object:
        """Do it once for all ranks of an incarnation; again, if it failed."""
        key = (job.name, job.incarnation, what)
        for ended in [k for k in self._under_way if k[0] == job.name and k[1] < job.incarnation]:
            del self._under_way[ended]
        task = self._under_way.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception())):

            async def done() -> object:
                return await work()

            task = self._under_way[key] = asyncio.get_running_loop().create_task(done())
            # Who asked may be gone when it fails; whoever asks next is told.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(task)

    async def _records(self, job: str, plan: SnapshotPlan) -> Records:
        deadline_s = time.monotonic() + self._timeout_s
        ranks = tuple(source.rank for source in plan.sources)
        ask = partial(self._fetching.records, job, plan, ranks, deadline_s)
        # Not in the pipeline's threads: this node, too, may be asked, and answers in those.
        return await asyncio.to_thread(ask)

    async def _mended(self, job: Job, plan: SnapshotPlan, rank: int, damaged: bool) -> None:
        await self._mending.install(job.name, plan, (rank,), anew=damaged)

    async def _staged(
        self, job: Job, plan: SnapshotPlan, rank: int, described: Described
    ) -> Path | None:
        """A file with the units that hold replicated leaves; None if the shard has none."""
        units = wanted_units(decode(described.layout_envelope, f"layout of rank {rank}"))
        if not units:
            return None
        log.info(
            "job %s: fetching what %s has of replicated leaves in rank %d",
            job.name,
            plan.snapshot,
            rank,
        )
        self._staged_for.add(job.name)
        async with self._dropping:
            pass
        return await self._mending.stage(job.name, plan, rank, units, described.record)

    def offered(self, job: Job) -> None:
        """A rank has gone on to a step: what was staged goes, once no rank may be reading it."""
        if job.name in self._staged_for and not job.restoring and not job.joining:
            self._pipeline.spawn(self._drop_staged(job))

    async def _drop_staged(self, job: Job) -> None:
        staging = self._pipeline.staging
        async with self._dropping:
            if staging is not None and not job.restoring and not job.joining:
                self._staged_for.discard(job.name)
                await asyncio.to_thread(staging.drop, job.name)

    def _local(
        self, job: Job, rank: int, level: str, plan: SnapshotPlan, layout: bytes
    ) -> ShardLocation:
        if level == "nvme":
            nvme = self._pipeline.nvme
            assert nvme is not None
            with nvme.open_shard(job.name, plan.snapshot, rank) as stored:
                return _location(rank, level, str(stored.path), 0, stored.record, layout)
        held = job.snapshots.get(plan.snapshot)
        if held is None or rank not in held.sealed:
            raise FormatInvalid(f"rank {rank} of {plan.snapshot}", "it is not in memory any more")
        shard = held.sealed[rank]
        arena = self._pipeline.arena_file(job.name, rank, shard.place.generation)
        offset = shard.place.slot * arena.slot_bytes
        return _location(rank, level, str(arena.path), offset, shard.envelope, layout)


def _location(
    rank: int, level: str, path: str, offset: int, record: bytes, layout: bytes
) -> ShardLocation:
    return ShardLocation(
        rank=rank,
        level=level,
        path=path,
        offset=offset,
        image_bytes=open_record(record, f"record of rank {rank}").image_bytes,
        record=record,
        layout=layout,
    )
