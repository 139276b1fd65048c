"""Copies that were not committed together are never mixed; and any state against a reference."""

from dataclasses import replace
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.agent.inventory import HeldParity, HeldShard, HeldSnapshot, NodeInventory
from everstep.agent.planning import Decoded, Erasure, Held, SnapshotPlan, plan_snapshots
from everstep.agent.plans import ParityPlan
from everstep.proto.ids import UNIT_BYTES, SnapshotId

from .protected import LAYOUT, SNAPSHOT, all_nodes, digest, even, holding, plan_of, unprotected

MIB = UNIT_BYTES


def copy(rank: int, version: int, level: str = "memory") -> HeldShard:
    return HeldShard(rank, level, MIB, LAYOUT, digest(rank, version))


def only(inventories: list[NodeInventory], **asked: object) -> SnapshotPlan:
    (plan,) = plan_snapshots(inventories, **asked)  # type: ignore[arg-type]
    return plan


def test_a_majority_does_not_decide_which_copy_is_the_right_one() -> None:
    nodes = [
        unprotected("n1", [copy(0, 1), copy(1, 1)], 2),
        unprotected("n2", [copy(0, 1)], 2),
        unprotected("n3", [copy(0, 2)], 2),
    ]
    found = only(nodes)
    assert not found.recoverable and found.sources == ()
    assert found.missing == (
        "two snapshots go by this name: the copies of rank 0 differ (n1/memory, n2/memory against "
        "n3/memory), and no parity plan and no node's NVMe vouches for one whole set of them",
    )


def test_the_set_that_parity_vouches_for_is_taken() -> None:
    plan = plan_of([[MIB]] * 3, 1, version=1)
    nodes = [*all_nodes(plan), unprotected("n9", [copy(0, 2), copy(1, 2), copy(2, 2)], 3)]
    found = only(nodes, prefer_node={0: "n9"})
    assert [source.node_id for source in found.sources if isinstance(source, Held)] == [
        "n1",
        "n2",
        "n3",
    ]
    # n1 is lost: its rank is decoded, not taken from the other snapshot.
    assert isinstance(only(nodes[1:]).sources[0], Decoded)
    assert found.further_losses == 1


def test_the_set_on_a_disk_is_taken_and_memory_only_where_it_is_the_same() -> None:
    nodes = [
        unprotected("n1", [copy(0, 1, "nvme"), copy(1, 1, "nvme"), copy(0, 2)], 2),
        unprotected("n2", [copy(1, 1)], 2),
    ]
    found = only(nodes)
    assert [(s.node_id, s.level) for s in found.sources if isinstance(s, Held)] == [
        ("n1", "nvme"),
        ("n2", "memory"),
    ]
    # Of the disk's set one rank is damaged: the other copy is of another snapshot and stays away.
    lost = only(nodes, erasures=[Erasure("n1", SNAPSHOT, 0, "nvme")])
    assert [text.split(":")[0] for text in lost.missing] == ["rank 0"]


def test_disks_of_several_nodes_and_plans_of_several_groups_may_be_of_either() -> None:
    disks = [
        unprotected("n1", [copy(0, 1, "nvme"), copy(0, 2)], 2),
        unprotected("n2", [copy(1, 1, "nvme")], 2),
    ]
    assert not only(disks).recoverable
    first = plan_of([[MIB]] * 3, 1, world=6, version=1)
    second = plan_of([[MIB]] * 3, 1, first_node=4, first_rank=3, world=6, version=1)
    groups = [*all_nodes(first), *all_nodes(replace(second, plan_id="second"))]
    assert only(groups).recoverable
    assert not only([*groups, unprotected("n9", [copy(0, 2)], 6)]).recoverable


def test_a_copy_that_nobody_contradicts_may_belong_to_either_set() -> None:
    # Rank 0 is disputed; NVMe has a part only, so that rank 1 in memory may be of the other one.
    nodes = [
        unprotected("n1", [copy(0, 1, "nvme"), copy(0, 2)], 2),
        unprotected("n2", [copy(1, 1)], 2),
    ]
    assert not only(nodes).recoverable


def test_what_lies_at_a_level_that_may_not_be_used_is_evidence_still() -> None:
    nodes = [
        unprotected("n1", [copy(0, 1, "nvme"), copy(0, 2)], 2),
        unprotected("n2", [copy(1, 1)], 2),
    ]
    for asked in ({"levels": {"memory"}}, {"erasures": [Erasure("n1", SNAPSHOT, 0, "nvme")]}):
        assert not only(nodes, **asked).recoverable


def test_parity_against_nvme_is_decided_for_neither() -> None:
    plan = plan_of([[MIB]] * 3, 1, version=1)
    disk = unprotected("n9", [copy(rank, 2, "nvme") for rank in range(3)], 3)
    found = only([*all_nodes(plan), disk])
    assert "the whole sets that parity plans and NVMe vouch for differ, too" in found.missing[0]
    # A part of a snapshot on a disk from elsewhere does not stand against a whole plan.
    part = unprotected("n9", [copy(0, 2, "nvme")], 3)
    assert only([*all_nodes(plan), part]).recoverable


def test_two_plans_that_disagree_vouch_for_nothing() -> None:
    first = plan_of([[MIB]] * 3, 1, version=1)
    second = plan_of([[MIB]] * 3, 1, version=2, plan_id="other")
    assert not only([holding(first, 0), holding(second, 1), holding(first, 2)]).recoverable


def test_plans_of_one_name_but_other_content_do_not_make_up_one_row() -> None:
    plan = even(4, 1)
    other = replace(plan, members=tuple(reversed(plan.members)))
    nodes = all_nodes(plan)[1:]
    for index in (1, 2, 3):
        held = nodes[index - 1].snapshots[0]
        lying = replace(held, parities=(HeldParity(other, "memory"),))
        changed = list(nodes)
        changed[index - 1] = NodeInventory(f"n{index + 1}", (lying,))
        assert not only(changed).recoverable


def test_worlds_that_differ_are_not_put_together() -> None:
    nodes = [unprotected("n1", [copy(0, 1)], 1), unprotected("n2", [copy(1, 1)], 2)]
    assert only(nodes).missing == ("its copies are of worlds of 1 and 2 ranks",)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_once_two_copies_differ_all_that_is_used_is_of_one_version(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 3))
    plan = plan_of([[MIB]] * 3, 1, version=1) if world == 3 and data.draw(st.booleans()) else None
    nodes = []
    for index in range(3):
        on_disk = data.draw(st.sampled_from([1, 2]))
        shards = [
            copy(rank, data.draw(st.sampled_from([1, 2])) if level == "memory" else on_disk, level)
            for rank in range(world)
            for level in ("memory", "nvme")
            if data.draw(st.booleans())
        ]
        parities = (HeldParity(plan, "memory"),) if plan and data.draw(st.booleans()) else ()
        held = HeldSnapshot(SNAPSHOT, world, tuple(shards), parities)
        nodes.append(NodeInventory(f"n{index + 1}", (held,)))
    found = only(nodes)
    if not found.recoverable:
        return
    seen: dict[int, set[bytes]] = {}
    for node in nodes:
        for shard in node.snapshots[0].shards:
            seen.setdefault(shard.rank, set()).add(shard.record_digest[:8])
        for parity in node.snapshots[0].parities:
            for member in parity.plan.members:
                for planned in member.shards:
                    seen.setdefault(planned.rank, set()).add(planned.record_digest[:8])
    if any(len(versions) > 1 for versions in seen.values()):
        assert len({version_of(source, nodes) for source in found.sources}) == 1


def version_of(source: Held | Decoded, nodes: list[NodeInventory]) -> bytes:
    if isinstance(source, Decoded):
        return source.plan.members[source.member].shards[0].record_digest[:8]
    (found,) = (
        shard.record_digest[:8]
        for node in nodes
        if node.node_id == source.node_id
        for shard in node.snapshots[0].shards
        if (shard.rank, shard.level) == (source.rank, source.level)
    )
    return found


Place = tuple[str, str]
"""Node and level."""


class Reference:
    """The rules, unit by unit, without a thought for speed."""

    def __init__(
        self, plan: ParityPlan, shards: set[tuple[int, Place]], parity: set[Place]
    ) -> None:
        self.plan, self.rows = plan, plan.rows()
        self.shards, self.parity = shards, parity

    def without(self, gone: tuple[str, ...]) -> "Reference":
        return Reference(
            self.plan,
            {(rank, place) for rank, place in self.shards if place[0] not in gone},
            {place for place in self.parity if place[0] not in gone},
        )

    def held(self, rank: int) -> bool:
        return any(one == rank for one, _ in self.shards)

    def usable(self, member: int, row: int) -> bool:
        if member in self.rows.parity_holders(row):
            return any(node == self.plan.members[member].node_id for node, _ in self.parity)
        units = self.rows.contribution(member, row)
        return all(self.held(self.plan.members[member].locate(u)[0].rank) for u in units)

    def decodable(self, rank: int) -> bool:
        if not self.parity:
            return False
        for index, member in enumerate(self.plan.members):
            for unit in range(member.units):
                if member.locate(unit)[0].rank == rank:
                    row, _ = self.rows.place_of(index, unit)
                    symbols = sum(self.usable(m, row) for m in range(self.rows.members))
                    if symbols < self.rows.data_symbols:
                        return False
        return True

    def recoverable(self) -> bool:
        return all(self.held(rank) or self.decodable(rank) for rank in range(self.plan.world))

    def further_losses(self, nodes: list[str]) -> int:
        for losses in range(1, len(nodes) + 1):
            for gone in combinations(nodes, losses):
                if not self.without(gone).recoverable():
                    return losses - 1
        return len(nodes)


@st.composite
def states(draw: st.DrawFn) -> tuple[ParityPlan, list[NodeInventory], list[Erasure], Reference]:
    size = draw(st.integers(2, 5))
    images = st.lists(st.integers(1, 5 * MIB), max_size=2)
    sizes = draw(st.lists(images, min_size=size, max_size=size))
    if not any(sizes):
        sizes[0] = [MIB]
    plan = plan_of(sizes, draw(st.integers(1, size - 1)))
    shards, parity, erasures = set(), set(), []
    nodes: dict[str, tuple[list[HeldShard], list[HeldParity]]] = {}
    likely = st.sampled_from([True, True, True, False])
    for member in plan.members:
        for level, chance in (("memory", likely), ("nvme", st.booleans())):
            own_parity = draw(chance)
            held, manifests = nodes.setdefault(member.node_id, ([], []))
            if own_parity:
                manifests.append(HeldParity(plan, level))
                parity.add((member.node_id, level))
            for shard in member.shards:
                if draw(chance):
                    node = member.node_id if draw(likely) else draw(st.sampled_from(["n1", "n9"]))
                    held = nodes.setdefault(node, ([], []))[0]
                    held.append(
                        HeldShard(shard.rank, level, shard.image_bytes, LAYOUT, shard.record_digest)
                    )
                    shards.add((shard.rank, (node, level)))
    for rank, place in sorted(shards):
        if draw(st.integers(0, 9)) == 9:
            erasures.append(Erasure(place[0], SNAPSHOT, rank, place[1]))
            shards.discard((rank, place))
    inventories = [
        NodeInventory(node, (HeldSnapshot(SNAPSHOT, plan.world, tuple(held), tuple(manifests)),))
        for node, (held, manifests) in nodes.items()
    ]
    return plan, inventories, erasures, Reference(plan, shards, parity)


@given(states())
@settings(max_examples=250, deadline=None)
def test_any_state_is_judged_as_by_the_reference(
    state: tuple[ParityPlan, list[NodeInventory], list[Erasure], Reference],
) -> None:
    plan, inventories, erasures, reference = state
    (found,) = plan_snapshots(inventories, erasures=erasures)
    assert found.recoverable == reference.recoverable()
    for source in found.sources:
        if isinstance(source, Held):
            assert (source.rank, (source.node_id, source.level)) in reference.shards
        else:
            assert not reference.held(source.rank) and reference.decodable(source.rank)
    in_memory = Reference(
        plan,
        {one for one in reference.shards if one[1][1] == "memory"},
        {place for place in reference.parity if place[1] == "memory"},
    )
    nodes = [node.node_id for node in inventories]
    if found.recoverable:
        assert [source.rank for source in found.sources] == list(range(plan.world))
        assert found.further_losses == reference.further_losses(nodes)
        whole = in_memory.recoverable()
        assert found.memory_losses == (in_memory.further_losses(nodes) if whole else None)


def test_a_snapshot_is_not_put_together_from_two_steps() -> None:
    plan = even(3, 1)
    older = replace(plan, snapshot=SnapshotId(2, 39))
    nodes = [holding(plan, 0), holding(older, 1), holding(older, 2)]
    plans = plan_snapshots(nodes)
    assert [(p.snapshot.step, p.recoverable) for p in plans] == [(40, False), (39, True)]
