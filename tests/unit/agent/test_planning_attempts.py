"""Parts of two runs that took the same incarnation and step never make up one snapshot."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.agent.attempts import commit_id_of
from everstep.agent.inventory import HeldParity, HeldShard, HeldSnapshot, NodeInventory
from everstep.agent.planning import Decoded, Erasure, Held, SnapshotPlan, plan_snapshots
from everstep.agent.plans import ParityPlan
from everstep.proto.ids import UNIT_BYTES

from .protected import LAYOUT, SNAPSHOT, all_nodes, digest, plan_of, unprotected

MIB = UNIT_BYTES
OLD, NEW = b"o" * 16, b"n" * 16
VERSIONS = {OLD: 1, NEW: 2}


def copy(
    rank: int, commit_id: bytes, level: str = "memory", *, named: bool = True, version: int = 0
) -> HeldShard:
    """A run's copy; `named`: whether it bears the commit id."""
    record = digest(rank, version or VERSIONS[commit_id])
    return HeldShard(rank, level, MIB, LAYOUT, record, commit_id if named else b"")


def only(inventories: list[NodeInventory], **asked: object) -> SnapshotPlan:
    (plan,) = plan_snapshots(inventories, **asked)  # type: ignore[arg-type]
    return plan


def places(found: SnapshotPlan) -> list[str]:
    return [f"{s.node_id}/{s.level}" if isinstance(s, Held) else "decoded" for s in found.sources]


def bearing(node: NodeInventory, commit_id: bytes) -> NodeInventory:
    held = node.snapshots[0]
    shards = tuple(replace(shard, commit_id=commit_id) for shard in held.shards)
    return replace(node, snapshots=(replace(held, shards=shards),))


def group(first_node: int, first_rank: int, world: int, version: int = 2) -> ParityPlan:
    return plan_of(
        [[MIB]] * 3,
        1,
        first_node=first_node,
        first_rank=first_rank,
        world=world,
        plan_id=f"group-{first_node}-{version}",
        version=version,
    )


def test_an_old_runs_disk_does_not_stand_in_for_the_lost_copy_of_the_new_run() -> None:
    nodes = [
        unprotected("n1", [copy(0, OLD, "nvme")], 2),
        unprotected("n2", [copy(1, NEW), copy(1, NEW, "nvme")], 2),
    ]
    found = only(nodes)
    assert not found.recoverable
    (words,) = found.missing
    assert "no intact copy is in reach" in words
    assert "is of another snapshot of the same name, or cannot be shown to be of this one" in words
    # The same copies are a snapshot if they were committed as one.
    assert only([bearing(node, NEW) for node in nodes]).recoverable


@pytest.mark.parametrize("named", [True, False])
def test_nor_does_it_while_the_new_run_has_not_been_told_its_commit_id(named: bool) -> None:
    nodes = [
        unprotected("n1", [copy(0, OLD, "nvme")], 2),
        unprotected("n2", [copy(1, NEW, named=named)], 2),
    ]
    assert not only(nodes).recoverable
    # Nor is a disk that was written without a commit id taken for the new run's.
    nodes[0] = unprotected("n1", [copy(0, OLD, "nvme", named=not named)], 2)
    assert not only(nodes).recoverable


def test_the_other_run_is_taken_if_it_is_there_as_a_whole() -> None:
    old = [copy(rank, OLD, "nvme") for rank in range(2)]
    nodes = [
        unprotected("n1", [old[0]], 2),
        unprotected("n2", [old[1], copy(1, NEW)], 2),
    ]
    found = only(nodes, prefer_node={1: "n2"})
    assert found.recoverable and found.commit_id == OLD
    assert places(found) == ["n1/nvme", "n2/nvme"]
    assert found.memory_losses is None
    nodes.append(unprotected("n3", [copy(0, NEW), copy(1, NEW)], 2))
    for asked in ({"erasures": [Erasure("n1", SNAPSHOT, 0, "nvme")]}, {"levels": {"memory"}}):
        found = only(nodes, **asked)
        assert found.recoverable and found.commit_id == NEW
        assert found.memory_losses == 0


def test_of_two_runs_that_are_there_as_a_whole_neither_is_guessed() -> None:
    nodes = [
        unprotected("n1", [copy(0, OLD, "nvme"), copy(1, OLD, "nvme")], 2),
        unprotected("n2", [copy(0, NEW), copy(1, NEW)], 2),
    ]
    found = only(nodes)
    assert found.sources == () and found.missing == (
        "2 snapshots that were committed apart go by this name, and all of them are whole "
        "(n2/memory against n1/nvme): take away the nodes or disks that hold the unwanted one",
    )
    assert only(nodes[1:]).recoverable and only(nodes[:1]).recoverable


def test_one_stale_copy_does_no_harm_to_several_groups() -> None:
    first, second = group(1, 0, 6), group(4, 3, 6)
    nodes = [bearing(node, NEW) for node in (*all_nodes(first), *all_nodes(second))]
    stale = unprotected("n9", [copy(0, OLD, "nvme")], 6)
    found = only([*nodes, stale])
    assert found.recoverable and found.commit_id == NEW and found.further_losses == 1
    # The rank that the stale disk has is lost: it is decoded.
    found = only([*nodes[1:], stale])
    assert places(found)[0] == "decoded"
    assert not only([*nodes[2:], stale]).recoverable


def test_parity_of_the_other_run_decodes_nothing() -> None:
    old, new = group(1, 0, 3, version=1), group(1, 0, 3)
    nodes = [bearing(node, NEW) for node in all_nodes(new)[1:]]
    with_old = [
        replace(
            node,
            snapshots=(replace(node.snapshots[0], parities=(HeldParity(old, "nvme"),)),),
        )
        for node in nodes
    ]
    assert only(nodes).recoverable
    assert not only(with_old).recoverable
    # Nor does a plan that agrees in what it shares, but names a shard of the other run.
    of_both = replace(
        new, members=(replace(old.members[0], shards=old.members[0].shards), *new.members[1:])
    )
    nodes = [
        replace(
            node,
            snapshots=(replace(node.snapshots[0], parities=(HeldParity(of_both, "memory"),)),),
        )
        for node in nodes
    ]
    disk = unprotected("n9", [copy(0, OLD, "nvme")], 3)
    assert not only([*nodes, disk]).recoverable


def test_without_a_commit_id_the_same_record_belongs_to_it() -> None:
    nodes = [
        unprotected("n1", [copy(0, NEW, "nvme"), copy(0, NEW, named=False)], 2),
        unprotected("n2", [copy(1, NEW)], 2),
        unprotected("n3", [copy(0, OLD, named=False)], 2),
    ]
    assert places(only(nodes)) == ["n1/memory", "n2/memory"]


def test_without_a_commit_id_what_an_agreeing_plan_names_belongs_to_it() -> None:
    plan = group(1, 0, 3)
    nodes = all_nodes(plan)
    nodes[0] = bearing(nodes[0], NEW)
    stale = unprotected("n9", [copy(rank, OLD, "nvme") for rank in (1, 2)], 3)
    found = only([*nodes, stale])
    assert found.commit_id == NEW and places(found) == ["n1/memory", "n2/memory", "n3/memory"]
    found = only([*nodes[:2], stale])
    assert isinstance(found.sources[2], Decoded)
    without = [
        replace(node, snapshots=(replace(node.snapshots[0], parities=()),)) for node in nodes
    ]
    assert not only([*without, stale]).recoverable


def test_without_a_commit_id_copies_belong_to_it_if_all_records_add_up() -> None:
    true_id = commit_id_of({rank: digest(rank, 2) for rank in range(3)})
    told = unprotected("n1", [replace(copy(0, NEW), commit_id=true_id)], 3)
    untold = unprotected("n2", [copy(1, NEW, named=False), copy(2, NEW, named=False)], 3)
    assert only([told, untold]).recoverable
    other = unprotected("n2", [copy(1, NEW, named=False), copy(2, OLD, named=False)], 3)
    found = only([told, other])
    assert not found.recoverable
    assert found.missing[0].startswith("ranks 1-2") or len(found.missing) == 2


def test_a_commit_id_that_stands_for_two_records_of_a_rank_is_no_proof() -> None:
    nodes = [
        unprotected("n1", [copy(0, NEW), copy(1, NEW)], 2),
        unprotected("n2", [copy(0, NEW, version=7)], 2),
    ]
    assert not only(nodes).recoverable


def test_the_same_record_under_another_commit_id_is_left_alone() -> None:
    nodes = [
        unprotected("n1", [copy(0, NEW), copy(1, NEW)], 2),
        unprotected("n2", [replace(copy(0, NEW, "nvme"), commit_id=OLD)], 2),
    ]
    assert only(nodes).further_losses == 0
    assert not only(nodes, erasures=[Erasure("n1", SNAPSHOT, 0, "memory")]).recoverable


def test_a_plan_that_contradicts_what_was_committed_does_not_spoil_it() -> None:
    plan, other = group(1, 0, 3), group(1, 0, 3, version=9)
    lying = replace(plan, members=(plan.members[0], other.members[1], plan.members[2]))
    nodes = [bearing(node, NEW) for node in all_nodes(plan)]
    for index in (1, 2):
        held = nodes[index].snapshots[0]
        parities = (HeldParity(lying, "memory"),)
        nodes[index] = replace(nodes[index], snapshots=(replace(held, parities=parities),))
    assert only(nodes).recoverable
    assert not only(nodes[1:]).recoverable


def test_another_run_may_have_been_of_another_world() -> None:
    nodes = [
        unprotected("n1", [copy(0, OLD, "nvme")], 3),
        unprotected("n2", [copy(0, NEW), copy(1, NEW)], 2),
    ]
    found = only(nodes)
    assert found.recoverable and found.world == 2


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_comes_back_no_plan_has_parts_of_two_runs(data: st.DataObject) -> None:
    plans = {commit_id: group(1, 0, 3, VERSIONS[commit_id]) for commit_id in (OLD, NEW)}
    nodes = []
    for index in range(4):
        # One node's memory, and its disk, are each of one run, and may bear no commit id.
        shards: list[HeldShard] = []
        parities: list[HeldParity] = []
        for level in ("memory", "nvme"):
            run = data.draw(st.sampled_from([OLD, NEW]))
            named = data.draw(st.booleans()) or run == OLD
            ranks = data.draw(st.sets(st.integers(0, 2)))
            shards += [copy(rank, run, level, named=named) for rank in sorted(ranks)]
            if index < 3 and data.draw(st.booleans()):
                parities.append(HeldParity(plans[run], level))
        held = HeldSnapshot(SNAPSHOT, 3, tuple(shards), tuple(parities))
        nodes.append(NodeInventory(f"n{index + 1}", (held,)))
    if all(not shard.commit_id for node in nodes for shard in node.snapshots[0].shards):
        return  # nothing tells the runs apart but records that differ
    found = only(nodes)
    if found.recoverable:
        assert len({_run_of(source, nodes) for source in found.sources}) == 1
        named = {commit_id: {0, 1, 2} <= _ranks(nodes, commit_id) for commit_id in (OLD, NEW)}
        assert not all(named.values())


def _ranks(nodes: list[NodeInventory], commit_id: bytes) -> set[int]:
    shards = (shard for node in nodes for shard in node.snapshots[0].shards)
    return {shard.rank for shard in shards if shard.commit_id == commit_id}


def _run_of(source: Held | Decoded, nodes: list[NodeInventory]) -> int:
    if isinstance(source, Decoded):
        return source.plan.members[source.member].shards[0].record_digest[0]
    (version,) = (
        shard.record_digest[0]
        for node in nodes
        for shard in node.snapshots[0].shards
        if (node.node_id, shard.level, shard.rank) == (source.node_id, source.level, source.rank)
    )
    return version
