"""The same agents, driven by Hypothesis: it finds short stories, and shrinks those that fail."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from .cluster.simulation import Profile, Simulation

FAULTS = len(Simulation(0).all_faults())


class Agents(RuleBasedStateMachine):
    """A few nodes, a job on them, and what goes wrong."""

    simulation: Simulation

    @initialize(seed=st.integers(0, 1 << 16), nodes=st.integers(2, 5))
    def begin(self, seed: int, nodes: int) -> None:
        self.simulation = Simulation(seed, Profile(nodes=(nodes, nodes)))
        self.simulation.begin()
        self.simulation.advance(4.0)

    @rule(seconds=st.sampled_from((0.1, 0.5, 2.0, 5.0)))
    def time_passes(self, seconds: float) -> None:
        self.simulation.advance(seconds)

    @rule(fault=st.integers(0, FAULTS - 1))
    def something_goes_wrong(self, fault: int) -> None:
        self.simulation.fault(self.simulation.all_faults()[fault][0])

    @rule(fault=st.integers(0, FAULTS - 1), seconds=st.sampled_from((0.05, 0.3, 1.0)))
    def it_goes_wrong_soon(self, fault: int, seconds: float) -> None:
        self.simulation.clock.later(seconds, self.simulation.all_faults()[fault][0])
        self.simulation.advance(seconds)

    def teardown(self) -> None:
        """In the end all is well again."""
        if hasattr(self, "simulation"):
            self.simulation.calm()


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Agents,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_promises_hold_in_short_stories_of_many() -> None:
    run(examples=25, steps=12)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_promises_hold_in_many_stories_of_many() -> None:
    run(examples=2000, steps=30)
