"""The same node, driven by Hypothesis: it finds short stories, and shrinks those that fail."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from .simulator.agent import Faults
from .simulator.simulation import Profile, Simulation
from .simulator.trainer import Habits

FAULTS = len(Simulation(0).all_faults())


class Node(RuleBasedStateMachine):
    """A node, its trainers, and what goes wrong with them."""

    simulation: Simulation

    @initialize(seed=st.integers(0, 1 << 16), world=st.integers(1, 3), troubled=st.booleans())
    def begin(self, seed: int, world: int, troubled: bool) -> None:
        """Small worlds, in which only the rules below go wrong or, `troubled`, chance too."""
        self.simulation = Simulation(seed, Profile(max_world=world))
        self.simulation.world = world
        if not troubled:
            self.simulation.habits = Habits()
            self.simulation.agent.faults = Faults()
        self.simulation.begin()

    @rule(pick=st.integers(0, 50))
    def something_happens(self, pick: int) -> None:
        self.simulation.move(pick)

    @rule(count=st.integers(5, 60), order=st.integers(0, 1 << 16))
    def much_happens(self, count: int, order: int) -> None:
        chance = random.Random(order)
        for _ in range(count):
            self.simulation.move(chance.getrandbits(16))

    @rule(fault=st.integers(0, FAULTS - 1))
    def something_goes_wrong(self, fault: int) -> None:
        self.simulation.fault(self.simulation.all_faults()[fault][0])

    def teardown(self) -> None:
        """In the end all is well again."""
        if hasattr(self, "simulation"):
            self.simulation.calm()
            self.simulation.restore_all()


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Node,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_promises_hold_in_short_stories() -> None:
    run(examples=60, steps=25)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_promises_hold_in_many_stories() -> None:
    run(examples=5000, steps=60)
