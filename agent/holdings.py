"""What a node tells the coordinator of each job, and what it is told to do.

Owns the two messages of the control plane as plain data. A `Report` is everything that the
coordinator needs to know of a node, each time; `Orders` is everything that a node still has to do
according to its last report. Promises that both are idempotent: lost, late, doubled or reordered
ones do no harm. The wire form is in `agent.messages`. An order is an event: it is fed to the state
machine of the node that gets it.
"""

from dataclasses import dataclass, field

from everstep.agent import events
from everstep.agent.job import Job, Snapshot, Stage
from everstep.proto.ids import SnapshotId

REPORTED_REFUSALS = 8
"""Newest refused steps of a job that a report names: others may have sealed them."""


@dataclass(frozen=True, slots=True)
class ShardFact:
    """One sealed shard."""

    rank: int
    layout_id: str
    image_bytes: int
    record_digest: bytes = field(repr=False)
    replica_samples: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SnapshotFact:
    """A node's part of a snapshot."""

    snapshot: SnapshotId
    world: int
    stage: str
    """``open`` (not sealed here, or not checked yet), ``sealed``, ``committed`` or ``dropped``."""
    shards: tuple[ShardFact, ...] = ()
    reason: str = ""
    drifted: tuple[int, ...] = ()
    """Keys of leaves: see `everstep.snapshot.samples`."""


@dataclass(frozen=True, slots=True)
class RoundFact:
    """A node's part of a parity round."""

    plan_id: str
    snapshot: SnapshotId
    stage: str
    """``encoding``, ``prepared``, ``committed`` or ``failed``."""
    members: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class FlushedFact:
    """A node's part of a snapshot on its NVMe."""

    snapshot: SnapshotId
    world: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MemberFact:
    """A trainer of the present incarnation on this node."""

    rank: int
    process_id: str
    attached: bool
    joining: bool = False
    """Whether it was taken over live, and has not offered a step yet."""


@dataclass(frozen=True, slots=True)
class JobFact:
    """Everything that a node knows of a job."""

    job: str
    incarnation: int
    world: int
    launch_id: str = ""
    newest_incarnation: int = 0
    """Of anything known here, so that the next number is new."""
    members: tuple[MemberFact, ...] = ()
    snapshots: tuple[SnapshotFact, ...] = ()
    rounds: tuple[RoundFact, ...] = ()
    flushed: tuple[FlushedFact, ...] = ()
    durable: tuple[SnapshotId, ...] = ()
    flushing: SnapshotId | None = None
    flush_failed: tuple[SnapshotId, ...] = ()
    restore_decided: bool = False
    restored: SnapshotId | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """A member's heartbeat, with everything it holds."""

    sequence: int
    """Grows with each report of one agent process."""
    term: int
    """Of the newest coordinator that this node has obeyed."""
    jobs: tuple[JobFact, ...]


Order = (
    events.CommitOrdered
    | events.DropOrdered
    | events.DurableOrdered
    | events.FlushOrdered
    | events.PrepareOrdered
    | events.RoundEnded
    | events.BeginOrdered
)


@dataclass(frozen=True, slots=True)
class Orders:
    """What a member has to do."""

    sequence: int
    """Of the report that this answers."""
    term: int
    orders: tuple[Order, ...]
    suspected: tuple[str, ...]
    coordinator: str
    """Whom the sender takes for the coordinator; itself, if the orders count."""


def job_fact(job: Job) -> JobFact:
    """What this node knows of a job."""
    known = [job.incarnation, *(s.incarnation for s in job.snapshots)]
    known += [s.incarnation for s in (*job.durable, *job.flushed)]
    return JobFact(
        job=job.name,
        incarnation=job.incarnation,
        world=job.world,
        launch_id=job.launch_id,
        newest_incarnation=max(known),
        members=tuple(
            MemberFact(rank, member.process_id, member.attached, rank in job.joining)
            for rank, member in sorted(job.members.items())
        ),
        snapshots=(*_snapshot_facts(job), *_refusals(job)),
        rounds=tuple(
            RoundFact(
                known_round.plan.plan_id,
                known_round.plan.snapshot,
                known_round.stage.value,
                tuple(member.node_id for member in known_round.plan.members),
                known_round.problem,
            )
            for known_round in job.rounds.values()
        ),
        flushed=tuple(
            FlushedFact(snapshot, world, ranks)
            for snapshot, (world, ranks) in sorted(job.flushed.items())
        ),
        durable=tuple(sorted(job.durable)),
        flushing=job.flushing,
        flush_failed=tuple(sorted(job.flush_failed)),
        restore_decided=job.restore_decided,
        restored=job.restored,
    )


def _snapshot_facts(job: Job) -> tuple[SnapshotFact, ...]:
    facts = []
    for snapshot in job.snapshots.values():
        stage = _stage(job, snapshot)
        if stage == "dropped":
            facts.append(
                SnapshotFact(snapshot.id, snapshot.world, stage, reason=snapshot.reason[:500])
            )
        else:
            shards = _shards(snapshot) if stage != "open" else ()
            facts.append(SnapshotFact(snapshot.id, snapshot.world, stage, shards))
    return tuple(facts)


def _stage(job: Job, snapshot: Snapshot) -> str:
    if snapshot.stage is Stage.DROPPED:
        return "dropped"
    if not snapshot.verified:
        return "open"
    if snapshot.stage is Stage.COMMITTED:
        return "committed"
    return "sealed" if job.sealed_here(snapshot) else "open"


def _shards(snapshot: Snapshot) -> tuple[ShardFact, ...]:
    return tuple(
        ShardFact(
            rank, shard.layout_id, shard.image_bytes, shard.record_digest, shard.replica_samples
        )
        for rank, shard in sorted(snapshot.sealed.items())
    )


def _refusals(job: Job) -> list[SnapshotFact]:
    """Steps refused here, which other nodes may have sealed."""
    newest = job.newest_committed()
    after = newest.id if newest is not None else SnapshotId(0, 0)
    named = [(SnapshotId(job.incarnation, step), reason) for step, reason in job.refused.items()][
        -REPORTED_REFUSALS:
    ]
    return [
        SnapshotFact(snapshot, job.world, "dropped", reason=reason[:500])
        for snapshot, reason in named
        if snapshot > after and snapshot not in job.snapshots
    ]


def holds_round(fact: JobFact, plan_id: str) -> str:
    """The stage of a node's part in a round; empty if it knows nothing of it."""
    return next((r.stage for r in fact.rounds if r.plan_id == plan_id), "")
