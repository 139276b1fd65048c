"""Partitions and broken links: no commit without all members, nothing lost, healed by itself."""

from collections.abc import Callable

import pytest
from fleet import Fleet

pytestmark = pytest.mark.netns
FleetOf = Callable[..., Fleet]


def test_half_and_half_commits_on_no_side_and_heals_by_itself(fleet_of: FleetOf) -> None:
    fleet = fleet_of()
    fleet.start()
    fleet.launch()
    assert fleet.restore()["step"] is None
    fleet.commit(2, "parity")
    newest = fleet.told["memory"]
    fleet.network.split(("n1", "n2"), ("n3", "n4"))
    for lines in fleet.train(4, timeout=0.3):
        fleet.assert_no_commit(lines)
    fleet.until_suspected("n1", "n3", "n4")
    fleet.until_suspected("n4", "n1", "n2")
    assert fleet.cluster("n2").coordinator == "n1"
    assert fleet.cluster("n4").coordinator == "n3"
    for lines in fleet.train(2, timeout=0.3):
        fleet.assert_no_commit(lines)
    assert fleet.told["memory"] == newest
    for host in fleet.hosts.values():
        assert (1, newest[1]) in host.committed("memory")
    fleet.network.heal()
    fleet.commit(2, "parity")
    fleet.relaunch("memory")
    fleet.commit()
    fleet.assert_calm()


def test_a_link_that_is_dead_one_way_is_named_and_commits_nothing(fleet_of: FleetOf) -> None:
    fleet = fleet_of()
    fleet.start()
    fleet.launch()
    fleet.commit(2)
    fleet.network.cut("n3", "n1")
    fleet.until_suspected("n1", "n3")
    fleet.until_suspected("n3", "n1")
    for lines in fleet.train(3, timeout=0.3):
        fleet.assert_no_commit(lines)
    # Who follows whom differs now, and both sides are heard by the rest.
    assert fleet.cluster("n2").coordinator == "n1"
    fleet.network.heal()
    fleet.commit(2, "parity")
    fleet.until_suspected("n1")
    fleet.relaunch("memory")
    fleet.assert_calm()


def test_without_the_link_between_two_members_there_is_memory_but_no_parity(
    fleet_of: FleetOf,
) -> None:
    fleet = fleet_of(options={"parity": {"timeout_s": 1.0}})
    fleet.start()
    fleet.launch()
    fleet.commit(2, "parity")
    protected = fleet.told["parity"]
    fleet.network.split(("n3",), ("n4",))
    fleet.commit(4, "memory")
    assert fleet.told["memory"] > fleet.told["parity"] == protected
    fleet.network.heal()
    fleet.commit(1, "parity")
    fleet.relaunch("memory")
    fleet.assert_calm()
