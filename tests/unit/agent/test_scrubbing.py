"""The scrub: everything that stays is looked at in turn, and what has rotted is mended or told."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.agent.actions import Encode
from everstep.agent.inventory import parsed
from everstep.agent.job import RoundStage, Stage
from everstep.agent.repairing import Image, Repairing, bad_units, runs
from everstep.agent.scrubbing import Course, Item, Looked, Scrubbing, held_items
from everstep.kernels.digest import digest_units
from everstep.proto import peer_pb2 as wire
from everstep.proto.errors import PeerUnavailable
from everstep.proto.ids import UNIT_BYTES, SnapshotId

from .several_nodes import JOB, PLAN, SNAPSHOT, UNEQUAL, Group, group_of

DEADLINE_S = 30.0
Body = Callable[[Group, Scrubbing], Coroutine[Any, Any, None]]


def item(number: int, job: str = JOB) -> Item:
    return Item(job, "memory", SnapshotId(1, number), 0)


def test_items_are_looked_at_in_turn() -> None:
    course = Course(settled_s=10, rest_s=100)
    held = [item(1), item(2), item(3)]
    assert course.next(held, 0) is None
    assert course.next(held, 9.9) is None
    seen = []
    for now_s in (10, 11, 12):
        found = course.next(held, now_s)
        assert found is not None
        seen.append(found)
        course.looked_at(found, now_s)
    assert seen == held
    assert course.next(held, 50) is None
    assert course.next(held, 110) == item(1)


def test_what_comes_new_waits_its_turn_and_what_is_gone_is_forgotten() -> None:
    course = Course(settled_s=10, rest_s=100)
    course.next([item(1), item(2)], 0)
    assert course.next([item(1), item(2), item(3)], 10) == item(1)
    course.looked_at(item(1), 10)
    assert course.next([item(2), item(3)], 15) == item(2)
    course.looked_at(item(2), 15)
    assert course.next([item(2), item(3)], 19) is None
    assert course.next([item(2), item(3)], 20) == item(3)
    # It comes back: as something new.
    assert course.next([item(1)], 200) is None
    assert course.next([item(1)], 210) == item(1)


def test_what_is_not_mended_yet_is_looked_at_soon() -> None:
    course = Course(settled_s=10, rest_s=100)
    course.next([item(1)], 0)
    course.looked_at(item(1), 10, again=True)
    assert course.next([item(1)], 20) == item(1)


@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=60))
def test_nothing_that_stays_waits_for_ever(arrivals: list[set[int]]) -> None:
    """Whatever else comes and goes, an item that is held is looked at in its turn."""
    course = Course(settled_s=0, rest_s=0.5)
    looks = 0
    for turn, others in enumerate(arrivals):
        held = [item(99), *(item(number) for number in others)]
        found = course.next(held, turn)
        assert found in held
        course.looked_at(found, turn)
        looks += found == item(99)
    assert looks >= len(arrivals) // 7


def run(
    root: Path, parities: int, body: Body, *, at: str = "n3", alone: bool = False, **how: Any
) -> None:
    async def whole() -> None:
        async with group_of(root, parities, **how) as group:
            node = group.nodes[at]
            repairing = None if alone else Repairing(at, inventories(group), group.fetching[at], 20)
            scrubbing = Scrubbing(node.pipeline, repairing, course=Course(0, 1000))
            try:
                await body(group, scrubbing)
            finally:
                scrubbing.close()
                if repairing is not None:
                    repairing.close()

    asyncio.run(whole())


def inventories(group: Group) -> Any:
    async def ask(job: str) -> Any:
        return [
            parsed(await node.serving.inventory(wire.InventoryRequest(job=job)))
            for name, node in group.nodes.items()
            if name not in group.down
        ]

    return ask


def damage_of(looked: list[Looked]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(one.item.level, one.item.rank): one.bad_units for one in looked if one.bad_units}


def in_memory(group: Group, name: str, rank: int) -> bytes:
    with group.nodes[name].memory.open_shard(JOB, SNAPSHOT, rank) as shard:
        return bytes(shard.image)


def test_what_is_sound_is_left_alone(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        looked = await scrubbing.verify_and_repair(JOB)
        assert {(one.item.level, one.item.rank) for one in looked} == {
            ("memory", rank) for rank in (-1, 2, 4, 6)
        }
        assert not any(one.problem or one.bad_units or one.repaired for one in looked)
        counters = group.nodes["n3"].state.jobs[JOB].counters
        parity_bytes = group.plan.rows().parity_file_units(2) * UNIT_BYTES
        images = sum(len(group.shards[rank].image) for rank in (2, 4, 6))
        assert counters["scrubbed_bytes"] == images + parity_bytes
        assert sum(one.bytes for one in looked) == images + parity_bytes

    run(tmp_path, 1, body)


def test_rot_in_memory_is_decoded_away_and_only_that_is_fetched(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        node = group.nodes["n3"]
        node.overwrite(2, UNIT_BYTES + 5, b"rot")
        node.overwrite(2, 3 * UNIT_BYTES + 1, b"rot")
        fetched: list[Any] = []
        pins: list[int] = []
        fetch = group.fetching["n3"].fetch

        def noting(plan: Any, rank: int, units: Any, *rest: Any, **named: Any) -> None:
            fetched.append((rank, units))
            pins.append(node.state.jobs[JOB].snapshots[SNAPSHOT].pins)
            fetch(plan, rank, units, *rest, **named)

        group.fetching["n3"].fetch = noting  # type: ignore[method-assign]
        looked = await scrubbing.verify_and_repair(JOB)
        assert damage_of(looked) == {("memory", 2): (1, 3)}
        assert [one.repaired for one in looked if one.bad_units] == [True]
        assert fetched == [(2, [range(1, 2), range(3, 4)])]
        assert pins == [1]
        assert in_memory(group, "n3", 2) == group.shards[2].image
        job = node.state.jobs[JOB]
        assert job.counters["scrub_repaired"] == 2
        assert job.snapshots[SNAPSHOT].stage is Stage.COMMITTED
        assert job.snapshots[SNAPSHOT].pins == 0

    run(tmp_path, 1, body)


def test_rot_on_disk_is_mended_from_memory_in_place(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        group.hold_on_disk("n3")
        node = group.nodes["n3"]
        node.state.jobs[JOB].flushed[SNAPSHOT] = (group.world, (2, 4, 6))
        with node.nvme.open_shard(JOB, SNAPSHOT, 2) as shard:
            path = shard.path
        with path.open("r+b") as file:
            file.seek(2 * UNIT_BYTES)
            file.write(b"rot")
        assert node.nvme.verify(JOB, SNAPSHOT, 2) == [2]
        looked = await scrubbing.verify_and_repair(JOB, levels=("nvme",))
        assert damage_of(looked) == {("nvme", 2): (2,)}
        assert node.nvme.verify(JOB, SNAPSHOT, 2) == []
        assert path.read_bytes() == group.shards[2].image

    run(tmp_path, 1, body)


def test_without_peers_damage_is_reported(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        node = group.nodes["n3"]
        node.overwrite(4, 5, b"rot")
        looked = await scrubbing.verify_and_repair(JOB)
        (found,) = [one for one in looked if one.problem]
        assert found.item.rank == 4 and found.bad_units == (0,)
        job = node.state.jobs[JOB]
        assert job.snapshots[SNAPSHOT].stage is Stage.DROPPED
        assert SNAPSHOT in job.damaged

    run(tmp_path, 1, body, alone=True)


def test_rot_that_nobody_can_mend_is_reported(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        node = group.nodes["n3"]
        node.overwrite(2, 5, b"rot")
        group.down |= {"n1", "n2"}
        (found,) = [one for one in await scrubbing.verify_and_repair(JOB) if one.problem]
        assert found.item.rank == 2
        assert SNAPSHOT in node.state.jobs[JOB].damaged

    run(tmp_path, 1, body)


def test_a_peer_that_does_not_answer_costs_no_snapshot(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        node = group.nodes["n3"]
        node.overwrite(2, 5, b"rot")

        async def silent(name: str, request: Any) -> Any:
            raise PeerUnavailable(name, "test")

        group.calls["n3"].handlers["Rebuild"] = silent
        (found,) = [one for one in await scrubbing.verify_and_repair(JOB) if one.problem]
        assert found.again and not found.repaired
        job = node.state.jobs[JOB]
        assert job.snapshots[SNAPSHOT].stage is Stage.COMMITTED
        assert not job.damaged and job.snapshots[SNAPSHOT].pins == 0

    run(tmp_path, 1, body)


def test_rotten_parity_is_encoded_anew(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        node = group.nodes["n3"]
        encodes: list[Any] = []
        node.pipeline._performers[Encode] = encodes.append
        with node.parity.open(JOB, PLAN) as held:
            path = held.path
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"rotten")
        (found,) = [one for one in await scrubbing.verify_and_repair(JOB) if one.problem]
        assert found.item.rank == -1 and found.again
        assert [action.plan.plan_id for action in encodes] == [PLAN]
        assert node.state.jobs[JOB].rounds[PLAN].stage is RoundStage.MENDING

    run(tmp_path, 1, body)


def test_rotten_parity_on_disk_is_stored_again(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        node = group.nodes["n3"]
        group.hold_on_disk("n3")
        with node.parity.open(JOB, PLAN) as held:
            node.nvme.parity.store(JOB, SNAPSHOT, held.image, held.record)
        node.state.jobs[JOB].rounds[PLAN].on_nvme = True
        with node.nvme.parity.open(JOB, PLAN) as held:
            path = held.path
        with path.open("r+b") as file:
            file.write(b"rotten")
        assert node.nvme.parity.verify(JOB, PLAN)
        looked = await scrubbing.verify_and_repair(JOB, levels=("nvme",))
        assert [one.repaired for one in looked if one.item.rank < 0] == [True]
        assert not node.nvme.parity.verify(JOB, PLAN)

    run(tmp_path, 1, body)


def test_a_slot_that_changes_hands_meanwhile_is_no_damage(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        node = group.nodes["n3"]
        job = node.state.jobs[JOB]
        node.overwrite(2, 5, b"another snapshot's")
        located = scrubbing._located

        def overtaken(one: Item) -> Any:
            found = located(one)
            job.snapshots.pop(SNAPSHOT, None)
            return found

        scrubbing._located = overtaken  # type: ignore[method-assign]
        looked = await scrubbing.verify_and_repair(JOB)
        assert not any(one.problem or one.bad_units for one in looked)
        assert not job.damaged

    run(tmp_path, 1, body)


async def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


def test_it_goes_on_by_itself_at_its_rate(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        node = group.nodes["n3"]
        node.overwrite(6, 5, b"rot")
        begun_s = time.monotonic()
        task = asyncio.create_task(scrubbing.run())
        counters = node.state.jobs[JOB].counters
        await eventually(lambda: counters.get("scrub_repaired"), "the rot was not found")
        everything = sum(one.bytes for one in await scrubbing.verify_and_repair(JOB))
        counters.clear()
        assert in_memory(group, "n3", 6) == group.shards[6].image
        # Two units of it were looked at twice; four may pass at once.
        least_s = (2 * UNIT_BYTES) / (4 * UNIT_BYTES)
        assert everything > 6 * UNIT_BYTES and time.monotonic() - begun_s > least_s
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    run(tmp_path, 1, body, parity__scrub_bytes_s="4 MiB")


def test_switched_off_it_does_nothing(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        await asyncio.wait_for(scrubbing.run(), 5)

    run(tmp_path, 1, body, parity__scrub_bytes_s=0)


def test_only_what_is_held_is_listed(tmp_path: Path) -> None:
    async def body(group: Group, scrubbing: Scrubbing) -> None:
        node = group.nodes["n3"]
        job = node.state.jobs[JOB]
        assert len(list(held_items(node.pipeline))) == len(UNEQUAL["n3"]) + 1
        job.snapshots[SNAPSHOT].verified = False
        job.rounds[PLAN].stage = RoundStage.ENCODING
        assert list(held_items(node.pipeline)) == []

    run(tmp_path, 1, body)


@pytest.mark.parametrize("size", [0, 1, UNIT_BYTES, 2 * UNIT_BYTES + 5])
def test_units_are_compared_to_their_end(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    path = tmp_path / "file"
    path.write_bytes(b"lead" + data[:size])
    digests = digest_units(data[:size], UNIT_BYTES) if size else b""
    image = Image(path, 4, size, digests)
    with path.open("rb") as file:
        assert bad_units(file.fileno(), image, range(image.units)) == []
    path.write_bytes(b"lead" + data[: size - 1])
    with path.open("rb") as file:
        assert bad_units(file.fileno(), image, range(image.units)) == [image.units - 1][:size]


def test_units_as_ranges() -> None:
    assert runs([]) == []
    assert runs([3]) == [range(3, 4)]
    assert runs([0, 1, 2, 5, 7, 8]) == [range(3), range(5, 6), range(7, 9)]
