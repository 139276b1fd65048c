"""A job on several nodes of real processes, and the promises that it checks by itself.

Trainers go in lockstep, as collectives make real ones do. Whatever is restored is compared with
what it must be (P0), with what a trainer was told is committed at a level (P1); every snapshot's
hold on training is measured (P3).
"""

import re
import signal
import time
from pathlib import Path
from typing import Any

from harness import Node, Process, Trainer, TrainerError, Zygote, until
from netns import Network

from everstep.proto import agent_pb2 as wire

SIZES_BYTES = (1_300_000, 2_500_000, 300_000, 1_900_000, 1_048_576, 700_001, 2_097_152, 900_000)
"""Of the ranks' own bytes: unlike, and with and without a broken unit at the end."""
COMMON_BYTES = 400_000
STALL_LIMIT_S = 2.0
"""What a snapshot may cost training on a machine that has other things to do: the client's own
limit for an agent that does not answer is 0.25 s."""
Line = dict[str, Any]
Told = tuple[int, int]
"""Launch and step: later ones are larger."""


class Host(Node):
    """A node of a fleet."""

    def __init__(self, zygotes: dict[str, Zygote], node_id: str, network: Network) -> None:
        super().__init__(zygotes)
        self.node_id = node_id
        self.namespace = network.namespace(node_id)
        self.lost = False

    def last_words(self) -> str:
        """The end of the agent's log, for the message of a test that failed."""
        logs = sorted(self.base.glob("agent-*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(f"--- {self.node_id} {p.name}\n{p.read_text()[-2500:]}" for p in logs[-2:])

    def said(self) -> str:
        """Everything that this node's agents have logged."""
        logs = sorted(self.base.glob("agent-*.log"), key=lambda path: path.stat().st_mtime)
        return "".join(path.read_text(errors="replace") for path in logs)


class Fleet:
    """Nodes n1, n2 and so on, one rank on each unless told otherwise."""

    def __init__(
        self,
        zygotes: dict[str, Zygote],
        count: int = 4,
        *,
        spares: int = 0,
        parities: int = 1,
        nodes_of_ranks: tuple[str, ...] = (),
        options: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self._zygotes = zygotes
        self.node_ids = tuple(f"n{i + 1}" for i in range(count))
        everybody = tuple(f"n{i + 1}" for i in range(count + spares))
        self.nodes_of_ranks = list(nodes_of_ranks or self.node_ids)
        self.options: dict[str, dict[str, Any]] = {
            "cluster": {"heartbeat_s": 0.1, "suspect_after_s": 0.8, "join_timeout_s": 5.0},
            "parity": {"parities": parities, "timeout_s": 5.0, "scrub_bytes_s": 0},
            "bulk": {"stall_timeout_s": 2.0, "ticket_timeout_s": 5.0},
            "memory": {"keep_free_bytes": 0},
            "nvme": {"interval": "off", "keep_newest": 2},
            "limits": {"declare_timeout_s": 10.0, "restore_timeout_s": 30.0},
            "agent": {"insecure": True, "shutdown_timeout_s": 5.0},
        }
        for section, values in (options or {}).items():
            self.options.setdefault(section, {}).update(values)
        self.sizes_bytes = list(SIZES_BYTES)
        self.network = Network(everybody)
        self.hosts: dict[str, Host] = {}
        self.trainers: dict[int, Trainer] = {}
        self.launches = 0
        self.step = 0
        self.told: dict[str, Told] = {}
        self.taken: set[Told] = set()
        self.stalls_s: list[float] = []
        self._homes: dict[str, Path] = {}
        for node_id in self.node_ids:
            self.add(node_id)

    def add(self, node_id: str, **cluster: Any) -> Host:
        """A node with nothing on it and nothing running."""
        host = self.hosts[node_id] = Host(self._zygotes, node_id, self.network)
        self.configure(host, **cluster)
        return host

    def configure(self, host: Host, **cluster: Any) -> None:
        """Give a node this fleet's options, and others of [cluster] if wanted."""
        host.options = {section: dict(values) for section, values in self.options.items()}
        host.options["agent"]["listen"] = self.network.address(host.node_id)
        peers = [f"{node_id}={self.network.address(node_id)}" for node_id in self.node_ids]
        host.options["cluster"] |= {"peers": peers, **cluster}

    def start(self, *node_ids: str, **request: Any) -> None:
        """Start the agents of these nodes, or of all, and wait until they answer."""
        for node_id in node_ids or self.node_ids:
            self.hosts[node_id].start_agent(ready=False, **request)
        for node_id in node_ids or self.node_ids:
            self.await_agent(node_id)

    def await_agent(self, node_id: str) -> None:
        host = self.hosts[node_id]
        assert host.agent is not None
        host.until_answering(host.agent)

    def agent(self, node_id: str) -> Process:
        agent = self.hosts[node_id].agent
        assert agent is not None
        return agent

    def lose(self, *node_ids: str) -> None:
        """The nodes' power fails and their disks burn: processes, memory and NVMe are gone."""
        self._drop_dead(node_ids)
        for node_id in node_ids:
            self.hosts[node_id].close()
            self.add(node_id)

    def cut_power(self, *node_ids: str) -> None:
        """The nodes' memory is gone; what was on NVMe stays."""
        self._drop_dead(node_ids or self.node_ids)
        for node_id in node_ids or self.node_ids:
            self.hosts[node_id].wipe_memory()

    def _drop_dead(self, node_ids: tuple[str, ...]) -> None:
        """All at one time: an agent that outlived its trainers would flush what they left."""
        trainers = [
            self.trainers.pop(r) for n in node_ids for r in self.ranks_of(n) if r in self.trainers
        ]
        agents = [self.agent(node_id) for node_id in node_ids if self.agent(node_id).alive]
        for process in (*agents, *(trainer.process for trainer in trainers)):
            process.signal(signal.SIGKILL)
        for agent in agents:
            agent.ended()
        for trainer in trainers:
            trainer.kill()

    def until_parity_is_durable(self) -> None:
        """What was told is durable survives power loss; with its parity, a lost disk, too."""
        step = f"*/step-{self.told['nvme'][1]:012d}/parity.manifest"
        hosts = self.hosts.values()
        until(lambda: all(list(host.nvme.glob(step)) for host in hosts), "parity on NVMe")

    def ranks_of(self, node_id: str) -> list[int]:
        return [rank for rank, node in enumerate(self.nodes_of_ranks) if node == node_id]

    def host_of(self, rank: int) -> Host:
        return self.hosts[self.nodes_of_ranks[rank]]

    def each(self, command: str, within_s: float = 40.0, **options: Any) -> dict[int, Any]:
        """One command to all trainers at a time; their answers by rank."""
        for trainer in self.trainers.values():
            trainer.begin(command, **options)
        deadline = time.monotonic() + within_s
        return {
            rank: trainer.end(max(0.1, deadline - time.monotonic()))
            for rank, trainer in self.trainers.items()
        }

    def launch(self, **options: Any) -> None:
        """Start the job's trainers anew, on all ranks."""
        self.kill_trainers()
        self.launches += 1
        self.step = 0
        world = len(self.nodes_of_ranks)
        for rank in range(world):
            trainer = self.host_of(rank).start_trainer(script="known_trainer.py")
            self.trainers[rank] = trainer
            trainer.begin(
                "connect",
                address=self.host_of(rank).address,
                rank=rank,
                world=world,
                launch=self.launches,
                size_bytes=self.sizes_bytes[rank],
                common_bytes=COMMON_BYTES,
                **options,
            )
        for trainer in self.trainers.values():
            trainer.end()

    def kill_trainers(self) -> None:
        while self.trainers:
            self.trainers.popitem()[1].kill()

    def train(self, steps: int = 1, level: str = "memory", **options: Any) -> list[dict[int, Line]]:
        """Steps in lockstep; what became of each snapshot, by rank."""
        return [self._one(level, **options) for _ in range(steps)]

    def _one(self, level: str, **options: Any) -> dict[int, Line]:
        lines: dict[int, Line] = {}
        self.step += 1
        self.taken.add((self.launches, self.step))
        for rank, answer in self.each("run", level=level, **options).items():
            (lines[rank],) = answer
            assert lines[rank]["step"] == self.step, lines
            self.stalls_s.append(lines[rank]["stall_s"])
            self._hear(self.step, lines[rank]["levels"])
        assert self.stalls_s[-1] < STALL_LIMIT_S, f"training was held up (P3): {lines}"
        assert max(self.stalls_s[-len(lines) :]) < STALL_LIMIT_S, f"held up (P3): {lines}"
        return lines

    def _hear(self, step: int, levels: list[str]) -> None:
        for level in levels:
            self.told[level] = max(self.told.get(level, (0, 0)), (self.launches, step))

    def hear(self) -> None:
        """Ask all trainers what they have been told since."""
        for states in self.each("heard").values():
            for step, levels in states.items():
                self._hear(int(step), levels)

    def commit(
        self,
        steps: int = 1,
        level: str = "memory",
        within_s: float = 40.0,
        wait_s: float = 4.0,
    ) -> None:
        """Train until so many steps more were committed at a level on all ranks."""
        deadline = time.monotonic() + within_s
        while steps:
            lines = self._one(level, timeout=wait_s)
            if all(level in line["levels"] for line in lines.values()):
                steps -= 1
            elif time.monotonic() > deadline:
                raise TimeoutError(f"nothing is committed any more: {lines}\n{self.last_words()}")
            else:
                time.sleep(0.05)

    def assert_no_commit(self, lines: dict[int, Line]) -> None:
        """Nobody was told of a commit."""
        assert not [line for line in lines.values() if line["levels"]], lines

    def restore(self, at_least: str = "memory", **options: Any) -> Line:
        """All ranks restore: the same step, bit for bit, no older than was told at a level."""
        answers = self.each("restore", **options)
        found = {(line["launch"], line["step"]) for line in answers.values()}
        assert len(found) == 1, f"ranks at different steps (P0): {answers}"
        assert not [line for line in answers.values() if line["wrong"]], f"wrong (P0): {answers}"
        (launch_and_step,) = found
        if at_least:
            told = self.told.get(at_least, (0, 0))
            if told == (0, 0) and launch_and_step == (0, None):
                return answers[0]
            assert launch_and_step in self.taken, (launch_and_step, sorted(self.taken)[-5:])
            assert launch_and_step >= told, f"told {told}, lost (P1): {answers}\n"
            # What was newer is abandoned.
            self.told = {level: min(told, launch_and_step) for level, told in self.told.items()}
        self.step = launch_and_step[1] or 0
        return {**answers[0], "levels": sorted({x for a in answers.values() for x in a["levels"]})}

    def refused(self) -> str:
        """All ranks are refused a restore, and nothing was loaded; what the first was told."""
        for trainer in self.trainers.values():
            trainer.begin("restore")
        told = []
        for trainer in self.trainers.values():
            try:
                raise AssertionError(f"something was restored: {trainer.end()}")
            except TrainerError as error:
                told.append(str(error))
            assert not trainer.do("touched"), told
        return told[0]

    def relaunch(self, at_least: str = "memory", **options: Any) -> Line:
        """New trainers on all nodes, which restore."""
        self.launch()
        return self.restore(at_least, **options)

    def resize(self, *nodes_of_ranks: str, at_least: str = "memory") -> Line:
        """New trainers, as many as there are nodes named, which restore what others have saved."""
        self.kill_trainers()
        saved_world = len(self.nodes_of_ranks)
        for rank in range(saved_world, len(nodes_of_ranks)):
            # A new rank takes what an old one had for itself.
            self.sizes_bytes[rank] = self.sizes_bytes[rank % saved_world]
        self.nodes_of_ranks = list(nodes_of_ranks)
        return self.relaunch(at_least, saved_world=saved_world)

    def cluster(self, node_id: str) -> Any:
        """The membership, as this node's agent sees it."""
        return self.hosts[node_id].ask("Status", wire.StatusRequest()).cluster

    def suspects(self, node_id: str) -> set[str]:
        """Whom this node's agent takes for lost."""
        members = self.cluster(node_id).members
        return {member.node_id for member in members if member.state == "suspected"}

    def until_suspected(self, by: str, *lost: str, within_s: float = 15.0) -> None:
        """An agent takes exactly these nodes for lost, and says so in its log."""
        until(lambda: self.suspects(by) == set(lost), f"{by} missing {lost}", within_s)
        for node_id in lost:
            until(
                lambda named=rf"nothing was heard .*{node_id}": re.search(
                    named, self.hosts[by].said()
                ),
                f"{by} naming {node_id}",
            )

    def until_joined(self) -> None:
        """All agents that run know of each other."""
        running = {n for n, host in self.hosts.items() if host.agent and host.agent.alive}

        def joined() -> bool:
            return all(
                {m.node_id for m in self.cluster(node_id).members if m.state == "live"} >= running
                for node_id in running
            )

        until(joined, "all agents knowing of each other")

    def until_said(self, node_id: str, words: str, within_s: float = 15.0) -> None:
        host = self.hosts[node_id]
        until(lambda: words in host.said(), f"{node_id} saying {words!r}", within_s)

    def last_words(self) -> str:
        return "\n".join(host.last_words() for host in self.hosts.values())

    def assert_calm(self) -> None:
        """No agent has met anything that nobody had thought of."""
        for host in self.hosts.values():
            assert "Traceback" not in host.said(), host.last_words()

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()
        self.network.close()
