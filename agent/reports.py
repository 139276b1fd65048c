"""What the agent tells people: status, verification, what was freed.

Owns the answers to the CLI's questions. Promises that `verify` changes nothing and that `collect`
with `dry_run` deletes nothing. Long checks run in the pipeline's bounded threads.
"""

import asyncio
import os
from collections.abc import Iterator

from everstep.agent import events
from everstep.agent.config import Config
from everstep.agent.job import Job, Stage
from everstep.agent.pipeline import Pipeline, nvme_intact
from everstep.agent.state import State
from everstep.proto import agent_pb2 as wire
from everstep.proto.errors import EverstepError, Refused
from everstep.proto.ids import SnapshotId
from everstep.snapshot.record import open_record
from everstep.storage.retention import Rule, expired


def newest_commits(job: Job) -> Iterator[wire.Notice]:
    """Notices of the newest commit at each level, for a session that has just attached; in memory
    of the whole incarnation, since a trainer may wait for more than one."""
    newest = job.newest_committed()
    found = [
        (s.id, "memory")
        for s in sorted(job.snapshots.values(), key=lambda s: s.id)
        if s.stage is Stage.COMMITTED and newest and s.id.incarnation == newest.id.incarnation
    ]
    protected = job.protected()
    if protected is not None:
        found.append((protected, "parity"))
    durable = job.newest_durable()
    if durable is not None:
        found.append((durable, "nvme"))
    for snapshot, level in found:
        body = wire.Committed(incarnation=snapshot.incarnation, step=snapshot.step, level=level)
        yield wire.Notice(committed=body)


def status(
    config: Config,
    state: State,
    *,
    version: str,
    uptime_s: float,
    only_job: str,
    cluster: wire.ClusterStatus | None = None,
) -> wire.StatusReply:
    """What the agent holds and does."""
    jobs = [job for name, job in sorted(state.jobs.items()) if only_job in ("", name)]
    return wire.StatusReply(
        node_id=config.agent.node_id,
        version=version,
        pid=os.getpid(),
        uptime_s=uptime_s,
        memory_dir=str(config.agent.memory_dir),
        nvme_dir=str(config.agent.nvme_dir or ""),
        jobs=[_job_status(job) for job in jobs],
        memory_reserved_bytes=sum(_arena_bytes(job) for job in state.jobs.values()),
        cluster=cluster,
    )


def _arena_bytes(job: Job, rank: int | None = None) -> int:
    return sum(
        arena.slot_bytes * arena.slot_count
        for owner, arenas in job.arenas.items()
        for arena in arenas
        if rank in (None, owner)
    )


def _job_status(job: Job) -> wire.JobStatus:
    ranks = [
        wire.RankStatus(
            rank=rank,
            pid=member.pid,
            attached=member.attached,
            arena_bytes=_arena_bytes(job, rank),
            last_sealed_step=max(
                (s.id.step for s in job.snapshots.values() if rank in s.sealed), default=0
            ),
        )
        for rank, member in sorted(job.members.items())
    ]
    return wire.JobStatus(
        job=job.name,
        incarnation=job.incarnation,
        world=job.world,
        ranks=ranks,
        snapshots=list(_snapshots(job)),
        counters=job.counters,
        last_error=job.last_error,
    )


def _snapshots(job: Job) -> Iterator[wire.SnapshotStatus]:
    for snapshot in sorted(job.snapshots.values(), key=lambda s: s.id):
        if snapshot.stage is Stage.DROPPED:
            continue
        shards = snapshot.sealed.values()
        yield wire.SnapshotStatus(
            incarnation=snapshot.id.incarnation,
            step=snapshot.id.step,
            level="memory",
            committed=snapshot.stage is Stage.COMMITTED,
            sealed_ranks=sorted(snapshot.sealed),
            bytes=sum(shard.image_bytes for shard in shards),
            captured_unix_s=max((shard.captured_unix_s for shard in shards), default=0.0),
        )
    for durable, world in sorted(job.durable.items()):
        yield wire.SnapshotStatus(
            incarnation=durable.incarnation,
            step=durable.step,
            level="nvme",
            committed=True,
            sealed_ranks=range(world),
        )


async def verify(pipeline: Pipeline, request: wire.VerifyRequest) -> wire.VerifyReply:
    """Check the digests of every committed shard that the request names."""
    loop = asyncio.get_running_loop()
    shards: list[wire.VerifiedShard] = []
    for job in list(pipeline.state.jobs.values()):
        if request.job not in ("", job.name):
            continue
        for snapshot, rank, level in _copies(job, request):
            pinned = pipeline.submit(events.Pin(job.name, snapshot))
            try:
                shard = await loop.run_in_executor(
                    pipeline.workers, _verify_one, pipeline, job, snapshot, rank, level
                )
            finally:
                if pinned:
                    pipeline.submit(events.Unpin(job.name, snapshot))
            gone = not pinned if level == "memory" else snapshot not in job.durable
            if not gone:
                shards.append(shard)
    return wire.VerifyReply(shards=shards)


def _copies(job: Job, request: wire.VerifyRequest) -> list[tuple[SnapshotId, int, str]]:
    levels = set(request.levels) or {"memory", "nvme"}
    memory = [
        (snapshot.id, rank, "memory")
        for snapshot in job.snapshots.values()
        if snapshot.stage is Stage.COMMITTED
        for rank in sorted(snapshot.sealed)
    ]
    # Of several nodes, each has its own ranks on its disk.
    nvme = [
        (s, rank, "nvme")
        for s, world in job.durable.items()
        for rank in job.durable_ranks.get(s, range(world))
    ]
    wanted = [copy for copy in memory + nvme if copy[2] in levels]
    if request.HasField("step"):
        wanted = [copy for copy in wanted if copy[0].step == request.step]
    return sorted(wanted)


def _verify_one(
    pipeline: Pipeline, job: Job, snapshot: SnapshotId, rank: int, level: str
) -> wire.VerifiedShard:
    result = wire.VerifiedShard(
        job=job.name,
        incarnation=snapshot.incarnation,
        step=snapshot.step,
        rank=rank,
        level=level,
    )
    try:
        if level == "memory":
            held = job.snapshots[snapshot]
            result.bytes = held.sealed[rank].image_bytes
            pipeline.check_memory(job, held, rank)
        else:
            assert pipeline.nvme is not None
            with pipeline.nvme.open_shard(job.name, snapshot, rank) as shard:
                record = open_record(shard.record, f"record of rank {rank}")
                result.bytes = record.image_bytes
                nvme_intact(pipeline.nvme, job.name, snapshot, rank, str(shard.path))
        result.intact = True
    except (EverstepError, OSError, KeyError) as error:
        result.problem = str(error)
    return result


async def collect(
    pipeline: Pipeline, config: Config, request: wire.CollectRequest
) -> wire.CollectReply:
    """Delete what the retention rule does not keep, or a whole job.

    Raises:
        Refused: If a whole job is to go while a trainer is attached to it.
    """
    rule = Rule(config.nvme.keep_newest, config.nvme.keep_every_steps or None)
    items: list[wire.CollectedItem] = []
    for job in [j for j in pipeline.state.jobs.values() if request.job in ("", j.name)]:
        if request.everything:
            items += await _collect_job(pipeline, job, request.dry_run)
        elif pipeline.nvme is not None:
            for snapshot, reason in expired(sorted(job.durable), rule, _in_use(job)):
                items.append(_item("nvme", snapshot, reason))
                if not request.dry_run:
                    job.durable.pop(snapshot, None)
                    await asyncio.to_thread(pipeline.nvme.delete, job.name, snapshot)
    return wire.CollectReply(items=items)


def _in_use(job: Job) -> set[SnapshotId]:
    return {s for s in (job.restored, job.flushing) if s is not None}


def _item(level: str, snapshot: SnapshotId, reason: str, size: int = 0) -> wire.CollectedItem:
    return wire.CollectedItem(
        level=level,
        step=snapshot.step,
        incarnation=snapshot.incarnation,
        reason=reason,
        bytes=size,
    )


async def _collect_job(pipeline: Pipeline, job: Job, dry_run: bool) -> list[wire.CollectedItem]:
    if any(member.attached for member in job.members.values()):
        raise Refused(f"job {job.name!r} has a trainer attached: end it first. Nothing was freed.")
    reason = "the whole job was named"
    items = [
        _item("memory", s.id, reason, sum(x.image_bytes for x in s.sealed.values()))
        for s in job.snapshots.values()
    ] + [_item("nvme", snapshot, reason) for snapshot in sorted(job.durable)]
    if dry_run:
        return items
    pipeline.submit(events.Removed(job.name))
    await asyncio.to_thread(pipeline.memory.remove_job, job.name)
    if pipeline.nvme is not None:
        await asyncio.to_thread(pipeline.nvme.remove_job, job.name)
    return items
