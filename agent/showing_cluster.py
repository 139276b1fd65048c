"""A cluster's reports as tables and lines for people.

Owns what `everstep status` and `everstep list` show of several nodes. A table never knows more than
the document, whose names are in `agent.safety`. Asks and decides nothing.
"""

from typing import TYPE_CHECKING

from everstep.agent.display import line, note, ranks, size, span, table
from everstep.agent.safety import Report, copies_in_words, held_report

if TYPE_CHECKING:
    from everstep.proto.peer_pb2 import OverviewReply

_SHOWN_ROWS = 40


def show_cluster(report: Report) -> None:
    """Show a `cluster_report`."""
    if report["fenced_by"]:
        line(f"this agent's place is held by {report['fenced_by']}: it takes no snapshots")
    if report["refusal"]:
        line(f"no place in the cluster: {report['refusal']}")
    _show_members(report)
    for warning in report["warnings"]:
        note(f"warning: {warning}")
    if report["problem"]:
        note(f"the coordinator could not be asked: {report['problem']}")
    if report["waiting_for"]:
        note(f"not heard of yet: {', '.join(report['waiting_for'])}")
    for job in report["jobs"]:
        _show_job(job, protects=report["protects"])


def _show_members(report: Report) -> None:
    coordinator = report["coordinator"]
    members = report["members"]
    table(
        f"cluster, epoch {report['epoch']}, coordinator {coordinator or 'none'}",
        ("node", "address", "labels", "state", "since epoch>", "refused calls>"),
        [
            (
                one["node_id"],
                one["address"],
                ", ".join(f"{key}={value}" for key, value in one["labels"].items()) or "-",
                f"replaced by {one['replaced_by']}" if one["replaced_by"] else one["state"],
                one["since_epoch"],
                report["refused_calls"].get(one["node_id"], 0),
            )
            for one in members[:_SHOWN_ROWS]
        ],
    )
    if len(members) > _SHOWN_ROWS:
        line(f"and {len(members) - _SHOWN_ROWS} more nodes: see --json")
    strangers = report["refused_calls"].get("strangers")
    if strangers:
        line(f"  calls refused to nodes that are none of these: {strangers}")
    refused = {
        name: count
        for name, count in report["bulk_counters"].items()
        if name.startswith("refused_") and count
    }
    if refused:
        said = ", ".join(f"{name.removeprefix('refused_')} {n}" for name, n in refused.items())
        line(f"  streams refused on the bulk plane: {said}")


def _show_job(job: Report, *, protects: bool) -> None:
    table(
        f"job {job['job']}, over all nodes",
        ("level", "newest step>", "behind>", "seconds behind>", "captured"),
        [
            (
                level,
                one["step"],
                _steps(one["lag_steps"]),
                None if one["lag_s"] is None else f"{one['lag_s']:.1f}",
                f"{span(one['age_s'])} ago" if one["age_s"] is not None else None,
            )
            for level, one in job["newest"].items()
        ],
    )
    _show_redundancy(job, protects=protects)
    for risk in job["at_risk"]:
        line(f"  at risk: {risk}")
    _show_late(job)
    for problem in job["problems"]:
        note(f"  problem: {problem}")


def _steps(lag: int | None) -> str | None:
    return None if lag is None else f"{lag} step{'' if lag == 1 else 's'}"


def _show_redundancy(job: Report, *, protects: bool) -> None:
    newest = job["recoverable"]
    if newest is not None:
        memory = newest["memory_losses"]
        by_memory = "" if memory is None else f" ({memory} by memory alone)"
        line(
            f"  step {newest['step']} survives the further loss of "
            f"{newest['further_losses']} node(s){by_memory}"
        )
    if not protects:
        line("  no parity: it is switched off")
    for group in job["groups"]:
        if group["missing"]:
            line(
                f"  the group of {', '.join(group['members'])} protects step {group['step']} "
                f"without {', '.join(group['missing'])}"
            )


def _show_late(job: Report) -> None:
    for pending in job["pending"]:
        where = f" on {', '.join(pending['late_nodes'])}" if pending["late_nodes"] else ""
        many = "ranks" if len(pending["late_ranks"]) > 1 else "rank"
        line(f"  step {pending['step']} waits for {many} {ranks(pending['late_ranks'])}{where}")
    at_work = job["round"]
    if at_work is not None:
        waiting = ", ".join(at_work["waiting_for"]) or "its commit"
        line(
            f"  parity of step {at_work['step']} waits for {waiting} "
            f"since {at_work['running_s']:.1f} s"
        )
    if job["silent"]:
        line(f"  gone: {', '.join(job['silent'])}")


def held_by_all_report(source: str, overview: "OverviewReply") -> Report:
    """The snapshots of all jobs over all nodes."""
    return {
        "source": source,
        "snapshots": [row for job in overview.jobs for row in held_report(job)],
        "silent": sorted({node for job in overview.jobs for node in job.silent}),
        "problems": [
            {"where": job.job, "reason": problem}
            for job in overview.jobs
            for problem in job.problems
        ],
    }


def show_held_by_all(report: Report) -> None:
    """Show a `held_by_all_report`."""
    table(
        f"snapshots of {report['source']}",
        ("job", "step>", "incarnation>", "held", "bytes>", "age>", "state", "survives loss of>"),
        [
            (
                one["job"],
                one["step"],
                one["incarnation"],
                copies_in_words(one["copies"], one["world"]),
                size(max((copies["bytes"] for copies in one["copies"]), default=0)),
                span(one["age_s"]),
                "ok" if one["recoverable"] else "; ".join(one["missing"]),
                _nodes(one["further_losses"]),
            )
            for one in report["snapshots"]
        ],
    )
    if report["silent"]:
        note(f"not reached, and counted as lost: {', '.join(report['silent'])}")
    for problem in report["problems"]:
        note(f"damaged: {problem['where']}: {problem['reason']}")


def _nodes(losses: int | None) -> str | None:
    return None if losses is None else f"{losses} node{'' if losses == 1 else 's'}"
