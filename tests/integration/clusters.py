"""Several real agents that are one cluster, on loopback, and trainers on their nodes.

Each node has a home, a memory directory, an NVMe directory and a port of its own. Everything that
is started here ends with `AgentCluster.close`, by its process id; every wait has a deadline.
"""

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everstep.agent.asking import Agent
from everstep.proto.agent_pb2 import StatusReply
from everstep.proto.errors import EverstepError
from everstep.storage.arena import MemoryLevel
from everstep.storage.nvme import NvmeLevel
from tests.zygotes import Program

DEADLINE_S = 60.0
_POLL_S = 0.02
QUICK = "[cluster]\nheartbeat_s = 0.1\nsuspect_after_s = 0.6\njoin_timeout_s = 10\n"
"""How soon a node counts as lost; a test that needs patience says something else."""


def eventually(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until `condition` holds; return what it returned."""
    deadline = time.monotonic() + deadline_s
    while not (outcome := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {deadline_s} s: {what}")
        time.sleep(_POLL_S)
    return outcome


class AgentNode:
    """One node: its directories, its port, and the agent on it, if one runs.

    Args:
        node_id: Its name.
        options: The agent's configuration file, as TOML.
        environ: Added to the agent's environment, e.g. failpoints.
        prefix: Put before the agent's command, e.g. to run it in a network namespace.
    """

    def __init__(
        self,
        node_id: str,
        options: str,
        environ: dict[str, str],
        prefix: tuple[str, ...] = (),
        host: str = "127.0.0.1",
    ) -> None:
        self.node_id = node_id
        # In /tmp, since a socket's path must be short.
        self.home = Path(tempfile.mkdtemp(prefix=f"es-{node_id}-", dir="/tmp"))
        self.memory_dir = Path(tempfile.mkdtemp(prefix="everstep-test-", dir="/dev/shm"))
        self.nvme_dir = self.home / "nvme"
        self.socket = self.home / "a.sock"
        self.address = f"unix:{self.socket}"
        self.log = self.home / "agent.log"
        self.config = self.home / "everstep.toml"
        self.config.write_text(options)
        self.environ = environ
        self.process: Program | subprocess.Popen[bytes] | None = None
        self.replaces = ""
        self._prefix = prefix
        # Bound but not listening: nobody else is given the port, and the agent may have it.
        self._reserved = socket.socket(socket.AF_INET)
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self.endpoint = f"{host}:{self._reserved.getsockname()[1]}"

    @property
    def pid(self) -> int:
        """The agent's."""
        assert self.process is not None
        return self.process.pid

    @property
    def runs(self) -> bool:
        """Whether its agent does."""
        return self.process is not None and self.process.poll() is None

    @property
    def memory(self) -> MemoryLevel:
        """Its memory level, to look at and to damage."""
        return MemoryLevel(self.memory_dir, keep_free_bytes=0)

    @property
    def nvme(self) -> NvmeLevel:
        """Its durable level, to look at."""
        return NvmeLevel(self.nvme_dir, write_threads=1, chunk_bytes=1 << 20, direct=False)

    def start(self, peers: list[str], environ: dict[str, str] | None = None) -> None:
        """Start its agent, and wait until its socket answers."""
        assert not self.runs
        command = ["-m", "everstep.agent", "agent"]
        command += ["--node-id", self.node_id, "--listen", self.endpoint]
        command += ["--socket", str(self.socket), "--memory-dir", str(self.memory_dir)]
        command += ["--nvme-dir", str(self.nvme_dir), "--config", str(self.config)]
        for peer in peers:
            command += ["--peer", peer]
        if self.replaces:
            command += ["--replaces", self.replaces]
        added = {"EVERSTEP_HOME": str(self.home), **self.environ, **(environ or {})}
        if not self._prefix:
            self.process = Program("agent", *command, environ=added, log=self.log)
            return
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._prefix, sys.executable, *command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **added},
            )

    def await_answer(self) -> None:
        """Wait until its socket answers."""
        eventually(self._answers, f"an answer at {self.address}")

    def _answers(self) -> bool:
        assert self.runs, self.said()
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def said(self, last_chars: int = 4000) -> str:
        """The end of its log."""
        return f"{self.node_id}: " + self.log.read_text(errors="replace")[-last_chars:]

    def send(self, number: signal.Signals) -> None:
        """Send its agent a signal, e.g. SIGSTOP."""
        os.kill(self.pid, number)

    def end(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End its agent; the exit status."""
        assert self.process is not None
        if self.runs:
            self.send(number)
            self.send(signal.SIGCONT)
        return self.process.wait(DEADLINE_S)

    def wipe(self, *, nvme: bool) -> None:
        """What its loss takes with it."""
        assert not self.runs, "end it first"
        for entry in self.memory_dir.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if nvme:
            shutil.rmtree(self.nvme_dir, ignore_errors=True)

    def close(self) -> None:
        """End its agent and remove what it left."""
        if self.process is not None:
            self.end()
        self._reserved.close()
        shutil.rmtree(self.memory_dir, ignore_errors=True)
        shutil.rmtree(self.home, ignore_errors=True)

    def flip(self, job: str, step: int, rank: int, *, from_end: int = 1) -> None:
        """Change one byte of a shard in its memory, counted from the end of the image."""
        (held,) = [
            one for one in self.memory.records(job) if (one.snapshot.step, one.rank) == (step, rank)
        ]
        at = held.slot * held.arena.slot_bytes + held.record.image_bytes - from_end
        with held.arena.path.open("r+b") as arena:
            arena.seek(at)
            (byte,) = arena.read(1)
            arena.seek(at)
            arena.write(bytes([byte ^ 0x40]))


class NodeTrainer:
    """The script cluster_trainer.py as a process: one rank on one node.

    Args:
        node: Where.
        rank: Which.
        world: Of how many.
        arguments: See there.
        environ: Added to its environment.
    """

    def __init__(
        self,
        node: AgentNode,
        rank: int,
        world: int,
        arguments: tuple[str, ...],
        environ: dict[str, str],
    ) -> None:
        self.node, self.rank = node, rank
        self.said: list[dict[str, Any]] = []
        self._errors = node.home / f"trainer-{rank}-{time.monotonic_ns()}.log"
        script = str(Path(__file__).parent / "cluster_trainer.py")
        environ = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "EVERSTEP_AGENT": node.address,
            **environ,
        }
        self.process = Program(
            "trainer", script, *arguments, environ=environ, log=self._errors, piped=True
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._begun = b""

    def until(self, **wanted: Any) -> dict[str, Any]:
        """The next thing it says that has these values; everything so far is in `said`."""
        return self.until_that(lambda fact: wanted.items() <= fact.items(), str(wanted))

    def until_that(
        self, condition: Callable[[dict[str, Any]], bool], what: str, deadline_s: float = DEADLINE_S
    ) -> dict[str, Any]:
        """The next thing it says of which `condition` holds."""
        deadline = time.monotonic() + deadline_s
        while True:
            fact = self._next(deadline)
            assert fact is not None, f"rank {self.rank} never said {what}: {self.words()}"
            if condition(fact):
                return fact

    def _next(self, deadline: float) -> dict[str, Any] | None:
        """The next line; None at the end or the deadline."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._begun:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not selector.select(left_s):
                    return None
                more = self.process.stdout.read()
                if more == b"":
                    return None
                self._begun += more or b""
        first, _, self._begun = self._begun.partition(b"\n")
        fact: dict[str, Any] = json.loads(first)
        self.said.append(fact)
        return fact

    def words(self) -> str:
        """What it and its node said, for a failure."""
        errors = self._errors.read_text(errors="replace")[-3000:]
        return f"{self.said[-5:]}\n{errors}\n{self.node.said()}"

    def drain(self, deadline_s: float = DEADLINE_S) -> list[dict[str, Any]]:
        """Everything it says until it ends."""
        deadline = time.monotonic() + deadline_s
        while self._next(deadline) is not None:
            pass
        return self.said

    def go_on(self) -> None:
        """Let one that lingers end."""
        assert self.process.stdin is not None
        if not self.process.stdin.closed:
            self.process.stdin.close()

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        self.go_on()
        self.drain()
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and not stream.closed:
                stream.close()


class AgentCluster:
    """Agents n1, n2, ... that know each other.

    Args:
        options: Added to each agent's configuration file, as TOML. Its [cluster] is there already.
        cluster: [cluster] instead of `QUICK`.
        environ: Added to each agent's environment.
    """

    def __init__(
        self, options: str = "", *, cluster: str = QUICK, environ: dict[str, str] | None = None
    ) -> None:
        self.nodes: dict[str, AgentNode] = {}
        self.trainers: list[NodeTrainer] = []
        self._options = f"{cluster}\n{options}"
        self._environ = environ or {}

    def __getitem__(self, node_id: str) -> AgentNode:
        return self.nodes[node_id]

    def add(self, node_id: str, more: str = "") -> AgentNode:
        """A node without an agent yet; `more` is added to its configuration file."""
        node = AgentNode(node_id, f"{self._options}\n{more}", dict(self._environ))
        self.nodes[node_id] = node
        return node

    def start(self, count: int, *, whole: bool = True) -> None:
        """Start so many agents; wait until all are members and one coordinates them."""
        new = [self.add(f"n{number}") for number in range(1, count + 1)]
        for node in new:
            node.start(self._peers())
        for node in new:
            node.await_answer()
        if whole:
            self.await_members(count)

    def _peers(self) -> list[str]:
        return [f"{node.node_id}={node.endpoint}" for node in self.nodes.values()]

    def await_members(self, count: int, *, deadline_s: float = DEADLINE_S) -> None:
        """Wait until all running agents see so many live members."""
        for node in [node for node in self.nodes.values() if node.runs]:
            eventually(
                lambda node=node: len(self.live(node.node_id)) == count,
                f"{count} members seen by {node.said()}",
                deadline_s,
            )

    def live(self, node_id: str) -> list[str]:
        """The members that a node takes for alive; none if it has no place itself."""
        cluster = self.status(node_id).cluster
        if not cluster.joined:
            return []
        return [member.node_id for member in cluster.members if member.state == "live"]

    def kill(self, node_id: str) -> None:
        """SIGKILL its agent."""
        self[node_id].end()

    def wipe(self, node_id: str, *, nvme: bool = False) -> None:
        """Remove what its memory held, and its disk if asked; after `kill`."""
        self[node_id].wipe(nvme=nvme)

    def restart(self, node_id: str, environ: dict[str, str] | None = None) -> None:
        """Start its agent again, and wait until it has its place."""
        node = self[node_id]
        if node.runs:
            self.kill(node_id)
        node.start(self._peers(), environ)
        node.await_answer()
        self.await_place(node_id)

    def await_place(self, node_id: str) -> None:
        """Wait until an agent is a live member, as itself and the coordinator see it."""

        def joined() -> bool:
            if node_id not in self.live(node_id):
                return False
            coordinator = self.status(node_id).cluster.coordinator
            there = self.nodes.get(coordinator)
            return there is not None and node_id in self.live(coordinator)

        eventually(joined, f"a place for {self[node_id].said()}")

    def replace(self, old: str, new: str, more: str = "") -> AgentNode:
        """Start an agent on another node that takes a lost one's place."""
        assert not self[old].runs, "end it first"
        node = self.nodes.get(new) or self.add(new, more)
        node.replaces = old
        node.start(self._peers())
        node.await_answer()
        self.await_place(new)
        return node

    def status(self, node_id: str) -> StatusReply:
        """What its agent says of itself; an empty answer if it does not answer."""
        try:
            with Agent(self[node_id].address) as agent:
                return agent.status()
        except EverstepError:
            return StatusReply()

    def trainer(
        self, node_id: str, rank: int, world: int, *arguments: str, **environ: str
    ) -> NodeTrainer:
        """Start a rank on a node: see cluster_trainer.py for the arguments."""
        trainer = NodeTrainer(self[node_id], rank, world, arguments, environ)
        self.trainers.append(trainer)
        return trainer

    def close(self) -> None:
        """End everything."""
        for trainer in self.trainers:
            trainer.close()
        for node in self.nodes.values():
            node.close()
