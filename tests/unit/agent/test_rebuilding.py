"""Who decodes what, and which bytes travel, against the formulas of the notes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everstep.agent import sources
from everstep.agent.inventory import NodeInventory
from everstep.agent.planning import Erasure, SnapshotPlan, plan_snapshots
from everstep.agent.plans import ParityPlan
from everstep.agent.rebuilding import Movement, Segment, expected_s, movements, rebuild_work
from everstep.proto.ids import UNIT_BYTES

from .protected import SNAPSHOT, all_nodes, even, holding, plan_of, shard_of, unprotected

PAIRS = [(3, 1), (4, 1), (4, 2), (8, 2)]
MIB = UNIT_BYTES


def only(inventories: Sequence[NodeInventory], **asked: object) -> SnapshotPlan:
    (plan,) = plan_snapshots(inventories, **asked)  # type: ignore[arg-type]
    return plan


def received(moved: list[Movement]) -> dict[str, int]:
    amounts: dict[str, int] = defaultdict(int)
    for movement in moved:
        amounts[movement.to_node] += movement.bytes
    return amounts


@pytest.mark.parametrize(("nodes", "parities"), PAIRS)
def test_what_survivors_and_replacements_receive_is_as_the_formulas_have_it(
    nodes: int, parities: int
) -> None:
    data = nodes - parities
    plan = replace_sizes(even(nodes, parities, chunk_units=2))
    chunk = 2 * MIB
    everyone = all_nodes(plan)
    for losses in range(1, parities + 1):
        for gone in combinations(range(nodes), losses):
            found = only([node for index, node in enumerate(everyone) if index not in gone])
            moved = movements(found, {rank: f"new{rank}" for rank in gone})
            amounts = received(moved)
            for rank in gone:
                assert amounts.pop(f"new{rank}") == data * chunk
            at_most = -(-nodes // (nodes - losses)) * data * chunk
            assert max(amounts.values()) <= at_most
            # k - 1 symbols fetched and one passed on, for each chunk.
            assert sum(movement.bytes for movement in moved) == losses * data * data * chunk
            if losses == 1:
                assert losses * data * data * chunk <= nodes * data * chunk


def replace_sizes(plan: ParityPlan) -> ParityPlan:
    """Images that fill their chunks to the last byte."""
    members = tuple(
        replace(m, shards=tuple(replace(s, image_bytes=s.units * MIB) for s in m.shards))
        for m in plan.members
    )
    return replace(plan, members=members)


@pytest.mark.parametrize(("nodes", "parities"), PAIRS)
def test_decoding_is_spread_over_all_survivors(nodes: int, parities: int) -> None:
    plan = even(nodes, parities)
    found = only(all_nodes(plan)[parities:])
    chunks: dict[str, int] = defaultdict(int)
    for rank in range(parities):
        for segment in rebuild_work(found, rank, 99):
            chunks[segment.executor] += 1
    shares = [chunks[f"n{index + 1}"] for index in range(parities, nodes)]
    assert sum(shares) == parities * (nodes - parities)
    assert max(shares) - min(shares) <= 1


def check_segments(found: SnapshotPlan, rank: int, segment_units: int) -> list[Segment]:
    """Every unit of the image once, in order, where the geometry has it; k symbols that are."""
    segments = rebuild_work(found, rank, segment_units)
    (source,) = (source for source in found.decoded if source.rank == rank)
    plan, rows = source.plan, source.plan.rows()
    first = sum(s.units for s in plan.members[source.member].shards if s.rank < rank)
    next_unit = 0
    for segment in segments:
        assert 0 < segment.units <= segment_units and segment.image_unit == next_unit
        for offset in range(segment.units):
            place = rows.place_of(source.member, first + next_unit + offset)
            assert place == (segment.row, segment.first_unit + offset)
        next_unit += segment.units
        nodes = {place.split("/")[0] for place in segment.usable}
        assert segment.executor in nodes and len(set(segment.usable)) == len(segment.usable)
    assert next_unit == -(-source.image_bytes // MIB)
    return segments


def test_segments_cover_the_image_and_name_what_suffices_first() -> None:
    plan = plan_of([[3 * MIB, 2 * MIB + 5], [5 * MIB], [6 * MIB], [MIB, MIB]], 1)
    nodes = all_nodes(plan, ("memory", "nvme"))
    found = only(nodes[1:])
    for segment_units in (1, 2, 7):
        for rank in (0, 1):
            check_segments(found, rank, segment_units)
    first = rebuild_work(found, 0, 7)[0]
    assert (first.row, first.member, first.first_unit, first.units) == (1, 0, 0, 2)
    # Row 1: parity at n2; data of n1, which is lost, of n3, and zeros of n4's.
    memory, nvme = first.usable[:2], first.usable[2:]
    assert sorted(memory) == ["n2/memory", "n3/memory"]
    assert nvme == ("n2/nvme",)  # of a shard, the best copy is in the plan
    assert memory[0] == f"{first.executor}/memory"
    assert rebuild_work(found, 2, 7) == []


def test_zeros_are_fetched_from_nobody() -> None:
    plan = plan_of([[2 * MIB], [], [], []], 2)
    found = only(all_nodes(plan)[2:])
    (row_1, row_2) = rebuild_work(found, 0, 9)
    # Rows 1 and 2 have parities at n2, n3 and at n3, n4; the other data are zeros.
    assert (row_1.usable, row_1.executor) == (("n3/memory",), "n3")
    assert row_2.usable[0] == f"{row_2.executor}/memory"
    moved = movements(found, {0: "new"})
    assert all(movement.what == "rank 0, decoded" for movement in moved)
    assert sum(movement.bytes for movement in moved) == 2 * MIB


def test_shards_that_moved_are_read_where_they_are() -> None:
    plan = even(4, 1)
    moved_shard = shard_of(plan.members[0].shards[0])
    nodes = [*all_nodes(plan)[1:], unprotected("n9", [moved_shard], plan.world)]
    # Without n1's parity rank 1 cannot be decoded; with it, its shard is read at n9.
    damaged = Erasure("n2", SNAPSHOT, 1, "memory")
    found = only(nodes, erasures=[damaged])
    assert not found.recoverable
    parity = replace(holding(plan, 0).snapshots[0], shards=())
    nodes.append(NodeInventory("n1", (parity,)))
    found = only(nodes, erasures=[damaged])
    for segment in check_segments(found, 1, 9):
        data = 0 not in plan.rows().parity_holders(segment.row)
        assert ("n9/memory" in segment.usable) == data


def test_the_plan_that_came_over_the_wire_divides_the_work_alike() -> None:
    plan = plan_of([[3 * MIB, 2 * MIB + 5], [5 * MIB], [6 * MIB], [MIB, MIB]], 2)
    found = only(all_nodes(plan, ("memory", "nvme"))[2:])
    received_plan = sources.parsed(found.encoded(), "here")
    assert received_plan == found
    for source in found.decoded:
        work = rebuild_work(found, source.rank, 2)
        assert work and rebuild_work(received_plan, source.rank, 2) == work


def test_what_is_held_travels_only_if_it_is_not_in_memory_where_it_is_wanted() -> None:
    plan = even(3, 1)
    size = plan.members[0].shards[0].image_bytes
    nodes = [holding(plan, 0), holding(plan, 1, ("nvme",)), holding(plan, 2)]
    found = only(nodes)
    assert movements(found, {0: "n1", 1: "n2", 2: "n1"}) == [
        Movement("n2", "n2", size, "rank 1, from nvme"),
        Movement("n3", "n1", size, "rank 2, from memory"),
    ]
    assert movements(found, {}) == []


def test_alike_movements_are_one() -> None:
    plan = even(4, 1, chunk_units=4, ranks=2)
    found = only(all_nodes(plan)[1:])
    moved = movements(found, {0: "new", 1: "new"})
    to_new = [movement for movement in moved if movement.to_node == "new"]
    assert len({movement.from_node for movement in to_new}) == len(to_new) == 3
    whole = sum(shard.image_bytes for shard in plan.members[0].shards)
    assert sum(movement.bytes for movement in to_new) == whole
    assert "symbols to decode rank 0" in {movement.what for movement in moved}


def test_the_expected_time_is_that_of_the_busiest_node() -> None:
    moved = [
        Movement("n1", "n3", 600, ""),
        Movement("n2", "n3", 600, ""),
        Movement("n3", "n1", 900, ""),
        Movement("n4", "n4", 1000, ""),
    ]
    assert expected_s(moved, 100.0) == 12.0
    assert expected_s([], 100.0) == 0.0


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_any_recoverable_loss_is_divided_without_gap(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 5))
    images = st.lists(st.integers(1, 5 * MIB), max_size=2)
    sizes = data.draw(st.lists(images, min_size=size, max_size=size).filter(any))
    plan = plan_of(sizes, data.draw(st.integers(1, size - 1)))
    lost = data.draw(st.sets(st.integers(0, size - 1), max_size=plan.parities))
    found = only([node for index, node in enumerate(all_nodes(plan)) if index not in lost])
    assert found.recoverable
    ranks = [source.rank for source in found.decoded]
    for rank in ranks:
        check_segments(found, rank, data.draw(st.integers(1, 4)))
    moved = movements(found, dict.fromkeys(ranks, "new"))
    delivered = sum(movement.bytes for movement in moved if movement.to_node == "new")
    assert delivered == sum(source.image_bytes for source in found.decoded)
    assert all(0 < movement.bytes for movement in moved)
