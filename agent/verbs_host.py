"""The verbs about this host: `agent`, `doctor`, `demo`.

Owns their options. What a verb does is in the modules it imports, late.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from everstep.agent import flags
from everstep.agent.exits import FAILED, FINE
from everstep.agent.flags import Config, Json, MemoryDirectory, NvmeDirectory, Socket
from everstep.agent.verbs import app, examples


@app.command(
    epilog=examples(
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


@app.command(epilog=examples("doctor", "doctor --config /etc/everstep.toml", "doctor --json"))
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
    from everstep.agent import display, showing_checks
    from everstep.agent.config import load
    from everstep.agent.doctor import examine

    overrides = {
        "agent.socket": socket,
        "agent.memory_dir": memory_dir,
        "agent.nvme_dir": nvme_dir,
    }
    report = showing_checks.doctor_report(
        examine(load(config, overrides), probe_disk_bytes=probe_mib << 20)
    )
    if as_json:
        display.document(report)
    else:
        showing_checks.show_doctor(report)
    return FINE if report["fit"] else FAILED


@app.command(
    epilog=examples(
        "demo --short",
        "demo --output /tmp/demo --seed 7",
        "demo --nodes 4 --lose 1",
        "demo --nodes 4 --lose 2 --parity 1 --short --json",
    )
)
def demo(
    short: Annotated[bool, typer.Option("--short", help="A smaller model, fewer steps.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to train.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for the picture.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the kills and the training.")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=2, help="So many agents, each with a rank of one job.")
    ] = None,
    lose: Annotated[
        int | None, typer.Option(min=1, help="Nodes that are killed and wiped; default 1.")
    ] = None,
    parity: Annotated[
        int | None, typer.Option(min=1, help="Nodes that may be lost at one time.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Train, kill, recover, compare bit for bit.

    With --nodes: some of several nodes are lost with all they held, and what they held is decoded
    from the memory of the others. Needs torch: runs as a child process, whose exit status this is.
    """
    import subprocess

    command = [sys.executable, "-P", "-m", "everstep.client.demo"]
    command += ["--short"] if short else []
    command += ["--json"] if as_json else []
    given = {"steps": steps, "output": output, "seed": seed}
    given |= {"nodes": nodes, "lose": lose, "parity": parity}
    for flag, value in given.items():
        if value is not None:
            command += [f"--{flag}", str(value)]
    status = subprocess.run(command, check=False).returncode
    return status if status >= 0 else 128 - status
