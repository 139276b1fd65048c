"""Links that are lossy, narrow, late, torn down, or that swallow what is large."""

import time
from collections.abc import Callable

import pytest
from fleet import Fleet
from harness import until

pytestmark = pytest.mark.netns
FleetOf = Callable[..., Fleet]
PATIENT = {"cluster": {"heartbeat_s": 0.2, "suspect_after_s": 3.0}}


def fleet_with_parity(fleet: Fleet) -> Fleet:
    fleet.start()
    fleet.launch()
    fleet.commit(2, "parity")
    return fleet


@pytest.mark.timeout(240)
@pytest.mark.parametrize("percent", [2, pytest.param(20, marks=pytest.mark.long)])
def test_lost_packets_make_it_slower_and_nothing_else(fleet_of: FleetOf, percent: int) -> None:
    fleet = fleet_with_parity(fleet_of(options=PATIENT))
    for node_id in fleet.node_ids:
        fleet.network.lose(node_id, percent)
    fleet.commit(2, "memory", within_s=90.0, wait_s=4.0)
    if percent > 10:  # more than parity's deadline allows
        fleet.network.heal()
    fleet.commit(2, "parity", within_s=60.0, wait_s=3.0)
    fleet.lose("n2")
    fleet.start("n2")
    fleet.relaunch("parity")
    fleet.assert_calm()


def test_a_narrow_link_costs_parity_not_training(fleet_of: FleetOf) -> None:
    fleet = fleet_with_parity(fleet_of(options={"parity": {"timeout_s": 1.0}}))
    protected = fleet.told["parity"]
    fleet.network.limit("n3", "8mbit")
    begun = time.monotonic()
    # A round needs some 3 MB from n3, which is 3 s.
    fleet.commit(6, "memory")
    while time.monotonic() - begun < 1.5:
        fleet.commit()
    assert fleet.told["parity"] == protected
    fleet.network.heal()
    fleet.commit(1, "parity")
    fleet.lose("n3")
    fleet.start("n3")
    fleet.relaunch("parity")
    fleet.assert_calm()


@pytest.mark.long
def test_late_messages_that_overtake_each_other(fleet_of: FleetOf) -> None:
    fleet = fleet_of(options=PATIENT)
    for seed, node_id in enumerate(fleet.node_ids):
        fleet.network.delay(node_id, 0.01, 0.2, seed)
    fleet.start()
    fleet.launch()
    # A round is a dozen messages, one after the other.
    fleet.commit(3, "parity", within_s=90, wait_s=10)
    fleet.lose("n4")
    fleet.start("n4")
    fleet.relaunch("parity")
    fleet.commit(1, "parity", within_s=90, wait_s=10)
    fleet.assert_calm()


def test_connections_that_are_reset_all_the_time(fleet_of: FleetOf) -> None:
    fleet = fleet_with_parity(fleet_of())
    for _ in range(4):
        fleet.network.reset("n2", "n1")
        fleet.network.reset("n3", "n4")
        fleet.train(2, timeout=0.2)
        fleet.network.heal()
        fleet.train(1, timeout=1.0)
    fleet.commit(1, "parity")
    fleet.lose("n3")
    fleet.start("n3")
    fleet.relaunch("parity")
    fleet.assert_calm()


def test_a_path_that_swallows_large_packets_is_noticed_and_named(fleet_of: FleetOf) -> None:
    fleet = fleet_with_parity(fleet_of())
    fleet.network.swallow("n1", 150)
    begun = time.monotonic()
    until(lambda: fleet.suspects("n1"), "n1 missing somebody", 30.0)
    assert time.monotonic() - begun < 30.0
    for lines in fleet.train(2, timeout=0.3):
        fleet.assert_no_commit(lines)
    fleet.network.heal()
    fleet.commit(1, "parity", within_s=30.0)
    fleet.relaunch("memory")
    fleet.assert_calm()
