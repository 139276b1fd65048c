"""What an agent finds when it starts: arenas that outlived the last one, snapshots on NVMe.

Owns turning files into `Adopt` events. Promises to read only; that one unreadable file costs no
other; and that whatever cannot be adopted is reported with its reason. Digests of the adopted
images are checked afterwards, in the background.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator

from google.protobuf.message import DecodeError

from everstep.agent import events, plans
from everstep.agent.actions import Place
from everstep.proto.envelope import open_envelope
from everstep.proto.errors import EverstepError, FormatInvalid
from everstep.proto.ids import SnapshotId
from everstep.proto.state_pb2 import Membership
from everstep.snapshot.record import record_digest
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity_memory import ParityMemory
from everstep.storage.staging import Staging

log = logging.getLogger("everstep.agent")
_REPORTED_PROBLEMS = 20


def adoptions(
    memory: MemoryLevel,
    nvme: NvmeLevel | None,
    parity: ParityMemory | None = None,
    staging: Staging | None = None,
) -> Iterator[events.Adopt]:
    """One event for each job that left anything behind.

    Args:
        memory: This node's memory.
        nvme: This node's disk, if it has that level.
        parity: Other nodes' protection in this node's memory, where there are other nodes.
        staging: What was fetched for a restore; whoever wanted it is gone.
    """
    durable_jobs = _durable_jobs(nvme)
    _cleared(memory.finish_removals)
    for job in sorted(set(memory.jobs()) | durable_jobs):
        # A half-written arena would hold its memory until the next boot.
        _cleared(functools.partial(memory.sweep, job))
        for room in (parity, staging):
            if room is not None:
                _cleared(functools.partial(room.sweep, job))
        if nvme is not None and job in durable_jobs:
            _cleared(functools.partial(nvme.sweep, job))
        yield _adoption(job, memory, nvme if job in durable_jobs else None, parity)


def _durable_jobs(nvme: NvmeLevel | None) -> set[str]:
    if nvme is None:
        return set()
    try:
        _cleared(nvme.finish_removals)
        return set(nvme.jobs())
    except (EverstepError, OSError) as error:
        # A disk that fails must not cost what is in memory.
        log.error("nothing is read from %s: %s", nvme.root, error)
        return set()


def _cleared(clear: Callable[[], list[str]]) -> None:
    try:
        for done in clear():
            log.info("%s", done)
    except (EverstepError, OSError) as error:
        log.error("what was interrupted stays behind: %s", error)


def _adoption(
    job: str, memory: MemoryLevel, nvme: NvmeLevel | None, parity: ParityMemory | None
) -> events.Adopt:
    membership = _membership(job, memory)
    shards = tuple(_shards(job, memory, digested=parity is not None))
    commits = nvme.commits(job) if nvme is not None else []
    durable = tuple((SnapshotId(c.incarnation, c.step), c.world) for c in commits)
    known = [shard.snapshot.incarnation for shard in shards] + [s.incarnation for s, _ in durable]
    return events.Adopt(
        job=job,
        incarnation=max([membership.incarnation, *known]),
        world=membership.world or max((shard.world for shard in shards), default=1),
        launch_id=membership.launch_id,
        members=tuple(
            events.AdoptedMember(m.rank, m.process_id, m.pid, m.pid_started_s)
            for m in membership.members
        ),
        arenas=tuple(
            events.ArenaReserved(job, a.rank, a.generation, a.slot_bytes, a.slot_count)
            for a in memory.arenas(job)
        ),
        shards=shards,
        durable=durable,
        restored=SnapshotId(membership.restored_incarnation, membership.restored_step)
        if membership.restored_incarnation
        else None,
        restore_decided=membership.restore_decided,
        problems=_problems(job, memory, nvme),
        parities=_plans(job, parity),
        flushed_ranks=_flushed_ranks(job, nvme, durable) if parity is not None else {},
    )


def _flushed_ranks(
    job: str, nvme: NvmeLevel | None, durable: Iterable[tuple[SnapshotId, int]]
) -> dict[SnapshotId, tuple[int, ...]]:
    if nvme is None:
        return {}
    return {snapshot: tuple(nvme.ranks(job, snapshot)) for snapshot, _ in durable}


def _plans(job: str, parity: ParityMemory | None) -> tuple[plans.ParityPlan, ...]:
    found = []
    for manifest in parity.manifests(job) if parity is not None else ():
        try:
            found.append(plans.parsed(manifest.plan, f"parity of {job}"))
        except FormatInvalid as error:
            log.warning("job %s: %s", job, error)
    return tuple(found)


def _problems(job: str, memory: MemoryLevel, nvme: NvmeLevel | None) -> tuple[str, ...]:
    found = [*memory.problems(job), *(nvme.problems(job) if nvme is not None else [])]
    for problem in found:
        log.warning("job %s: %s: %s", job, problem.where, problem.reason)
    return tuple(f"{problem.where}: {problem.reason}" for problem in found[:_REPORTED_PROBLEMS])


def _shards(job: str, memory: MemoryLevel, *, digested: bool) -> Iterator[events.AdoptedShard]:
    for found in memory.records(job):
        record = found.record
        yield events.AdoptedShard(
            snapshot=SnapshotId(record.incarnation, record.step),
            rank=found.rank,
            world=record.world,
            place=Place(found.generation, found.slot),
            layout_id=record.layout_id,
            image_bytes=record.image_bytes,
            replica_samples=record.replica_samples,
            captured_unix_s=record.captured_unix_s,
            envelope=found.envelope,
            record_digest=record_digest(found.envelope) if digested else b"",
        )


def _membership(job: str, memory: MemoryLevel) -> Membership:
    where = f"membership of {job}"
    try:
        envelope = memory.membership(job)
        if envelope is None:
            return Membership()
        membership = Membership.FromString(open_envelope("membership", envelope, where))
        if membership.job != job:
            raise FormatInvalid(where, f"it is of job {membership.job!r}")
    except (FormatInvalid, DecodeError) as error:
        # Without it the next trainers simply begin a new incarnation.
        log.warning("job %s: %s", job, error)
        return Membership()
    return membership
