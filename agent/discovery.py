"""Where the other agents may be: from the configuration to node ids and addresses.

Owns the list, the name, the Slurm node list and the file that [cluster] may name, and their union.
Promises that no node and no address comes twice, and that what was found once stays known while a
name cannot be resolved or a file cannot be read. Does not promise that anyone answers there, and
does not know who belongs to the cluster: that is in agent/members.py. Blocks on DNS and files: run
it in a thread.
"""

import os
import socket as sockets
from collections.abc import Callable, Iterable
from pathlib import Path

from everstep.agent.cluster_options import ClusterOptions
from everstep.agent.options import (
    MAX_NODES,
    expanded_nodes,
    format_endpoint,
    split_endpoint,
    split_peer,
)
from everstep.proto.errors import InvalidConfiguration

Seed = tuple[str, str]
"""Node id, empty where it is not known, and ``HOST:PORT``."""
_MAX_FILE_BYTES = 16 << 20
_PEERS_FILE = "cluster.peers_file"


def addresses_of(host: str, port: int) -> tuple[str, ...]:
    """All addresses that a name has now, ascending.

    Raises:
        OSError: If it cannot be resolved.
    """
    found = {
        format_endpoint(str(address[0]), port)
        for family, _, _, _, address in sockets.getaddrinfo(host, port, type=sockets.SOCK_STREAM)
        # An address of one link only means nothing without the name of a device.
        if family in {sockets.AF_INET, sockets.AF_INET6} and "%" not in str(address[0])
    }
    return tuple(sorted(found)[:MAX_NODES])


def slurm_seeds(nodes_with_port: str) -> tuple[Seed, ...]:
    """An agent on each node of a ``NODELIST:PORT``, named as the node is."""
    nodes, _, port = nodes_with_port.rpartition(":")
    return tuple((name, format_endpoint(name, int(port))) for name in expanded_nodes(nodes))


def parsed_peers(text: str, source: str) -> tuple[Seed, ...]:
    """The seeds in a file's lines ``NODE=HOST:PORT``; empty lines and ``#`` comments do not count.

    Raises:
        InvalidConfiguration: For the first line that is of another form, or says a thing twice.
    """
    seeds: list[Seed] = []
    for number, line in enumerate(text.splitlines(), 1):
        peer = line.partition("#")[0].strip()
        if not peer:
            continue
        try:
            seeds.append(split_peer(peer))
        except ValueError as error:
            raise InvalidConfiguration(f"line {number}", str(error), source) from error
    return united([(source, seeds)])


def united(sources: Iterable[tuple[str, Iterable[Seed]]]) -> tuple[Seed, ...]:
    """The seeds of all sources together; a known node id is preferred to an unknown one.

    Raises:
        InvalidConfiguration: If two of them contradict each other.
    """
    by_address: dict[str, tuple[str, str]] = {}
    by_node: dict[str, tuple[str, str]] = {}
    for source, seeds in sources:
        for node_id, address in seeds:
            other, place = by_address.get(address, ("", source))
            if node_id and other not in {"", node_id}:
                problem = f"{address} is named both {other} (in {place}) and {node_id}"
                raise InvalidConfiguration("cluster", problem, source)
            elsewhere, place = by_node.get(node_id, (address, source))
            if node_id and elsewhere != address:
                problem = f"{node_id} is both at {elsewhere} (in {place}) and at {address}"
                raise InvalidConfiguration("cluster", problem, source)
            by_address[address] = (node_id or other, source)
            if node_id:
                by_node[node_id] = (address, source)
    if len(by_address) > MAX_NODES:
        raise InvalidConfiguration("cluster", f"more than {MAX_NODES:,} agents are named")
    return tuple(sorted((node_id, address) for address, (node_id, _) in by_address.items()))


class Discovery:
    """The seeds that one configuration leads to, now and later."""

    def __init__(
        self,
        options: ClusterOptions,
        resolve: Callable[[str, int], tuple[str, ...]] = addresses_of,
    ) -> None:
        """Look at nothing yet.

        Args:
            options: Where to look.
            resolve: From host and port to addresses; instead of asking DNS.
        """
        self.problem = ""
        """Why a name or a changed file gave nothing new the last time; empty if all is well."""
        self._options = options
        self._resolve = resolve
        self._dns: tuple[Seed, ...] = ()
        self._file: tuple[Seed, ...] = ()
        self._file_state: tuple[int, ...] | None = None

    @property
    def changes(self) -> bool:
        """Whether another look may find others."""
        return bool(self._options.peers_dns or self._options.peers_file)

    def seeds(self) -> tuple[Seed, ...]:
        """Look everywhere. This may block for as long as DNS does.

        Returns:
            Node ids, empty where unknown, and addresses; this agent may be among them.

        Raises:
            InvalidConfiguration: If a file cannot be read or understood and never could, or if
                two sources contradict each other.
        """
        options = self._options
        self.problem = ""
        if options.peers_file is not None:
            self._read(options.peers_file)
        if options.peers_dns:
            self._look_up(options.peers_dns)
        return united(
            [
                ("cluster.peers", options.peers),
                (
                    "cluster.peers_slurm",
                    slurm_seeds(options.peers_slurm) if options.peers_slurm else (),
                ),
                (str(options.peers_file), self._file),
                (f"the addresses of {options.peers_dns}", self._dns),
            ]
        )

    def _look_up(self, endpoint: str) -> None:
        host, port = split_endpoint(endpoint)
        try:
            self._dns = tuple(("", address) for address in self._resolve(host, port))
        except OSError as error:
            # A headless service without pods has no address: that is no mistake in the options.
            self.problem = f"{host} cannot be resolved ({error.strerror or error})"

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                state = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
                if state == self._file_state:
                    return
                content = file.read(_MAX_FILE_BYTES + 1)
            if len(content) > _MAX_FILE_BYTES:
                raise InvalidConfiguration(_PEERS_FILE, "the file is too large", str(path))
            self._file = parsed_peers(content.decode("utf-8"), str(path))
            self._file_state = state
        except OSError as error:
            problem = f"the file cannot be read ({error.strerror})"
            self._keep_on(InvalidConfiguration(_PEERS_FILE, problem, str(path)))
        except UnicodeDecodeError:
            self._keep_on(InvalidConfiguration(_PEERS_FILE, "the file is not text", str(path)))
        except InvalidConfiguration as error:
            self._keep_on(error)

    def _keep_on(self, error: InvalidConfiguration) -> None:
        """A file that was good once may be half written now: what it said holds on."""
        if self._file_state is None:
            raise error
        self.problem = str(error)
