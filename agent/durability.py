"""When a committed snapshot goes to NVMe, and which it pushes out there.

Owns the rules of flushing: the interval, one flush of a job at a time, what somebody waits for,
and the retention on NVMe. Promises that a late flush is skipped and never queued, and that the
newest durable snapshot is never deleted. Part of the agent's decisions: see `agent.state`.
"""

from typing import TYPE_CHECKING

from everstep.agent import actions, events
from everstep.agent.job import Job, Snapshot
from everstep.agent.rounds import flush_parity
from everstep.proto.ids import SnapshotId

if TYPE_CHECKING:
    from everstep.agent.state import State


def flush_due(state: "State", job: Job, committed: SnapshotId) -> bool:
    """Whether a new commit is to be flushed."""
    if not state.rules.nvme:
        return False
    if job.flush_wanted:
        return True
    interval = job.nvme_interval_steps or state.rules.nvme_interval_steps
    if interval:
        return committed.step // interval > job.last_flushed_step() // interval
    interval_s = state.rules.nvme_interval_s
    if interval_s is None:
        return False
    return job.flushed_at_s is None or state.now_s - job.flushed_at_s >= interval_s


def start_flush(state: "State", job: Job, snapshot: Snapshot) -> None:
    """Flush a snapshot, unless another flush is under way."""
    if job.flushing is not None:
        # A late flush is skipped, never queued: the next interval brings a newer snapshot.
        job.count("flushes_skipped")
        return
    if state.rules.clustered and _takes_the_place(job, snapshot.id):
        # Other nodes may never get theirs to disk. The next commit has another step.
        job.count("flushes_skipped")
        job.flush_wanted = True
        return
    job.flush_wanted = False
    job.flushing = snapshot.id
    job.flushed_at_s = state.now_s
    snapshot.pins += 1
    state.act(actions.Flush(job.name, snapshot.id))


def _takes_the_place(job: Job, wanted: SnapshotId) -> bool:
    """Whether a flush would overwrite what is, or may be, the newest that all nodes have on NVMe: a
    step that is taken again after a rewind lies in the same directory."""
    held = {*job.flushed, job.newest_durable()}
    return any(old is not None and old.step == wanted.step and old != wanted for old in held)


def flush_newest(state: "State", job: Job) -> SnapshotId | None:
    """Flush the newest commit now or, while another flush is under way, right after it."""
    newest = job.newest_committed()
    if newest is None or not state.rules.nvme:
        return None
    durable = job.newest_durable()
    if durable is not None and job.preference(durable) >= job.preference(newest.id):
        job.flush_wanted = False
        return durable
    if job.flushing is None:
        start_flush(state, job, newest)
    elif job.flushing != newest.id:
        job.flush_wanted = True
    return newest.id


def persist_wanted(state: "State", event: events.PersistWanted) -> SnapshotId | None:
    """See `everstep.agent.events.PersistWanted`."""
    job = state.jobs.get(event.job)
    return flush_newest(state, job) if job is not None else None


def flush_ended(state: "State", event: events.FlushEnded) -> None:
    """See `everstep.agent.events.FlushEnded`."""
    job = state.jobs[event.job]
    snapshot = job.snapshots[event.snapshot]  # pinned by the flush
    job.flushing = None
    snapshot.pins -= 1
    if event.problem:
        job.count("flushes_failed")
        job.flush_failed.add(event.snapshot)
        job.last_error = f"flush of {event.snapshot}: {event.problem}"
    else:
        job.count("flushed")
        job.flush_failed.clear()
        if state.rules.clustered:
            # Durable once all nodes have their parts on disk: see `events.DurableOrdered`.
            job.flushed[event.snapshot] = (snapshot.world, tuple(sorted(snapshot.sealed)))
        else:
            now_durable(state, job, event.snapshot, snapshot.world)
        flush_parity(state, job)
    if job.flush_wanted:
        # Somebody waits for a newer one. Tried once, and given up if it fails too.
        flush_newest(state, job)


def now_durable(state: "State", job: Job, snapshot: SnapshotId, world: int) -> None:
    """A snapshot is whole on NVMe; what retention does not keep any more goes."""
    for old in [s for s in job.durable if s.step == snapshot.step and s != snapshot]:
        del job.durable[old]
    job.durable[snapshot] = world
    state.act(actions.NotifyCommitted(job.name, snapshot, "nvme"))
    for old, reason in state.expired(sorted(job.durable)):
        being_restored = bool(job.restoring) and old == job.restored
        if being_restored or old == job.newest_durable():
            continue
        del job.durable[old]
        state.act(actions.DeleteDurable(job.name, old, reason))
