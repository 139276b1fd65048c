"""Many seeded runs of many agents on which everything goes wrong; see `cluster`.

On failure: `pytest tests/sim/test_cluster.py --seed N` repeats the run and prints its last events.
"""

import dataclasses
import time
from collections import Counter

import pytest

from .cluster.simulation import Profile, Simulation

SHORT_SEEDS = 150
LONG_SEEDS = 5000
SHOWN_LINES = 250
EIGHT = Profile(nodes=(8, 8))


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


def simulate_all(
    seeds: range, profile: Profile, one_seed: int | None, seed_count: int | None
) -> None:
    if one_seed is not None:
        simulate(one_seed, dataclasses.replace(profile, trace=True))
        return
    if seed_count is not None:
        seeds = range(seeds.start, seeds.start + seed_count)
    begun_s, events = time.process_time(), 0
    for seed in seeds:
        events += simulate(seed, profile).clock.events
    taken_s = max(time.process_time() - begun_s, 1e-6)
    print(
        f"{len(seeds) / taken_s * 60:.0f} seeds a minute of CPU, "
        f"{events // max(1, len(seeds))} events each"
    )


def test_promises_hold_among_many(one_seed: int | None, seed_count: int | None) -> None:
    simulate_all(range(SHORT_SEEDS), Profile(), one_seed, seed_count)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_promises_hold_among_many_for_long(one_seed: int | None, seed_count: int | None) -> None:
    simulate_all(range(SHORT_SEEDS, SHORT_SEEDS + LONG_SEEDS), Profile(), one_seed, seed_count)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_promises_hold_among_eight(one_seed: int | None, seed_count: int | None) -> None:
    simulate_all(range(1000), EIGHT, one_seed, seed_count)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_promises_hold_in_long_storms(one_seed: int | None, seed_count: int | None) -> None:
    simulate_all(range(200), Profile(storm_s=300.0), one_seed, seed_count)


def test_a_world_is_repeatable() -> None:
    first, second = (simulate(7, Profile(trace=True)).happened for _ in range(2))
    assert first == second
    assert first != simulate(8, Profile(trace=True)).happened


def test_enough_happens_among_many() -> None:
    """The promises would hold in an empty world, too."""
    seen: Counter[str] = Counter()
    levels: Counter[str] = Counter()
    ended: Counter[bool] = Counter()
    for seed in range(1000, 1045):
        simulation = simulate(seed, Profile())
        seen += simulation.seen
        levels.update(simulation.ledger.told_levels)
        ended.update(simulation.ledger.ends.values())
    assert min(levels[level] for level in ("memory", "parity", "nvme")) > 50, levels
    assert ended[True] > 100 and ended[False] > 5, ended
    for what in (
        "decoded",
        "died in action",
        "fresh start",
        "installed",
        "one way",
        "partition",
        "replacement",
        "resized",
        "restored",
        "rot",
        "stale report",
        "stopped",
        "takeover",
        "wiped",
        "Adopt",
        "AdoptedVerified",
        "BeginOrdered",
        "CommitOrdered",
        "DeleteDurable",
        "DeleteParity",
        "DropOrdered",
        "DurableOrdered",
        "Encode",
        "Encoded",
        "FlushEnded",
        "FlushOrdered",
        "FlushParity",
        "NotifyDropped",
        "PrepareOrdered",
        "RoundEnded",
        "SessionLost",
        "StopEncoding",
    ):
        assert seen[what], f"there is no {what}"


def test_all_agents_die_while_a_step_is_captured() -> None:
    """Trainers come back one node after the other: nobody is told of a drop and a commit."""
    for seed in range(1010, 1025):
        simulation = Simulation(seed, Profile(nodes=(5, 5)))
        simulation.begin()
        simulation.advance(4.0)
        for _ in range(11):
            simulation.fault(simulation.kill_agent)
        simulation.calm()
