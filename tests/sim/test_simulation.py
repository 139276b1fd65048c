"""Many seeded runs of a node on which everything goes wrong; see `simulator`.

On failure: `pytest tests/sim --seed N` repeats the run and prints its last events and actions.
"""

import dataclasses
from typing import get_args

import pytest

from everstep.agent import actions, events

from .simulator.simulation import Profile, Simulation

SHORT_SEEDS = 300
LONG_SEEDS = 20_000
SHOWN_LINES = 150


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
        again = f"pytest tests/sim --seed {seed}"
        raise AssertionError(f"seed {seed} ({again}): {error}\n{lines}") from error
    return simulation


def simulate_all(
    seeds: range, profile: Profile, one_seed: int | None, seed_count: int | None
) -> None:
    if one_seed is not None:
        simulate(one_seed, dataclasses.replace(profile, trace=True))
        return
    if seed_count is not None:
        seeds = range(seeds.start, seeds.start + seed_count)
    for seed in seeds:
        simulate(seed, profile)


def test_promises_hold(one_seed: int | None, seed_count: int | None) -> None:
    simulate_all(range(SHORT_SEEDS), Profile(), one_seed, seed_count)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_promises_hold_for_long(one_seed: int | None, seed_count: int | None) -> None:
    start = SHORT_SEEDS
    simulate_all(range(start, start + LONG_SEEDS), Profile(), one_seed, seed_count)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_promises_hold_in_long_storms(one_seed: int | None, seed_count: int | None) -> None:
    simulate_all(range(1000), Profile(steps=5000), one_seed, seed_count)


def test_a_seed_is_repeatable() -> None:
    first, second = (simulate(7, Profile(trace=True)).happened for _ in range(2))
    assert first == second
    assert first != simulate(8, Profile(trace=True)).happened


def test_enough_happens() -> None:
    """The promises would hold in an empty world, too."""
    lines: set[str] = set()
    commits = 0
    for seed in range(100):
        simulation = simulate(seed, Profile(trace=True))
        commits += simulation.promises.commits
        lines |= {
            line.split("(")[0].strip()
            for line in simulation.happened
            if line.startswith(("  event", "  action", "  the agent dies"))
        }
    assert commits > 200
    seen = {line.split()[-1] for line in lines}
    kinds = {kind.__name__ for kind in (*get_args(events.Event), *get_args(actions.Action))}
    # Which replicas are equal is decided apart from all else: see test_agreements.py; what a rank
    # that joins live reads, too: see test_state_joining.py.
    apart = {"Declare"}
    # An agent that stands alone has no coordinator and no parity: see test_cluster.py.
    among_many = {
        "CommitOrdered",
        "DropOrdered",
        "DurableOrdered",
        "FlushOrdered",
        "BeginOrdered",
        "JoinDecided",
        "PrepareOrdered",
        "Encoded",
        "RoundEnded",
        "ParityDamaged",
        "Installed",
        "Encode",
        "StopEncoding",
        "DeleteParity",
        "FlushParity",
    }
    assert kinds - seen - among_many == apart, kinds - seen
    assert any("dies before" in line for line in lines)
