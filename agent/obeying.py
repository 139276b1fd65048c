"""What a node does at the coordinator's word.

Owns the handling of its orders for snapshots: commit, drop, durable, flush, begin; and what becomes
of what was found at the start, or installed since. Promises that
every order is idempotent and that one which comes too late changes nothing. Part of the agent's
decisions: see `agent.state`. Orders about parity are in `agent.rounds`.
"""

from typing import TYPE_CHECKING

from everstep.agent import actions, events
from everstep.agent.durability import now_durable, start_flush
from everstep.agent.job import Job, Member, Round, RoundStage, SealedShard, Snapshot, Stage
from everstep.agent.rounds import committed_elsewhere, flush_parity
from everstep.proto.ids import SnapshotId

if TYPE_CHECKING:
    from everstep.agent.state import State


def commit_ordered(state: "State", event: events.CommitOrdered) -> None:
    """See `everstep.agent.events.CommitOrdered`."""
    job = state.jobs.get(event.job)
    snapshot = job.snapshots.get(event.snapshot) if job is not None else None
    if job is None:
        return
    if snapshot is None:
        committed_elsewhere(state, job, event.snapshot)
        return
    if event.commit_id:
        snapshot.commit_id = event.commit_id
    if snapshot.stage is Stage.OPEN:
        state.commit(job, snapshot)


def drop_ordered(state: "State", event: events.DropOrdered) -> None:
    """See `everstep.agent.events.DropOrdered`."""
    job = state.jobs.get(event.job)
    if job is None:
        return
    snapshot = job.snapshots.get(event.snapshot)
    if snapshot is not None and snapshot.stage is Stage.OPEN:
        state.drop(job, snapshot, event.reason, event.drifted)
    elif snapshot is None and event.snapshot.incarnation == job.incarnation:
        job.refuse(event.snapshot.step, event.reason)


def durable_ordered(state: "State", event: events.DurableOrdered) -> None:
    """See `everstep.agent.events.DurableOrdered`."""
    job = state.jobs.get(event.job)
    if job is None or event.snapshot in job.durable:
        return
    known = job.flushed.pop(event.snapshot, None)
    if known is None and (job.members or event.snapshot.incarnation != job.incarnation):
        return
    # Of what the job has flushed without a rank on this node, there is nothing here but parity.
    world, ranks = known or (job.world, ())
    job.durable_ranks[event.snapshot] = ranks
    now_durable(state, job, event.snapshot, world)
    for old in [s for s in job.flushed if job.preference(s) < job.preference(event.snapshot)]:
        # Some node never got it to disk, and now there is something newer that all have.
        del job.flushed[old]
        state.act(actions.DeleteDurable(job.name, old, "not whole, and superseded"))
    if known is None:
        flush_parity(state, job)


def flush_ordered(state: "State", event: events.FlushOrdered) -> None:
    """See `everstep.agent.events.FlushOrdered`."""
    job = state.jobs.get(event.job)
    snapshot = job.snapshots.get(event.snapshot) if job is not None else None
    if job is None or snapshot is None or snapshot.stage is not Stage.COMMITTED:
        return
    known = event.snapshot in job.flushed or event.snapshot in job.durable
    if state.rules.nvme and not known and job.flushing is None:
        start_flush(state, job, snapshot)


def begin_ordered(state: "State", event: events.BeginOrdered) -> None:
    """See `everstep.agent.events.BeginOrdered`."""
    job = state.jobs.get(event.job)
    if job is not None and event.incarnation > job.incarnation:
        state.begin_incarnation(job, event.world, event.launch_id, event.incarnation)
        state.keep_membership(job)


def adopted(event: events.Adopt) -> Job:
    """A job as it was found at the agent's start; nothing in it is judged yet."""
    job = Job(event.job, event.world, event.incarnation, event.launch_id)
    job.members = {
        m.rank: Member(m.process_id, m.pid, m.pid_started_s, attached=False, adopted=True)
        for m in event.members
    }
    for arena in event.arenas:
        job.add_arena(arena)
    job.durable = dict(event.durable)
    for plan in event.parities:
        job.rounds[plan.plan_id] = Round(plan, RoundStage.PREPARED)
    job.restored = event.restored
    job.restore_decided = event.restore_decided
    job.problems = tuple(event.problems)
    if event.restored is not None and event.restore_decided:
        job.restoring = set(range(event.world))
    for found in event.shards:
        new = Snapshot(found.snapshot, found.world)
        snapshot = job.snapshots.setdefault(found.snapshot, new)
        snapshot.granted[found.rank] = found.place
        snapshot.sealed[found.rank] = SealedShard.of(found)
    return job


def adopt_part(state: "State", job: Job, event: events.Adopt) -> None:
    """What an agent with peers finds at its start is judged by all of them, not by itself."""
    job.flushed = {
        snapshot: (world, event.flushed_ranks.get(snapshot, ()))
        for snapshot, world in event.durable
    }
    job.durable.clear()
    job.restoring &= job.members.keys()  # the others never come here to say that they are done
    for snapshot in sorted(job.snapshots.values(), key=lambda s: s.id, reverse=True):
        snapshot.verified = False
        snapshot.pins += 1
        if job.in_round(snapshot.id):
            snapshot.stage = Stage.COMMITTED  # a round is begun for nothing else
        state.act(actions.VerifyAdopted(job.name, snapshot.id))


def settle_earlier(state: "State", job: Job, restored: SnapshotId | None) -> None:
    """What was sealed in earlier incarnations, and not judged, is decided by what is restored."""
    for snapshot in job.open_snapshots():
        if snapshot.id.incarnation == job.incarnation:
            continue
        if snapshot.id == restored or job.in_round(snapshot.id):
            snapshot.stage = Stage.COMMITTED
        else:
            state.drop(job, snapshot, "not all ranks had sealed it, and the job went on without it")


def installed(state: "State", event: events.Installed) -> None:
    """See `everstep.agent.events.Installed`."""
    job = state.jobs.get(event.job)
    shard = event.shard
    if job is None:
        job = state.jobs[event.job] = Job(event.job, shard.world, shard.snapshot.incarnation)
    job.add_arena(event.arena)
    new = Snapshot(shard.snapshot, shard.world, Stage.COMMITTED)
    snapshot = job.snapshots.setdefault(shard.snapshot, new)
    if snapshot.stage is Stage.DROPPED:
        snapshot.withdrawn = False
        snapshot.reason = ""
    snapshot.stage = Stage.COMMITTED
    # One commit id stands for all shards here: it must not be said of one that it is not known of.
    if not snapshot.sealed.keys() - {shard.rank}:
        snapshot.commit_id = shard.commit_id
    elif snapshot.commit_id != shard.commit_id:
        snapshot.commit_id = b""
    snapshot.granted[shard.rank] = shard.place
    snapshot.sealed[shard.rank] = SealedShard.of(shard)
    job.damaged.pop(shard.snapshot, None)
