"""One seeded run: nodes, their agents, the network between them, and a job, until all is calm.

Owns the choice of what goes wrong. The same seed and profile give the same run: a stormy time, then
a calm one in which every node is back or replaced, and a new snapshot must be committed and
protected within a bound.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from everstep.agent import events
from everstep.agent.protection import ProtectionRules
from everstep.proto.ids import UNIT_BYTES
from everstep.storage.retention import Rule, expired

from .clock import Clock, Network
from .files import JOB
from .host import Agent, Host
from .ledger import Ledger, insist
from .training import Training

CALM_S = 90.0


@dataclass(frozen=True, slots=True)
class Profile:
    """How large and how stormy."""

    nodes: tuple[int, int] = (2, 8)
    storm_s: float = 10.0
    trace: bool = False


class Simulation:
    """One run."""

    def __init__(self, seed: int, profile: Profile | None = None) -> None:
        self.profile = profile or Profile()
        self.happened: list[str] = []
        self.trace: Callable[[str], None] | None = None
        self.chance = chance = random.Random(seed)
        self.clock = Clock()
        if self.profile.trace:
            self.trace = lambda line: self.happened.append(f"{self.clock.now_s:8.3f} {line}")
        self.network = Network(self.clock, chance)
        self.seen: Counter[str] = Counter()
        self.hosts: dict[str, Host] = {}
        self.ledger = Ledger(self.hosts)
        nodes = chance.randint(*self.profile.nodes)
        group_size = chance.choice((0, 0, 3, 4))
        parities = chance.choice((0, 0, 1, 2))
        if group_size and parities >= group_size:
            parities = 1
        self.rules = ProtectionRules(
            parities=parities,
            group_size=group_size,
            interval_steps=chance.choice((1, 1, 3)),
            timeout_s=5.0,
            retry_s=1.0,
        )
        self.member_rules = {"heartbeat_s": 1.0, "suspect_after_s": 3.0, "join_timeout_s": 8.0}
        self.state_rules: dict[str, Any] = {
            "nvme": chance.random() < 0.7,
            "nvme_interval_steps": chance.choice((None, 2, 4)),
            "flush_on_exit": chance.random() < 0.3,
        }
        rule = Rule(chance.randint(1, 2), None)
        self.expired = lambda snapshots: expired(snapshots, rule, set())
        self.image_bytes = chance.choice((1, 3, 7)) * UNIT_BYTES - 100
        self.labels = chance.random() < 0.3
        self._at: dict[str, Host] = {}
        for index in range(nodes):
            self._add_host(f"n{index + 1}")
        self.fresh = nodes
        ranks = nodes if chance.random() < 0.7 else chance.randint(1, 2 * nodes)
        slots = chance.choice((3, 3, 4))
        captures = (1, 1, 2)[seed % 3]  # not by chance: seeds keep their meaning
        slots += captures - 1
        self.training = Training(self, ranks, slots, chance.choice((1, 1, 2)), captures)
        if seed % 4 in (1, 2):
            self.training.resizing = random.Random(seed)
        self.rotting = random.Random(seed) if seed % 5 == 3 else None
        self.fault_rate_s = chance.choice((0.5, 1.0, 2.0, 4.0))
        self.faults, self.weights = self._choose_faults()
        self.stormy = True

    def _add_host(self, node_id: str) -> Host:
        host = self.hosts[node_id] = Host(self, node_id, f"{node_id}:1")
        self._at[host.address] = host
        self.seeds = tuple((h.node_id, h.address) for h in self.hosts.values() if not h.lost)
        for other in self.hosts.values():
            if other.agent is not None:
                other.agent.node.members.seek(self.seeds)
        return host

    def agent_at(self, address: str) -> Agent | None:
        """Who listens there."""
        host = self._at.get(address)
        return host.agent if host is not None else None

    # What goes wrong.

    def _choose_faults(self) -> tuple[list[Callable[[], None]], list[float]]:
        """Each run has faults of its own: what is rare among all of them is common among few."""
        usual = self.all_faults()
        chosen = [fault for fault in usual if self.chance.random() < 0.6] or list(usual)
        weights = [weight * self.chance.choice((0.3, 1.0, 3.0)) for _, weight in chosen]
        return [fault for fault, _ in chosen], weights

    def all_faults(self) -> tuple[tuple[Callable[[], None], float], ...]:
        """What can go wrong, and how often beside each other."""
        return (
            (self.kill_agent, 3),
            (self.arm_agent, 3),
            (self.stop_agent, 2),
            (self.lose_node, 2),
            (self.replace_node, 1),
            (self.replace_living, 0.5),
            (self.partition, 2),
            (self.one_way, 1),
            (self.heal, 3),
            (self.bad_network, 1),
            (self.kill_trainer, 2),
            (self.slow_encoding, 1),
            (self.disk_trouble, 0.5),
        )

    def _some_host(self) -> Host | None:
        found = [host for host in self.hosts.values() if not host.lost]
        return self.chance.choice(found) if found else None

    def kill_agent(self) -> None:
        """An agent process dies; its node and the trainers there live on."""
        host = self._some_host()
        if host is not None and host.agent is not None:
            host.die()
            self.clock.later(self.chance.choice((0.3, 1.0, 6.0)), self._start, host)

    def arm_agent(self) -> None:
        """An agent process will die between two actions."""
        host = self._some_host()
        if host is not None and host.agent is not None:
            host.agent.dies_in_actions = self.chance.randint(0, 12)
            self.clock.later(self.chance.choice((2.0, 8.0)), self._start, host)

    def _start(self, host: Host) -> None:
        if host.agent is None and not host.lost:
            host.start(self.seeds)

    def stop_agent(self) -> None:
        """A node stands still for a while."""
        host = self._some_host()
        if host is not None:
            host.stopped_until_s = self.clock.now_s + self.chance.choice((0.7, 2.0, 5.0, 9.0))
            self.seen["stopped"] += 1

    def lose_node(self, comes_back: bool = True) -> None:
        """A node's power fails: agent, trainers and memory are gone, maybe its disk, too."""
        host = self._some_host()
        if host is None:
            return
        disk = self.chance.random() < 0.3
        self._wipe(host, disk=disk)
        if comes_back:
            self.clock.later(self.chance.choice((0.5, 4.0, 9.0)), self._start, host)

    def _wipe(self, host: Host, *, disk: bool) -> None:
        self.seen["wiped"] += 1
        host.die()
        launch = self.training.launch
        for trainer in launch.trainers if launch is not None else ():
            if trainer.host is host:
                trainer.alive = False
        self.ledger.wiped(host.node_id, disk=disk)
        host.memory = type(host.memory)()
        if disk:
            host.disk = type(host.disk)()

    def replace_node(self) -> None:
        """A node is lost for good, and another one takes its place."""
        host = self._some_host()
        first = [h for h in self.hosts.values() if not h.lost and not h.replaces]
        if host is None or len(self.hosts) > 16 or len(first) < 2:
            return  # somebody must be left who knows the membership
        self._wipe(host, disk=True)
        host.lost = True
        self.clock.later(self.chance.choice((0.5, 4.0)), self._replacement, host.node_id)

    def replace_living(self) -> None:
        """Somebody takes a node for dead that only cannot be reached, and replaces it."""
        host = self._some_host()
        if host is None or len(self.hosts) > 16 or len(self.hosts) < 3:
            return
        self._cut({host.address})
        self._replacement(host.node_id)

    def _replacement(self, node_id: str) -> None:
        self.fresh += 1
        host = self._add_host(f"{self.chance.choice('amz')}{self.fresh}")
        host.replaces = node_id
        host.start(self.seeds)
        self.seen["replacement"] += 1

    def _cut(self, side: set[str]) -> None:
        others = {host.address for host in self.hosts.values()} - side
        self.network.blocked |= {(a, b) for a in side for b in others}
        self.network.blocked |= {(b, a) for a in side for b in others}

    def partition(self) -> None:
        """The network falls into two parts."""
        self._cut({h.address for h in self.hosts.values() if self.chance.random() < 0.4})
        self.seen["partition"] += 1

    def one_way(self) -> None:
        """Some links pass in one direction only."""
        addresses = [host.address for host in self.hosts.values()]
        for _ in range(self.chance.randint(1, 3)):
            source, target = self.chance.choice(addresses), self.chance.choice(addresses)
            if source != target:
                self.network.blocked.add((source, target))
        self.seen["one way"] += 1

    def heal(self) -> None:
        """All links pass again."""
        self.network.blocked.clear()
        self.network.loss = self.network.doubled = 0.0
        self.network.delay_s = 0.02
        self.ledger.slow_encoding = 0.3
        self.ledger.disk_trouble = 0.0

    def bad_network(self) -> None:
        """Messages are lost, late and doubled."""
        self.network.loss = self.chance.choice((0.05, 0.2, 0.4))
        self.network.doubled = self.chance.choice((0.0, 0.3))
        self.network.delay_s = self.chance.choice((0.02, 0.3, 1.0))

    def kill_trainer(self) -> None:
        """A trainer dies."""
        launch = self.training.launch
        if launch is not None and launch.trainers:
            self.training.kill(self.chance.choice(launch.trainers))

    def slow_encoding(self) -> None:
        """Encoding takes its time."""
        self.ledger.slow_encoding = self.chance.choice((2.0, 6.0))

    def disk_trouble(self) -> None:
        """Flushes fail."""
        self.ledger.disk_trouble = 0.5

    def rot(self) -> None:
        """A scrub finds that some node's parity is damaged."""
        if not self.stormy or self.rotting is None:
            return
        agents = [host.agent for host in self.hosts.values() if host.agent and host.runs]
        found = [(agent, one) for agent in agents for one in agent.host.memory.parities]
        if found:
            agent, plan_id = self.rotting.choice(found)
            self.ledger.rotten(plan_id, agent.host.node_id)
            del agent.host.memory.parities[plan_id]
            agent.feed(events.ParityDamaged(JOB, plan_id, "rot"))
            self.seen["rot"] += 1
        self.clock.later(self.rotting.expovariate(1.0), self.rot)

    # How it goes.

    def begin(self) -> None:
        """All agents start at about the same time."""
        for host in self.hosts.values():
            self.clock.later(self.chance.uniform(0, 0.3), self._start, host)
        self.clock.later(1.5, self.training.turn)
        self.clock.later(4.0, self.rot)

    def run(self) -> None:
        """The storm and the calm."""
        self.begin()
        self.advance(4.0)
        self._next_fault()
        self.advance(self.profile.storm_s)
        self.calm()

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.run(self.clock.now_s + seconds, self._look)

    def _look(self) -> None:
        if self.ledger.dirty:
            self.ledger.look()

    def _next_fault(self) -> None:
        if self.stormy:
            self.fault(self.chance.choices(self.faults, self.weights)[0])
            self.clock.later(self.chance.expovariate(1 / self.fault_rate_s), self._next_fault)

    def fault(self, fault: Callable[[], None]) -> None:
        """Let something go wrong."""
        if self.trace:
            self.trace(f"fault {fault.__name__}")
        fault()

    def calm(self) -> None:
        """Nothing goes wrong any more: a new snapshot is committed and protected in the end."""
        self.stormy = False
        self.heal()
        if self.trace:
            self.trace("calm")
        for host in self.hosts.values():
            if host.agent is not None:
                host.agent.dies_in_actions = None
            host.stopped_until_s = 0.0
            self._start(host)
        end_s = self.clock.now_s + CALM_S
        self.ledger.told_before = {k: set(told) for k, told in self.ledger.told_of.items()}
        while not self._protected_since():
            insist(self.clock.now_s < end_s, f"nothing new is protected: {self.why()}")
            self._replace_lost()
            self.advance(1.0)
        while self._left_behind():
            insist(self.clock.now_s < 2 * end_s, f"{self._left_behind()} stay: {self.why()}")
            self.advance(1.0)

    def _left_behind(self) -> list[str]:
        """Arenas of ranks that are not there, or not there any more."""
        launch = self.training.launch
        assert launch is not None
        if sum(not host.lost for host in self.hosts.values()) == 1:
            return []  # there is no parity that could take the place of an earlier one
        return [
            f"{host.node_id}: rank {rank}"
            for host in self.hosts.values()
            if host.agent is not None and host.agent.node.members.joined
            # Who was given the same number before: see `Ledger._two_of_one_name`.
            if host.agent.job is None or host.agent.job.launch_id in ("", launch.launch_id)
            for rank, _ in host.memory.arenas
            if not any(t.host is host and t.rank == rank for t in launch.trainers)
        ]

    def _protected_since(self) -> bool:
        launch = self.training.launch
        if launch is None or launch.stage != "running":
            return False
        running = [h for h in self.hosts.values() if not h.lost]
        for level in ("memory", "parity") if len(running) > 1 else ("memory",):
            new = self.ledger.told_of.get(level, set()) - self.ledger.told_before.get(level, set())
            if not any(snapshot.incarnation == launch.incarnation for snapshot in new):
                return False
        return True

    def _replace_lost(self) -> None:
        """An operator sees to it that each lost node has a replacement."""
        for host in list(self.hosts.values()):
            agent = host.agent
            if host.lost or agent is None or not agent.node.ready(agent.now_s):
                continue
            for other in self.hosts.values():
                self._give_way(other)
            lost = [
                e.node_id for e in agent.node.members.view.members() if self.hosts[e.node_id].lost
            ]
            coming = {h.replaces for h in self.hosts.values() if not h.lost}
            for node_id in lost:
                if node_id not in coming:
                    self._replacement(node_id)

    def _give_way(self, host: Host) -> None:
        """Whom it shall replace came back: then it is one node more."""
        agent = host.agent
        if host.replaces and agent is not None:
            members = agent.node.members
            if members.refusal and not members.joined:
                host.die()
                host.replaces = ""
                self._start(host)

    def why(self) -> str:
        """What there is to see when nothing happens any more."""
        lines = [f"{self.ledger.told_of} {self.training.launch}"]
        for host in self.hosts.values():
            agent = host.agent
            if agent is not None:
                members = agent.node.members
                lines.append(
                    f"{host.node_id}: coordinator {members.coordinator(agent.now_s)} ready "
                    f"{members.ready(agent.now_s)} suspects {members.suspected(agent.now_s)} "
                    f"fenced {members.fenced_by!r} {agent.job}"
                )
        return "\n".join(lines)
