"""Ranks that are taken over while the others go on: what that means on this node.

Owns the rule for a process that asks to join live: whether there is anything going on that it can
join, what its predecessor leaves behind, and what stays in memory while it reads. Promises that the
incarnation goes on, so that nobody else's session, commit or copy ends with it; that an open step
which the predecessor will never seal is dropped; and that as long as a rank is joining no further
step is begun here, so that no rank waits for one that cannot be there. Part of the agent's
decisions: see `agent.state`.
"""

from typing import TYPE_CHECKING

from everstep.agent import events
from everstep.agent.job import Job, Stage
from everstep.proto.errors import Refused

if TYPE_CHECKING:
    from everstep.agent.state import State


def other_world(job: str, rank: int, world: int, running: int) -> Refused:
    """A launch of another size cannot be joined."""
    return Refused(
        f"rank {rank} of job {job!r} would join live with a world of {world}, and {running} "
        "rank(s) make up the one that is running. Nothing was changed, the others go on. Start "
        f"it with a world of {running}, or end the others and start all ranks anew."
    )


def can_join(job: Job, event: events.Attach) -> bool:
    """Whether a process that asks for it joins what is going on; if not, it starts as any other.

    Raises:
        Refused: If what is going on is of another size.
    """
    rank = event.caller.rank
    others = any(m.attached for other, m in job.members.items() if other != rank)
    if not event.live or not (others or event.others_alive):
        return False
    if job.world != event.caller.world:
        raise other_world(job.name, rank, event.caller.world, job.world)
    return True


def takes_over(job: Job, event: events.Attach) -> bool:
    """Whether the rank was another process's in this incarnation, as far as anything here tells."""
    rank = event.caller.rank
    holder = job.members.get(rank)
    if holder is not None and holder.process_id != event.caller.process_id:
        return True
    # Every rank had a part in what is committed, and this process asks for the first time.
    return any(
        s.id.incarnation == job.incarnation and s.stage is Stage.COMMITTED
        for s in job.snapshots.values()
    )


def joined(state: "State", job: Job, rank: int) -> None:
    """A process has taken the rank over."""
    job.joining[rank] = None
    job.count("joined")
    for snapshot in job.present_open_snapshots():
        if rank not in snapshot.sealed:
            state.drop(job, snapshot, f"the trainer of rank {rank} was replaced")


def join_decided(state: "State", event: events.JoinDecided) -> None:
    """See `everstep.agent.events.JoinDecided`."""
    job = state.jobs.get(event.job)
    if job is not None and job.incarnation == event.incarnation and event.rank in job.members:
        job.joining[event.rank] = event.snapshot
