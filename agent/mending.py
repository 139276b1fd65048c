"""Brings shards back into this node's memory, so that they are held here again.

Owns `Mend`, and what a restore needs of it: own ranks' shards into arenas, the wanted units of
others into staged files. Promises that a shard is held here only once all of it matches its
record, which is published last; that what was begun before a crash claims nothing and is begun
anew; that no slot that a trainer may be writing to is touched; and that a shard which is here
already is left alone. Does not choose the sources: the plan does.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Protocol, TypeVar

from everstep.agent import events
from everstep.agent.actions import Place
from everstep.agent.describing import Described
from everstep.agent.fetching import BufferFor
from everstep.agent.pipeline import Pipeline
from everstep.agent.rates import Rate
from everstep.agent.reservation import arena_lock, new_arena, reserved_event, slot_bytes_for
from everstep.agent.sources import SnapshotPlan, parsed
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import EverstepError
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import UNIT_BYTES, SnapshotId, checked_name
from everstep.proto.state_pb2 import Record
from everstep.snapshot.record import record_digest
from everstep.storage.arena import ArenaFile
from everstep.storage.staging import StagedFile

log = logging.getLogger("everstep.agent")

_WORKERS = 4
"""Shards that are brought here at one time."""
_PROGRESS_S = 0.2
_Answer = TypeVar("_Answer")
Told = Callable[[int], None]


class Fetches(Protocol):
    """What brings bytes here: `Fetching`."""

    def records(
        self, job: str, plan: SnapshotPlan, ranks: Sequence[int], deadline_s: float
    ) -> dict[int, Described]:
        """Records and layouts of some ranks."""

    def fetch(
        self,
        plan: SnapshotPlan,
        rank: int,
        units: Sequence[range] | None,
        buffer_for: BufferFor,
        record: Record,
        *,
        deadline_s: float,
        rate: Rate | None = None,
        progress: Told,
    ) -> None:
        """Bring units of a shard here."""


class Mending:
    """All that is brought back to this node. Lives on the agent's loop."""

    def __init__(self, pipeline: Pipeline, fetching: Fetches) -> None:
        """Prepare.

        Args:
            pipeline: Of this agent.
            fetching: Brings the bytes.
        """
        self._pipeline = pipeline
        self._fetching = fetching
        self._timeout_s = pipeline.config.limits.restore_timeout_s
        # Not the pipeline's own: this node may be asked for data while its threads wait for it.
        self._workers = ThreadPoolExecutor(_WORKERS, "everstep-mend")
        self._tasks: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Begin nothing more; what is under way is not waited for."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    async def mend(self, request: wire.MendRequest) -> AsyncIterator[wire.MendProgress]:
        """The handler of `Mend`: have shards held here, and this node's parity encoded anew.

        Each problem is told, and what can be done beside it is.

        Raises:
            InvalidName: If that is no job's name.
            FormatInvalid: If the plan contradicts itself.
        """
        job = checked_name("job", request.job)
        plan = parsed(request.plan, "a plan of recovery")
        for rank in sorted(set(request.ranks)):
            async for progress in self._told(job, plan, rank):
                yield progress
        if request.parity:
            self._encode_anew(job, plan.snapshot)
        yield wire.MendProgress(ended=True)

    async def _told(
        self, job: str, plan: SnapshotPlan, rank: int
    ) -> AsyncIterator[wire.MendProgress]:
        """Install a rank's shard, and tell how far it is."""
        what, total_bytes, done_bytes = f"rank {rank}", 0, 0

        def came(count_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += count_bytes

        def told(problem: str = "") -> wire.MendProgress:
            return wire.MendProgress(
                what=what, done_bytes=done_bytes, total_bytes=total_bytes, problem=problem
            )

        try:
            total_bytes = plan.source_of(rank).image_bytes
        except KeyError:
            yield told(f"rank {rank} of {plan.snapshot} has no source: see `everstep recover`")
            return
        task = asyncio.get_running_loop().create_task(self.install(job, plan, (rank,), came=came))
        try:
            while not (await asyncio.wait({task}, timeout=_PROGRESS_S))[0]:
                yield told()
        finally:
            task.cancel()
        try:
            await task
        except (EverstepError, OSError) as error:
            yield told(str(error))
        else:
            done_bytes = total_bytes
            yield told()

    async def install(
        self,
        job: str,
        plan: SnapshotPlan,
        ranks: Sequence[int],
        *,
        came: Told = lambda count_bytes: None,
        rate: Rate | None = None,
        anew: bool = False,
    ) -> None:
        """Have ranks' shards held here, one after the other; returns when they are.

        Args:
            job: The job.
            plan: Where they are.
            ranks: Whose.
            anew: Whether what is held here is damaged, and to be replaced.
            came: Told, from a thread, how many more bytes have come.
            rate: Not to be exceeded.
            anew: Whether a copy that is held here is damaged, and to be replaced.

        Raises:
            KeyError: If the plan has no source of a rank.
            OutOfSpace: If memory or the job's quota do not hold it.
            EverstepError: What `Fetching` raises.
            DeadlineExceeded: If it takes longer than `restore_timeout_s`.
        """
        deadline_s = time.monotonic() + self._timeout_s
        for rank in ranks:
            work = self._install_locked(job, plan, rank, anew, came, rate, deadline_s)
            task = asyncio.get_running_loop().create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            # A caller that leaves must not give the slot free while a thread writes into it.
            await asyncio.shield(task)

    async def _install_locked(
        self,
        job: str,
        plan: SnapshotPlan,
        rank: int,
        anew: bool,
        came: Told,
        rate: Rate | None,
        deadline_s: float,
    ) -> None:
        async with arena_lock(self._pipeline, job, rank):
            held = self._held(job, plan.snapshot, rank)
            if held is None or anew:
                await self._install(job, plan, rank, came, rate, deadline_s)
            if held is not None and anew:
                drop = partial(self._pipeline.memory.drop, job, rank, held.generation, held.slot)
                await self._in_thread(drop)

    def _held(self, name: str, snapshot: SnapshotId, rank: int) -> Place | None:
        """Where a shard is in memory here, if other nodes may count on it."""
        job = self._pipeline.state.jobs.get(name)
        held = job.snapshots.get(snapshot) if job is not None else None
        if job is None or held is None or not job.holds(held):
            return None
        return held.sealed[rank].place if rank in held.sealed else None

    async def _install(
        self,
        job: str,
        plan: SnapshotPlan,
        rank: int,
        came: Told,
        rate: Rate | None,
        deadline_s: float,
    ) -> None:
        ask = partial(self._fetching.records, job, plan, (rank,), deadline_s)
        described = (await self._in_thread(ask))[rank]
        arena, slot = await self._room(job, rank, described.record.image_bytes)
        fill = partial(self._fill, plan, described, arena, slot, came, rate, deadline_s)
        await self._in_thread(fill)
        record = described.record
        self._pipeline.submit(
            events.Installed(
                job,
                reserved_event(arena),
                events.AdoptedShard(
                    snapshot=plan.snapshot,
                    rank=rank,
                    world=record.world,
                    place=Place(arena.generation, slot),
                    layout_id=record.layout_id,
                    image_bytes=record.image_bytes,
                    replica_samples=record.replica_samples,
                    captured_unix_s=record.captured_unix_s,
                    envelope=described.record_envelope,
                    record_digest=record_digest(described.record_envelope),
                    commit_id=plan.commit_id,
                ),
            )
        )
        log.info("job %s: %s, rank %d, is in memory here again", job, plan.snapshot, rank)

    async def _room(self, name: str, rank: int, image_bytes: int) -> tuple[ArenaFile, int]:
        """A slot that nobody writes to, and that nobody is given before it is filled."""
        job = self._pipeline.state.jobs.get(name)
        if job is not None and rank not in job.members:
            granted = {s.granted[rank] for s in job.snapshots.values() if rank in s.granted}
            # Left behind, by an installation that was cut short or a rank that went elsewhere.
            look = partial(self._left_behind, name, rank, image_bytes, granted)
            left = await self._in_thread(look)
            if left is not None:
                return left
        arena = await new_arena(self._pipeline, self._pipeline.config, name, rank, image_bytes)
        return arena, 0

    def _left_behind(
        self, job: str, rank: int, image_bytes: int, granted: set[Place]
    ) -> tuple[ArenaFile, int] | None:
        memory = self._pipeline.memory
        recorded = {
            Place(held.generation, held.slot) for held in memory.records(job) if held.rank == rank
        }
        slots, least_bytes = self._pipeline.config.memory.slots, slot_bytes_for(image_bytes)
        for arena in reversed(memory.arenas(job)):
            if arena.rank != rank or arena.slot_count != slots or arena.slot_bytes < least_bytes:
                continue
            for slot in range(arena.slot_count):
                if Place(arena.generation, slot) not in granted | recorded:
                    return arena, slot
        return None

    def _fill(
        self,
        plan: SnapshotPlan,
        described: Described,
        arena: ArenaFile,
        slot: int,
        came: Told,
        rate: Rate | None,
        deadline_s: float,
    ) -> None:
        """Fetch a shard into a slot, then say what is in it. In a thread."""
        memory, record = self._pipeline.memory, described.record
        memory.drop(arena.job, arena.rank, arena.generation, slot)
        with memory.writable(arena, slot, record.image_bytes) as view:

            def buffer_for(unit: int) -> memoryview:
                return view[unit * UNIT_BYTES : (unit + 1) * UNIT_BYTES]

            self._fetching.fetch(
                plan,
                arena.rank,
                None,
                buffer_for,
                record,
                deadline_s=deadline_s,
                rate=rate,
                progress=came,
            )
        memory.put_layout(arena.job, record.layout_id, described.layout_envelope)
        failpoint("agent.mend.before_record")
        memory.publish(arena.job, arena.rank, arena.generation, slot, described.record_envelope)
        failpoint("agent.mend.after_record")

    async def stage(
        self,
        job: str,
        plan: SnapshotPlan,
        rank: int,
        units: Sequence[range],
        record: Record,
        *,
        more: bool = False,
        rate: Rate | None = None,
    ) -> Path:
        """Bring units of another node's shard here, for a restore; returns the file.

        Args:
            job: The job.
            plan: Where the shard is.
            rank: Whose.
            units: Of its image; the file has holes elsewhere.
            record: The shard's.
            more: Whether other units of it are here already, and stay.
            rate: Not to be exceeded.

        Raises:
            OutOfSpace: If memory does not hold the units.
            EverstepError: What `Fetching` raises.
        """
        deadline_s = time.monotonic() + self._timeout_s
        work = partial(self._stage, job, plan, rank, units, record, more, rate, deadline_s)
        return await self._in_thread(work)

    def _stage(
        self,
        job: str,
        plan: SnapshotPlan,
        rank: int,
        units: Sequence[range],
        record: Record,
        more: bool,
        rate: Rate | None,
        deadline_s: float,
    ) -> Path:
        staging = self._pipeline.staging
        assert staging is not None, "staged where there are no peers"
        opened = staging.extend if more else staging.create
        with (
            opened(job, plan.snapshot, rank, record.image_bytes, units) as staged,
            _Windows(staged) as windows,
        ):
            self._fetching.fetch(
                plan,
                rank,
                units,
                windows.buffer_for,
                record,
                deadline_s=deadline_s,
                rate=rate,
                progress=lambda count_bytes: None,
            )
            return staged.path

    def _encode_anew(self, name: str, snapshot: SnapshotId) -> None:
        """Have this node's parity of a snapshot made again, if it has part in any."""
        job = self._pipeline.state.jobs.get(name)
        for plan_id, known in list(job.rounds.items()) if job is not None else ():
            if known.plan.snapshot == snapshot and not known.is_encoding:
                self._pipeline.submit(events.ParityDamaged(name, plan_id, "it is to be made anew"))

    async def _in_thread(self, work: Callable[[], _Answer]) -> _Answer:
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)


class _Windows(ExitStack):
    """Mapped units of a staged file: one for each thread, since mappings are few."""

    def __init__(self, staged: StagedFile) -> None:
        super().__init__()
        self._staged = staged
        self._open: dict[int, ExitStack] = {}

    def buffer_for(self, unit: int) -> memoryview:
        """The memory of a unit, until the same thread asks for the next."""
        mine = self._open.get(get_ident())
        if mine is None:
            mine = self._open[get_ident()] = self.enter_context(ExitStack())
        mine.close()
        return mine.enter_context(self._staged.writable(unit))
