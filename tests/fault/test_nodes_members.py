"""Who is a member: agents that restart, are replaced, come back from the dead, stand still."""

import hashlib
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet import Fleet
from harness import TrainerError, until
from netns import stopped_in_turns

pytestmark = pytest.mark.netns
FleetOf = Callable[..., Fleet]


def started(fleet: Fleet) -> Fleet:
    fleet.start()
    fleet.launch()
    fleet.commit(2, "parity")
    return fleet


def files(root: Path) -> dict[str, str]:
    """Every file of a directory with the digest of what is in it."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def replaced_by(fleet: Fleet, node_id: str) -> list[str]:
    """Who has a node's place, as n1 knows it."""
    return [m.replaced_by for m in fleet.cluster("n1").members if m.node_id == node_id]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)]
)
def test_all_agents_are_restarted_one_by_one(fleet_of: FleetOf, number: int) -> None:
    fleet = started(fleet_of())
    for node_id in fleet.node_ids:
        newest = fleet.told["memory"]
        fleet.agent(node_id).signal(number)
        fleet.agent(node_id).ended()
        for lines in fleet.train(1, timeout=0.2):
            fleet.assert_no_commit(lines)
        fleet.start(node_id)
        host = fleet.hosts[node_id]
        until(lambda: newest in host.committed("memory"), f"{newest} being there again")  # noqa: B023
        fleet.commit(2)
    fleet.commit(1, "parity")
    fleet.relaunch("memory")
    fleet.commit(1, "parity")
    fleet.assert_calm()


def test_a_zombie_comes_back_when_another_has_its_place(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of(spares=1))
    others = ("n1", "n2", "n3", "n5")
    fleet.network.split(("n4",), others)
    zombie = fleet.trainers.pop(3)
    fleet.until_suspected("n1", "n4")
    fleet.add("n5", replaces="n4")
    fleet.start("n5")
    # From here on no order is for n4: one given before may still reach it, late, and be obeyed.
    until(lambda: replaced_by(fleet, "n4") == ["n5"], "n5 in the place of n4")
    fleet.nodes_of_ranks[3] = "n5"
    found = fleet.relaunch("parity")
    assert "parity" not in found["rejected"]
    fleet.commit(2, "parity")
    told = dict(fleet.told)

    # It went on in the dark, and committed nothing.
    for line in zombie.run(3, "memory", timeout=0.2):
        assert not line["levels"], line
    host = fleet.hosts["n4"]
    before = files(host.memory), files(host.nvme)
    fleet.network.heal()
    until(lambda: fleet.cluster("n4").fenced_by, "the fence")
    fleet.until_said("n4", "no place in the cluster")
    for line in zombie.run(5, "memory", timeout=0.2):
        assert not line["levels"], line
        assert "place of n4 in the cluster is held by n5" in line["skipped"], line
    assert (files(host.memory), files(host.nvme)) == before
    fleet.commit(2, "parity")
    assert replaced_by(fleet, "n4") == ["n5"]

    # Nothing of what it holds is ever used.
    zombie.kill()
    fleet.relaunch("memory")
    assert fleet.told["memory"] > told["memory"]
    fleet.assert_calm()


def test_of_two_that_claim_one_place_one_wins(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of(spares=1, options={"limits": {"declare_timeout_s": 2.0}}))
    second = fleet.add("n5")
    second.node_id = "n2"
    fleet.start("n5")
    fleet.until_said("n5", "no place in the cluster")
    status = fleet.cluster("n5")
    assert not status.joined
    assert "n2" in status.refusal + status.fenced_by, status
    claimant = second.start_trainer(script="known_trainer.py")
    with pytest.raises(TrainerError, match="coordin"):
        claimant.do(
            "connect",
            address=second.address,
            rank=1,
            world=4,
            launch=9,
            size_bytes=10,
            common_bytes=40,
            limits={"agent_start_s": 5.0},
        )
    fleet.commit(2, "parity")
    fleet.assert_calm()


def test_an_agent_that_stands_still_is_lost_for_a_while(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of())
    for node_id in ("n3", "n1"):  # a member, then the coordinator
        fleet.agent(node_id).stop()
        for lines in fleet.train(3, timeout=0.2):
            fleet.assert_no_commit(lines)
        fleet.until_suspected("n2", node_id)
        fleet.agent(node_id).proceed()
        fleet.commit(2, "parity")
    fleet.until_suspected("n2")
    fleet.relaunch("memory")
    fleet.assert_calm()


def test_a_slow_agent_makes_commits_late(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of(options={"cluster": {"suspect_after_s": 1.5}}))
    with stopped_in_turns([fleet.agent("n3").pid], 0.03, 0.27):
        fleet.train(8, timeout=1.0)
        fleet.commit(2, "memory", within_s=30.0)
    fleet.commit(1, "parity")
    fleet.relaunch("memory")
    fleet.assert_calm()


def test_an_agent_of_another_release_is_refused_and_named(fleet_of: FleetOf) -> None:
    fleet = fleet_of()
    fleet.start("n1", "n2", "n3")
    newer = {f"everstep.agent.{m}.PEER_PROTOCOL": 99 for m in ("peers", "answering")}
    fleet.start("n4", constants=newer)
    fleet.until_said("n4", "speaks version 99")
    assert not fleet.cluster("n4").joined
    assert "n4" not in [m.node_id for m in fleet.cluster("n1").members]
    assert sum(fleet.cluster("n1").refused_calls.values())
    fleet.agent("n4").kill()
    fleet.start("n4")
    fleet.launch()
    fleet.commit(1, "parity")
    fleet.assert_calm()
