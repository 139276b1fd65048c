"""The reports of the verbs: as plain data for JSON, and as tables for people.

Owns the names in the JSON documents, which scripts rely on, and what is shown of them. A table
never knows more than the document. Asks and decides nothing.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everstep.agent.display import age, line, note, ranks, size, span, table

if TYPE_CHECKING:
    # For their names alone: `status` and `doctor` must not wait for numpy.
    from everstep.agent.bare import Held
    from everstep.agent.choosing import Chosen
    from everstep.agent.collecting import Item
    from everstep.agent.doctor import Finding
    from everstep.agent.verifying import Checked, Verdict
    from everstep.proto.agent_pb2 import JobStatus, StatusReply
    from everstep.storage.level import Problem

Report = dict[str, Any]
_SHOWN_ROWS = 40


def status_report(status: "StatusReply", address: str) -> Report:
    """What an agent holds and does."""
    return {
        "address": address,
        "node_id": status.node_id,
        "pid": status.pid,
        "version": status.version,
        "uptime_s": status.uptime_s,
        "memory_dir": status.memory_dir,
        "nvme_dir": status.nvme_dir,
        "memory_reserved_bytes": status.memory_reserved_bytes,
        "jobs": [_job_report(job) for job in status.jobs],
    }


def _job_report(job: "JobStatus") -> Report:
    committed = [one for one in job.snapshots if one.committed]
    newest: Report = {}
    for one in sorted(committed, key=lambda one: (one.incarnation, one.step)):
        newest[one.level] = {"step": one.step, "incarnation": one.incarnation}
    captured = max((one.captured_unix_s for one in committed), default=0.0)
    return {
        "job": job.job,
        "incarnation": job.incarnation,
        "world": job.world,
        "ranks": [
            {
                "rank": rank.rank,
                "pid": rank.pid,
                "attached": rank.attached,
                "arena_bytes": rank.arena_bytes,
                "last_sealed_step": rank.last_sealed_step,
            }
            for rank in job.ranks
        ],
        "newest": newest,
        "last_commit_age_s": age(captured),
        "counters": dict(sorted(job.counters.items())),
        "last_error": job.last_error,
    }


def show_status(report: Report) -> None:
    """Show a `status_report`."""
    line(
        f"agent {report['node_id']}, pid {report['pid']}, version {report['version']}, "
        f"up {span(report['uptime_s'])}, at {report['address']}"
    )
    reserved = size(report["memory_reserved_bytes"])
    line(f"memory {report['memory_dir']}, {reserved} reserved")
    line(f"nvme   {report['nvme_dir'] or 'none'}")
    for job in report["jobs"]:
        _show_job(job)
    if not report["jobs"]:
        line("no job yet")


def _show_job(job: Report) -> None:
    newest = ", ".join(f"{level} step {one['step']}" for level, one in job["newest"].items())
    since = span(job["last_commit_age_s"])
    table(
        f"job {job['job']}, incarnation {job['incarnation']}, world {job['world']}",
        ("rank>", "pid>", "attached", "arena>", "last sealed step>"),
        [
            (
                rank["rank"],
                rank["pid"],
                "yes" if rank["attached"] else "no",
                size(rank["arena_bytes"]),
                rank["last_sealed_step"],
            )
            for rank in job["ranks"]
        ],
    )
    line(f"  newest committed: {newest or 'none'}" + (f", captured {since} ago" if since else ""))
    counters = ", ".join(f"{name} {count}" for name, count in job["counters"].items())
    line(f"  counters: {counters or 'none'}")
    if job["last_error"]:
        line(f"  last error: {job['last_error']}")


def list_report(source: str, rows: "Iterable[Held]", problems: "Sequence[Problem]") -> Report:
    """The snapshots of an agent or a directory."""
    return {
        "source": source,
        "snapshots": [
            {
                "job": one.job,
                "level": one.level,
                "step": one.snapshot.step,
                "incarnation": one.snapshot.incarnation,
                "world": one.world,
                "ranks": list(one.ranks),
                "bytes": one.bytes,
                "unix_s": one.unix_s,
                "age_s": age(one.unix_s),
                "committed": one.committed,
            }
            for one in rows
        ],
        "problems": _problems(problems),
    }


def _problems(problems: "Sequence[Problem]") -> list[Report]:
    return [{"where": problem.where, "reason": problem.reason} for problem in problems]


def show_list(report: Report) -> None:
    """Show a `list_report`."""
    table(
        f"snapshots of {report['source']}",
        ("job", "level", "step>", "incarnation>", "ranks", "bytes>", "age>", "committed"),
        [
            (
                one["job"],
                one["level"],
                one["step"],
                one["incarnation"],
                f"{ranks(one['ranks'])} of {one['world']}",
                size(one["bytes"]),
                span(one["age_s"]),
                "yes" if one["committed"] else "no",
            )
            for one in report["snapshots"]
        ],
    )
    _note_problems(report)


def _note_problems(report: Report) -> None:
    for problem in report["problems"]:
        note(f"damaged: {problem['where']}: {problem['reason']}")


def show_shard(report: Report, *, everything: bool) -> None:
    """Show what `inspecting.inspected` returned; long lists are cut unless `everything`."""
    line(report["path"])
    if "record" not in report:
        line("no record of Everstep's beside it: only the header is shown, nothing can be verified")
    else:
        _show_record(report)
    table(
        "leaves",
        ("name", "dtype", "shape", "bytes>", "held here>", "replicated"),
        [
            (
                leaf["name"],
                leaf["dtype"],
                "x".join(map(str, leaf["shape"])) or "scalar",
                size(leaf["bytes"]),
                size(leaf["held_bytes"]),
                "yes" if leaf["replicated"] else "no",
            )
            for leaf in _cut(report["leaves"], everything)
        ],
    )
    _note_cut(report["leaves"], "leaves", everything)
    if report.get("aliases"):
        table("aliases", ("name", "is another name of"), report["aliases"].items())
    if report.get("values"):
        rows = [(v["path"], v["chars"], v["summary"]) for v in _cut(report["values"], everything)]
        table("values", ("path", "characters>", "summary"), rows)
        _note_cut(report["values"], "values", everything)


def _show_record(report: Report) -> None:
    record = report["record"]
    line(
        f"job {report['job']}, step {report['step']}, incarnation {report['incarnation']}, "
        f"rank {report['rank']} of {report['world']}, level {report['level']}"
    )
    line(f"captured {span(age(record['captured_unix_s']))} ago by {record['producer']}")
    line(
        f"image {size(report['image_bytes'])} at byte {report['offset']}, "
        f"{record['digests']} digests, layout {report['layout_id']}"
    )
    table(
        "parts",
        ("part", "kind", "class", "leaves>", "values>", "held here>", "per rank"),
        [
            (
                part["name"],
                part["kind"],
                part["class_name"],
                part["leaves"],
                part["values"],
                size(part["held_bytes"]),
                "yes" if part["per_rank"] else "no",
            )
            for part in report["parts"]
        ],
    )


def _cut(rows: Sequence[Any], everything: bool) -> Sequence[Any]:
    return rows if everything else rows[:_SHOWN_ROWS]


def _note_cut(rows: Sequence[Any], what: str, everything: bool) -> None:
    if not everything and len(rows) > _SHOWN_ROWS:
        line(f"and {len(rows) - _SHOWN_ROWS} more {what}: see --all")


def verify_report(verdict: "Verdict") -> Report:
    """What a verification found."""
    return {
        "intact": verdict.intact,
        "bytes": sum(one.bytes for one in verdict.checked),
        "shards": [_checked(one) for one in verdict.checked],
        "damaged": [_checked(one) for one in verdict.damaged],
        "problems": _problems(verdict.problems),
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
        "rank": one.rank,
        "bytes": one.bytes,
        "intact": not one.problem,
        "problem": one.problem,
    }


def show_verify(report: Report) -> None:
    """Show a `verify_report`."""
    table(
        "verified",
        ("job", "level", "step>", "incarnation>", "rank>", "bytes>", "state"),
        [
            (
                one["job"],
                one["level"],
                one["step"],
                one["incarnation"],
                one["rank"],
                size(one["bytes"]),
                "ok" if one["intact"] else "damaged",
            )
            for one in report["shards"]
        ],
    )
    shards = len(report["shards"])
    if report["intact"]:
        line(f"{shards} shard(s), {size(report['bytes'])}: all intact")
        return
    for one in report["damaged"]:
        note(f"damaged: {one['job']}, step {one['step']}, rank {one['rank']}: {one['problem']}")
    _note_problems(report)
    for job in sorted({one["job"] for one in report["damaged"]}):
        _note_usable(job, [one for one in report["usable"] if one["job"] == job])


def _note_usable(job: str, usable: Sequence[Report]) -> None:
    shown = [f"step {one['step']} from {' and '.join(one['levels'])}" for one in usable[:8]]
    if shown:
        note(f"job {job}: what was verified can still restore {', '.join(shown)}")
    else:
        note(f"job {job}: nothing that was verified can be restored whole")


def export_report(chosen: "Chosen", form: str, output: Path, written: Report) -> Report:
    """What was exported."""
    return {
        "job": chosen.job,
        "step": chosen.snapshot.step,
        "incarnation": chosen.snapshot.incarnation,
        "levels": sorted({copy.level for copy in chosen.copies.values()}),
        "format": form,
        "output": str(output.absolute()),
        "rejected": list(chosen.rejected),
        **written,
    }


def show_export(report: Report) -> None:
    """Show an `export_report`."""
    line(
        f"wrote {report['output']}: step {report['step']} of job {report['job']}, "
        f"{report['tensors']} tensors, {size(report['bytes'])}, from {', '.join(report['levels'])}"
    )
    if report.get("omitted_values"):
        note(
            f"{report['omitted_values']} values that are no tensors have no place in safetensors; "
            "--to torch takes them along"
        )
    for optimizer in report.get("optimizers_by_name", ()):
        note(
            f"the state of {optimizer} stays under parameter names: their order in the optimizer "
            "could not be proven"
        )


def show_items(items: "Sequence[Item]") -> None:
    """Show what would be freed."""
    if items:
        rows = [
            (
                item.job,
                item.level,
                item.snapshot.step if item.snapshot else "arena",
                item.snapshot.incarnation if item.snapshot else None,
                size(item.bytes),
                item.reason,
            )
            for item in items
        ]
        headings = ("job", "level", "step>", "incarnation>", "bytes>", "why")
        table("to be freed", headings, rows)


def gc_report(items: "Sequence[Item]", *, freed: bool) -> Report:
    """What was, or would be, freed."""
    return {
        "freed": freed,
        "bytes": sum(_counted(item, items) for item in items),
        "items": [
            {
                "job": item.job,
                "level": item.level,
                "step": item.snapshot.step if item.snapshot else None,
                "incarnation": item.snapshot.incarnation if item.snapshot else None,
                "bytes": item.bytes,
                "reason": item.reason,
            }
            for item in items
        ],
    }


def _counted(item: "Item", items: "Sequence[Item]") -> int:
    """Snapshots in memory lie inside their job's arena, which counts as a whole."""
    arena = any(other.snapshot is None and other.job == item.job for other in items)
    inside = arena and item.level == "memory" and item.snapshot is not None
    return 0 if inside else item.bytes or 0


def show_gc(report: Report) -> None:
    """Show the outcome of a `gc_report`."""
    if not report["items"]:
        line("nothing to free: retention keeps all that is there")
    elif report["freed"]:
        line(f"freed {size(report['bytes'])}")
    else:
        line(f"nothing was freed; it would be {size(report['bytes'])}")


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
