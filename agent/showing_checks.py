"""What `everstep verify` and `everstep doctor` found: as plain data for JSON, and for people.

Owns the names in these JSON documents, which scripts rely on, and what is shown of them. A table
never knows more than the document. Asks and decides nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from everstep.agent.display import line, note, size, table
from everstep.agent.showing import Report, note_problems, problems_report

if TYPE_CHECKING:
    from everstep.agent.doctor import Finding
    from everstep.agent.verifying import Checked, Verdict


def verify_report(verdict: "Verdict") -> Report:
    """What a verification found."""
    return {
        "intact": verdict.intact,
        "repaired": [_checked(one) for one in verdict.repaired],
        "unexamined": [{"node_id": node, "problem": why} for node, why in verdict.unexamined],
        "silent": list(verdict.silent),
        "bytes": sum(one.bytes for one in verdict.checked),
        "shards": [_checked(one) for one in verdict.checked],
        "damaged": [_checked(one) for one in verdict.damaged],
        "problems": problems_report(verdict.problems),
        "usable": [
            {
                "job": one.job,
                "step": one.snapshot.step,
                "incarnation": one.snapshot.incarnation,
                "levels": list(one.levels),
            }
            for one in verdict.usable()
        ],
    }


def _checked(one: "Checked") -> Report:
    return {
        "job": one.job,
        "level": one.level,
        "step": one.snapshot.step,
        "incarnation": one.snapshot.incarnation,
        "rank": None if one.parity else one.rank,
        "parity": one.parity,
        "node_id": one.node_id,
        "bytes": one.bytes,
        "intact": not one.problem or one.repaired,
        "problem": one.problem,
        "repaired": one.repaired,
        "repair_problem": one.repair_problem,
    }


def show_verify(report: Report) -> None:
    """Show a `verify_report`."""
    several = any(one["node_id"] for one in report["shards"])
    table(
        "verified",
        (
            "job",
            *(("node",) if several else ()),
            "level",
            "step>",
            "incarnation>",
            "rank>",
            "bytes>",
            "state",
        ),
        [
            (
                one["job"],
                *((one["node_id"],) if several else ()),
                one["level"],
                one["step"],
                one["incarnation"],
                "parity" if one["parity"] else one["rank"],
                size(one["bytes"]),
                _state(one),
            )
            for one in report["shards"]
        ],
    )
    shards = len(report["shards"])
    for node in report["silent"]:
        note(f"{node} counts as lost: nothing of it was looked at")
    for one in report["repaired"]:
        line(f"repaired: {_named(one)}: {one['problem']}")
    if report["intact"]:
        line(f"{shards} shard(s), {size(report['bytes'])}: all intact")
        return
    for one in report["damaged"]:
        why = f"; not repaired: {one['repair_problem']}" if one["repair_problem"] else ""
        note(f"damaged: {_named(one)}: {one['problem']}{why}")
    for one in report["unexamined"]:
        note(f"not looked at: {one['node_id']}: {one['problem']}")
    note_problems(report)
    for job in sorted({one["job"] for one in report["damaged"]}):
        _note_usable(job, [one for one in report["usable"] if one["job"] == job])


def _state(one: Report) -> str:
    if one["repaired"]:
        return "repaired"
    return "ok" if one["intact"] else "damaged"


def _named(one: Report) -> str:
    what = "parity" if one["parity"] else f"rank {one['rank']}"
    where = f", {one['level']} of {one['node_id']}" if one["node_id"] else ""
    return f"{one['job']}, step {one['step']}, {what}{where}"


def _note_usable(job: str, usable: Sequence[Report]) -> None:
    shown = [
        f"step {one['step']}" + (f" from {' and '.join(one['levels'])}" if one["levels"] else "")
        for one in usable[:8]
    ]
    if shown:
        note(f"job {job}: what was verified can still restore {', '.join(shown)}")
    else:
        note(f"job {job}: nothing that was verified can be restored whole")


def doctor_report(findings: "Sequence[Finding]") -> Report:
    """What the doctor found."""
    return {
        "fit": all(finding.status != "fail" for finding in findings),
        "findings": [
            {
                "check": finding.check,
                "status": finding.status,
                "detail": finding.detail,
                "advice": finding.advice,
            }
            for finding in findings
        ],
    }


def show_doctor(report: Report) -> None:
    """Show a `doctor_report`."""
    rows = [(f["status"], f["check"], f["detail"], f["advice"] or "") for f in report["findings"]]
    table("doctor", ("", "check", "found", "what to do"), rows)
    if not report["fit"]:
        note("an agent would not work, or not keep its promises, here: see the lines that fail")
