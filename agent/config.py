"""Every option of the agent, where it may come from, and what it may be.

Owns the options with their defaults and ranges; deploy/everstep.toml is their commented list.
Promises that a `Config` was checked as a whole, so that whoever reads it need not check again, that
flags win over the file and the file over the defaults, and that an unknown option is an error. Does
not look at the machine: whether directories exist and limits suffice is the doctor's to say.
"""

import difflib
import os
import re
import socket as sockets
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from everstep.agent.cluster_options import BulkOptions, ClusterOptions, ParityOptions
from everstep.agent.options import (
    ALIGNMENT_BYTES,
    MIB,
    Interval,
    as_bytes,
    as_choice,
    as_count,
    as_endpoint,
    as_flag,
    as_interval,
    as_nodes_with_port,
    as_path,
    as_path_or_none,
    as_seconds,
    as_text,
    as_uids,
    format_endpoint,
    is_loopback,
    is_wildcard,
    rule,
    split_endpoint,
)
from everstep.proto.errors import InvalidConfiguration
from everstep.proto.ids import MAX_RANKS, checked_name
from everstep.proto.places import (
    SOCKET_PATH_MAX_BYTES,
    default_places,
    fits_socket,
    format_address,
    offers_socket,
    parse_address,
    private_socket,
)

AUTO = "auto"
"""In the file: take what `default_places`, the host or other options say."""
MAX_SLOTS = 8
_SLOTS = 2
_SLOTS_WITH_PARITY = 3
"""The newest protected, the one being encoded, the one in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """[agent]: who and where this agent is. Fields without a default are "auto" in the file."""

    node_id: str = field(metadata=rule(as_text))
    """This host's name among agents; the host name, made safe."""
    socket: Path = field(metadata=rule(as_path))
    """The public unix socket for trainers and the CLI."""
    listen: str = field(default="", metadata=rule(as_endpoint))
    """``HOST:PORT`` for other agents; empty for none."""
    insecure: bool = field(default=False, metadata=rule(as_flag))
    """Allow `listen` beyond loopback without TLS: anyone on that network can read the state."""
    memory_dir: Path = field(metadata=rule(as_path))
    """Directory of the arenas, on a tmpfs."""
    nvme_dir: Path | None = field(metadata=rule(as_path_or_none))
    """Directory of the durable level; None for no such level."""
    allowed_uids: frozenset[int] = field(default=frozenset(), metadata=rule(as_uids))
    """Users besides the agent's own and root who may talk to it."""
    log_file: Path | None = field(default=None, metadata=rule(as_path_or_none))
    """None for standard error."""
    log_level: str = field(
        default="info", metadata=rule(as_choice("debug", "info", "warning", "error"))
    )
    """The least severe messages that are logged."""
    max_jobs: int = field(default=16, metadata=rule(as_count(1, 4096)))
    """Jobs whose arenas are held at one time."""
    shutdown_timeout_s: float = field(default=30.0, metadata=rule(as_seconds(1, 3600)))
    """From SIGTERM to the end of the process, flush included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """[memory]: the arenas."""

    slots: int = field(metadata=rule(as_count(2, MAX_SLOTS)))
    """Snapshots of one rank held side by side, the one in flight included. "auto" in the file."""
    keep_free_bytes: int = field(default=512 * MIB, metadata=rule(as_bytes(0, 1 << 50)))
    """Left free in `memory_dir` and in the host's memory."""
    quota_bytes: int = field(default=0, metadata=rule(as_bytes(0, 1 << 50)))
    """Arena bytes one job may hold on this host; 0 for no limit."""
    digest_threads: int = field(default=2, metadata=rule(as_count(1, 64)))
    """Threads that digest committed shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmeOptions:
    """[nvme]: the durable level of this host."""

    interval: Interval = field(default=Interval(every_steps=100), metadata=rule(as_interval))
    """How often a committed snapshot is flushed; a trainer may ask for another interval."""
    keep_newest: int = field(default=2, metadata=rule(as_count(1, 1000)))
    """Committed steps that are kept."""
    keep_every_steps: int = field(default=0, metadata=rule(as_count(0, 1 << 40)))
    """Also keep each step that this divides; 0 for none."""
    write_threads: int = field(default=3, metadata=rule(as_count(1, 64)))
    """Threads that write an image."""
    chunk_bytes: int = field(default=8 * MIB, metadata=rule(as_bytes(ALIGNMENT_BYTES, 1024 * MIB)))
    """Bytes of one write; a multiple of 4096."""
    direct: bool = field(default=True, metadata=rule(as_flag))
    """Write with O_DIRECT where the file system can."""
    flush_on_exit: bool = field(default=True, metadata=rule(as_flag))
    """Flush the newest committed snapshot when a trainer dies."""
    flush_on_sigterm: bool = field(default=True, metadata=rule(as_flag))
    """Flush the newest committed snapshot before the agent ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """[limits]: bounds on waits and on what a peer can make the agent hold."""

    declare_timeout_s: float = field(default=30.0, metadata=rule(as_seconds(1, 3600)))
    """How long ranks wait for each other to declare their layouts."""
    restore_timeout_s: float = field(default=600.0, metadata=rule(as_seconds(1, 86400)))
    """How long ranks wait for a restore to be decided and verified."""
    max_message_bytes: int = field(default=64 * MIB, metadata=rule(as_bytes(MIB, 1024 * MIB)))
    """The largest gRPC message that is accepted."""
    max_ranks: int = field(default=1024, metadata=rule(as_count(1, MAX_RANKS)))
    """The largest world a job may have."""
    max_connections: int = field(default=256, metadata=rule(as_count(8, 1 << 16)))
    """Open connections to the public socket; each holds three file descriptors."""
    max_concurrent_calls: int = field(default=1024, metadata=rule(as_count(16, 1 << 20)))
    """gRPC calls at one time; each attached trainer holds one open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsOptions:
    """[tls]: mutual TLS between agents; all three or none."""

    certificate: Path | None = field(default=None, metadata=rule(as_path_or_none))
    """PEM; its subject is the node id."""
    key: Path | None = field(default=None, metadata=rule(as_path_or_none))
    """PEM, readable by the agent's user only."""
    authority: Path | None = field(default=None, metadata=rule(as_path_or_none))
    """PEM of who signs the agents' certificates."""

    @property
    def enabled(self) -> bool:
        """Whether agents must prove who they are."""
        return self.certificate is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All options of one agent, checked."""

    agent: AgentOptions
    memory: MemoryOptions
    nvme: NvmeOptions
    limits: LimitOptions
    tls: TlsOptions
    cluster: ClusterOptions
    parity: ParityOptions
    bulk: BulkOptions
    slots_automatic: bool = False
    """Whether `memory.slots` is the least, and a trainer with several captures gets more."""

    @property
    def private_socket(self) -> Path:
        """Where the gRPC server listens, behind the door."""
        return private_socket(self.agent.socket)

    @property
    def offers_socket(self) -> Path:
        """Where trainers ask for slots."""
        return offers_socket(self.agent.socket)

    @property
    def lock(self) -> Path:
        """Held by the agent that owns the socket."""
        return self.agent.socket.with_suffix(".lock")

    @property
    def address(self) -> str:
        """``HOST:PORT`` where other agents reach this one; empty if it does not listen.

        Its port is 0 if `agent.listen` takes a free one: the listener knows which.
        """
        if self.cluster.address or not self.agent.listen:
            return self.cluster.address
        host, port = split_endpoint(self.agent.listen)
        listed = dict(self.cluster.peers).get(self.agent.node_id)
        if listed is not None and (is_wildcard(host) or not port):
            return listed
        return format_endpoint(sockets.gethostname() if is_wildcard(host) else host, port)

    @property
    def bulk_listen(self) -> str:
        """``HOST:PORT`` of the bulk plane; empty if this agent does not listen."""
        if self.bulk.listen or not self.agent.listen:
            return self.bulk.listen
        return format_endpoint(split_endpoint(self.agent.listen)[0], 0)


_SECTIONS: Mapping[str, type[Any]] = MappingProxyType(
    {section.name: section.type for section in fields(Config) if is_dataclass(section.type)}  # type: ignore[misc]
)
_Given = dict[str, tuple[object, str]]
"""By dotted option: the value as given, and the file it came from (empty for a flag)."""


def load(
    file: Path | None = None,
    overrides: Mapping[str, object] = MappingProxyType({}),
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Read, merge and check all options.

    Args:
        file: TOML; without it ``EVERSTEP_CONFIG`` names one, else there is none.
        overrides: By dotted name, e.g. ``{"nvme.interval": "60 s"}``; None means not given. A
            text is also understood as the file would, so ``"4"`` will do for a number.
        environ: Instead of the process's own environment.

    Raises:
        InvalidConfiguration: For the first option that is unknown or not acceptable.
    """
    if environ is None:
        environ = os.environ  # noqa: TID251  the place to read it
    if file is None and environ.get("EVERSTEP_CONFIG"):
        file = Path(environ["EVERSTEP_CONFIG"])
    given: _Given = {} if file is None else _read(file)
    given |= {option: (value, "") for option, value in overrides.items() if value is not None}
    for option, (_, source) in given.items():
        _known(option, source)
    automatic = _automatic(environ)
    config = Config(
        **{
            name: section(**_section_values(name, section, given, automatic))
            for name, section in _SECTIONS.items()
        }
    )
    return _checked(_resolved(config, given, environ), given)


def agent_address(given: str = "", environ: Mapping[str, str] | None = None) -> str:
    """The agent that `given`, else ``EVERSTEP_AGENT``, else this user's configuration names.

    Args:
        given: ``unix:/path``, or empty.
        environ: Instead of the process's own environment.

    Returns:
        Its address, spelled the way gRPC parses it.

    Raises:
        InvalidConfiguration: If the address or the configuration is not acceptable.
    """
    if environ is None:
        environ = os.environ  # noqa: TID251  the place to read it
    chosen = given or environ.get("EVERSTEP_AGENT", "")
    if chosen:
        return format_address(parse_address(chosen))
    return format_address(load(environ=environ).agent.socket)


def _read(file: Path) -> _Given:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"the file cannot be read ({error.strerror})"
        raise InvalidConfiguration(str(file), problem) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(str(file), f"the file is not TOML ({error})") from error
    given: _Given = {}
    for section, table in tables.items():
        if isinstance(table, dict):
            if section not in _SECTIONS:
                raise InvalidConfiguration(
                    f"[{section}]", "unknown section" + _nearest(section, _SECTIONS), str(file)
                )
            given |= {f"{section}.{name}": (value, str(file)) for name, value in table.items()}
        else:
            given[section] = (table, str(file))
    return given


def option_names() -> tuple[str, ...]:
    """All options by their dotted names, in the order of the file."""
    return tuple(
        f"{name}.{option.name}" for name, section in _SECTIONS.items() for option in fields(section)
    )


def _known(option: str, source: str) -> None:
    names = option_names()
    if option in names:
        return
    elsewhere = [name for name in names if name.partition(".")[2] == option.rpartition(".")[2]]
    hint = f"; the nearest is {elsewhere[0]}" if elsewhere else _nearest(option, names)
    raise InvalidConfiguration(option, "unknown option" + hint, source)


def _nearest(name: str, names: Mapping[str, object] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f"; the nearest is {close[0]}" if close else ""


def _automatic(environ: Mapping[str, str]) -> dict[str, object]:
    places = default_places(environ, os.getuid())
    return {
        "agent.node_id": safe_node_id(sockets.gethostname()),
        "agent.socket": places.socket,
        "agent.memory_dir": places.memory_dir,
        "agent.nvme_dir": places.nvme_dir,
        "memory.slots": _SLOTS,
    }


def _resolved(config: Config, given: _Given, environ: Mapping[str, str]) -> Config:
    """Fill in what depends on more than one option."""
    agent, memory, cluster = config.agent, config.memory, config.cluster
    automatic = _is_automatic("memory.slots", given)
    if cluster.configured and config.parity.parities != 0 and automatic:
        memory = replace(memory, slots=_SLOTS_WITH_PARITY)
    if cluster.peers_slurm.isdecimal():
        nodes = environ.get("SLURM_JOB_NODELIST", "")
        if not nodes:
            raise InvalidConfiguration(
                "cluster.peers_slurm",
                "SLURM_JOB_NODELIST is not set, so there is no list of nodes; start the agent in a "
                'Slurm job, or write the list: "gpu[001-003]:PORT"',
                given["cluster.peers_slurm"][1],
            )
        listed = _parsed_listed(f"{nodes}:{cluster.peers_slurm}")
        cluster = replace(cluster, peers_slurm=listed)
    if cluster.peers_slurm and _is_automatic("agent.node_id", given):
        # Slurm's own name of this node, by which the list names it.
        agent = replace(agent, node_id=environ.get("SLURMD_NODENAME") or agent.node_id)
    return replace(config, agent=agent, memory=memory, cluster=cluster, slots_automatic=automatic)


def _parsed_listed(nodes: str) -> str:
    try:
        return as_nodes_with_port(nodes)
    except ValueError as error:
        raise InvalidConfiguration("SLURM_JOB_NODELIST", str(error), "the environment") from error


def _is_automatic(option: str, given: _Given) -> bool:
    return given.get(option, (AUTO, ""))[0] == AUTO


def safe_node_id(hostname: str) -> str:
    """Return `hostname` with what an id may not contain replaced; never empty."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", hostname).lstrip(".")[:128] or "node"


def _section_values(
    section_name: str, section: type[Any], given: _Given, automatic: Mapping[str, object]
) -> dict[str, object]:
    values: dict[str, object] = {}
    for option in fields(section):
        name = f"{section_name}.{option.name}"
        value, source = given.get(name, (AUTO if name in automatic else MISSING, ""))
        if value == AUTO and name in automatic:
            values[option.name] = automatic[name]
        elif value is not MISSING:
            values[option.name] = _parsed(name, option, value, source)
    return values


def _parsed(name: str, option: Field[Any], value: object, source: str) -> object:
    parse: Callable[[object], object] = option.metadata["parse"]
    try:
        return parse(value)
    except ValueError as error:
        if not source and isinstance(value, str):
            try:
                return parse(tomllib.loads(f"value = {value}")["value"])
            except (tomllib.TOMLDecodeError, ValueError):
                pass
        raise InvalidConfiguration(name, str(error), source) from error


def _checked(config: Config, given: _Given) -> Config:
    """The rules that concern more than one option or more than its type."""

    def require(holds: bool, option: str, problem: str) -> None:
        if not holds:
            raise InvalidConfiguration(option, problem, given.get(option, ("", ""))[1])

    agent, tls = config.agent, config.tls
    checked_name("node", agent.node_id)
    require(
        fits_socket(agent.socket) and fits_socket(config.private_socket),
        "agent.socket",
        f"{agent.socket} is too long: a unix socket's path, {config.private_socket} included, "
        f"has at most {SOCKET_PATH_MAX_BYTES} bytes; name a shorter one",
    )
    require(
        agent.nvme_dir is None or not agent.nvme_dir.is_relative_to(agent.memory_dir),
        "agent.nvme_dir",
        f"{agent.nvme_dir} lies in memory_dir and would not survive power loss; name a directory "
        'on a disk, or "" to do without that level',
    )
    require(
        config.nvme.chunk_bytes % ALIGNMENT_BYTES == 0,
        "nvme.chunk_bytes",
        f"{config.nvme.chunk_bytes} is not a multiple of {ALIGNMENT_BYTES}, as O_DIRECT needs",
    )
    pems = (tls.certificate, tls.key, tls.authority)
    require(
        all(pems) or not any(pems),
        "tls",
        "certificate, key and authority are needed together; set all three or none",
    )
    for option, endpoint in (("agent.listen", agent.listen), ("bulk.listen", config.bulk.listen)):
        host = split_endpoint(endpoint)[0] if endpoint else "localhost"
        require(
            is_loopback(host) or tls.enabled or agent.insecure,
            option,
            f"{endpoint} can be reached from other hosts, and without TLS anyone there could read "
            "and replace training state; fill in [tls], listen on 127.0.0.1, or set "
            "agent.insecure = true on a network that you trust",
        )
    _check_cluster(config, require)
    return config


def _check_cluster(config: Config, require: Callable[[bool, str, str], None]) -> None:
    cluster, parity, listen = config.cluster, config.parity, config.agent.listen
    unreachable = "needs agent.listen, so that the other agents can reach this one"
    for option in ("peers", "peers_dns", "peers_slurm", "peers_file", "address", "replaces"):
        named = f"cluster.{option}"
        require(bool(listen) or not getattr(cluster, option), named, unreachable)
    require(bool(listen) or not config.bulk.listen, "bulk.listen", unreachable)
    require(
        bool(listen) or not parity.parities,
        "parity.parities",
        "needs other agents to hold it; set agent.listen and name them in [cluster], or set 0",
    )
    host, port = split_endpoint(cluster.address or "localhost:1")
    require(
        port > 0 and not is_wildcard(host),
        "cluster.address",
        f"nobody can be reached at {cluster.address}; name a host and a port",
    )
    if cluster.replaces:
        checked_name("node", cluster.replaces)
    require(
        cluster.configured or not cluster.replaces,
        "cluster.replaces",
        "needs peers, of which one lets this agent take that place",
    )
    require(
        cluster.replaces != config.agent.node_id,
        "cluster.replaces",
        f"{cluster.replaces} is this node; leave it out to rejoin under the same id",
    )
    require(
        cluster.suspect_after_s >= 3 * cluster.heartbeat_s,
        "cluster.suspect_after_s",
        f"{cluster.suspect_after_s:g} s is less than three heartbeats of {cluster.heartbeat_s:g} "
        "s, so that one lost message would look like a lost node",
    )
    require(
        not parity.group_size or parity.group_size > max(parity.parities or 0, 1),
        "parity.group_size",
        f"a group of {parity.group_size} cannot survive the loss of {parity.parities or 1} of its "
        "nodes; make it larger than parity.parities",
    )
