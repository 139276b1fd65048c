"""Many seeded runs of many agents on which everything goes wrong; see `cluster`.

On failure: `pytest tests/sim/test_cluster.py --seed N` repeats the run and prints its last events.
"""

import dataclasses

import pytest

from .cluster.simulation import Profile, Simulation

SHORT_SEEDS = 150
SHOWN_LINES = 250


def simulate(seed: int, profile: Profile) -> Simulation:
    """One run.

    Raises:
        AssertionError: With the seed, and if it is traced with what led there.
    """
    simulation = Simulation(seed, profile)
    try:
        simulation.run()
    except Exception as error:
        lines = "\n".join(simulation.happened[-SHOWN_LINES:])
        again = f"pytest tests/sim/test_cluster.py --seed {seed}"
        raise AssertionError(f"seed {seed} ({again}): {error}\n{lines}") from error
    return simulation
