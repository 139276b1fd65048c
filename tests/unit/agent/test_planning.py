"""What can be recovered, from where, and what it would still survive."""

from dataclasses import replace
from itertools import combinations

import pytest

from everstep.agent.inventory import HeldParity, HeldSnapshot, NodeInventory
from everstep.agent.planning import Decoded, Erasure, Held, ParityAt, SnapshotPlan, plan_snapshots
from everstep.agent.plans import ParityPlan
from everstep.proto.ids import UNIT_BYTES, SnapshotId

from .protected import (
    SNAPSHOT,
    all_nodes,
    also,
    even,
    holding,
    plan_of,
    shard_of,
    unprotected,
)

PAIRS = [(3, 1), (4, 1), (4, 2), (8, 2)]
MIB = UNIT_BYTES


def only(inventories: list[NodeInventory], **asked: object) -> SnapshotPlan:
    plans = plan_snapshots(inventories, **asked)  # type: ignore[arg-type]
    assert len(plans) == 1
    return plans[0]


def moved_to(node_id: str, plan: ParityPlan, members: list[int]) -> NodeInventory:
    """A node that took over the shards of members, and holds no parity."""
    shards = [shard_of(shard) for index in members for shard in plan.members[index].shards]
    return unprotected(node_id, shards, plan.world)


@pytest.mark.parametrize(("nodes", "parities"), PAIRS)
def test_every_loss_of_at_most_m_nodes_is_recoverable_and_no_greater_one(
    nodes: int, parities: int
) -> None:
    plan = even(nodes, parities, ranks=2)
    everyone = all_nodes(plan)
    for losses in range(nodes + 1):
        for gone in combinations(range(nodes), losses):
            left = [node for index, node in enumerate(everyone) if index not in gone]
            if not left:
                assert plan_snapshots(left) == []
                continue
            found = only(left)
            assert found.recoverable == (losses <= parities)
            lost_ranks = [rank for index in gone for rank in (2 * index, 2 * index + 1)]
            if found.recoverable:
                assert [source.rank for source in found.sources] == list(range(2 * nodes))
                assert [source.rank for source in found.decoded] == lost_ranks
                assert [source.member for source in found.decoded] == [r // 2 for r in lost_ranks]
                assert found.further_losses == found.memory_losses == parities - losses
            else:
                assert len(found.missing) == losses
                assert found.further_losses == 0 and found.memory_losses is None


def test_what_is_missing_is_said_with_its_last_holders_and_how_much_is_lacking() -> None:
    plan = even(4, 1, ranks=2)
    found = only(all_nodes(plan)[2:])
    assert found.missing == (
        "ranks 0-1: last held by n1; decoding takes 3 symbols of each row, and 1 is lacking; "
        "nothing is in reach of n1, n2",
        "ranks 2-3: last held by n2; decoding takes 3 symbols of each row, and 1 is lacking; "
        "nothing is in reach of n1, n2",
    )
    found = only(all_nodes(plan)[3:])
    assert "and 2 are lacking" in found.missing[0]
    assert [source.rank for source in found.sources] == [6, 7]


def test_without_parity_what_is_not_held_is_missing() -> None:
    plan = even(3, 1)
    found = only([holding(plan, 0, parity=False), holding(plan, 1, parity=False)])
    assert found.missing == ("rank 2: no intact copy is in reach, and no parity that protects it",)
    whole = only([holding(plan, index, parity=False) for index in range(3)])
    assert whole.recoverable and whole.further_losses == 0


@pytest.mark.parametrize(
    "sizes",
    [
        [[5 * MIB + 1], [MIB], [3 * MIB], [2 * MIB, 1]],
        [[7 * MIB], [], [1], [MIB - 1]],
        [[4 * MIB, 2 * MIB, 100], [3 * MIB], [], []],
    ],
)
@pytest.mark.parametrize("parities", [1, 2])
def test_unequal_and_empty_members_survive_as_many_losses(
    sizes: list[list[int]], parities: int
) -> None:
    plan = plan_of(sizes, parities)
    everyone = all_nodes(plan)
    for gone in combinations(everyone, parities):
        found = only([node for node in everyone if node not in gone])
        assert found.recoverable
    assert only(everyone).further_losses >= parities


def test_zeros_beyond_the_end_of_a_stream_need_no_holder() -> None:
    # Only n1 holds anything, so that the data symbols of all others are zeros: one parity of each
    # row is enough, and those of n3 and n4 hold the rows between them.
    plan = plan_of([[2 * MIB], [], [], []], 2)
    everyone = all_nodes(plan)
    assert only(everyone[2:]).recoverable
    assert only(everyone).further_losses == 2
    assert not only(everyone[3:]).recoverable
    assert only([everyone[1], everyone[3]]).recoverable


def test_of_an_empty_image_the_record_is_needed_still() -> None:
    nodes = all_nodes(plan_of([[0], [0]], 1))
    # No symbol is, but one of the manifests is.
    assert only(nodes[:1]).recoverable
    assert only(nodes).further_losses == 1


def test_memory_comes_before_nvme_and_the_wanted_node_before_others() -> None:
    plan = even(3, 1)
    shard = plan.members[0].shards[0]
    nodes = all_nodes(plan, ("nvme",))
    assert only(nodes).sources[0] == Held(0, "n1", "nvme", shard.image_bytes)
    nodes[2] = also(nodes[2], shard_of(shard))
    assert only(nodes).sources[0] == Held(0, "n3", "memory", shard.image_bytes)
    assert only(nodes, prefer_node={0: "n1"}).sources[0] == Held(
        0, "n3", "memory", shard.image_bytes
    )
    nodes[1] = also(nodes[1], shard_of(shard))
    assert only(nodes).sources[0] == Held(0, "n2", "memory", shard.image_bytes)
    assert only(nodes, prefer_node={0: "n3"}).sources[0] == Held(
        0, "n3", "memory", shard.image_bytes
    )
    assert only(nodes, levels={"nvme"}).sources[0] == Held(0, "n1", "nvme", shard.image_bytes)


def test_symbols_of_one_row_may_come_from_several_levels() -> None:
    plan = even(4, 1)
    mixed = [holding(plan, 1), holding(plan, 2, ("nvme",)), holding(plan, 3, ("nvme", "memory"))]
    found = only(mixed)
    assert found.sources[0] == Decoded(0, plan, 0, plan.members[0].shards[0].image_bytes)
    assert found.parities == (
        ParityAt("plan", "n2", "memory"),
        ParityAt("plan", "n3", "nvme"),
        ParityAt("plan", "n4", "memory"),
        ParityAt("plan", "n4", "nvme"),
    )
    assert found.levels == ("memory", "nvme")
    assert found.further_losses == 0 and found.memory_losses is None
    assert not only(mixed, levels={"memory"}).recoverable


@pytest.mark.parametrize(("nodes", "parities"), PAIRS)
def test_after_all_nodes_restarted_empty_the_disks_of_p_less_m_are_enough(
    nodes: int, parities: int
) -> None:
    plan = even(nodes, parities)
    disks = all_nodes(plan, ("nvme",))
    for kept in combinations(range(nodes), nodes - parities):
        left = [
            disks[index] if index in kept else NodeInventory(f"n{index + 1}")
            for index in range(nodes)
        ]
        found = only(left)
        assert found.recoverable and found.levels == ("nvme",)
        assert (found.further_losses, found.memory_losses) == (0, None)
        left[kept[0]] = NodeInventory(f"n{kept[0] + 1}")
        assert not only(left).recoverable


def test_disks_make_up_for_memory_in_what_is_survived() -> None:
    plan = even(4, 1)
    other = [shard_of(shard, "nvme") for member in plan.members for shard in member.shards]
    nodes = [*all_nodes(plan), unprotected("n9", other, plan.world)]
    found = only(nodes)
    # Of rank 0, say, there is n1's memory, n9's disk, and the group's parity: three ways.
    assert (found.further_losses, found.memory_losses) == (2, 1)
    assert found.further_loss_level == "nvme"


def test_a_copy_found_damaged_is_as_good_as_lost() -> None:
    plan = even(4, 1)
    nodes = all_nodes(plan)
    damaged = Erasure("n1", SNAPSHOT, 0, "memory")
    found = only(nodes, erasures=[damaged])
    assert isinstance(found.sources[0], Decoded)
    assert found.further_losses == 0
    parity = Erasure("n1", SNAPSHOT, None, "memory")
    assert only(nodes, erasures=[parity]).recoverable
    # In the row of n1's parity nobody lost data; n1's own data needs none of it.
    assert only(nodes, erasures=[damaged, parity]).recoverable
    assert not only(nodes, erasures=[damaged, Erasure("n2", SNAPSHOT, None, "memory")]).recoverable
    assert not only(nodes, erasures=[damaged, Erasure("n2", SNAPSHOT, 1, "memory")]).recoverable
    # Damage of another level or another snapshot is none of this copy's.
    for elsewhere in (
        replace(damaged, level="nvme"),
        replace(damaged, snapshot=SnapshotId(2, 39)),
        replace(damaged, node_id="n2"),
    ):
        assert isinstance(only(nodes, erasures=[elsewhere]).sources[0], Held)


def test_of_a_node_with_several_ranks_one_may_be_damaged_at_each_node_in_other_rows() -> None:
    # Two ranks a node; the chunks are as long as a rank's image.
    plan = plan_of([[2 * MIB, 2 * MIB]] * 3, 1)
    nodes = all_nodes(plan)
    # n1's rank 0 is in row 1 and n2's rank 2 in row 2: each row lacks one symbol only.
    both = [Erasure("n1", SNAPSHOT, 0, "memory"), Erasure("n2", SNAPSHOT, 2, "memory")]
    found = only(nodes, erasures=both)
    assert [source.rank for source in found.decoded] == [0, 2]
    # n1's rank 1 is in row 2, too.
    both = [Erasure("n1", SNAPSHOT, 1, "memory"), Erasure("n2", SNAPSHOT, 2, "memory")]
    assert not only(nodes, erasures=both).recoverable


def test_shards_that_moved_count_where_they_are() -> None:
    plan = even(4, 1)
    nodes = all_nodes(plan)
    # n1 was lost and its shard installed on n5; its parity is not there again.
    moved = [*nodes[1:], moved_to("n5", plan, [0])]
    found = only(moved)
    assert found.sources[0] == Held(0, "n5", "memory", plan.members[0].shards[0].image_bytes)
    # Were n5 lost, rank 0 would be decoded. Were n3 lost, its shard would lack n1's parity.
    assert found.further_losses == 0
    assert only(nodes[1:]).recoverable
    without_n3 = only([nodes[1], nodes[3], moved_to("n5", plan, [0])])
    assert not without_n3.recoverable and without_n3.missing[0].startswith(
        "rank 2: last held by n3"
    )


def test_a_node_that_took_over_two_members_takes_both_with_it() -> None:
    plan = even(4, 2)
    nodes = [*all_nodes(plan), moved_to("n9", plan, [2])]
    nodes[2] = holding(plan, 2, parity=True)
    nodes[2] = replace(nodes[2], snapshots=(replace(nodes[2].snapshots[0], shards=()),))
    nodes[3] = also(nodes[3], *moved_to("n4", plan, [0]).snapshots[0].shards)
    nodes[0] = replace(nodes[0], snapshots=(replace(nodes[0].snapshots[0], shards=()),))
    found = only(nodes)
    assert found.recoverable
    assert found.further_losses == brute_force(nodes, found)


def brute_force(nodes: list[NodeInventory], found: SnapshotPlan) -> int:
    for losses in range(1, len(nodes) + 1):
        for gone in combinations(range(len(nodes)), losses):
            left = [node for index, node in enumerate(nodes) if index not in gone]
            plans = [p for p in plan_snapshots(left) if p.snapshot == found.snapshot]
            if not plans or not plans[0].recoverable:
                return losses - 1
    return len(nodes)


def test_two_groups_lose_each_on_its_own() -> None:
    first = plan_of([[3 * MIB]] * 4, 1, world=8, plan_id="first")
    second = plan_of([[3 * MIB]] * 4, 1, first_node=5, first_rank=4, world=8, plan_id="second")
    nodes = [*all_nodes(first), *all_nodes(second)]
    assert only(nodes).further_losses == 1
    found = only([*nodes[1:4], *nodes[5:]])
    assert found.recoverable and found.further_losses == 0
    assert {source.plan.plan_id for source in found.decoded} == {"first", "second"}
    assert not only(nodes[2:]).recoverable


def test_a_search_that_is_too_long_says_no_more_than_the_groups_guarantee(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = even(4, 1)
    copies = [shard_of(shard) for member in plan.members for shard in member.shards]
    nodes = [*all_nodes(plan), unprotected("n9", copies, plan.world)]
    assert only(nodes).further_losses == 2
    monkeypatch.setattr("everstep.agent.planning.MAX_CHECKS", 1)
    assert only(nodes).further_losses == 1


def test_the_newest_comes_first_or_what_the_job_prefers() -> None:
    def held(snapshot: SnapshotId) -> HeldSnapshot:
        plan = plan_of([[MIB]] * 3, 1, snapshot=snapshot)
        return HeldSnapshot(snapshot, 1, (shard_of(plan.members[0].shards[0]),))

    ids = [SnapshotId(1, 90), SnapshotId(2, 40), SnapshotId(2, 30)]
    nodes = [
        NodeInventory("n1", (held(ids[2]), held(ids[0]))),
        NodeInventory("n2", (held(ids[1]),)),
    ]
    assert [p.snapshot for p in plan_snapshots(nodes)] == [ids[1], ids[2], ids[0]]
    # Incarnation 2 was left behind.
    wanted = plan_snapshots(nodes, preference=lambda s: (s.incarnation != 2, s))
    assert [p.snapshot for p in wanted] == [ids[0], ids[1], ids[2]]
    assert [p.snapshot for p in plan_snapshots(nodes, to_step=30)] == [ids[2]]
    assert plan_snapshots(nodes, to_step=31) == []


def test_parity_of_a_node_that_is_no_member_counts_for_nothing() -> None:
    plan = even(3, 1)
    stranger = NodeInventory("n9", (HeldSnapshot(SNAPSHOT, 3, (), (HeldParity(plan, "memory"),)),))
    assert only([stranger, holding(plan, 0, parity=False)]).missing
    assert not only([stranger, holding(plan, 0), holding(plan, 1, parity=False)]).recoverable
