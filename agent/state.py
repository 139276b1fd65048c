"""The agent's decisions: events in, actions and a reply out.

Owns every rule about incarnations, grants, seals, commits, flushes and what may be evicted.
Promises: the same events in the same order give the same actions; every rank of a job gets the
same answer for the same step; a commit is a fact derived from sealed shards, never stored apart.
Does no I/O, reads no clock, holds no lock: the caller feeds it from one thread and performs the
actions in order, those before the reply first.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from everstep.agent import actions, events, granting, joining, obeying, rounds
from everstep.agent.actions import Action, Place
from everstep.agent.durability import (
    flush_due,
    flush_ended,
    flush_newest,
    persist_wanted,
    start_flush,
)
from everstep.agent.job import (
    Job,
    Member,
    SealedShard,
    Snapshot,
    Stage,
)
from everstep.agent.obeying import adopt_part, adopted, settle_earlier
from everstep.proto.errors import ArenaLost, OutOfSpace, RankClaimed, Refused, StaleIncarnation
from everstep.proto.ids import SnapshotId, checked_name

_MAX_INCARNATION = 1 << 48
Expired = Callable[[list[SnapshotId]], list[tuple[SnapshotId, str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the configuration says, as far as decisions need it."""

    max_jobs: int = 64
    max_ranks: int = 1024
    nvme: bool = True
    nvme_interval_steps: int | None = 100
    nvme_interval_s: float | None = None
    flush_on_exit: bool = True
    node_id: str = ""
    clustered: bool = False
    """Whether commits are the coordinator's word, because ranks may live on other nodes."""


@dataclass(slots=True)
class Outcome:
    """What one event leads to."""

    actions: list[Action] = field(default_factory=list)
    reply: Any = None


class State:
    """All jobs of this node. Never change attributes from outside: only through `handle`."""

    def __init__(self, rules: Rules, expired: Expired) -> None:
        self.rules = rules
        self.jobs: dict[str, Job] = {}
        self.expired = expired
        self._actions: list[Action] = []
        self.now_s = 0.0

    def handle(self, event: events.Event, now_s: float) -> Outcome:
        """Take one event; return what to do about it.

        Args:
            event: What happened.
            now_s: A monotonic time; only differences matter.

        Raises:
            Refused: If a trainer's request is not acceptable; nothing has changed then.
        """
        self.now_s = now_s
        self._actions = []
        reply = _HANDLERS[type(event)](self, event)
        return Outcome(self._actions, reply)

    def act(self, action: Action) -> None:
        """Ask for an action as part of what is handled now."""
        self._actions.append(action)

    def _job(self, caller: events.Caller) -> Job:
        job = self.jobs.get(caller.job)
        member = job.members.get(caller.rank) if job is not None else None
        holds = member is not None and member.process_id == caller.process_id
        if job is None or not holds or caller.incarnation != job.incarnation:
            raise StaleIncarnation(caller.job, caller.incarnation, job.incarnation if job else 0)
        return job

    def _attach(self, event: events.Attach) -> int:
        caller = event.caller
        checked_name("job", caller.job)
        if not 0 <= caller.rank < caller.world <= self.rules.max_ranks:
            raise Refused(f"rank {caller.rank} of world {caller.world} is not possible here.")
        if caller.incarnation > _MAX_INCARNATION:
            raise Refused(f"no job was ever started {caller.incarnation} times.")
        job = self.jobs.get(caller.job)
        if job is None:
            if len(self.jobs) >= self.rules.max_jobs:
                raise Refused(f"this agent holds {self.rules.max_jobs} jobs (max_jobs) already.")
            job = Job(caller.job, caller.world, caller.incarnation, event.launch_id)
        joins = False
        if event.decided is not None:
            self._join_decided(job, event, event.decided)
            joins = event.live
        elif caller.incarnation:
            self._rejoin(job, event)
        else:
            joins = self._join(job, event)
        self.jobs[caller.job] = job
        job.members[caller.rank] = Member(caller.process_id, event.pid, event.pid_started_s)
        if joins:
            joining.joined(self, job, caller.rank)
        if event.nvme_interval_steps is not None:
            job.nvme_interval_steps = event.nvme_interval_steps
        granting.readmit(job, caller.rank, event.in_flight)
        self.keep_membership(job)
        return job.incarnation

    def keep_membership(self, job: Job) -> None:
        """Write the membership down, if it is known for sure."""
        # What is known from trainers alone is not kept: the next agent shall not take it for all.
        if not job.resumed:
            self.act(actions.WriteMembership(job.name))

    def _join(self, job: Job, event: events.Attach) -> bool:
        """A process that belongs to no incarnation yet: the present one is its, or a new one.

        Returns:
            Whether it has taken the rank over in the present one.
        """
        caller = event.caller
        holder = job.members.get(caller.rank)
        replaces = holder is not None and holder.process_id != caller.process_id
        if holder is not None and replaces and event.holder_alive:
            raise RankClaimed(caller.job, caller.rank, holder.pid)
        if joining.can_join(job, event):
            return joining.takes_over(job, event)
        launched_anew = bool(event.launch_id) and event.launch_id != job.launch_id
        # Without members the job is new, or its membership was lost: the number found with what is
        # left is taken, and one number for two runs would give two snapshots the same id. Of a
        # resumed one nobody knows whether this rank was in it before.
        anew = not job.members or job.resumed or job.world != caller.world or launched_anew
        if anew or replaces:
            self.begin_incarnation(job, caller.world, event.launch_id)
        return False

    def _join_decided(self, job: Job, event: events.Attach, decided: int) -> None:
        """A process whose incarnation the coordinator knows."""
        caller = event.caller
        holder = job.members.get(caller.rank)
        other = holder is not None and holder.process_id != caller.process_id
        if decided < job.incarnation:
            raise StaleIncarnation(caller.job, decided, job.incarnation)
        if holder is not None and other and event.holder_alive:
            raise RankClaimed(caller.job, caller.rank, holder.pid)
        # Of another launch or world, it is a number that was taken again while those who remember
        # it could not be asked: nobody shall wait here for the ranks of that one.
        is_first = not caller.incarnation and not event.live
        other_launch = bool(event.launch_id and job.launch_id) and event.launch_id != job.launch_id
        if decided > job.incarnation or job.world != caller.world or (is_first and other_launch):
            self.begin_incarnation(job, caller.world, event.launch_id, decided)

    def _rejoin(self, job: Job, event: events.Attach) -> None:
        """A process that knows its incarnation: it never ends another one, however late it is."""
        caller = event.caller
        if not job.members and caller.incarnation >= job.incarnation:
            # The trainers have outlived an agent that lost its memory of them.
            for snapshot in job.open_snapshots():
                if snapshot.id.incarnation != caller.incarnation:
                    self.drop(job, snapshot, "the job was restarted since")
            job.resume(caller, event.launch_id)
        elif not job.has_member(caller):
            raise StaleIncarnation(caller.job, caller.incarnation, job.incarnation)

    def begin_incarnation(
        self, job: Job, world: int, launch_id: str, number: int | None = None
    ) -> None:
        """The job was started anew."""
        for snapshot in job.open_snapshots():
            # What is whole here may be committed on other nodes: the coordinator will say.
            if not (self.rules.clustered and job.sealed_here(snapshot)):
                self.drop(job, snapshot, "the job was restarted before all ranks had sealed it")
        job.begin_incarnation(world, launch_id, number)

    def _session_lost(self, event: events.SessionLost) -> None:
        job = self.jobs.get(event.job)
        member = job.members.get(event.rank) if job else None
        if job is None or member is None or member.process_id != event.process_id:
            return
        if not member.attached:  # it had detached in good order
            return
        member.attached = False
        job.joining.pop(event.rank, None)
        for snapshot in job.present_open_snapshots():
            if event.rank not in snapshot.sealed:
                self.drop(job, snapshot, f"the trainer of rank {event.rank} is gone")
        if self.rules.flush_on_exit:
            flush_newest(self, job)

    def _detach(self, event: events.Detach) -> None:
        job = self._job(event.caller)
        rank = event.caller.rank
        job.members[rank].attached = False
        job.members[rank].detached = True
        job.restoring.discard(rank)
        job.joining.pop(rank, None)
        for snapshot in job.present_open_snapshots():
            if rank not in snapshot.sealed:
                self.drop(job, snapshot, f"rank {rank} closed its client")

    def _arena_reserved(self, event: events.ArenaReserved) -> None:
        job = self.jobs.get(event.job)
        if job is not None:
            job.add_arena(event)
        else:  # removed meanwhile
            self.act(actions.ReleaseArena(event.job, event.rank, event.generation))

    def _arena_gone(self, event: events.ArenaGone) -> None:
        job = self.jobs.get(event.job)
        if job is None:
            return
        for snapshot in list(job.snapshots.values()):
            place = snapshot.granted.get(event.rank)
            if place is not None and place.generation == event.generation:
                snapshot.copying.discard(event.rank)
                if snapshot.stage is not Stage.DROPPED:
                    job.damaged[snapshot.id] = f"the arena of rank {event.rank} is gone"
                    self.drop(job, snapshot, job.damaged[snapshot.id])
        job.remove_arena(event.rank, event.generation)
        for old in job.evictable():
            if old.stage is Stage.DROPPED and not job.in_present_arenas(old):
                self.forget(job, old)

    def check(self, caller: events.Caller) -> None:
        """Raise StaleIncarnation unless this process is the rank's in the present incarnation."""
        self._job(caller)

    def _declare(self, event: events.Declare) -> tuple[int, ...] | None:
        job = self._job(event.caller)
        return job.agreements.declare(event, job.world)

    def _offer(self, event: events.Offer) -> Place | str:
        job = self._job(event.caller)
        rank = event.caller.rank
        if rank not in job.arenas:
            raise ArenaLost(job.name, rank)
        job.restoring.discard(rank)
        job.joining.pop(rank, None)
        job.members[rank].captures_in_flight = event.captures_in_flight
        granting.give_up_older(self, job, event)
        if event.step in job.refused:
            return job.refused[event.step]
        snapshot_id = SnapshotId(job.incarnation, event.step)
        snapshot = job.snapshots.get(snapshot_id)
        if snapshot is None:
            refusal = job.why_not(snapshot_id)
            if refusal and event.patient and refusal.startswith("busy"):
                return refusal
            if refusal:
                job.count("skipped")
                job.refuse(event.step, refusal)
                return refusal
            snapshot = job.snapshots[snapshot_id] = Snapshot(snapshot_id, job.world)
        if snapshot.stage is Stage.DROPPED:
            return snapshot.reason
        if rank in snapshot.sealed:
            return f"step {event.step} is sealed already"
        return granting.grant(self, job, snapshot, event)

    def _seal(self, event: events.Seal) -> str | None:
        job = self._job(event.caller)
        rank = event.caller.rank
        granting.readmit_sealing(job, event)
        snapshot = job.snapshots.get(SnapshotId(job.incarnation, event.step))
        if snapshot is None or snapshot.granted.get(rank) != event.place:
            return f"step {event.step} was not granted that slot"
        snapshot.copying.discard(rank)
        if snapshot.stage is Stage.DROPPED:
            return snapshot.reason
        known = snapshot.sealed.get(rank)
        if known is not None and known.envelope != event.envelope:
            return f"step {event.step} is sealed already, with another record"
        if event.image_bytes > job.arenas[rank][-1].slot_bytes:
            raise OutOfSpace("the slot", event.image_bytes, job.arenas[rank][-1].slot_bytes)
        snapshot.sealing[rank] = SealedShard.of(event)
        self.act(actions.PublishRecord(job.name, snapshot.id, rank, event.place, event.envelope))
        return None

    def _recorded(self, event: events.Recorded) -> None:
        job = self.jobs[event.job]
        snapshot = job.snapshots[event.snapshot]
        snapshot.sealed[event.rank] = snapshot.sealing.pop(event.rank)
        alone = not self.rules.clustered
        if alone and not snapshot.missing_ranks() and snapshot.stage is Stage.OPEN:
            self.commit(job, snapshot)

    def commit(self, job: Job, snapshot: Snapshot) -> None:
        """All ranks have sealed: it is the newest that a restore may take."""
        drifted = snapshot.drifted_replicas()
        if drifted is None or drifted:
            what = "disagree on what is replicated" if drifted is None else "have drifted apart"
            self.drop(job, snapshot, f"the ranks' replicas {what}", drifted or ())
            return
        snapshot.stage = Stage.COMMITTED
        job.count("committed")
        job.damaged.clear()
        job.problems = ()
        for old in job.open_snapshots():
            if old.id < snapshot.id:
                self.drop(job, old, f"{snapshot.id} was committed before it")
        self.act(actions.NotifyCommitted(job.name, snapshot.id, "memory"))
        self.tidy(job, snapshot.id)
        if flush_due(self, job, snapshot.id):
            start_flush(self, job, snapshot)

    def tidy(self, job: Job, committed: SnapshotId) -> None:
        """Forget what a new commit has made useless, and arenas that hold nothing else."""
        # Of an earlier incarnation, heard of late: nothing is known to be newer than what is here.
        settled = committed.incarnation == job.incarnation
        for old in job.evictable():
            dropped = old.stage is Stage.DROPPED and old.id < committed
            if dropped or (settled and not job.in_present_arenas(old)):
                self.forget(job, old)
        for rank, generation in job.idle_generations() if settled else ():
            job.remove_arena(rank, generation)
            self.act(actions.ReleaseArena(job.name, rank, generation))

    def _abandon(self, event: events.Abandon) -> None:
        job = self._job(event.caller)
        snapshot = job.snapshots.get(SnapshotId(job.incarnation, event.step))
        if snapshot is None:
            return
        snapshot.copying.discard(event.caller.rank)
        if snapshot.stage is Stage.OPEN:
            self.drop(job, snapshot, f"rank {event.caller.rank}: {event.reason}")

    def drop(
        self, job: Job, snapshot: Snapshot, reason: str, drifted: tuple[int, ...] = ()
    ) -> None:
        """A snapshot will never commit: withdraw it, and tell the trainers."""
        snapshot.stage = Stage.DROPPED
        snapshot.reason = reason
        job.count("dropped")
        job.last_error = f"{snapshot.id} was dropped: {reason}"
        if snapshot.id not in job.damaged:
            self._withdraw(job, snapshot)
        # The record of a damaged one stays until its slot is needed: the next agent must know too.
        self.act(actions.NotifyDropped(job.name, snapshot.id, reason, drifted))

    def _withdraw(self, job: Job, snapshot: Snapshot) -> None:
        if not snapshot.withdrawn:
            snapshot.withdrawn = True
            for rank, shard in snapshot.sealed.items():
                self.act(actions.DropRecord(job.name, rank, shard.place))

    def forget(self, job: Job, snapshot: Snapshot) -> None:
        """Withdraw a snapshot so that its slots can be written."""
        assert not job.must_stay(snapshot)
        self._withdraw(job, snapshot)
        del job.snapshots[snapshot.id]
        if snapshot.id.incarnation == job.incarnation:
            job.refuse(snapshot.id.step, snapshot.reason or "superseded")

    def _adopt(self, event: events.Adopt) -> None:
        job = self.jobs[event.job] = adopted(event)
        if self.rules.clustered:
            adopt_part(self, job, event)
            return
        for snapshot in sorted(job.snapshots.values(), key=lambda s: s.id, reverse=True):
            problem = job.problem_of_adopted(snapshot)
            if problem:
                self.drop(job, snapshot, problem)
            elif not snapshot.missing_ranks():
                snapshot.stage = Stage.COMMITTED
                snapshot.verified = False
                snapshot.pins += 1
                self.act(actions.VerifyAdopted(job.name, snapshot.id))

    def _adopted_verified(self, event: events.AdoptedVerified) -> None:
        job = self.jobs.get(event.job)
        snapshot = job.snapshots.get(event.snapshot) if job else None
        if job is None or snapshot is None or snapshot.verified:
            return
        snapshot.verified = True
        snapshot.pins -= 1
        if event.damaged:
            self._damaged(events.Damaged(event.job, event.snapshot, event.damaged))

    def _pin(self, event: events.Pin) -> bool:
        job = self.jobs.get(event.job)
        snapshot = job.snapshots.get(event.snapshot) if job else None
        if job is None or snapshot is None or not job.holds(snapshot):
            return False
        snapshot.pins += 1
        return True

    def _unpin(self, event: events.Unpin) -> None:
        job = self.jobs.get(event.job)
        snapshot = job.snapshots.get(event.snapshot) if job else None
        if snapshot is not None and snapshot.pins:
            snapshot.pins -= 1

    def _removed(self, event: events.Removed) -> None:
        job = self.jobs.get(event.job)
        if job is None:
            return
        if any(member.attached for member in job.members.values()):
            raise Refused(f"job {event.job!r} has a trainer attached: end it first.")
        if job.flushing is not None:
            raise Refused(f"job {event.job!r} is being flushed to NVMe: try again shortly.")
        del self.jobs[event.job]

    def _damaged(self, event: events.Damaged) -> None:
        job = self.jobs.get(event.job)
        snapshot = job.snapshots.get(event.snapshot) if job else None
        stages = (Stage.COMMITTED, Stage.OPEN) if self.rules.clustered else (Stage.COMMITTED,)
        if job is not None and snapshot is not None and snapshot.stage in stages:
            job.count("damaged")
            job.damaged[snapshot.id] = event.reason
            self.drop(job, snapshot, event.reason)

    def _restore_decided(self, event: events.RestoreDecided) -> None:
        job = self.jobs.get(event.job)
        if job is None or job.incarnation != event.incarnation:
            return
        job.restored = event.snapshot
        job.restore_decided = True
        ranks = job.members if self.rules.clustered else range(job.world)
        job.restoring = set(ranks) if event.snapshot is not None else set()
        if self.rules.clustered:
            settle_earlier(self, job, event.snapshot)
        self.keep_membership(job)


_HANDLERS: dict[type, Callable[[State, Any], Any]] = {
    events.Attach: State._attach,
    events.SessionLost: State._session_lost,
    events.Detach: State._detach,
    events.ArenaReserved: State._arena_reserved,
    events.ArenaGone: State._arena_gone,
    events.Declare: State._declare,
    events.Offer: State._offer,
    events.Seal: State._seal,
    events.Recorded: State._recorded,
    events.Abandon: State._abandon,
    events.Adopt: State._adopt,
    events.AdoptedVerified: State._adopted_verified,
    events.Damaged: State._damaged,
    events.FlushEnded: flush_ended,
    events.PersistWanted: persist_wanted,
    events.Pin: State._pin,
    events.Unpin: State._unpin,
    events.Removed: State._removed,
    events.RestoreDecided: State._restore_decided,
    events.JoinDecided: joining.join_decided,
    events.CommitOrdered: obeying.commit_ordered,
    events.DropOrdered: obeying.drop_ordered,
    events.DurableOrdered: obeying.durable_ordered,
    events.FlushOrdered: obeying.flush_ordered,
    events.BeginOrdered: obeying.begin_ordered,
    events.Installed: obeying.installed,
    events.PrepareOrdered: rounds.prepare_ordered,
    events.Encoded: rounds.encoded,
    events.RoundEnded: rounds.round_ended,
    events.ParityDamaged: rounds.parity_damaged,
}
