"""Performs what the state machine decides: records, flushes, verification, notices.

Owns all of the agent's input and output on levels, and the bounded threads that do it. Promises
that an action marked *before the reply* has taken effect when `submit` returns, and that the
outcome of every longer action comes back to the state machine as an event. Decides nothing.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from everstep.agent import actions, events
from everstep.agent.config import Config
from everstep.agent.job import Job, Snapshot
from everstep.agent.node import Node, Send, Step
from everstep.agent.notices import Notices
from everstep.agent.state import State
from everstep.proto.envelope import seal
from everstep.proto.errors import ArenaLost, EverstepError, ShardCorrupt
from everstep.proto.failpoint import failpoint
from everstep.proto.ids import SnapshotId
from everstep.proto.state_pb2 import Commit, CommittedShard, Member, Membership
from everstep.snapshot.digest import check_image
from everstep.snapshot.record import open_record, record_digest
from everstep.storage.arena import ArenaFile, MemoryLevel
from everstep.storage.level import ShardImage
from everstep.storage.nvme import NvmeLevel
from everstep.storage.parity_memory import ParityMemory
from everstep.storage.staging import Staging

log = logging.getLogger("everstep.agent")


class Pipeline:
    """The hands of one agent."""

    def __init__(
        self, config: Config, state: State, memory: MemoryLevel, nvme: NvmeLevel | None
    ) -> None:
        self.config = config
        self.state = state
        self.memory = memory
        self.nvme = nvme
        self.notices = Notices()
        self.parity: ParityMemory | None = None
        """Other nodes' protection in this node's memory, where there are other nodes."""
        self.staging: Staging | None = None
        self.node: Node | None = None
        """Set by the daemon where there are other agents; see `join_cluster`."""
        self._send: Callable[[list[Send]], None] = lambda sends: None
        self.digesters = ThreadPoolExecutor(config.memory.digest_threads, "everstep-digest")
        # One thread for each job's flush at most; the levels' own threads do the writing.
        self.workers = ThreadPoolExecutor(config.agent.max_jobs, "everstep-level")
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._progress = asyncio.Condition()
        self._performers: dict[type, Callable[[Any], None]] = {
            actions.DropRecord: self._drop_record,
            actions.PublishRecord: self._publish_record,
            actions.WriteMembership: self._write_membership,
            actions.ReleaseArena: self._release_arena,
            actions.NotifyCommitted: self._notify_committed,
            actions.NotifyDropped: self._notify_dropped,
            actions.Flush: lambda action: self.spawn(self._flush(action)),
            actions.VerifyAdopted: lambda action: self.spawn(self._verify_adopted(action)),
            actions.DeleteDurable: lambda action: self.spawn(self._delete_durable(action)),
        }

    def submit(self, event: events.Event) -> Any:
        """Feed an event to the state machine and act on the outcome.

        Returns:
            The reply of the decision.

        Raises:
            Refused: From the decision; nothing was done then.
        """
        if self.node is not None:
            step = self.node.handle(event, time.monotonic())
            self.perform(step)
            return step.reply
        outcome = self.state.handle(event, time.monotonic())
        for action in outcome.actions:
            self._performers[type(action)](action)
        return outcome.reply

    def perform(self, step: Step) -> None:
        """Act on what the node came to, then send what it wants sent."""
        for action in step.actions:
            self._performers[type(action)](action)
        self._send(step.sends)

    def join_cluster(
        self,
        node: Node,
        send: Callable[[list[Send]], None],
        performers: Mapping[type, Callable[[Any], None]],
    ) -> None:
        """From now on decisions are the node's, together with others.

        Args:
            node: This agent among its peers.
            send: Sends messages to them.
            performers: What acts on the actions that concern parity.
        """
        self.node = node
        self._send = send
        self._performers.update(performers)

    async def settled(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition on the state holds; it is looked at after each longer action."""
        try:
            async with asyncio.timeout(timeout_s), self._progress:
                await self._progress.wait_for(condition)
        except TimeoutError:
            return False
        return True

    async def idle(self, timeout_s: float) -> bool:
        """Wait until no longer action is under way."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Give the threads back; actions under way are not waited for."""
        self.digesters.shutdown(wait=False, cancel_futures=True)
        self.workers.shutdown(wait=False, cancel_futures=True)

    def spawn(self, coroutine: Any) -> None:
        """Run a longer action; `idle` waits for its end."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        self._idle.clear()
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()
        if not task.cancelled() and task.exception() is not None:
            log.error("an action failed", exc_info=task.exception())

    async def announce_progress(self) -> None:
        """Let `settled` look again."""
        async with self._progress:
            self._progress.notify_all()

    def _drop_record(self, action: actions.DropRecord) -> None:
        self.memory.drop(action.job, action.rank, action.place.generation, action.place.slot)

    def _publish_record(self, action: actions.PublishRecord) -> None:
        failpoint("agent.seal.before_record")
        place = action.place
        self.memory.publish(action.job, action.rank, place.generation, place.slot, action.envelope)
        failpoint("agent.seal.after_record")
        self.submit(events.Recorded(action.job, action.snapshot, action.rank))

    def _write_membership(self, action: actions.WriteMembership) -> None:
        job = self.state.jobs[action.job]
        body = membership_of(job).SerializeToString(deterministic=True)
        self.memory.write_membership(job.name, seal("membership", body))

    def _release_arena(self, action: actions.ReleaseArena) -> None:
        self.memory.release(action.job, action.rank, action.generation)

    def _notify_committed(self, action: actions.NotifyCommitted) -> None:
        failpoint("agent.commit.before_notice")
        self.notices.committed(action.job, action.snapshot, action.level)
        if self.node is not None:
            # Somebody may wait for what other nodes had to do as well.
            self.spawn(self.announce_progress())

    def _notify_dropped(self, action: actions.NotifyDropped) -> None:
        log.warning("job %s: %s was dropped: %s", action.job, action.snapshot, action.reason)
        self.notices.dropped(action.job, action.snapshot, action.reason, action.drifted)

    async def _flush(self, action: actions.Flush) -> None:
        job = self.state.jobs[action.job]
        snapshot = job.snapshots[action.snapshot]
        problem = ""
        loop = asyncio.get_running_loop()
        mapped = ExitStack()
        try:
            await loop.run_in_executor(self.workers, self._write_durable, job, snapshot, mapped)
        except (EverstepError, OSError) as error:
            problem = str(error)
            log.warning("job %s: flush of %s failed: %s", job.name, action.snapshot, error)
            await loop.run_in_executor(self.workers, self._clear_failed, job.name, snapshot.id)
            if isinstance(error, ShardCorrupt):
                # Writing checks what it reads: the copy in memory is no snapshot any more.
                self.submit(events.Damaged(action.job, action.snapshot, problem))
        self.submit(events.FlushEnded(action.job, action.snapshot, problem))
        await self.announce_progress()
        # Unmapping takes a tenth of a flush's time: nobody need wait for it.
        await loop.run_in_executor(self.workers, mapped.close)

    def _clear_failed(self, job: str, snapshot: SnapshotId) -> None:
        assert self.nvme is not None
        try:
            self.nvme.give_up(job, snapshot)
        except (EverstepError, OSError) as error:
            log.warning("job %s: what is left of %s stays: %s", job, snapshot, error)

    def _write_durable(self, job: Job, snapshot: Snapshot, mapped: ExitStack) -> None:
        assert self.nvme is not None
        failpoint("agent.flush.before_begin")
        self.nvme.begin(job.name, snapshot.id)
        commit = Commit(
            job=job.name,
            incarnation=snapshot.id.incarnation,
            step=snapshot.id.step,
            world=snapshot.world,
            committed_unix_s=time.time(),
            commit_id=snapshot.commit_id,
        )
        for rank, shard in sorted(snapshot.sealed.items()):
            layout = self.memory.layout(job.name, shard.layout_id)
            self.nvme.put_layout(job.name, shard.layout_id, layout)
            image = mapped.enter_context(self.open_memory(job, snapshot, rank))
            self.nvme.store(job.name, snapshot.id, rank, image.image, shard.envelope)
            commit.shards.append(
                CommittedShard(
                    rank=rank,
                    layout_id=shard.layout_id,
                    image_bytes=shard.image_bytes,
                    record_digest=record_digest(shard.envelope),
                )
            )
            failpoint("agent.flush.after_shard")
        body = commit.SerializeToString(deterministic=True)
        self.nvme.commit(job.name, snapshot.id, seal("commit", body, repairable=True))
        failpoint("agent.flush.after_commit")

    async def _verify_adopted(self, action: actions.VerifyAdopted) -> None:
        job = self.state.jobs[action.job]
        snapshot = job.snapshots[action.snapshot]
        loop = asyncio.get_running_loop()
        damaged = ""
        try:
            for rank in sorted(snapshot.sealed):
                await loop.run_in_executor(self.workers, self.check_memory, job, snapshot, rank)
        except (EverstepError, OSError) as error:
            damaged = str(error)
            log.error("job %s: adopted %s is damaged: %s", job.name, action.snapshot, error)
        self.submit(events.AdoptedVerified(action.job, action.snapshot, damaged))
        await self.announce_progress()

    async def _delete_durable(self, action: actions.DeleteDurable) -> None:
        assert self.nvme is not None
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self.workers, self.nvme.delete, action.job, action.snapshot)
        except (EverstepError, OSError) as error:
            # A snapshot that could not be deleted costs space, never safety: found at the next
            # start and deleted then.
            log.warning("job %s: %s was not deleted: %s", action.job, action.snapshot, error)

    def arena_file(self, job: str, rank: int, generation: int) -> ArenaFile:
        """The arena of a rank's generation, as found on tmpfs."""
        for arena in self.memory.arenas(job):
            if (arena.rank, arena.generation) == (rank, generation):
                return arena
        raise FileNotFoundError(f"arena of rank {rank}, generation {generation}, of job {job}")

    def check_arena(self, job: str, rank: int) -> None:
        """Look whether the arena that a rank writes is still there.

        Raises:
            ArenaLost: If somebody removed it; the job knows by now.
        """
        known = self.state.jobs.get(job)
        present = known.arenas.get(rank) if known is not None else None
        if not present:
            return
        there = {a.generation for a in self.memory.arenas(job) if a.rank == rank}
        gone = [arena.generation for arena in present if arena.generation not in there]
        lost = present[-1].generation in gone
        for generation in gone:
            self.submit(events.ArenaGone(job, rank, generation))
        if lost:
            raise ArenaLost(job, rank)

    def open_memory(self, job: Job, snapshot: Snapshot, rank: int) -> ShardImage:
        """Map one sealed shard of this node's memory, read-only."""
        shard = snapshot.sealed[rank]
        arena = self.arena_file(job.name, rank, shard.place.generation)
        return self.memory.image(arena, shard.place.slot, shard.image_bytes)

    def check_memory(self, job: Job, snapshot: Snapshot, rank: int) -> None:
        """Check a sealed shard's digests; blocks, so call it in a thread.

        Raises:
            Damaged: If the bytes are not what was captured.
        """
        record = open_record(snapshot.sealed[rank].envelope, f"record of rank {rank}")
        with self.open_memory(job, snapshot, rank) as image:
            where = f"memory, rank {rank} of {snapshot.id}"
            check_image(image.image, record, where, self.digesters)


def nvme_intact(nvme: NvmeLevel, job: str, snapshot: SnapshotId, rank: int, where: str) -> None:
    """Return only if a shard on NVMe matches its digests; it is read, not mapped.

    Raises:
        ShardCorrupt: With the units that differ.
    """
    bad = nvme.verify(job, snapshot, rank)
    if bad:
        raise ShardCorrupt(where, tuple(bad))


def membership_of(job: Job) -> Membership:
    """What is kept of a job's membership beside its arenas."""
    restored = job.restored or SnapshotId(0, 0)
    return Membership(
        job=job.name,
        incarnation=job.incarnation,
        world=job.world,
        launch_id=job.launch_id,
        restored_incarnation=restored.incarnation,
        restored_step=restored.step,
        restore_decided=job.restore_decided,
        members=[
            Member(
                rank=rank,
                process_id=member.process_id,
                pid=member.pid,
                pid_started_s=member.pid_started_s,
            )
            for rank, member in sorted(job.members.items())
        ],
    )
