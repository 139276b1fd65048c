"""All agents are killed at once and started again, while what they have sent is still under way."""

import pytest

from .cluster.simulation import Profile, Simulation


def restart(seed: int, nodes: int, delay_s: float, slow_s: float) -> None:
    """A network becomes slow; all agents die; their last messages find the next ones."""
    simulation = Simulation(seed, Profile(nodes=(nodes, nodes)))
    simulation.begin()
    simulation.advance(4.0)
    simulation.network.delay_s = delay_s
    simulation.advance(slow_s)
    for host in simulation.hosts.values():
        host.die()
    simulation.calm()


# What some seeds have ended with. Two nodes: both fenced by the dead, one waiting for a place that
# it had already, one given up. Three: a round given up that had been committed.
@pytest.mark.parametrize(("nodes", "delay_s", "slow_s"), [(2, 0.5, 1.0), (3, 1.0, 2.0)])
def test_what_the_dead_have_said_undoes_nothing(nodes: int, delay_s: float, slow_s: float) -> None:
    for seed in range(60):
        restart(seed, nodes, delay_s, slow_s)


def test_all_killed_at_a_moment_at_which_messages_are_under_way() -> None:
    simulation = Simulation(96, Profile(nodes=(2, 2)))
    simulation.begin()
    simulation.advance(4.4)
    for host in simulation.hosts.values():
        host.die()
    simulation.calm()
