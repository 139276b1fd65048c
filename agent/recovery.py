"""Which snapshot a job restores, and from which copies.

Owns the search: newest first, each rank's shard from memory, else NVMe. Promises that every rank
of an incarnation gets the same snapshot, with all of its shards, however many ranks saved it; that
a copy which fails its check is named; and that an answer is whole or an error (P0): never a mix of
steps, never part of a state. With several ranks digests are checked before the answer is given,
since it must hold for all; a single rank checks the copies itself before it uses a byte, and comes
back if one is damaged: reading it once instead of twice. Does not move bytes: trainers read the
copies in place.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from everstep.agent import events
from everstep.agent.job import Job, Stage
from everstep.agent.needs import Needs, check_needs
from everstep.agent.pipeline import Pipeline, nvme_intact
from everstep.proto.agent_pb2 import RejectedCopy, RestoreReply, ShardLocation
from everstep.proto.errors import (
    Damaged,
    DeadlineExceeded,
    EverstepError,
    NothingRecoverable,
    Refused,
    StaleIncarnation,
)
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import SnapshotId
from everstep.snapshot.record import open_record

log = logging.getLogger("everstep.agent")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a restore may take."""

    to_step: int | None = None
    levels: frozenset[str] = frozenset()
    """Allowed levels; empty means all."""
    rejected: tuple[RejectedCopy, ...] = ()
    """Copies that the caller has found damaged."""

    def allows(self, level: str) -> bool:
        """Whether copies of this level may be used."""
        return not self.levels or level in self.levels


@dataclass(slots=True)
class Search:
    """One search under way; all ranks wait for the same."""

    checking: bool
    """Whether digests are checked here, rather than by the one rank that asks."""
    rejected: list[RejectedCopy] = field(default_factory=list)

    def is_rejected(self, snapshot: SnapshotId, rank: int, level: str) -> bool:
        """Whether a copy is known to be damaged."""
        wanted = (snapshot.incarnation, snapshot.step, rank, level)
        return any((c.incarnation, c.step, c.rank, c.level) == wanted for c in self.rejected)

    def reject(self, snapshot: SnapshotId, rank: int, level: str, reason: str) -> None:
        """Note a copy that was not taken."""
        log.warning("%s, rank %d, %s: not used: %s", snapshot, rank, level, reason)
        copy = RejectedCopy(step=snapshot.step, rank=rank, level=level, reason=reason[:500])
        copy.incarnation = snapshot.incarnation
        self.rejected.append(copy)


class Recovery:
    """Decides restores for one agent."""

    def __init__(self, pipeline: Pipeline, timeout_s: float) -> None:
        self._pipeline = pipeline
        self._timeout_s = timeout_s
        self._decisions: dict[tuple[str, int], asyncio.Task[RestoreReply]] = {}
        self._asked: dict[tuple[str, int], Wanted] = {}

    async def decide(self, job: Job, wanted: Wanted) -> RestoreReply:
        """The one answer for the job's present incarnation.

        Raises:
            NothingRecoverable: If there are snapshots, but no whole one.
            Refused: If this incarnation was asked to restore something else before.
            DeadlineExceeded: If the check takes longer than `restore_timeout_s`.
        """
        if job.resumed and job.world > 1:
            raise Refused(
                f"the agent's memory was lost while this launch of job {job.name!r} ran, and with "
                "it what the other ranks may have restored already. Nothing was loaded. Start "
                "all ranks anew."
            )
        key = (job.name, job.incarnation)
        for ended in [k for k in self._decisions if k[0] == job.name and k != key]:
            del self._decisions[ended], self._asked[ended]
        if wanted.rejected and job.world == 1:
            self._decisions.pop(key, None)
        task = self._decisions.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = asyncio.get_running_loop().create_task(self._search(job, wanted))
            self._decisions[key] = task
            self._asked[key] = wanted
        elif (wanted.to_step, wanted.levels) != (self._asked[key].to_step, self._asked[key].levels):
            raise _asked_otherwise(job)
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await asyncio.shield(task)
        except TimeoutError:
            raise DeadlineExceeded(
                f"checking the snapshots of {job.name}", self._timeout_s
            ) from None
        if wanted.to_step is not None and (not reply.found or reply.step != wanted.to_step):
            raise _asked_otherwise(job)
        return reply

    async def join(self, job: Job, rank: int, wanted: Wanted) -> RestoreReply:
        """The newest that the running incarnation has committed, for a rank that joined it live.

        If it has committed nothing yet, what all its ranks begin with. What is found stays until
        the rank offers a step.

        Raises:
            NothingRecoverable: If no copy of what was committed is whole, or wanted.
            EverstepError: As `decide`.
        """
        incarnation = job.incarnation
        committed = [s.id for s in job.snapshots.values() if s.stage is Stage.COMMITTED]
        found = {s for s in (*committed, *job.durable) if s.incarnation == incarnation}
        if not found:
            return await self.decide(job, wanted)
        search = Search(checking=True)
        for snapshot in sorted(found, reverse=True):
            if wanted.to_step not in (None, snapshot.step):
                continue
            locations = await self._locate(job, snapshot, wanted, search)
            if job.incarnation != incarnation:
                raise StaleIncarnation(job.name, incarnation, job.incarnation)
            if locations is not None:
                decided = events.JoinDecided(job.name, rank, incarnation, snapshot)
                self._pipeline.submit(decided)
                return _found(snapshot, locations, search)
        reasons = [f"step {r.step}, rank {r.rank}, {r.level}: {r.reason}" for r in search.rejected]
        raise NothingRecoverable(
            job.name, tuple(reasons or ["this launch has committed no such step"])
        )

    async def gather(
        self, job: Job, rank: int, snapshot: SnapshotId, needs: Needs
    ) -> list[ShardLocation]:
        """Where shards are that a rank wants units of: all are here, there is nothing to bring.

        Raises:
            FormatInvalid: If the snapshot has no such shards or units.
            NothingRecoverable: If one of them is damaged by now.
            EverstepError: As `decide`.
        """
        decided = self._decisions.get((job.name, job.incarnation))
        if decided is not None and rank not in job.joining:
            shards = list((await asyncio.shield(decided)).shards)
        else:
            # Told to a rank that joined live, or by the agent before this one.
            search = Search(checking=True)
            found = await self._locate(job, snapshot, Wanted(), search)
            if found is None:
                reasons = tuple(f"rank {r.rank}, {r.level}: {r.reason}" for r in search.rejected)
                raise NothingRecoverable(job.name, reasons)
            shards = found
        check_needs(needs, {shard.rank: shard.image_bytes for shard in shards})
        return [shard for shard in shards if shard.rank in needs]

    async def _search(self, job: Job, wanted: Wanted) -> RestoreReply:
        search = Search(checking=job.world > 1)
        if job.world == 1:
            # Found by the agent itself, at its start.
            for lost, reason in job.damaged.items():
                search.reject(lost, 0, "memory", reason)
        for copy in wanted.rejected if job.world == 1 else ():
            damaged = SnapshotId(copy.incarnation, copy.step)
            search.reject(damaged, copy.rank, copy.level, copy.reason)
            if copy.level == "memory":
                self._pipeline.submit(events.Damaged(job.name, damaged, copy.reason))
        incarnation = job.incarnation
        found = candidates(job, wanted)
        for snapshot in found:
            locations = await self._locate(job, snapshot, wanted, search)
            if job.incarnation != incarnation:
                # Nothing is kept in place for those who ask too late.
                raise StaleIncarnation(job.name, incarnation, job.incarnation)
            if locations is None:
                continue
            decided = events.RestoreDecided(job.name, job.incarnation, snapshot)
            self._pipeline.submit(decided)
            failpoint("agent.restore.decided")
            return _found(snapshot, locations, search)
        if found or job.damaged or job.problems or wanted.to_step is not None:
            reasons = [
                f"step {r.step}, rank {r.rank}, {r.level}: {r.reason}" for r in search.rejected
            ]
            if not reasons and found:
                reasons = [f"{found[0]} is at no level any more"]
            if not reasons:
                reasons = [f"{lost}, memory: {reason}" for lost, reason in job.damaged.items()]
                reasons += job.problems
            if not found and wanted.to_step is not None:
                reasons = [f"step {wanted.to_step} is at no level; `everstep list` shows what is"]
            raise NothingRecoverable(job.name, tuple(reasons))
        self._pipeline.submit(events.RestoreDecided(job.name, job.incarnation, None))
        return RestoreReply(found=False)

    async def _locate(
        self, job: Job, snapshot: SnapshotId, wanted: Wanted, search: Search
    ) -> list[ShardLocation] | None:
        """A checked copy of every rank's shard, or None with the reasons in `search`."""
        world = _world_of(job, snapshot)
        in_memory = self._pipeline.submit(events.Pin(job.name, snapshot))
        try:
            found = await asyncio.gather(
                *(self._copy_of(job, snapshot, rank, wanted, search) for rank in range(world))
            )
            return None if None in found else [location for location in found if location]
        finally:
            if in_memory:
                self._pipeline.submit(events.Unpin(job.name, snapshot))

    async def _copy_of(
        self, job: Job, snapshot: SnapshotId, rank: int, wanted: Wanted, search: Search
    ) -> ShardLocation | None:
        sources: Iterable[
            tuple[str, Callable[[Job, SnapshotId, int, bool], ShardLocation | None]]
        ] = (
            ("memory", self._from_memory),
            ("nvme", self._from_nvme),
        )
        loop = asyncio.get_running_loop()
        for level, source in sources:
            if not wanted.allows(level) or search.is_rejected(snapshot, rank, level):
                continue
            try:
                location = await loop.run_in_executor(
                    self._pipeline.workers, source, job, snapshot, rank, search.checking
                )
            except (EverstepError, OSError) as error:
                search.reject(snapshot, rank, level, str(error))
                if level == "memory" and isinstance(error, Damaged):
                    self._pipeline.submit(events.Damaged(job.name, snapshot, str(error)))
                continue
            if location is not None:
                return location
        return None

    def _from_memory(
        self, job: Job, snapshot_id: SnapshotId, rank: int, checking: bool
    ) -> ShardLocation | None:
        snapshot = job.snapshots.get(snapshot_id)
        if snapshot is None or snapshot.stage is not Stage.COMMITTED:
            return None
        shard = snapshot.sealed[rank]
        if checking:
            self._pipeline.check_memory(job, snapshot, rank)
        arena = self._pipeline.arena_file(job.name, rank, shard.place.generation)
        return ShardLocation(
            rank=rank,
            level="memory",
            path=str(arena.path),
            offset=shard.place.slot * arena.slot_bytes,
            image_bytes=shard.image_bytes,
            record=shard.envelope,
            layout=self._pipeline.memory.layout(job.name, shard.layout_id),
        )

    def _from_nvme(
        self, job: Job, snapshot: SnapshotId, rank: int, checking: bool
    ) -> ShardLocation | None:
        nvme = self._pipeline.nvme
        if nvme is None or snapshot not in job.durable:
            return None
        with nvme.open_shard(job.name, snapshot, rank) as shard:
            record = open_record(shard.record, f"record of rank {rank}")
            if checking:
                nvme_intact(nvme, job.name, snapshot, rank, str(shard.path))
            return ShardLocation(
                rank=rank,
                level="nvme",
                path=str(shard.path),
                offset=0,
                image_bytes=record.image_bytes,
                record=shard.record,
                layout=nvme.layout(job.name, record.layout_id),
            )


def _found(snapshot: SnapshotId, locations: list[ShardLocation], search: Search) -> RestoreReply:
    return RestoreReply(
        found=True,
        incarnation=snapshot.incarnation,
        step=snapshot.step,
        shards=locations,
        rejected=search.rejected,
    )


def _asked_otherwise(job: Job) -> Refused:
    return Refused(
        f"this launch of job {job.name!r} restores something else already, for all its ranks "
        "alike. Nothing was loaded. Ask for the same step and levels on every rank, and once; to "
        "go to another step later, use `rewind` on every rank."
    )


def _world_of(job: Job, snapshot: SnapshotId) -> int:
    in_memory = job.snapshots.get(snapshot)
    return in_memory.world if in_memory is not None else job.durable.get(snapshot, job.world)


def candidates(job: Job, wanted: Wanted) -> list[SnapshotId]:
    """Committed snapshots that the caller may take, the most wanted first.

    Raises:
        Refused: If this incarnation began from nothing, asked otherwise: from fewer levels.
    """
    found: set[SnapshotId] = set()
    if wanted.allows("memory"):
        found |= {s.id for s in job.snapshots.values() if s.stage is Stage.COMMITTED}
    if wanted.allows("nvme"):
        found |= set(job.durable)
    if job.restore_decided and (job.world > 1 or not wanted.rejected):
        # Some ranks may have restored already, before this agent was started: the answer stays.
        if job.restored is None and found:
            raise _asked_otherwise(job)
        return [job.restored] if job.restored is not None else []
    wanted_ids = (s for s in found if wanted.to_step in (None, s.step))
    return sorted(wanted_ids, key=job.preference, reverse=True)
