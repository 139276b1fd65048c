"""The flags of the command line that several verbs share, and those of `everstep agent`.

Owns their names and help texts. Does not check values: agent/config.py does, as for the file.
"""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[
    bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")
]
Address = Annotated[
    str,
    typer.Option(
        "--agent",
        metavar="unix:/PATH",
        help="The agent to ask; default: EVERSTEP_AGENT, else this user's own.",
    ),
]
JobName = Annotated[str, typer.Option("--job", metavar="JOB", help="Only this job.")]
Step = Annotated[
    int | None, typer.Option("--step", min=0, help="This step; default: the newest, or all.")
]
Level = Annotated[str, typer.Option("--level", metavar="LEVEL", help="Only memory, or only nvme.")]
Directory = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIRECTORY]",
        help="An nvme or memory directory, or a job or step in one: no agent is asked.",
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="The TOML file; default: the one EVERSTEP_CONFIG names.")
]
Socket = Annotated[Path | None, typer.Option(help="The agent's public unix socket.")]
MemoryDirectory = Annotated[Path | None, typer.Option(help="Where the arenas are, on a tmpfs.")]
NvmeDirectory = Annotated[str | None, typer.Option(help='The durable level; "" for none.')]
MemoryDirectories = Annotated[
    list[Path] | None,
    typer.Option(
        "--memory-dir", help="A node's memory directory, once for each: no agent is asked."
    ),
]
NvmeDirectories = Annotated[
    list[Path] | None,
    typer.Option("--nvme-dir", help="A node's NVMe directory, once for each: no agent is asked."),
]

NodeId = Annotated[str | None, typer.Option(help="This host's name among agents.")]
LogFile = Annotated[Path | None, typer.Option(help="Default: standard error.")]
Listen = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="For other agents; default: none.")
]
Insecure = Annotated[
    bool | None,
    typer.Option(
        "--insecure", help="Listen beyond loopback without TLS, on a network that you trust."
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        metavar="NODE=HOST:PORT",
        help="Another agent; once for each. This node itself is passed over.",
    ),
]
PeersDns = Annotated[
    str | None,
    typer.Option(metavar="NAME:PORT", help="Each address that this name has is an agent."),
]
PeersSlurm = Annotated[
    str | None,
    typer.Option(
        metavar="[NODELIST:]PORT",
        help="An agent on each node of this Slurm job, or of a list such as gpu[001-003].",
    ),
]
PeersFile = Annotated[
    Path | None,
    typer.Option(help="Lines NODE=HOST:PORT; read again when it changed."),
]
Parity = Annotated[
    str | None,
    typer.Option(
        metavar="NODES",
        help="Nodes that may be lost at one time; 0: none. Default: by the number of nodes.",
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="KEY=VALUE",
        help="What this node fails together with, e.g. rack=a; once for each.",
    ),
]
Replaces = Annotated[
    str | None, typer.Option(metavar="NODE", help="Take the place of this lost node.")
]
