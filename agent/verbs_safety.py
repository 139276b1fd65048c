"""The verbs about what is safe: `status`, `list`, `recover`, `verify`.

Owns their options. What a verb does is in the modules it imports, late.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everstep.agent.exits import FAILED, FINE
from everstep.agent.flags import (
    Address,
    Directory,
    JobName,
    Json,
    Level,
    MemoryDirectories,
    NvmeDirectories,
    Step,
)
from everstep.agent.verbs import (
    address_named,
    agent_named,
    app,
    examples,
    job_named,
    level_named,
    place_named,
)
from everstep.proto.errors import InvalidConfiguration, Refused

if TYPE_CHECKING:
    from everstep.agent.bare_nodes import BareNodes

_MOST_BYTES_S = 1 << 50


@app.command(
    epilog=examples(
        "status", "status --job gpt", "status --agent unix:/run/user/1000/a.sock --json"
    )
)
def status(job: JobName = "", address: Address = "", as_json: Json = False) -> None:
    """Show what an agent holds and does, and how safe each job of its cluster is.

    For each job: its ranks, its newest steps, its counters and its last error. Of an agent that
    has peers also: who belongs to the cluster and who is gone, the newest step at each level over
    all nodes, what is at risk, how many more nodes may be lost, and who is late.
    """
    from everstep.agent import display, showing
    from everstep.agent.asking import Agent

    job_named(job)
    with Agent(address_named(address)) as asked:
        known = asked.status()
        overview = asked.overview(job) if known.HasField("cluster") else None
        if job:
            elsewhere = [one.job for one in overview.jobs] if overview is not None else []
            known = asked.status(job, elsewhere)
        report = showing.status_report(known, asked.address, overview)
    if as_json:
        display.document(report)
    else:
        showing.show_status(report)


def _nodes(
    memory_dirs: Sequence[Path] | None,
    nvme_dirs: Sequence[Path] | None,
    job: str,
    address: str,
    directory: Path | None = None,
) -> "BareNodes | None":
    """The directories of several nodes; None if none was named."""
    if not memory_dirs and not nvme_dirs:
        return None
    from everstep.agent.bare_nodes import BareNodes

    if address or directory is not None:
        raise Refused(
            "directories are looked at without an agent: name them all with --memory-dir and "
            "--nvme-dir, and leave --agent out."
        )
    return BareNodes(memory_dirs or (), nvme_dirs or (), job)


@app.command(
    "list",
    epilog=examples(
        "list",
        "list --job gpt",
        "list ~/.local/state/everstep/nvme",
        "list --nvme-dir /mnt/n1/nvme --nvme-dir /mnt/n2/nvme",
        "list --json",
    ),
)
def list_snapshots(
    directory: Directory = None,
    job: JobName = "",
    memory_dir: MemoryDirectories = None,
    nvme_dir: NvmeDirectories = None,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """List the snapshots at each level.

    Those that an agent and its peers hold or, without one, those that lie in a directory, or in
    those of several nodes. Over several nodes: whether it can be recovered or what is missing, and
    how many more nodes may be lost.
    """
    from everstep.agent import display, showing, showing_cluster
    from everstep.agent.bare import held, held_by_agent, problems, problems_of_agent
    from everstep.proto.peer_pb2 import OverviewReply

    job_named(job)
    overview = None
    nodes = _nodes(memory_dir, nvme_dir, job, address, directory)
    if nodes is not None:
        with nodes:
            overview = OverviewReply(jobs=[nodes.overview(one) for one in nodes.jobs()])
            report = showing.list_report(nodes.name, (), ())
    elif directory is not None:
        with place_named(directory, job, address) as place:
            report = showing.list_report(place.name, held(place), problems(place))
    else:
        with agent_named(address) as asked:
            known = asked.status()
            overview = asked.overview(job) if known.HasField("cluster") else None
            elsewhere = [one.job for one in overview.jobs] if overview is not None else []
            known = asked.status(job, elsewhere)
            rows = held_by_agent(known, asked.address)
            report = showing.list_report(asked.address, rows, problems_of_agent(known))
    report["cluster"] = None
    if overview is not None:
        report["cluster"] = showing_cluster.held_by_all_report(report["source"], overview)
    if as_json:
        display.document(report)
    elif report["cluster"] is not None:
        showing_cluster.show_held_by_all(report["cluster"])
        showing.note_problems(report)
    else:
        showing.show_list(report)


@app.command(
    epilog=examples(
        "recover --job gpt --dry-run",
        "recover --job gpt",
        "recover --job gpt --step 1200 --level nvme --yes",
        "recover --job gpt --dry-run --bytes-per-second '3 GB' --json",
        "recover --job gpt --dry-run --nvme-dir /mnt/n1/nvme --nvme-dir /mnt/n2/nvme",
    )
)
def recover(
    job: JobName = "",
    step: Step = None,
    level: Level = "",
    memory_dir: MemoryDirectories = None,
    nvme_dir: NvmeDirectories = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what can be recovered, and what it takes.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    bytes_per_second: Annotated[
        str,
        typer.Option(
            "--bytes-per-second",
            metavar="BYTES",
            help="What a node sends and receives, for the expected time; default: 1 GB.",
        ),
    ] = "1 GB",
    address: Address = "",
    as_json: Json = False,
) -> int:
    """Bring a job back into memory after nodes were lost.

    Shows what can be recovered from all nodes that are in reach, and what is missing of the rest;
    then which bytes go from where to where, and does it. The newest step that is whole, unless
    --step says another. Trainers that restore do the same by themselves. It may be run again.
    """
    job_named(job)
    levels = [level] if level_named(level) else []
    bytes_s = _bytes_s(bytes_per_second)
    nodes = _nodes(memory_dir, nvme_dir, job, address)
    if nodes is not None:
        with nodes:
            return _planned_bare(nodes, step, levels, bytes_s, dry_run=dry_run, as_json=as_json)
    if not job:
        raise Refused("name the job that is to be recovered: --job JOB. Nothing was done.")
    if as_json and not (dry_run or yes):
        raise Refused("with --json nobody can be asked: say --yes or --dry-run. Nothing was done.")
    return _recovered(
        job, step, levels, bytes_s, address, dry_run=dry_run, yes=yes, as_json=as_json
    )


def _bytes_s(text: str) -> int:
    from everstep.agent.options import as_bytes

    try:
        return as_bytes(1, _MOST_BYTES_S)(text)
    except ValueError as error:
        raise InvalidConfiguration("--bytes-per-second", str(error)) from error


def _planned_bare(
    nodes: "BareNodes",
    step: int | None,
    levels: Sequence[str],
    bytes_s: int,
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    """What bare directories allow: nobody is there to move anything."""
    from everstep.agent import display, recovering

    if not dry_run:
        raise Refused(
            "from bare directories a recovery can only be planned: say --dry-run, or start the "
            "agents on them and name one. Nothing was done."
        )
    job = nodes.one_job()
    plans = nodes.plans(job, step=step, levels=frozenset(levels))
    report = recovering.bare_report(job, plans, nodes.inventories(job), bytes_s=bytes_s)
    if as_json:
        display.document(report)
    else:
        recovering.show_recover(report)
    return recovering.exit_status(report)


def _recovered(
    job: str,
    step: int | None,
    levels: Sequence[str],
    bytes_s: int,
    address: str,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> int:
    from everstep.agent import display, recovering

    with agent_named(address) as asked:
        reply = asked.plan(job, step, levels)
        report, plans = recovering.planned_report(job, reply, bytes_s=bytes_s)
        if not as_json and (plans or dry_run):
            recovering.show_recover(report)
        if not dry_run:
            snapshot = recovering.choose(job, plans, step).snapshot
            outcomes: tuple[recovering.Outcome, ...] = ()
            if report["movements"]:
                if not yes and not typer.confirm("Do this?", err=True):
                    raise Refused("nothing was moved.")
                meter = display.meter()
                outcomes = recovering.carried_out(asked, job, snapshot, levels, meter)
            report = recovering.outcome_report(report, outcomes)
            if not as_json:
                recovering.show_outcome(report)
    if as_json:
        display.document(report)
    return recovering.exit_status(report)


@app.command(
    epilog=examples(
        "verify",
        "verify --job gpt --step 1200",
        "verify --repair",
        "verify --level nvme",
        "verify /nvme/gpt --json",
        "verify --nvme-dir /mnt/n1/nvme --nvme-dir /mnt/n2/nvme",
    )
)
def verify(
    directory: Directory = None,
    job: JobName = "",
    step: Step = None,
    level: Level = "",
    memory_dir: MemoryDirectories = None,
    nvme_dir: NvmeDirectories = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what is damaged from peers or parity.")
    ] = False,
    address: Address = "",
    as_json: Json = False,
) -> int:
    """Check the digests of what is committed, on all nodes that the agent knows.

    Exit status 1 if anything is damaged and not repaired: then it says what, and what can still be
    restored.
    """
    from everstep.agent import display, showing_checks, verifying

    job_named(job)
    nodes = _nodes(memory_dir, nvme_dir, job, address, directory)
    bare = directory is not None or nodes is not None
    if repair and bare:
        raise Refused("only agents repair: start one on each node. Nothing was changed.")
    if nodes is not None:
        with nodes:
            verdict = verifying.by_nodes(nodes, step, level_named(level), display.meter())
    elif directory is not None:
        with place_named(directory, job, address) as place:
            verdict = verifying.by_directory(place.at(level_named(level)), step, display.meter())
    else:
        with agent_named(address) as asked:
            known = asked.status()
            meter, level = display.meter(), level_named(level)
            if known.HasField("cluster"):
                verdict = verifying.by_cluster(asked, job, step, level, meter, repair=repair)
            else:
                known = asked.status(job)
                verdict = verifying.by_agent(asked, known, step, level, meter)
                if repair and not verdict.intact:
                    display.note(
                        "nothing was repaired: this agent has no peers, and there is no parity"
                    )
    report = showing_checks.verify_report(verdict)
    if as_json:
        display.document(report)
    else:
        showing_checks.show_verify(report)
    return FINE if verdict.intact else FAILED
