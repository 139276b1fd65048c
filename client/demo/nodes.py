"""The nodes of the demo's cluster: directories, a port and an agent each, all on this machine.

Owns starting, killing and wiping them, and asking their agents how they are. Promises to end only
processes it started, by their id, that every wait is bounded, and that `close` leaves nothing, in
memory either. Knows nothing of training.
"""

import shutil
import socket as sockets
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import grpc

from everstep.client.channel import Channel
from everstep.client.demo.processes import ProcessFailed
from everstep.client.environment import for_child, places
from everstep.proto import agent_pb2 as wire
from everstep.proto import peer_pb2 as peer
from everstep.proto.errors import AgentUnavailable, DeadlineExceeded
from everstep.proto.peer_pb2_grpc import RecoveryStub
from everstep.proto.places import Places
from everstep.proto.wire_errors import decode

_LOOPBACK = "127.0.0.1"
_POLL_S = 0.05
_ASK_S = 20.0
_END_S = 20.0
_MEMBERS_S = 90.0
SUSPECT_AFTER_S = 3.0
_OPTIONS = f"""
[cluster]
heartbeat_s = 0.5
suspect_after_s = {SUSPECT_AFTER_S}
join_timeout_s = 60

[nvme]
# A lost node takes its disk along here, and what is left behind is deleted: no need to be slow.
flush_on_exit = false
flush_on_sigterm = false

[memory]
keep_free_bytes = "64 MiB"
"""


class Node:
    """One node; its agent runs after `start`.

    Args:
        node_id: Its name among agents.
        home: An EVERSTEP_HOME of its own.
        nvme_dir: Instead of the one in `home`: a disk that was moved here.
    """

    def __init__(self, node_id: str, home: Path, nvme_dir: Path | None = None) -> None:
        self.node_id = node_id
        self.home = home
        home.mkdir()
        self._places: Places = places({"EVERSTEP_HOME": str(home)})
        self.memory_dir = self._places.memory_dir
        self.nvme_dir = nvme_dir or self._places.nvme_dir
        self.address = self._places.address
        self.log = self._places.log
        # Bound, but not listening: nobody else is given the port, and the agent may have it.
        self._reserved = sockets.socket(sockets.AF_INET)
        self._reserved.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        self._reserved.bind((_LOOPBACK, 0))
        self.endpoint = f"{_LOOPBACK}:{self._reserved.getsockname()[1]}"
        self._agent: subprocess.Popen[bytes] | None = None

    def start(self, peers: Iterable["Node"], parity: int, replaces: str = "") -> None:
        """Start its agent, without waiting for it."""
        config = self.home / "everstep.toml"
        config.write_text(_OPTIONS)
        # -P, since the demo may be run in a checkout, where everstep/ is the face alone.
        command = [sys.executable, "-P", "-m", "everstep.agent", "agent"]
        command += ["--node-id", self.node_id, "--listen", self.endpoint]
        command += ["--config", str(config), "--parity", str(parity)]
        command += ["--nvme-dir", str(self.nvme_dir)]
        for other in peers:
            command += ["--peer", f"{other.node_id}={other.endpoint}"]
        if replaces:
            command += ["--replaces", replaces]
        with self.log.open("ab") as log:
            self._agent = subprocess.Popen(
                command,
                env=for_child({"EVERSTEP_HOME": str(self.home), "EVERSTEP_CONFIG": None}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """SIGKILL its agent, and wait for the end."""
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait(_END_S)

    def wipe(self, *, disk: bool) -> None:
        """Remove what its loss takes with it: its memory, and its disk if asked."""
        shutil.rmtree(self.memory_dir, ignore_errors=True)
        if disk:
            shutil.rmtree(self.nvme_dir, ignore_errors=True)

    def close(self) -> None:
        """End its agent, and give back its memory and its port."""
        self.kill()
        self._reserved.close()
        shutil.rmtree(self.memory_dir, ignore_errors=True)
        if self.home not in self._places.socket.parents:
            # A home with a long name has its socket elsewhere.
            self._places.socket.unlink(missing_ok=True)

    def status(self) -> wire.StatusReply | None:
        """What its agent says of itself; None while it does not answer.

        Raises:
            ProcessFailed: If it has ended by itself.
        """
        if self._agent is None or (status := self._agent.poll()) is not None:
            raise ProcessFailed(f"the agent of {self.node_id}", status or 0, self.log)
        channel = Channel(self.address)
        try:
            reply: wire.StatusReply = channel.call("Status", wire.StatusRequest(), _ASK_S)
            return reply
        except (AgentUnavailable, DeadlineExceeded):
            return None
        finally:
            channel.close()

    def parity_bytes(self, job: str) -> int:
        """Parity in its memory: of one snapshot, the largest if there are several."""
        folder = self.memory_dir / job / "parity"
        held = {path.name.partition("-")[0] for path in folder.glob("*.manifest")}
        sizes = [path.stat().st_size for path in folder.glob("*.parity") if path.stem in held]
        return max(sizes, default=0)


class Cluster:
    """All nodes; a context manager that closes them.

    Args:
        home: Where theirs are.
        count: How many to begin with.
        parity: How many may be lost at one time.
    """

    def __init__(self, home: Path, count: int, parity: int) -> None:
        self._home = home
        self._parity = parity
        self._begun = count
        self.nodes: list[Node] = []
        """The node of each rank."""
        self.gone: list[Node] = []

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for node in self.nodes + self.gone:
            node.close()

    def start(self) -> None:
        """Start the first agents, and wait until each sees all as live."""
        for number in range(1, self._begun + 1):
            name = f"n{number}"
            self.nodes.append(Node(name, self._home / name))
        for node in self.nodes:
            node.start(self.nodes, self._parity)
        names = {node.node_id for node in self.nodes}
        self.await_live(self.nodes, lambda live: live == names, "the agents to meet")

    def replace(self, rank: int, *, disk: bool) -> Node:
        """Put a node with a new name in the place of a lost one; does not wait for it.

        Args:
            rank: Whose node is lost.
            disk: Whether the lost one's disk is moved over.
        """
        lost = self.nodes[rank]
        name = f"n{len(self.nodes) + len(self.gone) + 1}"
        new = Node(name, self._home / name, lost.nvme_dir if disk else None)
        self.gone.append(lost)
        self.nodes[rank] = new
        new.start(self.nodes, self._parity, replaces=lost.node_id)
        return new

    def await_live(
        self, asked: Iterable[Node], fits: Callable[[set[str]], bool], what: str
    ) -> None:
        """Wait until the live members that each of these nodes sees fit.

        Raises:
            DeadlineExceeded: If that is not in time.
        """
        deadline = time.monotonic() + _MEMBERS_S
        for node in asked:
            while not fits(live(node)):
                if time.monotonic() > deadline:
                    late = f"{node.node_id} (see {node.log})"
                    raise DeadlineExceeded(what, _MEMBERS_S, (late,))
                time.sleep(_POLL_S)

    def bytes_sent(self) -> int:
        """By all agents to each other, since each began: parity and recovery."""
        statuses = [node.status() for node in self.nodes]
        return sum(
            int(status.cluster.bulk_counters["bytes_sent"])
            for status in statuses
            if status is not None
        )

    def shard_bytes(self) -> int:
        """The newest committed snapshot on all nodes together."""
        newest = [_newest(node, "memory") for node in self.nodes]
        return sum(int(one.bytes) for one in newest if one is not None)

    def newest_on_disk(self) -> int:
        """The newest step that all nodes have on disk; 0: none."""
        newest = [_newest(node, "nvme") for node in self.nodes]
        return min((int(one.step) if one is not None else 0) for one in newest)


def live(node: Node) -> set[str]:
    """The members that a node takes for alive; none while it has no place itself."""
    status = node.status()
    if status is None or not status.cluster.joined:
        return set()
    return {member.node_id for member in status.cluster.members if member.state == "live"}


def _newest(node: Node, level: str) -> wire.SnapshotStatus | None:
    """The newest snapshot that is committed at a level, as a node sees it."""
    status = node.status()
    held = [
        snapshot
        for job in (status.jobs if status is not None else ())
        for snapshot in job.snapshots
        if snapshot.level == level and snapshot.committed
    ]
    return max(held, key=lambda one: (one.incarnation, one.step), default=None)


def recovery_plan(asked: Node, job: str) -> peer.PlanReply:
    """What of a job can be recovered, and from where: `everstep recover --dry-run` shows the same.

    Raises:
        EverstepError: If the agent does not say.
    """
    with grpc.insecure_channel(asked.address) as channel:
        try:
            request = peer.PlanRequest(job=job)
            reply: peer.PlanReply = RecoveryStub(channel).Plan(request, timeout=_MEMBERS_S)
            return reply
        except grpc.RpcError as error:
            raise decode(error, asked.address) from error
