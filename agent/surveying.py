"""What is known of the cluster and its jobs, put into messages for people.

Owns the membership as an agent sees it, and the coordinator's survey of each job: the newest step
at each level, what is not committed yet and who holds it up, the parity round under way, the
groups of the newest parity. Promises that a survey says nothing that the members did not report.
Asks nobody and decides nothing.
"""

from collections.abc import Iterator, Mapping

from everstep.agent.coordination import Cluster, Coordination
from everstep.agent.holdings import JobFact
from everstep.agent.job import Job
from everstep.agent.members import Members
from everstep.agent.tables import JobTable
from everstep.proto import agent_pb2, peer_pb2
from everstep.proto.ids import SnapshotId

LIVE, SUSPECTED, REPLACED = "live", "suspected", "replaced"
_PENDING = 4
"""Snapshots that wait for ranks, of one job: more are never open at one time but after a crash."""


def cluster_status(
    members: Members, refused: Mapping[str, int], bulk: Mapping[str, int], now_s: float
) -> agent_pb2.ClusterStatus:
    """The membership, as an agent sees it."""
    suspected = set(members.suspected(now_s))
    return agent_pb2.ClusterStatus(
        joined=members.joined,
        epoch=members.epoch,
        coordinator=members.coordinator(now_s),
        fenced_by=members.fenced_by,
        refusal=members.refusal,
        members=[
            agent_pb2.MemberStatus(
                node_id=entry.node_id,
                address=entry.address,
                labels=dict(entry.labels),
                state=REPLACED
                if entry.replaced_by
                else SUSPECTED
                if entry.node_id in suspected
                else LIVE,
                replaced_by=entry.replaced_by,
                since_epoch=entry.since_epoch,
            )
            for entry in members.view
        ],
        waiting_for=members.waiting_for(now_s) if members.is_coordinator(now_s) else (),
        refused_calls=refused,
        bulk_counters=bulk,
    )


def survey(
    coordination: Coordination, cluster: Cluster, now_s: float, only_job: str = ""
) -> list[peer_pb2.JobSurvey]:
    """What the coordinator knows of each job."""
    rounds = coordination.protection.rounds()
    return [
        _surveyed(name, table, coordination, cluster, rounds.get(name), now_s)
        for name, table in sorted(coordination.jobs.items())
        if only_job in ("", name)
    ]


def _surveyed(
    name: str,
    table: JobTable,
    coordination: Coordination,
    cluster: Cluster,
    at_work: tuple[SnapshotId, tuple[str, ...], float] | None,
    now_s: float,
) -> peer_pb2.JobSurvey:
    newest = coordination.newest_committed(name)
    message = peer_pb2.JobSurvey(
        job=name,
        incarnation=table.incarnation,
        world=table.world,
        ranks=_ranks(table.facts, table.incarnation),
        newest=_newest(table, newest, cluster),
        pending=_pending(table, newest),
        groups=_groups(table, cluster),
        problems=sorted(set(_problems(table.facts))),
        excluded=[_named(snapshot) for snapshot in _drifted(table)],
    )
    restored = _restored(table)
    if restored is not None:
        message.restored.CopyFrom(_named(restored))
    if at_work is not None:
        snapshot, waiting_for, started_s = at_work
        message.round.CopyFrom(
            peer_pb2.RoundSurvey(
                incarnation=snapshot.incarnation,
                step=snapshot.step,
                waiting_for=waiting_for,
                running_s=now_s - started_s,
            )
        )
    return message


def _named(snapshot: SnapshotId) -> peer_pb2.SnapshotName:
    return peer_pb2.SnapshotName(incarnation=snapshot.incarnation, step=snapshot.step)


def _restored(table: JobTable) -> SnapshotId | None:
    present = [f for f in table.facts.values() if f.incarnation == table.incarnation]
    return max((f.restored for f in present if f.restored is not None), default=None)


def _drifted(table: JobTable) -> list[SnapshotId]:
    return [
        snapshot
        for snapshot, known in sorted(table.snapshots.items())
        if known.whole and known.drifted_replicas() != () and not known.committed_at
    ]


def _ranks(facts: Mapping[str, JobFact], incarnation: int) -> list[peer_pb2.RankSurvey]:
    """Where each rank runs or, if nobody attached it since, ran."""
    found: dict[int, tuple[int, bool, str]] = {}
    for node_id, fact in sorted(facts.items()):
        for member in fact.members:
            place = (fact.incarnation, member.attached, node_id)
            found[member.rank] = max(place, found.get(member.rank, place))
    return [
        peer_pb2.RankSurvey(
            rank=rank, node_id=node_id, attached=attached and of_incarnation == incarnation
        )
        for rank, (of_incarnation, attached, node_id) in sorted(found.items())
    ]


def _newest(
    table: JobTable, in_memory: SnapshotId | None, cluster: Cluster
) -> list[peer_pb2.LevelSurvey]:
    durable = [snapshot for snapshot, known in table.flushed.items() if known.whole]
    found = {
        "memory": in_memory,
        "parity": newest_protected(table, cluster),
        "nvme": max([*durable, *table.durable], default=None),
    }
    return [
        peer_pb2.LevelSurvey(level=level, incarnation=one.incarnation, step=one.step)
        for level, one in found.items()
        if one is not None
    ]


def newest_protected(table: JobTable, cluster: Cluster) -> SnapshotId | None:
    """The newest snapshot of which some parity is committed, be members of its groups lost."""
    return max((snapshot for _, snapshot, _, _ in _committed_plans(table, cluster)), default=None)


def _committed_plans(
    table: JobTable, cluster: Cluster
) -> Iterator[tuple[str, SnapshotId, tuple[str, ...], list[str]]]:
    """Plans with committed parity: (plan, snapshot, members, those whose part is missing)."""
    for plan_id, nodes in sorted(table.rounds.items()):
        facts = list(nodes.values())
        if any(fact.stage == "committed" for fact in facts):
            there = {node_id for node_id, fact in nodes.items() if fact.stage != "failed"}
            missing = [m for m in facts[0].members if m not in there & cluster.live]
            yield plan_id, facts[0].snapshot, facts[0].members, missing


def _groups(table: JobTable, cluster: Cluster) -> list[peer_pb2.GroupSurvey]:
    newest = newest_protected(table, cluster)
    return [
        peer_pb2.GroupSurvey(
            plan_id=plan_id,
            incarnation=snapshot.incarnation,
            step=snapshot.step,
            members=members,
            missing=missing,
        )
        for plan_id, snapshot, members, missing in _committed_plans(table, cluster)
        if snapshot == newest
    ]


def _pending(table: JobTable, newest: SnapshotId | None) -> list[peer_pb2.PendingSurvey]:
    runs_on = {
        member.rank: node_id
        for node_id, fact in table.facts.items()
        if fact.incarnation == table.incarnation
        for member in fact.members
    }
    found = []
    for snapshot, known in sorted(table.snapshots.items(), reverse=True)[:_PENDING]:
        if known.decided or (newest is not None and snapshot <= newest):
            continue
        late = [rank for rank in range(known.world) if rank not in known.ranks]
        found.append(
            peer_pb2.PendingSurvey(
                incarnation=snapshot.incarnation,
                step=snapshot.step,
                late_ranks=late,
                late_nodes=sorted({runs_on[rank] for rank in late if rank in runs_on}),
            )
        )
    return found


def _problems(facts: Mapping[str, JobFact]) -> Iterator[str]:
    for node_id, fact in facts.items():
        for known in fact.rounds:
            if known.problem:
                yield f"{node_id}: parity of {known.snapshot}: {known.problem}"
        for snapshot in fact.flush_failed:
            yield f"{node_id}: {snapshot} could not be flushed to NVMe"


def captured_times(job: Job | None) -> dict[SnapshotId, float]:
    """When the snapshots in this agent's memory were captured."""
    if job is None:
        return {}
    times = {
        snapshot.id: max((s.captured_unix_s for s in snapshot.sealed.values()), default=0.0)
        for snapshot in job.snapshots.values()
    }
    return {snapshot: unix_s for snapshot, unix_s in times.items() if unix_s}
