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
    from everstep.proto.agent_pb2 import JobStatus, StatusReply
    from everstep.proto.peer_pb2 import OverviewReply
    from everstep.storage.level import Problem

Report = dict[str, Any]
_SHOWN_ROWS = 40


def status_report(
    status: "StatusReply", address: str, overview: "OverviewReply | None" = None
) -> Report:
    """What an agent holds and does; with `overview`, and its cluster."""
    from everstep.agent.safety import cluster_report

    cluster = None
    if overview is not None:
        cluster = cluster_report(status.node_id, status.cluster, overview)
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
        "cluster": cluster,
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
    if report["cluster"] is not None:
        from everstep.agent.showing_cluster import show_cluster

        show_cluster(report["cluster"])
    for job in report["jobs"]:
        _show_job(job, clustered=report["cluster"] is not None)
    if not report["jobs"]:
        line("no job yet")


def _show_job(job: Report, *, clustered: bool) -> None:
    newest = ", ".join(f"{level} step {one['step']}" for level, one in job["newest"].items())
    since = span(job["last_commit_age_s"])
    table(
        f"job {job['job']}, incarnation {job['incarnation']}, world {job['world']}"
        + (", on this node" if clustered else ""),
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
        "problems": problems_report(problems),
    }


def problems_report(problems: "Sequence[Problem]") -> list[Report]:
    """Files that cannot be used."""
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
    note_problems(report)


def note_problems(report: Report) -> None:
    """Show the files that cannot be used."""
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
    if report.get("left_out"):
        note(
            f"{len(report['left_out'])} tensors that other ranks have for themselves were left "
            "out; --rank says whose state is meant"
        )
    for optimizer in report.get("optimizers_by_name", ()):
        note(
            f"the state of {optimizer} stays under parameter names: their order in the optimizer "
            "could not be proven"
        )


def show_import(report: Report) -> None:
    """Show what was imported."""
    line(
        f"imported {report['source']} as step {report['step']} of job {report['job']}: "
        f"{report['tensors']} tensors, {size(report['bytes'])}, at {', '.join(report['levels'])}"
    )
    for part in report["parts"]:
        line(f"  {part['name']}: {part['kind']}, {part['tensors']} tensors, {size(part['bytes'])}")


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
