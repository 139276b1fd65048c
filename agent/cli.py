"""The command line: `everstep VERB`.

Owns the verbs, their options and the exit status: 0 fine, 1 nothing recoverable or verification
failed, 2 usage, 3 an agent could not be reached. Promises that a verb ends in a table or, with
``--json``, in exactly one JSON document on standard output, and that what goes wrong is one clear
message. What a verb does is in the modules it imports, late, so that the agent's own process
carries none of them.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from everstep.agent import flags
from everstep.agent.exits import FAILED, FINE, Verbs
from everstep.agent.flags import (
    Address,
    Config,
    Directory,
    JobName,
    Json,
    Level,
    MemoryDirectory,
    NvmeDirectory,
    Socket,
    Step,
)
from everstep.agent.version import installed_version
from everstep.proto.errors import AgentUnavailable, Refused

_KEEP_NEWEST = 2

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _examples(*lines: str) -> str:
    # "\b" keeps the line breaks of the paragraph it begins.
    return "\b\nExamples:\n" + "\n".join(f"  everstep {line}" for line in lines)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"everstep {installed_version()}")
        raise typer.Exit


@app.callback()
def everstep(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Everstep keeps a training run alive: what it holds, and whether it is whole.

    Exit status: 0 fine, 1 nothing recoverable or verification failed, 2 usage, 3 an agent could
    not be reached.
    """


@app.command(
    epilog=_examples(
        "agent",
        "agent --socket /run/everstep/agent.sock --memory-dir /dev/shm/everstep --nvme-dir /nvme",
        "agent --config /etc/everstep.toml --log-file /var/log/everstep.log",
        "agent --node-id n1 --listen 10.0.0.1:7400 --insecure --peer n2=10.0.0.2:7400 --parity 1",
        "agent --node-id n3 --replaces n1 --listen 10.0.0.3:7400 --peers-file /etc/everstep-peers",
        "agent --listen 0.0.0.0:7400 --insecure --peers-slurm 7400",
    )
)
def agent(
    node_id: flags.NodeId = None,
    socket: Socket = None,
    listen: flags.Listen = None,
    insecure: flags.Insecure = None,
    peer: flags.Peers = None,
    peers_dns: flags.PeersDns = None,
    peers_slurm: flags.PeersSlurm = None,
    peers_file: flags.PeersFile = None,
    parity: flags.Parity = None,
    label: flags.Labels = None,
    replaces: flags.Replaces = None,
    memory_dir: MemoryDirectory = None,
    nvme_dir: NvmeDirectory = None,
    config: Config = None,
    log_file: flags.LogFile = None,
    as_json: Json = False,
) -> None:
    """Run an agent in the foreground.

    It ends at SIGTERM or SIGINT. Flags win over the file. With --json, says once where it will
    answer, and then runs.
    """
    from everstep.agent.config import load

    overrides = {
        "agent.node_id": node_id,
        "agent.socket": socket,
        "agent.listen": listen,
        "agent.insecure": insecure,
        "agent.memory_dir": memory_dir,
        "agent.nvme_dir": nvme_dir,
        "agent.log_file": log_file,
        "cluster.peers": peer or None,
        "cluster.peers_dns": peers_dns,
        "cluster.peers_slurm": peers_slurm,
        "cluster.peers_file": peers_file,
        "cluster.labels": label or None,
        "cluster.replaces": replaces,
        "parity.parities": parity,
    }
    options = load(config, overrides)
    if as_json:
        _announce(options)
    from everstep.agent.daemon import run

    run(options)


def _announce(options: Any) -> None:
    import os

    from everstep.agent.display import document
    from everstep.proto.places import format_address

    document(
        {
            "address": format_address(options.agent.socket),
            "node_id": options.agent.node_id,
            "pid": os.getpid(),
            "memory_dir": str(options.agent.memory_dir),
            "nvme_dir": str(options.agent.nvme_dir or ""),
            "listen": options.agent.listen,
        }
    )


@app.command(
    epilog=_examples(
        "status", "status --job gpt", "status --agent unix:/run/user/1000/a.sock --json"
    )
)
def status(job: JobName = "", address: Address = "", as_json: Json = False) -> None:
    """Show what an agent holds and does.

    For each job: its ranks, its newest steps, its counters and its last error.
    """
    from everstep.agent import display, showing
    from everstep.agent.asking import Agent

    _job(job)
    with Agent(_address(address)) as asked:
        report = showing.status_report(asked.status(job), asked.address)
    if as_json:
        display.document(report)
    else:
        showing.show_status(report)


def _job(job: str) -> str:
    """The name, if it is one: a wrong one must not look like an absent job."""
    from everstep.proto.ids import checked_name

    return checked_name("job", job) if job else job


@app.command(
    "list",
    epilog=_examples("list", "list --job gpt", "list ~/.local/state/everstep/nvme", "list --json"),
)
def list_snapshots(
    directory: Directory = None, job: JobName = "", address: Address = "", as_json: Json = False
) -> None:
    """List the snapshots at each level.

    Those that an agent holds or, without one, those that lie in a directory.
    """
    from everstep.agent import display, showing
    from everstep.agent.bare import held, held_by_agent, problems, problems_of_agent

    _job(job)
    if directory is not None:
        with _place(directory, job, address) as place:
            report = showing.list_report(place.name, held(place), problems(place))
    else:
        with _agent(address) as asked:
            known = asked.status(job)
            rows = held_by_agent(known, asked.address)
            report = showing.list_report(asked.address, rows, problems_of_agent(known))
    if as_json:
        display.document(report)
    else:
        showing.show_list(report)


def _place(directory: Path | None, job: str, address: str) -> Any:
    """The named directory, or those of the agent."""
    from everstep.agent.bare import place_of, place_of_agent

    if directory is not None:
        if address:
            raise Refused("a directory is looked at without an agent: leave --agent out.")
        return place_of(directory, job)
    with _agent(address) as asked:
        return place_of_agent(asked.status(job), asked.address, job)


@app.command(
    epilog=_examples(
        "inspect --job gpt",
        "inspect --job gpt --step 1200 --rank 3",
        "inspect /nvme/gpt/step-000000001200/rank-00003.safetensors",
        "inspect /nvme/gpt --json",
    )
)
def inspect(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PATH]",
            help="A shard file, or a step, job or level directory: no agent is asked.",
        ),
    ] = None,
    job: JobName = "",
    step: Step = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Default: the lowest there is.")] = None,
    level: Level = "",
    everything: Annotated[bool, typer.Option("--all", help="Every leaf and value.")] = False,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Describe one shard of a snapshot.

    Its layout (parts, leaves, aliases), its record (step, producer, values), its digests.
    """
    from everstep.agent import display, showing
    from everstep.agent.inspecting import inspected

    def place() -> Any:
        return _place(path, _job(job), address)

    report = inspected(path, place, step=step, rank=rank, level=level)
    if as_json:
        display.document(report)
    else:
        showing.show_shard(report, everything=everything)


@app.command(
    epilog=_examples(
        "verify", "verify --job gpt --step 1200", "verify --level nvme", "verify /nvme/gpt --json"
    )
)
def verify(
    directory: Directory = None,
    job: JobName = "",
    step: Step = None,
    level: Level = "",
    address: Address = "",
    as_json: Json = False,
) -> int:
    """Check the digests of what is committed.

    Exit status 1 if anything is damaged: then it says what, and what can still be restored.
    """
    from everstep.agent import display, showing, verifying

    _job(job)
    if directory is not None:
        with _place(directory, job, address) as place:
            verdict = verifying.by_directory(place.at(_level(level)), step, display.meter())
    else:
        with _agent(address) as asked:
            known = asked.status(job)
            verdict = verifying.by_agent(asked, known, step, _level(level), display.meter())
    report = showing.verify_report(verdict)
    if as_json:
        display.document(report)
    else:
        showing.show_verify(report)
    return FINE if verdict.intact else FAILED


def _level(level: str) -> str:
    if level not in ("", "memory", "nvme"):
        raise Refused(f"there is no level {level!r}: say memory or nvme.")
    return level


@app.command(
    epilog=_examples(
        "export --job gpt --to safetensors --part model model.safetensors",
        "export --job gpt --step 1200 --to torch checkpoint.pt",
        "export /nvme/gpt --to dcp checkpoint-directory",
    )
)
def export(
    words: Annotated[
        list[Path],
        typer.Argument(
            metavar="[DIRECTORY] OUTPUT", help="What to export, unless --job; and where to."
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="safetensors, torch or dcp.")],
    job: JobName = "",
    step: Step = None,
    rank: Annotated[int, typer.Option(min=0, help="Whose state, where ranks differ.")] = 0,
    part: Annotated[
        list[str] | None,
        typer.Option(help="Only this part; a single one's names lose its prefix in safetensors."),
    ] = None,
    level: Level = "",
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT.")] = False,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Write a snapshot as files that others read.

    The newest that is whole, unless --step is given. Every digest is checked before a byte is
    written.
    """
    from everstep.agent import choosing, display, exporting, showing

    if to not in exporting.FORMATS or len(words) > 2:
        known = ", ".join(exporting.FORMATS)
        raise Refused(f"say `export [DIRECTORY] --to FORMAT OUTPUT`, FORMAT one of: {known}.")
    directory, output = (words[0], words[1]) if len(words) == 2 else (None, words[0])
    if directory is None and not job:
        raise Refused("name what to export: --job JOB, or a directory before the output.")
    exporting.check_output(output, force=force)
    with _place(directory, _job(job), address) as place:
        there = place.at(_level(level))
        chosen = choosing.choose(there, there.one_job(), step, display.meter())
    for reason in chosen.rejected:
        display.note(f"warning: not used: {reason}")
    parts = part or []
    if to == "safetensors":
        written = exporting.export_safetensors(chosen, rank, parts, output, display.meter())
    else:
        written = exporting.export_by_child(chosen, rank, parts, output, to, force=force)
    report = showing.export_report(chosen, to, output, written)
    if as_json:
        display.document(report)
    else:
        showing.show_export(report)


@app.command(
    epilog=_examples(
        "gc --dry-run",
        "gc --job old-run --all --yes",
        "gc /nvme --keep-newest 3",
        "gc --json --yes",
    )
)
def gc(
    directory: Directory = None,
    job: JobName = "",
    everything: Annotated[
        bool, typer.Option("--all", help="The whole job that --job names, arenas included.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what and why.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    keep_newest: Annotated[
        int | None, typer.Option(min=1, help="Steps to keep in a bare directory; default 2.")
    ] = None,
    keep_every_steps: Annotated[
        int | None, typer.Option(min=1, help="Keep there also every step that this divides.")
    ] = None,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Free what retention does not keep, or a job.

    Works through the agent, by its own retention rule; or on a bare directory, where what is kept
    is verified first.
    """
    from everstep.agent import collecting, display, showing
    from everstep.storage.retention import Rule

    if everything and not job and directory is None:
        raise Refused("--all frees a whole job: name it with --job. Nothing was freed.")
    if as_json and not (dry_run or yes):
        raise Refused("with --json nobody can be asked: say --yes or --dry-run. Nothing was freed.")
    if directory is None and (keep_newest or keep_every_steps):
        raise Refused("the agent keeps its own rule: --keep-... are for a bare directory.")
    where = _address(address)
    task: collecting.AgentTask | collecting.BareTask
    if directory is None:
        task = collecting.AgentTask(where, _job(job), everything=everything)
    else:
        rule = Rule(keep_newest or _KEEP_NEWEST, keep_every_steps)
        place = _place(directory, _job(job), address)
        meter = display.meter()
        task = collecting.BareTask(place, rule, where, meter, everything=everything)
    with task:
        items = task.planned()
        if not as_json:
            showing.show_items(items)
        agreed = bool(items) and not dry_run
        if agreed and not yes:
            agreed = typer.confirm("Free all of this?", err=True)
        report = showing.gc_report(task.free() if agreed else items, freed=agreed)
    if as_json:
        display.document(report)
    else:
        showing.show_gc(report)


def _agent(address: str) -> Any:
    """The agent that is named, or the advice to do without one."""
    from everstep.agent.asking import Agent
    from everstep.agent.config import load

    try:
        return Agent(_address(address))
    except AgentUnavailable as error:
        nvme_dir = load().agent.nvme_dir or "/nvme"
        detail = f"{error.detail}; with no agent running, name a directory, such as {nvme_dir}"
        raise AgentUnavailable(error.address, detail) from error


def _address(address: str) -> str:
    from everstep.agent.config import agent_address

    return agent_address(address)


@app.command(epilog=_examples("doctor", "doctor --config /etc/everstep.toml", "doctor --json"))
def doctor(
    config: Config = None,
    socket: Socket = None,
    memory_dir: MemoryDirectory = None,
    nvme_dir: NvmeDirectory = None,
    probe_mib: Annotated[
        int, typer.Option(min=0, max=65536, help="Written at most to time the disk; 0: not at all.")
    ] = 256,
    as_json: Json = False,
) -> int:
    """Say whether this host is fit for an agent.

    One line for each question, with what to do about it. Exit status 1 if an agent would not
    work or not keep its promises here.
    """
    from everstep.agent import display, showing
    from everstep.agent.config import load
    from everstep.agent.doctor import examine

    overrides = {
        "agent.socket": socket,
        "agent.memory_dir": memory_dir,
        "agent.nvme_dir": nvme_dir,
    }
    report = showing.doctor_report(
        examine(load(config, overrides), probe_disk_bytes=probe_mib << 20)
    )
    if as_json:
        display.document(report)
    else:
        showing.show_doctor(report)
    return FINE if report["fit"] else FAILED


@app.command(epilog=_examples("demo --short", "demo --output /tmp/demo --seed 7", "demo --json"))
def demo(
    short: Annotated[bool, typer.Option("--short", help="A smaller model, fewer steps.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for the picture.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the kills and the training.")] = None,
    as_json: Json = False,
) -> int:
    """Train, kill, recover, compare bit for bit.

    Needs torch: runs as a child process, whose exit status this is.
    """
    import subprocess

    command = [sys.executable, "-P", "-m", "everstep.client.demo"]
    command += ["--short"] if short else []
    command += ["--json"] if as_json else []
    for flag, value in (("--steps", steps), ("--output", output), ("--seed", seed)):
        if value is not None:
            command += [flag, str(value)]
    status = subprocess.run(command, check=False).returncode
    return status if status >= 0 else 128 - status


def main() -> None:
    """Run the CLI."""
    app(prog_name="everstep")
