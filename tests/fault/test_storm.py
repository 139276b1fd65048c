"""A storm: faults at random, one after another and together, on four nodes that train.

The seed fixes what happens and in which order; how far it gets is a matter of time. After each
fault the job must restore what it was told (P0, P1), go on by itself, and protect a step again;
no snapshot holds training up (P3).
"""

import random
import time
from collections.abc import Callable, Iterator

import pytest
from fleet import Fleet
from test_nodes_rot import flip_shards

pytestmark = pytest.mark.netns
FleetOf = Callable[..., Fleet]
Fault = Callable[[], str]
"""What went wrong: the strongest level that survives it, empty if the trainers do."""


class Storm:
    """One fleet and its weather."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.chance = random.Random(seed)
        self.log: list[str] = []
        self.faults: list[Fault] = [
            self.trainers_die,
            self.an_agent_dies,
            self.all_agents_restart,
            self.an_agent_stands_still,
            self.the_network_splits,
            self.a_direction_is_dead,
            self.packets_are_lost,
            self.connections_are_reset,
            self.a_link_is_narrow,
            self.a_node_is_lost,
            self.a_node_is_lost_in_a_round,
            self.bits_flip,
            self.the_power_fails,
        ]

    def blow(self, duration_s: float) -> None:
        """Let it storm."""
        deadline = time.monotonic() + duration_s
        fleet = self.fleet
        fleet.start()
        fleet.launch()
        while time.monotonic() < deadline:
            fleet.commit(1, "parity", within_s=40.0)
            self.train()
            fault = self.chance.choice(self.faults)
            self.log.append(fault.__name__)
            survives = fault()
            fleet.network.heal()
            if survives:
                found = fleet.relaunch(survives)
                self.log[-1] += f" -> {survives}: {found['launch']}, {found['step']}"
        self.end()
        fleet.assert_calm()

    def end(self) -> None:
        """In good weather nothing keeps what rotted for longer than a ticket is good for."""
        deadline = time.monotonic() + 40.0
        while True:
            # Enough of them that no slot which may be written has it in it.
            self.fleet.commit(4, "parity", within_s=40.0)
            self.fleet.relaunch("memory")
            try:
                for host in self.fleet.hosts.values():
                    host.assert_all_intact()
                return
            except AssertionError:
                if time.monotonic() >= deadline:
                    raise

    def train(self) -> None:
        """Some steps, whatever becomes of them."""
        for _ in range(self.chance.randrange(1, 5)):
            level = self.chance.choice(("", "memory", "memory", "parity"))
            self.fleet.train(1, level, timeout=0.3)
        if self.chance.random() < 0.2:
            self.fleet.train(1, "nvme", timeout=2.0)
        self.fleet.hear()

    def anybody(self) -> str:
        return self.chance.choice(self.fleet.node_ids)

    def two(self) -> tuple[str, str]:
        one, other = self.chance.sample(self.fleet.node_ids, 2)
        return one, other

    def trainers_die(self) -> str:
        return "memory"

    def an_agent_dies(self) -> str:
        node_id = self.anybody()
        self.fleet.agent(node_id).kill()
        self.train()
        self.fleet.start(node_id)
        return self.chance.choice(("", "memory"))

    def all_agents_restart(self) -> str:
        for node_id in self.fleet.node_ids:
            self.fleet.agent(node_id).kill()
        self.fleet.start()
        return self.chance.choice(("", "memory"))

    def an_agent_stands_still(self) -> str:
        agent = self.fleet.agent(self.anybody())
        agent.stop()
        self.train()
        self.train()
        agent.proceed()
        return self.chance.choice(("", "memory"))

    def the_network_splits(self) -> str:
        nodes = list(self.fleet.node_ids)
        self.chance.shuffle(nodes)
        cut = self.chance.randrange(1, len(nodes))
        self.fleet.network.split(tuple(nodes[:cut]), tuple(nodes[cut:]))
        self.train()
        self.train()
        return self.chance.choice(("", "memory"))

    def a_direction_is_dead(self) -> str:
        self.fleet.network.cut(*self.two())
        self.train()
        return ""

    def packets_are_lost(self) -> str:
        for node_id in self.fleet.node_ids:
            self.fleet.network.lose(node_id, self.chance.randrange(1, 10))
        self.train()
        return ""

    def connections_are_reset(self) -> str:
        self.fleet.network.reset(*self.two())
        self.train()
        return ""

    def a_link_is_narrow(self) -> str:
        self.fleet.network.limit(self.anybody(), "8mbit")
        self.train()
        return ""

    def a_node_is_lost(self) -> str:
        node_id = self.anybody()
        self.fleet.lose(node_id)
        self.fleet.start(node_id)
        return "parity"

    def a_node_is_lost_in_a_round(self) -> str:
        fleet = self.fleet
        fleet.step += 1
        fleet.taken.add((fleet.launches, fleet.step))
        for trainer in fleet.trainers.values():
            trainer.begin("run", level="", timeout=0.3)
        return self.a_node_is_lost()

    def bits_flip(self) -> str:
        self.fleet.kill_trainers()
        flip_shards(self.fleet.hosts[self.anybody()])
        return "parity"

    def the_power_fails(self) -> str:
        fleet = self.fleet
        fleet.commit(1, "nvme", within_s=40.0, wait_s=5.0)
        fleet.hear()
        fleet.cut_power()
        fleet.start()
        return "nvme"


@pytest.fixture
def storm(fleet_of: FleetOf) -> Iterator[Callable[[int], Storm]]:
    made: list[Storm] = []

    def make(seed: int) -> Storm:
        made.append(Storm(fleet_of(), seed))
        return made[-1]

    yield make
    for one in made:
        print("\n".join(one.log))


@pytest.mark.timeout(240)
def test_a_minute_of_it(storm: Callable[[int], Storm]) -> None:
    storm(20261122).blow(60.0)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ten_minutes_of_it(storm: Callable[[int], Storm]) -> None:
    storm(471108).blow(600.0)
