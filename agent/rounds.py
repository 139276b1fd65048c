"""A node's part in parity rounds: prepare, publish, commit or give up.

Owns the member's side of the two-phase commit (the coordinator's is `agent.coordination`).
Promises that the parity which is committed is freed only once a newer one is committed, that
parity which is whole is never thrown away on a node's own account, and that one round of a job is
under way at a time: a second order waits, unheard, for the coordinator to say it again. Part of
the agent's decisions: see `agent.state`.
"""

from typing import TYPE_CHECKING

from everstep.agent import actions, events
from everstep.agent.job import Job, Round, RoundStage, Stage
from everstep.agent.plans import ParityPlan
from everstep.proto.ids import SnapshotId

if TYPE_CHECKING:
    from everstep.agent.state import State


def prepare_ordered(state: "State", event: events.PrepareOrdered) -> None:
    """See `everstep.agent.events.PrepareOrdered`."""
    plan = event.plan
    job = state.jobs.get(plan.job)
    if job is None:
        # A node that runs no rank of the job may hold its parity.
        if len(state.jobs) >= state.rules.max_jobs:
            return
        job = state.jobs[plan.job] = Job(plan.job, plan.world, plan.snapshot.incarnation)
    # One that is prepared and of which nobody knows the end is kept beside: see `agent.protection`.
    if plan.plan_id in job.rounds or any(known.is_encoding for known in job.rounds.values()):
        return
    for known in [r for r in job.rounds.values() if r.stage is RoundStage.FAILED]:
        _forget(state, job, known)
    problem = _why_not(state, job, plan)
    if problem:
        job.rounds[plan.plan_id] = Round(plan, RoundStage.FAILED, problem)
        return
    job.rounds[plan.plan_id] = Round(plan)
    state.act(actions.Encode(plan))


def _why_not(state: "State", job: Job, plan: ParityPlan) -> str:
    mine = next((m for m in plan.members if m.node_id == state.rules.node_id), None)
    if mine is None:
        return "the plan does not name this node"
    snapshot = job.snapshots.get(plan.snapshot)
    held = snapshot.sealed if snapshot is not None and snapshot.stage is Stage.COMMITTED else {}
    for shard in mine.shards:
        if shard.rank not in held or held[shard.rank].record_digest != shard.record_digest:
            return f"rank {shard.rank} of {plan.snapshot} is not in memory here any more"
    return ""


def encoded(state: "State", event: events.Encoded) -> None:
    """See `everstep.agent.events.Encoded`."""
    job = state.jobs.get(event.job)
    known = job.rounds.get(event.plan_id) if job is not None else None
    if job is None or known is None:  # given up meanwhile
        state.act(actions.DeleteParity(event.job, event.plan_id))
        return
    if not known.is_encoding:
        return
    if event.problem:
        job.count("parities_failed")
        job.last_error = f"parity of {known.plan.snapshot}: {event.problem}"
        known.problem = event.problem
        if known.stage is RoundStage.MENDING:
            # To report that it failed, or to forget it, would be to say that it never was whole,
            # and that so nobody can have committed the round.
            known.stage = RoundStage.LOST
            state.act(actions.DeleteParity(job.name, event.plan_id))
        else:
            known.stage = RoundStage.FAILED
    else:
        known.stage = RoundStage.PREPARED


def round_ended(state: "State", event: events.RoundEnded) -> None:
    """See `everstep.agent.events.RoundEnded`."""
    job = state.jobs.get(event.job)
    known = job.rounds.get(event.plan_id) if job is not None else None
    if job is None or known is None or known.stage is RoundStage.COMMITTED:
        return
    if event.commit and known.stage is RoundStage.PREPARED:
        _commit(state, job, known)
    elif not event.commit:
        job.count("parities_given_up")
        job.last_error = f"parity of {known.plan.snapshot} was given up: {event.reason}"
        _forget(state, job, known)


def _commit(state: "State", job: Job, known: Round) -> None:
    newest = job.protected()
    known.stage = RoundStage.COMMITTED
    if newest is not None and job.preference(known.plan.snapshot) < job.preference(newest):
        _forget(state, job, known)
        return
    job.count("protected")
    for older in [r for r in job.rounds.values() if r is not known and _useless(job, r, known)]:
        _forget(state, job, older)
    state.act(actions.NotifyCommitted(job.name, known.plan.snapshot, "parity"))
    flush_parity(state, job)
    committed_elsewhere(state, job, known.plan.snapshot)


def committed_elsewhere(state: "State", job: Job, snapshot: SnapshotId) -> None:
    """The job may have gone on with no rank on this node: then nobody overwrites what is here."""
    if job.members or snapshot.incarnation != job.incarnation:
        return
    job.committed_elsewhere = max(snapshot, job.committed_elsewhere or snapshot)
    state.tidy(job, snapshot)


def _useless(job: Job, older: Round, committed: Round) -> bool:
    if older.stage is RoundStage.PREPARED:
        # Maybe it was committed elsewhere: then only something as new takes its place.
        return job.preference(older.plan.snapshot) <= job.preference(committed.plan.snapshot)
    return not older.is_encoding


def _forget(state: "State", job: Job, known: Round) -> None:
    del job.rounds[known.plan.plan_id]
    if known.is_encoding:
        state.act(actions.StopEncoding(job.name, known.plan.plan_id))
    state.act(actions.DeleteParity(job.name, known.plan.plan_id))


def flush_parity(state: "State", job: Job) -> None:
    """Write parity to NVMe beside shards that are there already, here or on other nodes."""
    if not state.rules.nvme:
        return
    for known in job.rounds.values():
        snapshot = known.plan.snapshot
        wanted = snapshot in job.flushed or snapshot in job.durable
        if wanted and known.stage is RoundStage.COMMITTED and not known.on_nvme:
            known.on_nvme = True
            state.act(actions.FlushParity(known.plan))


def parity_damaged(state: "State", event: events.ParityDamaged) -> None:
    """See `everstep.agent.events.ParityDamaged`: it is encoded anew, if its sources are there."""
    job = state.jobs.get(event.job)
    known = job.rounds.get(event.plan_id) if job is not None else None
    if job is None or known is None or known.is_encoding:
        return
    job.count("damaged")
    job.last_error = f"parity of {known.plan.snapshot}: {event.reason}"
    failed = known.stage is RoundStage.FAILED
    known.stage = RoundStage.ENCODING if failed else RoundStage.MENDING
    state.act(actions.Encode(known.plan))
