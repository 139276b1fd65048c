"""Nodes that are lost, at any time, and what is still there afterwards."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet import Fleet, Host
from harness import TrainerError, until

pytestmark = pytest.mark.netns
FleetOf = Callable[..., Fleet]


def started(fleet: Fleet, steps: int = 2) -> Fleet:
    fleet.start()
    fleet.launch()
    fleet.commit(steps, "parity")
    return fleet


def prepared(host: Host) -> set[int]:
    """The steps of which a node has parity in memory."""
    return {int(path.name.split("-")[3]) for path in host.memory.glob("*/parity/*.manifest")}


@pytest.mark.parametrize(
    ("parities", "lost"),
    [
        (1, ("n1",)),
        (2, ("n2", "n3")),
        pytest.param(1, ("n4",), marks=pytest.mark.long),
        pytest.param(2, ("n1", "n4"), marks=pytest.mark.long),
    ],
)
def test_as_many_as_there_are_parities_are_lost(
    fleet_of: FleetOf, parities: int, lost: tuple[str, ...]
) -> None:
    fleet = started(fleet_of(parities=parities))
    fleet.lose(*lost)
    fleet.start(*lost)
    found = fleet.relaunch("parity")
    assert found["levels"] == ["memory"]
    # And once more: what was restored is protected again.
    fleet.commit(1, "parity")
    fleet.lose(lost[0])
    fleet.start(lost[0])
    fleet.relaunch("parity")
    fleet.assert_calm()


def test_one_more_is_lost(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of())
    fleet.commit(1, "nvme")
    fleet.commit(2, "parity")
    fleet.cut_power("n2", "n3")
    fleet.start("n2", "n3")
    found = fleet.relaunch("nvme")
    assert "nvme" in found["levels"]
    fleet.lose("n2", "n3")
    fleet.start("n2", "n3")
    fleet.launch()
    told = fleet.refused()
    assert "NothingRecoverable" in told
    assert "rank" in told and any(word in told for word in ("1", "2")), told
    fleet.assert_calm()


def test_all_power_is_lost_and_a_disk(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of())
    fleet.commit(1, "nvme")
    fleet.until_parity_is_durable()
    fleet.commit(1, "parity")
    fleet.cut_power()
    fleet.lose("n3")
    fleet.start()
    found = fleet.relaunch("nvme")
    assert "nvme" in found["levels"]
    fleet.commit(1, "parity")
    fleet.assert_calm()


def test_a_node_is_lost_while_a_step_is_committed(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of())
    fleet.step += 1
    fleet.taken.add((fleet.launches, fleet.step))
    for trainer in fleet.trainers.values():
        trainer.begin("run", level="parity", timeout=0.5)
    fleet.lose("n2")
    for trainer in fleet.trainers.values():
        (line,) = trainer.end()
        fleet._hear(fleet.step, line["levels"])
    fleet.start("n2")
    fleet.relaunch("parity")
    fleet.assert_calm()


@pytest.mark.parametrize(
    "point",
    [
        "agent.encode.unit",
        pytest.param("agent.encode.before_publish", marks=pytest.mark.long),
        pytest.param("agent.encode.after_publish", marks=pytest.mark.long),
    ],
)
def test_an_agent_dies_in_a_round_of_parity_and_then_a_node(fleet_of: FleetOf, point: str) -> None:
    fleet = started(fleet_of())
    fleet.agent("n3").kill()
    fleet.start("n3", failpoints=f"{point}=kill@2")
    for _ in range(200):
        fleet.train(1, "memory", timeout=0.2)
        if not fleet.agent("n3").alive:
            break
    assert fleet.agent("n3").ended() == -9
    fleet.hear()
    fleet.lose("n2")
    fleet.start("n2", "n3")
    fleet.relaunch("parity")
    fleet.commit(1, "parity")
    fleet.assert_calm()


def test_a_round_of_parity_is_given_up_in_the_middle_of_a_restore(
    fleet_of: FleetOf, tmp_path: Path
) -> None:
    """A node is lost before its part of a round is there. The others' parts would suffice for its
    shard, for as long as nobody gives the round up."""
    publish, describe = tmp_path / "publish", tmp_path / "describe"
    fleet = fleet_of(options={"parity": {"timeout_s": 8.0}})
    fleet.start("n1", failpoints=f"agent.gather.records=hold:{describe}")
    fleet.start("n2", "n4")
    fleet.start("n3", failpoints=f"agent.encode.before_publish=hold:{publish}@2")
    fleet.launch()
    fleet.commit(1, "parity")
    fleet.train(1, "memory", timeout=4.0)
    others = [host for node_id, host in fleet.hosts.items() if node_id != "n3"]
    until(lambda: all(prepared(host) == {1, 2} for host in others), "the other nodes' parity")
    until(Path(f"{publish}.reached").exists, "the lost node's part")
    fleet.lose("n3")
    fleet.nodes_of_ranks[2] = "n4"
    fleet.launch()
    for trainer in fleet.trainers.values():
        trainer.begin("restore")
    until(Path(f"{describe}.reached").exists, "a decision on what is restored")
    until(lambda: all(prepared(host) == {1} for host in others), "the end of the round")
    Path(f"{describe}.go").touch()
    found = [trainer.end() for trainer in fleet.trainers.values()]
    assert {(answer["launch"], answer["step"]) for answer in found} == {(1, 1)}, found
    assert not [answer for answer in found if answer["wrong"]], found
    fleet.step = 1
    fleet.commit(1, "parity")
    fleet.assert_calm()


def test_a_node_that_runs_no_rank_is_lost_in_the_middle_of_a_restore(
    fleet_of: FleetOf, tmp_path: Path
) -> None:
    """It holds what a rank of another node is to load. The others have its parity: nobody needs to
    start the job again."""
    describe = tmp_path / "describe"
    fleet = fleet_of()
    fleet.start("n1", failpoints=f"agent.gather.records=hold:{describe}")
    fleet.start("n2", "n3", "n4")
    fleet.launch()
    fleet.commit(2, "parity")
    fleet.nodes_of_ranks[1] = "n1"
    fleet.launch()
    for trainer in fleet.trainers.values():
        trainer.begin("restore")
    until(Path(f"{describe}.reached").exists, "a decision on what is restored")
    fleet.lose("n2")
    Path(f"{describe}.go").touch()
    found = [trainer.end() for trainer in fleet.trainers.values()]
    assert {(answer["launch"], answer["step"]) for answer in found} == {fleet.told["parity"]}
    assert not [answer for answer in found if answer["wrong"]], found
    assert "asks for another plan" in fleet.hosts["n1"].said()
    fleet.step = fleet.told["parity"][1]
    fleet.commit(1, "parity")
    fleet.assert_calm()


@pytest.mark.parametrize(
    ("node_id", "point"),
    [
        ("n1", "agent.restore.decided"),
        ("n3", "agent.rebuild.decoded"),
        pytest.param("n2", "agent.mend.before_record", marks=pytest.mark.long),
    ],
)
def test_another_node_is_lost_in_the_middle_of_the_recovery(
    fleet_of: FleetOf, node_id: str, point: str
) -> None:
    fleet = started(fleet_of(parities=2, options={"limits": {"restore_timeout_s": 6.0}}))
    fleet.kill_trainers()
    fleet.lose("n2")
    if node_id != "n2":
        fleet.agent(node_id).kill()
    fleet.start("n2", failpoints=f"{point}=kill@1" if node_id == "n2" else "")
    if node_id != "n2":
        fleet.start(node_id, failpoints=f"{point}=kill@1")
    fleet.until_joined()
    fleet.launch(limits={"restore_s": 4.0})
    for trainer in fleet.trainers.values():
        trainer.begin("restore")
    until(lambda: not fleet.agent(node_id).alive, f"the death of {node_id}")
    # Ranks of other nodes may find another way; whatever they get is right.
    found = set()
    for rank, trainer in fleet.trainers.items():
        if fleet.nodes_of_ranks[rank] != node_id:
            with contextlib.suppress(TrainerError):
                answer = trainer.end()
                assert not answer["wrong"], answer
                found.add((answer["launch"], answer["step"]))
    assert len(found) <= 1, found
    assert not found or found.pop() >= fleet.told["parity"]
    fleet.kill_trainers()
    fleet.lose(node_id)
    fleet.start(node_id)
    fleet.relaunch("parity")
    fleet.commit(1, "parity")
    fleet.assert_calm()


def test_a_nodes_directories_are_removed_under_its_feet(fleet_of: FleetOf) -> None:
    fleet = started(fleet_of())
    for path in fleet.hosts["n3"].memory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    fleet.relaunch("parity")
    fleet.commit(1, "parity")
    for path in fleet.hosts["n1"].memory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    fleet.commit(1, "parity")
    fleet.relaunch("parity")


def test_a_replaced_node_and_ranks_that_start_elsewhere(fleet_of: FleetOf) -> None:
    """Hard case 13: another host takes part, and every rank is on another node than before."""
    fleet = started(fleet_of(spares=1))
    fleet.lose("n2")
    fleet.add("n5", replaces="n2")
    fleet.start("n5")
    fleet.nodes_of_ranks = ["n5", "n3", "n4", "n1"]
    fleet.relaunch("parity")
    fleet.commit(2, "parity")
    fleet.lose("n3")
    fleet.start("n3")
    fleet.relaunch("parity")
    fleet.assert_calm()
