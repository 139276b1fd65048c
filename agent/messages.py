"""Reports, orders, claims and views as they travel between agents.

Owns the translation between the plain data of `agent.holdings` and `agent.members` and the
messages of proto/peer.proto. Promises that what was parsed is bounded and has harmless names, and
that an order of an unknown kind, from a newer agent, is left out and not guessed at. Decides
nothing.
"""

from collections.abc import Iterable

import xxhash

from everstep.agent import events, plans
from everstep.agent.holdings import (
    FlushedFact,
    JobFact,
    MemberFact,
    Order,
    Orders,
    Report,
    RoundFact,
    ShardFact,
    SnapshotFact,
)
from everstep.agent.members import Claim, ClaimAnswer
from everstep.agent.view import Entry, View
from everstep.proto import peer_pb2 as wire
from everstep.proto.ids import SnapshotId, checked_name

_REASON_CHARACTERS = 500


def view_message(view: View) -> wire.View:
    """A view as a message."""
    return wire.View(
        entries=[
            wire.Entry(
                node_id=entry.node_id,
                boot_id=entry.boot_id,
                since_epoch=entry.since_epoch,
                address=entry.address,
                labels=dict(entry.labels),
                replaced_by=entry.replaced_by,
            )
            for entry in view
        ]
    )


def parsed_view(message: wire.View) -> View:
    """The view in a message.

    Raises:
        InvalidName: If a node's name is not acceptable.
    """
    return View(
        Entry(
            checked_name("node", entry.node_id),
            entry.since_epoch,
            entry.boot_id[:64],
            replaced_by=entry.replaced_by and checked_name("node", entry.replaced_by),
            address=entry.address[:300],
            labels=tuple(sorted(entry.labels.items())),
        )
        for entry in message.entries
    )


def claim_message(claim: Claim, sender: wire.Sender) -> wire.ClaimRequest:
    """A claim as a message."""
    return wire.ClaimRequest(
        sender=sender,
        address=claim.address,
        labels=dict(claim.labels),
        replaces=claim.replaces,
        view=view_message(claim.view),
    )


def parsed_claim(message: wire.ClaimRequest) -> Claim:
    """The claim in a message.

    Raises:
        InvalidName: If a node's name is not acceptable.
    """
    return Claim(
        node_id=checked_name("node", message.sender.node_id),
        boot_id=message.sender.boot_id[:64],
        address=message.address[:300],
        labels=tuple(sorted(message.labels.items())),
        replaces=message.replaces and checked_name("node", message.replaces),
        view=parsed_view(message.view),
    )


def answer_message(answer: ClaimAnswer) -> wire.ClaimReply:
    """The answer to a claim as a message."""
    return wire.ClaimReply(
        view=view_message(answer.view),
        refusal=answer.refusal,
        coordinator=answer.coordinator,
        joined=answer.joined,
    )


def parsed_answer(message: wire.ClaimReply) -> ClaimAnswer:
    """The answer to a claim in a message."""
    refusal = message.refusal[:1000]
    return ClaimAnswer(parsed_view(message.view), refusal, message.coordinator, message.joined)


def view_digest(view: View) -> bytes:
    """Equal for equal views, and most likely for no others."""
    return xxhash.xxh3_64_digest(view_message(view).SerializeToString(deterministic=True))


def report_message(report: Report, sender: wire.Sender, view: View | None) -> wire.ReportRequest:
    """A report as a message; without a view if the receiver has the same."""
    return wire.ReportRequest(
        sender=sender,
        sequence=report.sequence,
        term=report.term,
        jobs=[_job_message(fact) for fact in report.jobs],
        view=view_message(view) if view is not None else None,
    )


def parsed_report(message: wire.ReportRequest) -> Report:
    """The report in a message.

    Raises:
        InvalidName: If a job's name is not acceptable.
    """
    return Report(message.sequence, message.term, tuple(_parsed_job(job) for job in message.jobs))


def _name(snapshot: SnapshotId | None) -> wire.SnapshotName | None:
    return _name_of(snapshot) if snapshot is not None else None


def _name_of(snapshot: SnapshotId) -> wire.SnapshotName:
    return wire.SnapshotName(incarnation=snapshot.incarnation, step=snapshot.step)


def _named(name: wire.SnapshotName) -> SnapshotId:
    return SnapshotId(name.incarnation, name.step)


def _job_message(fact: JobFact) -> wire.JobFact:
    return wire.JobFact(
        job=fact.job,
        incarnation=fact.incarnation,
        world=fact.world,
        launch_id=fact.launch_id,
        newest_incarnation=fact.newest_incarnation,
        members=[
            wire.MemberFact(
                rank=m.rank, process_id=m.process_id, attached=m.attached, joining=m.joining
            )
            for m in fact.members
        ],
        snapshots=[_snapshot_message(part) for part in fact.snapshots],
        rounds=[
            wire.RoundFact(
                plan_id=known.plan_id,
                incarnation=known.snapshot.incarnation,
                step=known.snapshot.step,
                stage=known.stage,
                problem=known.problem[:_REASON_CHARACTERS],
                members=known.members,
            )
            for known in fact.rounds
        ],
        flushed=[
            wire.FlushedFact(
                incarnation=part.snapshot.incarnation,
                step=part.snapshot.step,
                world=part.world,
                ranks=part.ranks,
            )
            for part in fact.flushed
        ],
        durable=[_name_of(snapshot) for snapshot in fact.durable],
        flushing=_name(fact.flushing),
        flush_failed=[_name_of(snapshot) for snapshot in fact.flush_failed],
        restore_decided=fact.restore_decided,
        restored=_name(fact.restored),
    )


def _snapshot_message(part: SnapshotFact) -> wire.SnapshotFact:
    return wire.SnapshotFact(
        incarnation=part.snapshot.incarnation,
        step=part.snapshot.step,
        world=part.world,
        stage=part.stage,
        shards=[
            wire.ShardFact(
                rank=shard.rank,
                layout_id=shard.layout_id,
                image_bytes=shard.image_bytes,
                record_digest=shard.record_digest,
                replica_samples=shard.replica_samples,
            )
            for shard in part.shards
        ],
        reason=part.reason[:_REASON_CHARACTERS],
        drifted=part.drifted,
    )


def _parsed_job(message: wire.JobFact) -> JobFact:
    return JobFact(
        job=checked_name("job", message.job),
        incarnation=message.incarnation,
        world=message.world,
        launch_id=message.launch_id,
        newest_incarnation=message.newest_incarnation,
        members=tuple(
            MemberFact(m.rank, m.process_id, m.attached, m.joining) for m in message.members
        ),
        snapshots=tuple(_parsed_snapshot(part) for part in message.snapshots),
        rounds=tuple(
            RoundFact(
                known.plan_id,
                SnapshotId(known.incarnation, known.step),
                known.stage,
                tuple(known.members),
                known.problem[:_REASON_CHARACTERS],
            )
            for known in message.rounds
        ),
        flushed=tuple(
            FlushedFact(SnapshotId(part.incarnation, part.step), part.world, tuple(part.ranks))
            for part in message.flushed
        ),
        durable=tuple(_named(name) for name in message.durable),
        flushing=_named(message.flushing) if message.HasField("flushing") else None,
        flush_failed=tuple(_named(name) for name in message.flush_failed),
        restore_decided=message.restore_decided,
        restored=_named(message.restored) if message.HasField("restored") else None,
    )


def _parsed_snapshot(part: wire.SnapshotFact) -> SnapshotFact:
    return SnapshotFact(
        SnapshotId(part.incarnation, part.step),
        part.world,
        part.stage,
        tuple(
            ShardFact(s.rank, s.layout_id, s.image_bytes, s.record_digest, s.replica_samples)
            for s in part.shards
        ),
        part.reason[:_REASON_CHARACTERS],
        tuple(part.drifted),
    )


def orders_message(orders: Orders, sender: wire.Sender, view: View | None) -> wire.OrdersReply:
    """Orders as a message; without a view if the receiver has the same."""
    return wire.OrdersReply(
        sender=sender,
        sequence=orders.sequence,
        term=orders.term,
        orders=[_order_message(order) for order in orders.orders],
        suspected=orders.suspected,
        view=view_message(view) if view is not None else None,
        coordinator=orders.coordinator,
    )


def parsed_orders(message: wire.OrdersReply) -> Orders:
    """The orders in a message.

    Raises:
        FormatInvalid: If a plan contradicts itself.
        InvalidName: If a name is not acceptable.
    """
    return Orders(
        sequence=message.sequence,
        term=message.term,
        orders=tuple(_parsed_orders(message.orders)),
        suspected=tuple(message.suspected),
        coordinator=message.coordinator,
    )


def _order_message(order: Order) -> wire.Order:
    if isinstance(order, events.PrepareOrdered):
        return wire.Order(job=order.job, prepare=order.plan.encoded())
    if isinstance(order, events.RoundEnded):
        end = wire.EndRound(plan_id=order.plan_id, commit=order.commit, reason=order.reason[:1000])
        return wire.Order(job=order.job, end_round=end)
    if isinstance(order, events.BeginOrdered):
        begin = wire.Begin(world=order.world, launch_id=order.launch_id)
        return wire.Order(job=order.job, incarnation=order.incarnation, begin=begin)
    message = wire.Order(
        job=order.job, incarnation=order.snapshot.incarnation, step=order.snapshot.step
    )
    if isinstance(order, events.CommitOrdered):
        message.commit.commit_id = order.commit_id
    elif isinstance(order, events.DropOrdered):
        message.drop.reason = order.reason[:1000]
        message.drop.drifted.extend(order.drifted)
    elif isinstance(order, events.DurableOrdered):
        message.durable.SetInParent()
    else:
        message.flush.SetInParent()
    return message


def _parsed_orders(messages: Iterable[wire.Order]) -> Iterable[Order]:
    for message in messages:
        job = checked_name("job", message.job)
        snapshot = SnapshotId(message.incarnation, message.step)
        kind = message.WhichOneof("kind")
        if kind == "commit":
            yield events.CommitOrdered(job, snapshot, message.commit.commit_id)
        elif kind == "drop":
            drifted = tuple(message.drop.drifted)
            yield events.DropOrdered(job, snapshot, message.drop.reason, drifted)
        elif kind == "durable":
            yield events.DurableOrdered(job, snapshot)
        elif kind == "flush":
            yield events.FlushOrdered(job, snapshot)
        elif kind == "prepare":
            yield events.PrepareOrdered(plans.parsed(message.prepare, "an order"))
        elif kind == "end_round":
            end = message.end_round
            yield events.RoundEnded(job, end.plan_id, end.commit, end.reason)
        elif kind == "begin":
            begin = message.begin
            yield events.BeginOrdered(job, message.incarnation, begin.world, begin.launch_id)
