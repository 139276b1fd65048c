"""How safe each job of a cluster is: what `everstep status` says beyond one agent's own facts.

Owns the derivation of what is at risk, of the redundancy left, of the lag behind the newest commit
and of who is late, and its names in the JSON document. Promises that a job counts as no safer than
the plans of recovery say: whatever they do not cover is at risk. Asks nobody, shows nothing: see
`agent.showing_cluster`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from everstep.agent.display import age, ranks

if TYPE_CHECKING:
    # For their names alone.
    from everstep.proto.agent_pb2 import ClusterStatus
    from everstep.proto.peer_pb2 import (
        HeldOverview,
        JobOverview,
        JobSurvey,
        OverviewReply,
        SnapshotPlan,
    )

Report = dict[str, Any]
LEVELS = ("memory", "parity", "nvme")
_SHOWN_FALLBACKS = 4


def cluster_report(node_id: str, cluster: "ClusterStatus", overview: "OverviewReply") -> Report:
    """The membership as a node sees it, and how safe each job is."""
    gone = [member.node_id for member in cluster.members if member.state == "suspected"]
    surveyed = {one.job: one for one in overview.survey.jobs}
    return {
        "joined": cluster.joined,
        "epoch": cluster.epoch,
        "coordinator": cluster.coordinator,
        "fenced_by": cluster.fenced_by,
        "refusal": cluster.refusal,
        "members": [
            {
                "node_id": member.node_id,
                "address": member.address,
                "labels": dict(sorted(member.labels.items())),
                "state": (
                    "fenced" if member.node_id == node_id and cluster.fenced_by else member.state
                ),
                "replaced_by": member.replaced_by,
                "since_epoch": member.since_epoch,
            }
            for member in cluster.members
        ],
        "suspected": gone,
        "waiting_for": sorted({*cluster.waiting_for, *overview.survey.waiting_for}),
        "protects": overview.survey.protects,
        "warnings": list(overview.survey.warnings),
        "refused_calls": dict(sorted(cluster.refused_calls.items())),
        "bulk_counters": dict(sorted(cluster.bulk_counters.items())),
        "problem": overview.problem,
        "jobs": [
            job_report(job, surveyed.get(job.job), gone, protects=overview.survey.protects)
            for job in overview.jobs
        ],
    }


def job_report(
    job: "JobOverview",
    surveyed: "JobSurvey | None",
    gone: Sequence[str],
    *,
    protects: bool,
) -> Report:
    """How safe one job is.

    Args:
        job: What all nodes hold of it.
        surveyed: What the coordinator knows of it; None if there was none to ask.
        gone: Members that are suspected.
        protects: Whether parity is encoded at all.
    """
    recoverable = [plan for plan in job.plans if plan.recoverable]
    newest = _newest(job, surveyed)
    return {
        "job": job.job,
        "incarnation": surveyed.incarnation if surveyed else None,
        "world": surveyed.world if surveyed else None,
        "ranks": [
            {"rank": one.rank, "node_id": one.node_id, "attached": one.attached}
            for one in (surveyed.ranks if surveyed else ())
        ],
        "newest": newest,
        "recoverable": _plan_report(recoverable[0]) if recoverable else None,
        "fallbacks": list(_fallbacks(recoverable)),
        "at_risk": [
            *_risks_of_loss(job, recoverable, protects=protects),
            *(_risks_of_power(recoverable, newest.get("nvme")) if surveyed else ()),
        ],
        "pending": [
            {
                "step": one.step,
                "incarnation": one.incarnation,
                "late_ranks": list(one.late_ranks),
                "late_nodes": list(one.late_nodes),
            }
            for one in (surveyed.pending if surveyed else ())
        ],
        "round": _round_report(surveyed),
        "groups": [
            {
                "plan_id": one.plan_id,
                "step": one.step,
                "members": list(one.members),
                "missing": list(one.missing),
            }
            for one in (surveyed.groups if surveyed else ())
        ],
        "silent": sorted({*job.silent, *gone}),
        "problems": [*job.problems, *(surveyed.problems if surveyed else ())],
    }


def _plan_report(plan: "SnapshotPlan") -> Report:
    return {
        "step": plan.step,
        "incarnation": plan.incarnation,
        "further_losses": plan.further_losses,
        "memory_losses": plan.memory_losses if plan.HasField("memory_losses") else None,
    }


def _round_report(surveyed: "JobSurvey | None") -> Report | None:
    if surveyed is None or not surveyed.HasField("round"):
        return None
    at_work = surveyed.round
    return {
        "step": at_work.step,
        "incarnation": at_work.incarnation,
        "waiting_for": list(at_work.waiting_for),
        "running_s": at_work.running_s,
    }


def _newest(job: "JobOverview", surveyed: "JobSurvey | None") -> Report:
    """The newest step at each level, with how far it is behind the newest commit."""
    if surveyed is None:
        return {}
    times = {(held.incarnation, held.step): held.captured_unix_s for held in job.held}
    found = {one.level: (one.incarnation, one.step) for one in surveyed.newest}
    first = max(found.values(), default=None)
    report: Report = {}
    for level in LEVELS:
        if level not in found or first is None:
            continue
        incarnation, step = found[level]
        captured = times.get(found[level], 0.0)
        newest_s = times.get(first, 0.0)
        report[level] = {
            "step": step,
            "incarnation": incarnation,
            "age_s": age(captured),
            # Steps of two incarnations are not on one line.
            "lag_steps": first[1] - step if incarnation == first[0] else None,
            "lag_s": max(0.0, newest_s - captured) if captured and newest_s else None,
        }
    return report


def _fallbacks(recoverable: Sequence["SnapshotPlan"]) -> Iterator[Report]:
    """What the loss of one node, two nodes, ... leaves at least; step None: nothing."""
    most = max((plan.further_losses for plan in recoverable), default=-1)
    for losses in range(1, min(most + 1, _SHOWN_FALLBACKS) + 1):
        left = _left_after(recoverable, losses)
        yield {
            "losses": losses,
            "step": left.step if left else None,
            "incarnation": left.incarnation if left else None,
        }


def _left_after(recoverable: Sequence["SnapshotPlan"], losses: int) -> "SnapshotPlan | None":
    return next((plan for plan in recoverable if plan.further_losses >= losses), None)


def _risks_of_loss(
    job: "JobOverview", recoverable: Sequence["SnapshotPlan"], *, protects: bool
) -> Iterator[str]:
    """What the loss of one node would cost."""
    if not job.plans:
        return
    if not recoverable:
        first = job.plans[0]
        yield f"nothing can be recovered now: step {first.step}: {'; '.join(first.missing)}"
        return
    first = recoverable[0]
    wanted = job.plans[0]
    if wanted is not first:
        yield (
            f"step {wanted.step} cannot be recovered now ({'; '.join(wanted.missing)}); "
            f"step {first.step} can"
        )
    if first.further_losses == 0:
        left = _left_after(recoverable, 1)
        where = _where(first, job.held)
        goes = f"goes back to step {left.step}" if left else "leaves nothing to go back to"
        yield f"step {first.step} {where}; the loss of one node {goes}"
    elif protects and first.HasField("memory_losses") and first.memory_losses == 0:
        yield (
            f"step {first.step} has no parity in memory yet; "
            "the loss of one node is mended from NVMe only"
        )


def _risks_of_power(recoverable: Sequence["SnapshotPlan"], on_disk: Report | None) -> Iterator[str]:
    """What the loss of all memory would cost."""
    if not recoverable:
        return
    first = recoverable[0]
    if on_disk is None:
        yield "no step is on NVMe: the loss of all nodes' memory leaves nothing"
    elif on_disk["step"] != first.step:
        yield (
            f"step {first.step} is not on NVMe yet; "
            f"the loss of all nodes' memory goes back to step {on_disk['step']}"
        )


def _where(plan: "SnapshotPlan", held: Sequence["HeldOverview"]) -> str:
    levels = [
        copies.level
        for one in held
        if (one.incarnation, one.step) == (plan.incarnation, plan.step)
        for copies in one.copies
        if copies.ranks
    ]
    parity = any(
        copies.parity_nodes
        for one in held
        if (one.incarnation, one.step) == (plan.incarnation, plan.step)
        for copies in one.copies
    )
    if parity or len(levels) != 1:
        return "has no redundancy left"
    return f"is {'in memory' if levels == ['memory'] else 'on NVMe'} only, without parity"


def held_report(job: "JobOverview") -> list[Report]:
    """Each snapshot over all nodes: what there is of it, what is missing, what it survives."""
    plans = {(plan.incarnation, plan.step): plan for plan in job.plans}
    report = []
    for held in job.held:
        plan = plans.get((held.incarnation, held.step))
        losses = plan.further_losses if plan is not None and plan.recoverable else None
        report.append(
            {
                "job": job.job,
                "step": held.step,
                "incarnation": held.incarnation,
                "world": plan.world if plan is not None else None,
                "copies": [
                    {
                        "level": copies.level,
                        "ranks": list(copies.ranks),
                        "bytes": copies.bytes,
                        "parity_nodes": list(copies.parity_nodes),
                    }
                    for copies in held.copies
                ],
                "unix_s": held.captured_unix_s or None,
                "age_s": age(held.captured_unix_s or None),
                "recoverable": plan is not None and plan.recoverable,
                "missing": list(plan.missing) if plan is not None else ["it was never committed"],
                "further_losses": losses,
            }
        )
    return report


def copies_in_words(copies: Sequence[Report], world: int | None) -> str:
    """The copies of a `held_report` for people: ``memory 0-3 of 4 + parity on 3 nodes``."""
    said = []
    for one in copies:
        words = f"{one['level']} {ranks(one['ranks']) or 'no rank'} of {world}"
        nodes = len(one["parity_nodes"])
        said.append(
            words + (f" + parity on {nodes} node{'s' if nodes > 1 else ''}" if nodes else "")
        )
    return ", ".join(said)
