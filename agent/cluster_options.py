"""The options of an agent that is one of several: cluster, parity, bulk plane.

Owns their fields, defaults and ranges; agent/config.py reads and checks them with all others.
Promises nothing by itself.
"""

from dataclasses import dataclass, field
from pathlib import Path

from everstep.agent.options import (
    MIB,
    Interval,
    as_bytes,
    as_count,
    as_endpoint,
    as_interval,
    as_labels,
    as_nodes_with_port,
    as_parities,
    as_path_or_none,
    as_peers,
    as_seconds,
    as_text,
    rule,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """[cluster]: who the other agents are. Without any of them this agent stands alone."""

    peers: tuple[tuple[str, str], ...] = field(default=(), metadata=rule(as_peers))
    """Node ids and ``HOST:PORT`` of agents; this one may be among them."""
    peers_dns: str = field(default="", metadata=rule(as_endpoint))
    """``NAME:PORT``; each address that the name has is an agent."""
    peers_slurm: str = field(default="", metadata=rule(as_nodes_with_port))
    """``NODELIST:PORT``, or ``PORT`` alone for the nodes of this Slurm job; empty for none."""
    peers_file: Path | None = field(default=None, metadata=rule(as_path_or_none))
    """Lines ``NODE=HOST:PORT``; read again when it changed."""
    address: str = field(default="", metadata=rule(as_endpoint))
    """``HOST:PORT`` where others reach this agent; empty for what `listen` says."""
    replaces: str = field(default="", metadata=rule(as_text))
    """The node id of a lost agent whose place this one takes."""
    labels: tuple[tuple[str, str], ...] = field(default=(), metadata=rule(as_labels))
    """Failure domains of this node, such as rack and power, by key."""
    heartbeat_s: float = field(default=1.0, metadata=rule(as_seconds(0.01, 60)))
    """How often a member reports to the coordinator."""
    suspect_after_s: float = field(default=5.0, metadata=rule(as_seconds(0.03, 3600)))
    """How long a member may be silent before it counts as lost."""
    join_timeout_s: float = field(default=30.0, metadata=rule(as_seconds(0.1, 3600)))
    """How long a starting agent looks for the others before it goes on alone."""

    @property
    def configured(self) -> bool:
        """Whether other agents are named in any way."""
        return bool(self.peers or self.peers_dns or self.peers_slurm or self.peers_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """[parity]: what protects a snapshot in memory against the loss of nodes."""

    parities: int | None = field(default=None, metadata=rule(as_parities))
    """Node losses that a group survives; 0 for no parity, None for by the number of nodes."""
    group_size: int = field(default=0, metadata=rule(as_count(0, 255)))
    """Nodes that protect each other; 0 for by the number of nodes."""
    interval: Interval = field(default=Interval(every_steps=1), metadata=rule(as_interval))
    """How often a committed snapshot is protected."""
    timeout_s: float = field(default=60.0, metadata=rule(as_seconds(1, 3600)))
    """The deadline of one round, from the order to the commit."""
    rate_bytes_s: int = field(default=0, metadata=rule(as_bytes(0, 1 << 40)))
    """Bytes a second that this node takes from others for parity; 0 for no limit."""
    scrub_bytes_s: int = field(default=64 * MIB, metadata=rule(as_bytes(0, 1 << 40)))
    """Bytes a second that are read and checked for bit rot in the background; 0 for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkOptions:
    """[bulk]: the plane that carries snapshots between agents."""

    listen: str = field(default="", metadata=rule(as_endpoint))
    """``HOST:PORT``; empty for a free port on the host of `agent.listen`."""
    max_streams: int = field(default=16, metadata=rule(as_count(1, 1024)))
    """Streams served at one time, and as many taken."""
    max_tickets: int = field(default=1024, metadata=rule(as_count(1, 1 << 20)))
    """Tickets given and not yet used."""
    ticket_timeout_s: float = field(default=10.0, metadata=rule(as_seconds(0.1, 3600)))
    """How long a ticket is good for."""
    stall_timeout_s: float = field(default=10.0, metadata=rule(as_seconds(0.1, 3600)))
    """How long a stream may stand still before it is given up."""
    buffer_bytes: int = field(default=8 * MIB, metadata=rule(as_bytes(2 * MIB, 1024 * MIB)))
    """Memory that one stream's units may take on their way."""
    join_rate_bytes_s: int = field(default=0, metadata=rule(as_bytes(0, 1 << 40)))
    """Bytes a second that a joining rank may take from this node; 0 for no limit."""
