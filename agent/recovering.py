"""`everstep recover`: the plan, its progress and its outcome, for people and for scripts.

Owns the names in its JSON document, which scripts rely on, and what is shown of it. Promises that
a plan says for each snapshot whether it can be recovered or what is missing, how many more nodes
may be lost, which bytes travel and how long that takes; and that a recovery of which any node did
not say that it is done counts as failed. Moves nothing itself: the agents do.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from everstep.agent.display import Meter, line, note, ranks, size, span, table
from everstep.agent.exits import FAILED, FINE
from everstep.proto.errors import NothingRecoverable

if TYPE_CHECKING:
    # For their names alone: what is shown must not wait for numpy.
    from everstep.agent.asking import Agent
    from everstep.agent.destinations import Home
    from everstep.agent.inventory import NodeInventory
    from everstep.agent.rebuilding import Movement
    from everstep.agent.sources import SnapshotPlan, Source
    from everstep.proto.ids import SnapshotId
    from everstep.proto.peer_pb2 import MendProgress, PlanReply

Report = dict[str, Any]
_SHOWN_ROWS = 40


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went at one node."""

    node_id: str
    bytes: int
    problem: str
    """Empty if all that the node should have is there."""


def choose(job: str, plans: "Sequence[SnapshotPlan]", to_step: int | None = None) -> "SnapshotPlan":
    """The first that can be recovered; plans come with the most wanted first.

    Raises:
        NothingRecoverable: If none can, with what is missing of each.
    """
    for plan in plans:
        if plan.recoverable and to_step in (None, plan.snapshot.step):
            return plan
    reasons = tuple(
        f"{plan.snapshot}: {reason}"
        for plan in plans
        for reason in plan.missing
        if to_step in (None, plan.snapshot.step)
    )
    what = "no snapshot" if to_step is None else f"nothing of step {to_step}"
    raise NothingRecoverable(job, reasons or (f"the agents in reach hold {what} of it",))


def recover_report(
    job: str,
    plans: "Sequence[SnapshotPlan]",
    chosen: "SnapshotPlan | None",
    moved: "Sequence[Movement]",
    *,
    expected_s: float,
    bytes_s: float,
    problems: Sequence[str] = (),
    homes: "Sequence[Home]" = (),
) -> Report:
    """What can be recovered, and what that takes.

    Args:
        job: The job.
        plans: Of all its snapshots, the most wanted first.
        chosen: The one that is recovered.
        moved: Which bytes travel for that; see `rebuilding.movements`.
        expected_s: How long, by `rebuilding.expected_s`.
        bytes_s: The rate that was taken for it.
        problems: What nodes could not read, and who could not be asked.
        homes: Where each rank shall be in memory; nowhere, if it is not to be brought there.
    """
    return {
        "job": job,
        "snapshots": [_snapshot_report(plan) for plan in plans],
        "chosen": _chosen_report(chosen) if chosen else None,
        "movements": [
            {"from": m.from_node, "to": m.to_node, "bytes": m.bytes, "what": m.what} for m in moved
        ],
        "destinations": [
            {"rank": home.rank, "node_id": home.node_id, "reason": home.reason} for home in homes
        ],
        "bytes": sum(movement.bytes for movement in moved),
        "bytes_s": bytes_s,
        "expected_s": expected_s,
        "problems": list(problems),
    }


def _snapshot_report(plan: "SnapshotPlan") -> Report:
    return {
        "step": plan.snapshot.step,
        "incarnation": plan.snapshot.incarnation,
        "world": plan.world,
        "levels": list(plan.levels),
        "recoverable": plan.recoverable,
        "missing": list(plan.missing),
        "decoded_ranks": [source.rank for source in plan.decoded],
        "further_losses": plan.further_losses if plan.recoverable else None,
        "memory_losses": plan.memory_losses if plan.recoverable else None,
    }


def _chosen_report(plan: "SnapshotPlan") -> Report:
    return {
        "step": plan.snapshot.step,
        "incarnation": plan.snapshot.incarnation,
        "sources": [_source_report(source) for source in plan.sources],
    }


def _source_report(source: "Source") -> Report:
    from everstep.agent.sources import Held

    if isinstance(source, Held):
        where = {"node_id": source.node_id, "level": source.level, "plan_id": None}
    else:
        where = {"node_id": None, "level": None, "plan_id": source.plan.plan_id}
    return {"rank": source.rank, "bytes": source.image_bytes, **where}


def show_recover(report: Report) -> None:
    """Show a `recover_report`."""
    table(
        f"snapshots of job {report['job']}",
        ("step>", "incarnation>", "level", "state", "to decode", "survives loss of>", "in memory>"),
        [
            (
                one["step"],
                one["incarnation"],
                ", ".join(one["levels"]) or "-",
                "ok" if one["recoverable"] else "; ".join(one["missing"]),
                _ranks(one["decoded_ranks"]),
                _losses(one["further_losses"]),
                _losses(one["memory_losses"]),
            )
            for one in report["snapshots"]
        ],
    )
    for problem in report["problems"]:
        note(f"warning: {problem}")
    if report["chosen"] is None:
        note("nothing can be recovered from what is in reach")
    else:
        _show_chosen(report)


def _ranks(numbers: Sequence[int]) -> str:
    return f"{'ranks' if len(numbers) > 1 else 'rank'} {ranks(numbers)}" if numbers else "-"


def _losses(losses: int | None) -> str | None:
    return None if losses is None else f"{losses} node{'' if losses == 1 else 's'}"


def _show_chosen(report: Report) -> None:
    chosen = report["chosen"]
    line(f"to be recovered: step {chosen['step']}, incarnation {chosen['incarnation']}")
    _show_homes(report["destinations"], chosen["sources"])
    if not report["movements"]:
        elsewhere = {one["level"] for one in chosen["sources"]} - {"memory"}
        where = "on this node, where trainers load it from" if elsewhere else "where it is wanted"
        held = "held" if elsewhere else "in memory"
        line(f"nothing has to travel: every shard is {held} {where}")
        return
    shown = report["movements"][:_SHOWN_ROWS]
    table(
        "to be moved",
        ("from", "to", "bytes>", "what"),
        [(one["from"], one["to"], size(one["bytes"]), one["what"]) for one in shown],
    )
    if len(report["movements"]) > len(shown):
        line(f"and {len(report['movements']) - len(shown)} more: see --json")
    line(
        f"{size(report['bytes'])} in all; {_about(report['expected_s'])} if each node sends and "
        f"receives {size(int(report['bytes_s']))} a second"
    )


def _show_homes(homes: Sequence[Report], sources: Sequence[Report]) -> None:
    """Where ranks go that are not where they were held; the others stay."""
    held_at = {one["rank"]: one["node_id"] for one in sources}
    moved: dict[tuple[str, str], list[int]] = {}
    for home in homes:
        if held_at.get(home["rank"]) != home["node_id"]:
            moved.setdefault((home["node_id"], home["reason"]), []).append(home["rank"])
    for (node, reason), numbers in sorted(moved.items()):
        line(f"  {_ranks(numbers)} to {node}: {reason}")


def planned_report(
    job: str, reply: "PlanReply", *, bytes_s: float
) -> "tuple[Report, list[SnapshotPlan]]":
    """The report of an agent's plans, and the plans.

    Raises:
        FormatInvalid: If the agent's answer contradicts itself.
    """
    from everstep.agent.destinations import Home
    from everstep.agent.rebuilding import expected_s, movements
    from everstep.agent.sources import parsed

    plans = [parsed(plan, "the agent's plan of recovery") for plan in reply.plans]
    chosen = next((plan for plan in plans if plan.recoverable), None)
    homes = tuple(Home(one.rank, one.node_id, one.reason) for one in reply.destinations)
    # An agent that stands alone gives its trainers what it has, from where it has it.
    wanted = {} if reply.alone else {home.rank: home.node_id for home in homes}
    moved = movements(chosen, wanted) if chosen is not None else []
    problems = list(reply.problems)
    if reply.silent:
        problems.append(f"not reached, and counted as lost: {', '.join(reply.silent)}")
    report = recover_report(
        job,
        plans,
        chosen,
        moved,
        expected_s=expected_s(moved, bytes_s),
        bytes_s=bytes_s,
        problems=problems,
        homes=() if reply.alone else homes,
    )
    return report, plans


def bare_report(
    job: str,
    plans: "Sequence[SnapshotPlan]",
    nodes: "Sequence[NodeInventory]",
    *,
    bytes_s: float,
) -> Report:
    """What the directories of some nodes allow, if agents were started on these nodes."""
    from everstep.agent.destinations import destinations
    from everstep.agent.rebuilding import expected_s, movements

    chosen = next((plan for plan in plans if plan.recoverable), None)
    names = [node.node_id for node in nodes]
    homes = destinations(chosen, {}, names, {}) if chosen is not None else ()
    wanted = {home.rank: home.node_id for home in homes}
    moved = movements(chosen, wanted) if chosen is not None else []
    return recover_report(
        job,
        plans,
        chosen,
        moved,
        expected_s=expected_s(moved, bytes_s),
        bytes_s=bytes_s,
        problems=[f"{node.node_id}: {what}" for node in nodes for what in node.problems],
        homes=homes,
    )


def carried_out(
    agent: "Agent",
    job: str,
    snapshot: "SnapshotId",
    levels: Sequence[str],
    meter: Meter,
) -> tuple[Outcome, ...]:
    """Have the nodes recover a snapshot, and say how it went at each.

    The agent plans anew: damage may have been found since, and nodes may have come and gone.

    Raises:
        NothingRecoverable: If it cannot be recovered any more.
        AgentUnavailable: If the agent ends meanwhile.
    """
    from everstep.agent.destinations import Home, to_be_moved
    from everstep.agent.sources import parsed
    from everstep.proto.peer_pb2 import RecoverRequest, SnapshotName

    name = SnapshotName(incarnation=snapshot.incarnation, step=snapshot.step)
    told = iter(agent.recover(RecoverRequest(job=job, snapshot=name, levels=levels)))
    begun = next(told).plan
    plan = parsed(begun.plans[0], "the agent's plan of recovery")
    homes = [Home(one.rank, one.node_id, one.reason) for one in begun.destinations]
    moves = {} if begun.alone else to_be_moved(plan, homes)
    sizes = {source.rank: source.image_bytes for source in plan.sources}
    totals = {node: sum(sizes[rank] for rank in ranks) for node, ranks in moves.items()}
    return follow(((one.node_id, one.progress) for one in told), totals, meter)


def _about(seconds: float) -> str:
    return "less than a second" if seconds < 1 else f"about {span(seconds)}"


def follow(
    told: "Iterable[tuple[str, MendProgress]]",
    totals: Mapping[str, int],
    meter: Meter,
    title: str = "recovering",
) -> tuple[Outcome, ...]:
    """Show the progress of all nodes as one, and say how it went at each.

    Args:
        told: What the nodes tell, as (node, progress), in any order between nodes. `done_bytes`
            counts up for each `what` of a node.
        totals: By node, the bytes it should have in the end; each must say that it has ended.
        meter: Shows it.
        title: What is shown.
    """
    done: dict[tuple[str, str], int] = {}
    problems: dict[str, str] = {}
    ended: set[str] = set()
    with meter(title, sum(totals.values())) as advance:
        for node, progress in told:
            before = done.get((node, progress.what), 0)
            if progress.done_bytes > before:
                advance(progress.done_bytes - before)
                done[node, progress.what] = progress.done_bytes
            if progress.problem:
                problems.setdefault(node, progress.problem)
            if progress.ended:
                ended.add(node)
    return tuple(_outcomes(totals, done, problems, ended))


def _outcomes(
    totals: Mapping[str, int],
    done: Mapping[tuple[str, str], int],
    problems: Mapping[str, str],
    ended: set[str],
) -> Iterator[Outcome]:
    for node in sorted({*totals, *problems}):
        amount = sum(size_bytes for (of, _), size_bytes in done.items() if of == node)
        problem = problems.get(node, "")
        if not problem and node not in ended:
            problem = "it stopped before it said that it was done"
        yield Outcome(node, amount, problem)


def outcome_report(report: Report, outcomes: Sequence[Outcome]) -> Report:
    """A `recover_report` that was carried out."""
    return {
        **report,
        "recovered": report["chosen"] is not None and not any(one.problem for one in outcomes),
        "nodes": [
            {"node_id": one.node_id, "bytes": one.bytes, "problem": one.problem} for one in outcomes
        ],
    }


def show_outcome(report: Report) -> None:
    """Show how an `outcome_report` ended; the plan was shown before."""
    for one in report["nodes"]:
        if one["problem"]:
            note(f"failed at {one['node_id']}: {one['problem']}")
    if report["chosen"] is None:
        return
    step, job = report["chosen"]["step"], report["job"]
    if report["recovered"] and not report["movements"]:
        line(f"step {step} of job {job} is where it is wanted: nothing was moved")
    elif report["recovered"]:
        amount = sum(one["bytes"] for one in report["nodes"])
        where = ", ".join(one["node_id"] for one in report["nodes"] if one["bytes"]) or "nowhere"
        line(f"recovered step {step} of job {job}: {size(amount)} are again in memory ({where})")
    else:
        note(
            f"step {step} of job {job} is not recovered. What the other nodes hold is untouched; "
            "run it again for what is missing"
        )


def exit_status(report: Report) -> int:
    """The exit status of a `recover_report` or an `outcome_report`."""
    return FINE if report.get("recovered", report["chosen"] is not None) else FAILED
