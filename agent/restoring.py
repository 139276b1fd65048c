"""A restore on one node of several: bring here what this node's trainers need, and say where it is.

Owns the way from the coordinator's decision to local paths. Promises that a trainer is given local
copies only, of one snapshot, and a description of every shard of it; that the coordinator is asked
for another plan if this one cannot be carried out; that shards of this node's own
ranks are held here again, as committed as before, when it answers, if as many ranks restore it as
have saved it; and that of all other shards no unit is fetched that nobody has asked for with
`gather`. What is fetched or decoded was verified on arrival (see `agent.fetching`).
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeGuard

from everstep.agent import events
from everstep.agent.bringing import Bringing
from everstep.agent.describing import Described
from everstep.agent.fetching import Fetching
from everstep.agent.inventory import MEMORY, NVME
from everstep.agent.job import Job
from everstep.agent.mending import Mending
from everstep.agent.needs import Needs, Spans, check_needs
from everstep.agent.pipeline import Pipeline
from everstep.agent.recovery import Wanted
from everstep.agent.sources import Held, SnapshotPlan, Source, parsed
from everstep.proto.agent_pb2 import RestoreReply, ShardLocation
from everstep.proto.errors import (
    Damaged,
    DeadlineExceeded,
    FormatInvalid,
    PeerUnavailable,
    StaleIncarnation,
)
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import SnapshotId
from everstep.proto.peer_pb2 import DecideReply, DecideRequest
from everstep.snapshot.record import open_record

log = logging.getLogger("everstep.agent")
_AGAIN_S = 0.1
Records = dict[int, Described]
Ask = Callable[[str, DecideRequest, float], Awaitable[DecideReply]]


@dataclass(slots=True)
class _Told:
    """What the coordinator has said."""

    plan: SnapshotPlan
    number: int
    again: bool
    """Whether it says the same as before, though that could not be carried out."""
    failed: bool = False
    """Whether it could not be carried out."""


class Restoring:
    """All restores of this node's trainers."""

    def __init__(
        self,
        pipeline: Pipeline,
        node_id: str,
        ask: Ask,
        fetching: Fetching,
        mending: Mending,
        bringing: Bringing,
    ) -> None:
        self._pipeline = pipeline
        self._node_id = node_id
        self._ask = ask
        self._fetching = fetching
        self._mending = mending
        self._bringing = bringing
        self._timeout_s = pipeline.config.limits.restore_timeout_s
        self._told: dict[tuple[str, int], _Told] = {}
        """By job and incarnation, what was told last."""
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
        while True:
            before = self._told.get((job.name, job.incarnation))
            failed_plan = before.number if before is not None and before.failed else 0
            decided, plan = await self._decided(job, wanted, live=False, failed_plan=failed_plan)
            snapshot = plan.snapshot if plan is not None else None
            self._pipeline.submit(events.RestoreDecided(job.name, job.incarnation, snapshot))
            failpoint("agent.restore.decided")
            if plan is None:
                return RestoreReply(found=False)
            told = self._remember(job, decided, plan)
            try:
                return await self._found(job, rank, decided, plan)
            except (PeerUnavailable, Damaged) as error:
                told.failed = True
                if told.again:
                    raise
                log.warning("job %s: rank %d asks for another plan: %s", job.name, rank, error)
            await asyncio.sleep(_AGAIN_S)

    async def _decided(
        self, job: Job, wanted: Wanted, *, live: bool, failed_plan: int = 0
    ) -> tuple[DecideReply, SnapshotPlan | None]:
        incarnation = job.incarnation
        request = DecideRequest(
            job=job.name,
            incarnation=incarnation,
            levels=sorted(wanted.levels),
            live=live,
            failed_plan=failed_plan,
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
        records = await self._records_of(job, plan)
        as_saved = plan.world == job.world
        found = []
        for source in plan.sources:
            described = records[source.rank]
            if self._is_here(source):
                found.append(self._local(job, source.rank, source.level, plan, described))
            elif as_saved and source.rank == rank:
                # Held here from now on: the next failure finds it where it belongs.
                mend = partial(self._mended, job, plan, rank, damaged)
                await self._once(job, (plan.snapshot, rank), mend)
                found.append(self._local(job, rank, "memory", plan, described))
            else:
                found.append(_elsewhere(plan, source, described))
        return found

    def _remember(self, job: Job, decided: DecideReply, plan: SnapshotPlan) -> _Told:
        key = (job.name, job.incarnation)
        before = self._told.get(key)
        number = decided.plan_number
        if before is not None and before.number == number > 0 and before.plan == plan:
            return before  # another rank of this node was told
        again = before is not None and before.failed and before.plan == plan
        for ended in [known for known in self._told if known[0] == job.name]:
            del self._told[ended]
        told = self._told[key] = _Told(plan, number, again)
        return told

    def _is_here(self, source: Source) -> TypeGuard[Held]:
        return isinstance(source, Held) and source.node_id == self._node_id

    async def gather(self, job: Job, snapshot: SnapshotId, needs: Needs) -> list[ShardLocation]:
        """Bring units of shards here, for a rank that was told to restore this snapshot.

        Args:
            job: The job.
            snapshot: As `restore` has answered.
            needs: By rank of those who saved it, units of its image.

        Returns:
            A location for each rank of `needs`, with a path.

        Raises:
            PeerUnavailable: If this agent was started anew since it said what to restore, or if a
                shard is not there any more as it was planned: ask that again first.
            FormatInvalid: If the snapshot has no such shards or units.
            OutOfSpace: If memory does not hold them.
            EverstepError: If a shard cannot be had.
            DeadlineExceeded: If it takes longer than `restore_timeout_s`.
        """
        told = self._told.get((job.name, job.incarnation))
        if told is None or told.plan.snapshot != snapshot:
            problem = f"it was started anew since it said that {snapshot} is restored: ask it again"
            raise PeerUnavailable(self._node_id, problem)
        plan = told.plan
        check_needs(needs, {source.rank: source.image_bytes for source in plan.sources})
        try:
            async with asyncio.timeout(self._timeout_s):
                records = await self._records_of(job, plan)
                gathered = (
                    self._gathered(job, plan, plan.source_of(rank), units, records[rank])
                    for rank, units in sorted(needs.items())
                )
                return list(await asyncio.gather(*gathered))
        except (PeerUnavailable, Damaged) as error:
            told.failed = True
            if told.again:
                raise
            problem = f"{snapshot} is not there any more as it was planned: {error}"
            raise PeerUnavailable(self._node_id, problem) from error
        except TimeoutError:
            what = f"bringing what {job.name} restores to {self._node_id}"
            raise DeadlineExceeded(what, self._timeout_s) from None

    async def _gathered(
        self, job: Job, plan: SnapshotPlan, source: Source, units: Spans, described: Described
    ) -> ShardLocation:
        if self._is_here(source):
            return self._local(job, source.rank, source.level, plan, described)
        if self._has_ended(job, (plan.snapshot, source.rank)):
            return self._local(job, source.rank, "memory", plan, described)
        return await self._brought(job, plan, source, units, described)

    def _has_ended(self, job: Job, what: object) -> bool:
        """Whether something that is done once was done."""
        task = self._under_way.get((job.name, job.incarnation, what))
        return task is not None and task.done() and not (task.cancelled() or task.exception())

    async def _brought(
        self,
        job: Job,
        plan: SnapshotPlan,
        source: Source,
        units: Sequence[range],
        described: Described,
    ) -> ShardLocation:
        path = await self._bringing.bring(
            job.name, plan, source.rank, units, described, self._mending
        )
        return _location(source.rank, "memory", str(path), 0, described)

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

    async def _records_of(self, job: Job, plan: SnapshotPlan) -> Records:
        ask = partial(self._records, job.name, plan)
        records = await self._once(job, (plan.snapshot, "records"), ask)
        assert isinstance(records, dict)
        return records

    async def _records(self, job: str, plan: SnapshotPlan) -> Records:
        deadline_s = time.monotonic() + self._timeout_s
        ranks = tuple(source.rank for source in plan.sources)

        def ask() -> Records:
            failpoint("agent.gather.records")
            return self._fetching.records(job, plan, ranks, deadline_s)

        # Not in the pipeline's threads: this node, too, may be asked, and answers in those.
        return await asyncio.to_thread(ask)

    async def _mended(self, job: Job, plan: SnapshotPlan, rank: int, damaged: bool) -> None:
        await self._mending.install(job.name, plan, (rank,), anew=damaged)

    def _local(
        self, job: Job, rank: int, level: str, plan: SnapshotPlan, described: Described
    ) -> ShardLocation:
        if level == "nvme":
            nvme = self._pipeline.nvme
            assert nvme is not None
            with nvme.open_shard(job.name, plan.snapshot, rank) as stored:
                described = replace(described, record_envelope=stored.record)
                return _location(rank, level, str(stored.path), 0, described)
        held = job.snapshots.get(plan.snapshot)
        if held is None or rank not in held.sealed:
            raise FormatInvalid(f"rank {rank} of {plan.snapshot}", "it is not in memory any more")
        shard = held.sealed[rank]
        arena = self._pipeline.arena_file(job.name, rank, shard.place.generation)
        offset = shard.place.slot * arena.slot_bytes
        described = replace(described, record_envelope=shard.envelope)
        return _location(rank, level, str(arena.path), offset, described)


def _location(rank: int, level: str, path: str, offset: int, described: Described) -> ShardLocation:
    record = described.record_envelope
    return ShardLocation(
        rank=rank,
        level=level,
        path=path,
        offset=offset,
        image_bytes=open_record(record, f"record of rank {rank}").image_bytes,
        record=record,
        layout=described.layout_envelope,
    )


def _elsewhere(plan: SnapshotPlan, source: Source, described: Described) -> ShardLocation:
    """A shard of which nothing is here yet; with the slowest level that it is taken from."""
    if isinstance(source, Held):
        return _location(source.rank, source.level, "", 0, described)
    parities = [known for known in plan.parities if known.plan_id == source.plan.plan_id]
    in_memory = {known.node_id for known in parities if known.level == MEMORY}
    level = MEMORY if all(known.node_id in in_memory for known in parities) else NVME
    return _location(source.rank, level, "", 0, described)
