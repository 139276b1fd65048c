"""Inventories and plans of recovery on the wire: whole, checked, and nothing else."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from everstep.agent import inventory, sources
from everstep.agent.inventory import HeldSnapshot, NodeInventory
from everstep.agent.planning import SnapshotPlan, plan_snapshots
from everstep.proto import peer_pb2
from everstep.proto.errors import FormatInvalid, InvalidName
from everstep.proto.ids import MAX_RANKS, SnapshotId

from .protected import SNAPSHOT, all_nodes, even, holding, shard_of


def test_an_inventory_comes_over_the_wire_as_it_was() -> None:
    plan = even(4, 1, ranks=2)
    whole = holding(plan, 2, ("memory", "nvme"))
    other = HeldSnapshot(SnapshotId(1, 7), 8, (shard_of(plan.members[0].shards[1], "nvme"),))
    named = replace(shard_of(plan.members[0].shards[0]), commit_id=b"c" * 16)
    other = replace(other, shards=(*other.shards, named))
    mine = NodeInventory("n3", (*whole.snapshots, other), ("the disk is slow",))
    sent = peer_pb2.InventoryReply.FromString(mine.encoded().SerializeToString())
    assert inventory.parsed(sent) == mine


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda held: setattr(held.shards[0], "rank", 3), "beyond the world of 3"),
        (lambda held: setattr(held.shards[0], "level", "tape"), "no level 'tape'"),
        (lambda held: setattr(held.shards[0], "image_bytes", 1 << 60), "no possible size"),
        (lambda held: setattr(held.shards[0], "record_digest", b"short"), "no possible size or"),
        (lambda held: setattr(held.shards[0], "commit_id", b"short"), "no possible commit id"),
    ],
)
def test_a_shard_that_cannot_be_is_left_out_and_named(
    broken: Callable[[peer_pb2.HeldSnapshot], None], said: str
) -> None:
    message = holding(even(3, 1), 0).encoded()
    broken(message.snapshots[0])
    found = inventory.parsed(message)
    assert found.snapshots[0].shards == () and len(found.snapshots[0].parities) == 1
    assert len(found.problems) == 1 and said in found.problems[0]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda held: setattr(held.parities[0].plan, "code", "other"), "coded as 'other'"),
        (lambda held: setattr(held.parities[0].plan, "step", 41), "it is of step 41"),
        (lambda held: setattr(held.parities[0].plan, "world", 4), "a world of 4, not 3"),
        (lambda held: setattr(held.parities[0], "level", "tape"), "no level 'tape'"),
        (lambda held: setattr(held.parities[0].plan.members[0], "node_id", "n9"), "no member"),
    ],
)
def test_a_parity_that_cannot_be_is_left_out_and_named(
    broken: Callable[[peer_pb2.HeldSnapshot], None], said: str
) -> None:
    message = holding(even(3, 1), 0).encoded()
    broken(message.snapshots[0])
    found = inventory.parsed(message)
    assert found.snapshots[0].parities == () and len(found.snapshots[0].shards) == 1
    assert len(found.problems) == 1 and said in found.problems[0]


def test_a_world_beyond_all_bounds_is_not_walked_through() -> None:
    message = holding(even(3, 1), 0).encoded()
    message.snapshots[0].world = MAX_RANKS + 1
    found = inventory.parsed(message)
    assert found.snapshots == (HeldSnapshot(SNAPSHOT, 0),)
    assert plan_snapshots([found])[0].missing == ("nobody says how many ranks it has",)


def test_a_node_whose_name_could_be_a_path_is_refused() -> None:
    with pytest.raises(InvalidName):
        inventory.parsed(peer_pb2.InventoryReply(node_id="../n1"))


def recovered() -> SnapshotPlan:
    (plan,) = plan_snapshots(all_nodes(even(4, 2, ranks=2), ("memory", "nvme"))[1:])
    return plan


def test_a_plan_of_recovery_comes_over_the_wire_as_it_was() -> None:
    plan = replace(recovered(), commit_id=b"c" * 16)
    message = peer_pb2.SnapshotPlan.FromString(plan.encoded().SerializeToString())
    assert sources.parsed(message, "here") == plan
    assert message.further_losses == 1 and message.further_loss_level == "memory"
    (lost,) = plan_snapshots(all_nodes(even(4, 1))[2:])
    assert sources.parsed(lost.encoded(), "here") == lost
    assert not lost.encoded().HasField("memory_losses")


def test_one_plan_that_many_ranks_are_decoded_with_is_kept_once() -> None:
    first, second = sources.parsed(recovered().encoded(), "here").decoded
    assert first.plan is second.plan


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda plan: setattr(plan, "world", MAX_RANKS + 1), "is not possible"),
        (lambda plan: setattr(plan, "world", 9), "a plan is of|not from where"),
        (lambda plan: setattr(plan, "commit_id", b"short"), "a commit id of 5 bytes"),
        (lambda plan: plan.sources.pop(), "not from where"),
        (lambda plan: plan.sources.append(plan.sources[2]), "not in order"),
        (lambda plan: plan.missing.append("rank 2"), "not from where"),
        (lambda plan: setattr(plan, "step", 41), "a plan is of"),
        (lambda plan: setattr(plan.sources[0], "image_bytes", 5), "does not protect rank 0"),
        (lambda plan: setattr(plan.sources[2], "image_bytes", 1 << 60), "no possible size"),
        (lambda plan: setattr(plan.sources[2], "level", "tape"), "no level 'tape'"),
        (lambda plan: setattr(plan.parities[0], "level", "tape"), "no level 'tape'"),
        (lambda plan: plan.sources[0].ClearField("plan"), "coded as ''"),
    ],
)
def test_a_plan_of_recovery_that_contradicts_itself_is_refused(
    broken: Callable[[peer_pb2.SnapshotPlan], object], said: str
) -> None:
    message = recovered().encoded()
    broken(message)
    with pytest.raises(FormatInvalid, match=said):
        sources.parsed(message, "here")


def test_a_plan_of_recovery_with_a_name_that_could_be_a_path_is_refused() -> None:
    for where in ("sources", "parities"):
        message = recovered().encoded()
        getattr(message, where)[2].node_id = "../n1"
        with pytest.raises(InvalidName):
            sources.parsed(message, "here")
