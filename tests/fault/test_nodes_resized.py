"""A job that goes on in another number of ranks, from what the others have in memory or on disk."""

from collections.abc import Callable
from typing import Any

import pytest
from fleet import Fleet
from harness import TrainerError, until

pytestmark = pytest.mark.netns
FleetOf = Callable[..., Fleet]
LONG = pytest.mark.long


def started(fleet: Fleet, steps: int = 2) -> Fleet:
    fleet.start()
    fleet.launch()
    fleet.commit(steps, "parity")
    return fleet


def arenas(fleet: Fleet) -> dict[str, set[int]]:
    """By node, the ranks that have memory there; nodes without any are not named."""
    ranks = {
        node_id: {int(path.name.split("-")[1]) for path in host.arenas()}
        for node_id, host in fleet.hosts.items()
    }
    return {node_id: found for node_id, found in ranks.items() if found}


def staged(fleet: Fleet) -> list[str]:
    return [str(p) for host in fleet.hosts.values() for p in host.memory.glob("*/staged/*")]


def test_a_node_is_lost_and_the_others_go_on(fleet_of: FleetOf) -> None:
    """Four ranks, then three: what the lost one had comes from parity, nothing from a disk."""
    fleet = started(fleet_of())
    fleet.lose("n4")
    fleet.until_suspected("n1", "n4")
    found = fleet.resize("n1", "n2", "n3", at_least="parity")
    assert found["levels"] == ["memory"]
    fleet.commit(3, "parity")
    until(lambda: not staged(fleet), "what was gathered to be dropped")
    fleet.lose("n2")
    fleet.start("n2")
    fleet.relaunch("parity")
    fleet.assert_calm()


def test_two_ranks_on_one_node_take_from_four(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of())
    fleet.resize("n1", "n1", at_least="parity")
    # What four have saved is theirs as long as two have saved nothing.
    assert arenas(fleet) == {"n1": {0}, "n2": {1}, "n3": {2}, "n4": {3}}
    fleet.kill_trainers()
    fleet.nodes_of_ranks = ["n1", "n2", "n3", "n4"]
    fleet.relaunch("parity")
    fleet.resize("n1", "n1", at_least="parity")
    fleet.commit(4, "parity")
    until(lambda: arenas(fleet) == {"n1": {0, 1}}, "memory of the others' ranks to be released")
    fleet.lose("n1")
    fleet.start("n1")
    fleet.relaunch("parity")
    fleet.assert_calm()


def test_more_ranks_than_saved(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of(nodes_of_ranks=("n1", "n2", "n3")))
    fleet.resize("n1", "n2", "n3", "n4", at_least="parity")
    fleet.commit(2, "parity")
    fleet.lose("n4")
    fleet.start("n4")
    fleet.relaunch("parity")
    fleet.assert_calm()


@pytest.mark.parametrize("lost", [(), pytest.param(("n3",), marks=LONG)])
def test_after_power_is_lost_three_go_on_from_the_disks_of_four(
    fleet_of: FleetOf, lost: tuple[str, ...]
) -> None:
    fleet = started(fleet_of())
    fleet.commit(1, "nvme")
    if lost:
        fleet.until_parity_is_durable()
    fleet.cut_power()
    if lost:
        fleet.lose(*lost)
    fleet.start()
    fleet.resize("n1", "n2", "n4", at_least="nvme")
    fleet.commit(1, "parity")
    fleet.commit(1, "nvme")
    fleet.cut_power()
    fleet.start()
    found = fleet.relaunch("nvme")
    assert "nvme" in found["levels"]
    fleet.assert_calm()


@LONG  # test_lost_replicas.py has restores that break off, without a dead agent
@pytest.mark.parametrize("point", ["agent.gather.before_fetch", "agent.gather.after_fetch"])
def test_an_interrupted_restore_is_repeated(fleet_of: FleetOf, point: str) -> None:
    fleet = started(fleet_of())
    fleet.kill_trainers()
    fleet.lose("n4")
    fleet.agent("n1").kill()
    fleet.start("n1", failpoints=f"{point}=kill@1")
    fleet.until_suspected("n1", "n4")
    fleet.nodes_of_ranks = ["n1", "n2", "n3"]
    fleet.launch(limits={"restore_s": 4.0})
    for trainer in fleet.trainers.values():
        trainer.begin("restore", saved_world=4)
    until(lambda: not fleet.agent("n1").alive, "the death of n1's agent")
    for rank, trainer in fleet.trainers.items():
        answer: dict[str, Any] = {}
        try:
            answer = trainer.end()
        except TrainerError:
            assert not trainer.do("touched"), f"rank {rank} was left half restored"
        assert not answer.get("wrong"), answer
    fleet.kill_trainers()
    fleet.start("n1")
    fleet.nodes_of_ranks = ["n1", "n2", "n3", "n4"]
    fleet.resize("n1", "n2", "n3", at_least="parity")
    fleet.commit(1, "parity")
    fleet.assert_calm()
