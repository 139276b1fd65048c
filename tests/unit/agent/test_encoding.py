"""Parity of real nodes in one process, compared with the plain sum of what the nodes hold."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from everstep.agent import actions, contributions, encoding, events
from everstep.agent.encoding import Encoding
from everstep.agent.job import Job, Round, RoundStage
from everstep.agent.plans import ParityPlan
from everstep.agent.sending import BufferPiece, Source
from everstep.kernels.digest import digest_units
from everstep.kernels.gf256 import INVERSES, PRODUCTS
from everstep.proto import peer_pb2
from everstep.proto.errors import PeerUnavailable, Refused
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.proto.state_pb2 import ParityManifest
from everstep.snapshot.record import open_record, seal_record

from .small_nodes import (
    JOB,
    LAYOUT,
    LAYOUT_ID,
    SNAPSHOT,
    STALL_TIMEOUT_S,
    InProcess,
    Shards,
    SmallNode,
    record_of,
    small_nodes,
)

DEADLINE_S = 30.0
UNIT = UNIT_BYTES


async def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.005)


def stream_of(plan: ParityPlan, member: int, shards: Shards) -> bytes:
    return b"".join(
        shards.images[s.rank] + bytes(-s.image_bytes % UNIT) for s in plan.members[member].shards
    )


def parity_of(plan: ParityPlan, member: int, shards: Shards) -> bytes:
    """A member's parity as the design says, symbol by symbol."""
    rows = plan.rows()
    chunk, k = rows.chunk_units, rows.data_symbols
    found = b""
    for row, parity in rows.rows_of(member):
        total = numpy.zeros(chunk * UNIT, dtype=numpy.uint8)
        contributing = [m for m in range(rows.members) if (m - row) % rows.members >= plan.parities]
        for symbol, m in enumerate(contributing):
            first = (row - m - 1) % rows.members * chunk * UNIT
            data = stream_of(plan, m, shards)[first : first + chunk * UNIT]
            padded = numpy.frombuffer(data + bytes(chunk * UNIT - len(data)), dtype=numpy.uint8)
            total ^= PRODUCTS[INVERSES[(k + parity) ^ symbol], padded]
        found += total.tobytes()[: rows.parity_units(row) * UNIT]
    return found


class Group:
    """Nodes with an encoding each, all of one plan."""

    def __init__(self, nodes: Mapping[str, SmallNode], shards: Shards, parities: int) -> None:
        self.nodes = nodes
        self.shards = shards
        self.plan = shards.plan(parities)
        self.calls = {node_id: InProcess(node_id, nodes) for node_id in nodes}
        self.encodings: dict[str, Encoding] = {}
        self.answers: dict[str, list[events.Encoded]] = {node_id: [] for node_id in nodes}
        for node_id, node in nodes.items():
            made = Encoding(pipeline=node.pipeline, parity=node.parity, calls=self.calls[node_id])
            self.encodings[node_id] = made
            node.pipeline._performers.update(made.performers())
            node.hold(shards)
            self._listen(node)

    def _listen(self, node: SmallNode) -> None:
        submit = node.pipeline.submit

        def listening(event: events.Event) -> Any:
            if isinstance(event, events.Encoded):
                self.answers[node.node_id].append(event)
            return submit(event)

        node.pipeline.submit = listening  # type: ignore[method-assign]

    def encode(self, *node_ids: str) -> None:
        for node_id in node_ids or self.nodes:
            node = self.nodes[node_id]
            job = node.state.jobs.setdefault(JOB, Job(JOB, self.shards.world, 2))
            job.rounds[self.plan.plan_id] = Round(self.plan)
            self.perform(node_id, actions.Encode(self.plan))

    def perform(self, node_id: str, action: actions.Action) -> None:
        self.nodes[node_id].pipeline._performers[type(action)](action)

    async def answer(self, node_id: str) -> str:
        await eventually(lambda: self.answers[node_id], f"{node_id} never answers")
        assert len(self.answers[node_id]) == 1
        answer = self.answers[node_id][0]
        assert (answer.job, answer.plan_id) == (JOB, self.plan.plan_id)
        return answer.problem

    def published(self, node_id: str) -> tuple[bytes, ParityManifest] | None:
        store = self.nodes[node_id].parity
        if not store.manifests(JOB):
            return None
        with store.open(JOB, self.plan.plan_id) as image:
            return bytes(image.image), image.manifest

    async def close(self) -> None:
        for made in self.encodings.values():
            await made.close()


def run(
    root: Path,
    sizes: Mapping[str, Mapping[int, int]],
    parities: int,
    body: Callable[[Group], Coroutine[Any, Any, None]],
    **overrides: Any,
) -> None:
    async def whole() -> None:
        async with small_nodes(root, list(sizes), **overrides) as nodes:
            group = Group(nodes, Shards(sizes), parities)
            try:
                await body(group)
            finally:
                await group.close()

    asyncio.run(whole())


def one_each(*sizes: int) -> dict[str, dict[int, int]]:
    return {f"n{rank + 1}": {rank: size} for rank, size in enumerate(sizes)}


FOUR = one_each(3 * UNIT, 2 * UNIT + 1, 4 * UNIT + 77, 3 * UNIT - 5)
SEVERAL_RANKS = {
    "n1": {0: UNIT + 5, 4: 2 * UNIT, 5: 9},
    "n2": {1: 3 * UNIT + 1, 6: 0},
    "n3": {2: 12, 3: 2 * UNIT - 1},
}


@pytest.mark.parametrize(
    ("sizes", "parities"),
    [
        (one_each(2 * UNIT, 2 * UNIT, 2 * UNIT), 1),
        (FOUR, 1),
        (FOUR, 2),
        (FOUR, 3),
        (SEVERAL_RANKS, 1),
        (SEVERAL_RANKS, 2),
        (one_each(UNIT, UNIT + 1, UNIT - 1, 1), 1),
        ({"n1": {0: 3 * UNIT + 9}, "n2": {}, "n3": {1: UNIT}, "n4": {}}, 2),
        ({"n1": {}, "n2": {0: 100}}, 1),
        ({"n1": {}, "n2": {}, "n3": {}}, 1),
        (one_each(0, 0, 5), 1),
    ],
)
def test_parity_is_the_sum_that_the_design_says(
    tmp_path: Path, sizes: Mapping[str, Mapping[int, int]], parities: int
) -> None:
    async def body(group: Group) -> None:
        group.encode()
        rows = group.plan.rows()
        for member, node_id in enumerate(group.nodes):
            assert await group.answer(node_id) == ""
            published = group.published(node_id)
            assert published is not None
            data, manifest = published
            assert data == parity_of(group.plan, member, group.shards)
            assert manifest.plan == group.plan.encoded()
            assert manifest.member == member
            assert manifest.unit_digests == (digest_units(data, UNIT) if data else b"")
            assert {s.rank: s.record for s in manifest.records} == group.shards.records
            assert abs(manifest.encoded_unix_s - time.time()) < DEADLINE_S
            node = group.nodes[node_id]
            assert node.parity.verify(JOB, group.plan.plan_id) == []
            if group.shards.records:
                assert node.memory.layout(JOB, LAYOUT_ID) == LAYOUT
            assert node.state.jobs[JOB].rounds[group.plan.plan_id].stage is RoundStage.PREPARED
            counters = group.encodings[node_id].counters
            assert counters["bytes_received"] <= rows.received_units(member) * UNIT
            assert counters["published"] == 1
        sent = sum(node.bulk.counters["bytes_sent"] for node in group.nodes.values())
        total = sum(len(image) for image in group.shards.images.values())
        received = sum(made.counters["bytes_received"] for made in group.encodings.values())
        assert received == sent == parities * total

    run(tmp_path, sizes, parities, body)


def test_a_round_after_a_round_with_what_the_file_held_before(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        room = group.nodes["n1"].parity.reserve(JOB, "older", 8 * UNIT)
        room.view[:] = os.urandom(8 * UNIT)
        room.close()
        group.encode("n1")
        assert await group.answer("n1") == ""
        published = group.published("n1")
        assert published is not None
        assert published[0] == parity_of(group.plan, 0, group.shards)
        assert len(list((tmp_path / "n1" / "memory").rglob("*.parity"))) == 1

    run(tmp_path, one_each(UNIT, 3, 2 * UNIT + 9), 1, body)


async def nothing_is_published(group: Group, node_id: str) -> None:
    assert group.published(node_id) is None
    store = group.nodes[node_id].parity
    # What was reserved is free again, and is not held by anybody's view of it.
    files = len(list((group.nodes[node_id].memory.root / JOB / "parity").glob("*.parity")))
    with store.reserve(JOB, "next", UNIT):
        pass
    after = list((group.nodes[node_id].memory.root / JOB / "parity").glob("*.parity"))
    assert len(after) == max(files, 1)


def overwritten(group: Group) -> None:
    group.nodes["n3"].overwrite(2, 2 * UNIT + 17, b"rotten")  # n1 encodes units 2 and 3 of it


def gone(group: Group) -> None:
    state = group.nodes["n3"].state
    state.drop(state.jobs[JOB], state.jobs[JOB].snapshots[SNAPSHOT], "on purpose")


def stopped(group: Group) -> None:
    group.nodes["n3"].bulk.close()


def unreachable(group: Group) -> None:
    async def describe(node_id: str, request: Any) -> Any:
        if node_id == "n3":
            raise PeerUnavailable("n3", "it is gone")
        return await group.nodes[node_id].serving.describe(request)

    group.calls["n1"].handlers["Describe"] = describe


def silent(group: Group) -> None:
    async def describe(node_id: str, request: Any) -> Any:
        if node_id == "n3":
            await asyncio.sleep(DEADLINE_S)
        return await group.nodes[node_id].serving.describe(request)

    group.calls["n1"].handlers["Describe"] = describe


def another_record(group: Group) -> None:
    shards = group.shards
    image = os.urandom(len(shards.images[2]))
    _describing(group, 2, record_of(2, image, shards.world), LAYOUT)


def another_capture(group: Group) -> None:
    record = open_record(group.shards.records[2], "")
    record.captured_unix_s += 1
    _describing(group, 2, seal_record(record), LAYOUT)


def another_layout(group: Group) -> None:
    _describing(group, 2, group.shards.records[2], LAYOUT[:-1] + b"x")


def no_layout(group: Group) -> None:
    _describing(group, 2, group.shards.records[2], b"")


def rubbish(group: Group) -> None:
    _describing(group, 2, b"rubbish", LAYOUT)


def _describing(group: Group, rank: int, record: bytes, layout: bytes) -> None:
    async def describe(node_id: str, request: Any) -> Any:
        reply = await group.nodes[node_id].serving.describe(request)
        for shard in reply.shards:
            if shard.rank == rank:
                shard.record, shard.layout = record, layout
        return reply

    group.calls["n1"].handlers["Describe"] = describe


@pytest.mark.parametrize(
    "damage",
    [
        overwritten,
        gone,
        stopped,
        unreachable,
        silent,
        another_record,
        another_capture,
        another_layout,
        no_layout,
        rubbish,
    ],
)
def test_a_member_that_does_not_do_its_part_is_named(
    tmp_path: Path, damage: Callable[[Group], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions, "RETRIES", 2)

    async def body(group: Group) -> None:
        damage(group)
        group.encode("n1")
        problem = await group.answer("n1")
        assert "n3" in problem
        assert "unexpectedly" not in problem
        await nothing_is_published(group, "n1")
        assert group.encodings["n1"].counters["failed"] == 1
        assert group.nodes["n1"].state.jobs[JOB].rounds["plan-1"].stage is RoundStage.FAILED

    run(tmp_path, FOUR, 1, body)


def feed(units: Sequence[tuple[int, bytes, bytes]]) -> Source:
    return Source([BufferPiece(i, memoryview(d), digest) for i, d, digest in units], lambda: None)


def test_a_member_that_lies_about_a_digest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions, "RETRIES", 2)

    async def body(group: Group) -> None:
        async def lie(node_id: str, request: peer_pb2.OpenRequest) -> peer_pb2.Ticket:
            if node_id != "n3":
                return await group.nodes[node_id].serving.open(request)
            units = []
            for asked in request.shard.units:
                for unit in range(asked.first, asked.first + asked.count):
                    length = min(UNIT, len(group.shards.images[2]) - unit * UNIT)
                    data = bytes(length)
                    units.append((unit, data, digest_units(data, UNIT)))
            ticket = group.nodes["n3"].bulk.issue(feed(units))
            return peer_pb2.Ticket(
                token=ticket.token,
                address=ticket.address,
                units=ticket.units,
                bytes=ticket.bytes,
            )

        group.calls["n1"].handlers["Open"] = lie
        group.encode("n1")
        assert "n3" in await group.answer("n1")
        await nothing_is_published(group, "n1")

    run(tmp_path, FOUR, 1, body)


def test_when_a_stream_fails_the_others_stop(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        async def open_late(node_id: str, request: peer_pb2.OpenRequest) -> peer_pb2.Ticket:
            if node_id == "n3":
                raise Refused("on purpose")
            (running,) = group.encodings["n1"]._running.values()
            await asyncio.to_thread(running.halt.wait, STALL_TIMEOUT_S / 2)
            return await group.nodes[node_id].serving.open(request)

        group.calls["n1"].handlers["Open"] = open_late
        group.encode("n1")
        assert (await group.answer("n1")).startswith("n3: on purpose")
        assert group.encodings["n1"].counters["bytes_received"] == 0

    run(tmp_path, FOUR, 1, body)


def test_a_stream_that_breaks_is_resumed_from_the_first_missing_unit(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        asked: list[tuple[int, int]] = []

        async def break_once(node_id: str, request: peer_pb2.OpenRequest) -> peer_pb2.Ticket:
            serving = group.nodes[node_id].serving
            if node_id != "n3":
                return await serving.open(request)
            units = request.shard.units[0]
            asked.append((units.first, units.count))
            if len(asked) > 1:
                return await serving.open(request)
            record = open_record(group.shards.records[2], "")
            image = group.shards.images[2]
            good = image[units.first * UNIT :][:UNIT]
            digest = record.unit_digests[units.first * 16 :][:16]
            following = units.first + 1
            broken = (following, bytes(UNIT), record.unit_digests[following * 16 :][:16])
            source = feed([(units.first, good, digest), broken])
            ticket = group.nodes["n3"].bulk.issue(source)
            count_bytes = min(units.count * UNIT, len(image) - units.first * UNIT)
            return peer_pb2.Ticket(
                token=ticket.token, address=ticket.address, units=units.count, bytes=count_bytes
            )

        group.calls["n1"].handlers["Open"] = break_once
        group.encode("n1")
        assert await group.answer("n1") == ""
        assert asked[0][1] >= 2
        assert asked[1] == (asked[0][0] + 1, asked[0][1] - 1)
        published = group.published("n1")
        assert published is not None
        assert published[0] == parity_of(group.plan, 0, group.shards)

    run(tmp_path, one_each(UNIT, 2 * UNIT, 5 * UNIT + 9), 1, body)


def held_at_unit(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    reached, go = threading.Event(), threading.Event()

    def failpoint(name: str) -> None:
        if name == "agent.encode.unit":
            reached.set()
            assert go.wait(DEADLINE_S)

    monkeypatch.setattr(contributions, "failpoint", failpoint)
    return reached, go


def test_what_is_stopped_leaves_nothing_behind_and_is_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go = held_at_unit(monkeypatch)

    async def body(group: Group) -> None:
        group.encode("n1")
        await eventually(reached.is_set, "it never encodes")
        job = group.nodes["n1"].state.jobs[JOB]
        ended = events.RoundEnded(JOB, group.plan.plan_id, commit=False, reason="on purpose")
        group.nodes["n1"].pipeline.submit(ended)
        assert not job.rounds
        go.set()
        made = group.encodings["n1"]
        await eventually(lambda: made.counters["stopped"], "it goes on")
        assert await group.nodes["n1"].pipeline.idle(DEADLINE_S)
        assert group.answers["n1"] == []
        # The one that was held adds no other unit; the other two may have been through.
        assert made.counters["bytes_received"] <= (1 + 2 * 9) * UNIT
        await nothing_is_published(group, "n1")

    run(tmp_path, one_each(UNIT, 27 * UNIT, 27 * UNIT, 27 * UNIT), 1, body)


def test_what_is_stopped_while_it_asks_ends_at_once(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        asked = asyncio.Event()

        async def describe(node_id: str, request: Any) -> Any:
            asked.set()
            await asyncio.Event().wait()

        group.calls["n1"].handlers["Describe"] = describe
        group.encode("n1")
        await asked.wait()
        begun_s = time.monotonic()
        group.perform("n1", actions.StopEncoding(JOB, group.plan.plan_id))
        made = group.encodings["n1"]
        await eventually(lambda: made.counters["stopped"], "it goes on")
        assert time.monotonic() - begun_s < STALL_TIMEOUT_S / 2
        assert group.answers["n1"] == []

    run(tmp_path, FOUR, 1, body)


def test_what_is_stopped_before_it_began(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        async def describe(node_id: str, request: Any) -> Any:
            raise AssertionError("nobody need be asked")

        group.calls["n1"].handlers["Describe"] = describe
        group.encode("n1")
        group.perform("n1", actions.StopEncoding(JOB, group.plan.plan_id))
        group.perform("n1", actions.DeleteParity(JOB, group.plan.plan_id))
        assert await group.nodes["n1"].pipeline.idle(DEADLINE_S)
        assert group.answers["n1"] == []
        assert group.encodings["n1"].counters["stopped"] == 1
        await nothing_is_published(group, "n1")

    run(tmp_path, FOUR, 1, body)


def test_parity_is_deleted_only_after_its_encoding_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about_to, go = threading.Event(), threading.Event()

    def failpoint(name: str) -> None:
        if name == "agent.encode.before_publish":
            about_to.set()
            assert go.wait(DEADLINE_S)

    monkeypatch.setattr(encoding, "failpoint", failpoint)

    async def body(group: Group) -> None:
        group.encode("n1")
        await eventually(about_to.is_set, "it never publishes")
        group.perform("n1", actions.StopEncoding(JOB, group.plan.plan_id))
        group.perform("n1", actions.DeleteParity(JOB, group.plan.plan_id))
        workers = group.nodes["n1"].pipeline.workers
        for _ in range(20):  # so that it could have been deleted by now
            await asyncio.get_running_loop().run_in_executor(workers, os.sched_yield)
        go.set()
        assert await group.nodes["n1"].pipeline.idle(DEADLINE_S)
        assert group.published("n1") is None

    run(tmp_path, FOUR, 1, body)


def test_nothing_is_published_if_it_fails_right_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failpoint(name: str) -> None:
        if name == "agent.encode.before_publish":
            raise OSError(5, "on purpose")

    monkeypatch.setattr(encoding, "failpoint", failpoint)

    async def body(group: Group) -> None:
        group.encode("n1")
        assert "on purpose" in await group.answer("n1")
        await nothing_is_published(group, "n1")

    run(tmp_path, FOUR, 1, body)


def test_a_round_ends_by_its_deadline(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        begun_s = time.monotonic()
        group.encode("n1")
        problem = await group.answer("n1")
        assert problem.startswith("n")
        assert time.monotonic() - begun_s < 1.0 + 2 * STALL_TIMEOUT_S
        await nothing_is_published(group, "n1")

    overrides: dict[str, Any] = {"parity__timeout_s": 1.0, "parity__rate_bytes_s": 1 << 20}
    run(tmp_path, one_each(UNIT, 9 * UNIT, 9 * UNIT), 1, body, **overrides)


def test_the_rate_is_kept(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        begun_s = time.monotonic()
        group.encode("n1")
        assert await group.answer("n1") == ""
        received = group.encodings["n1"].counters["bytes_received"]
        assert received == 8 * UNIT
        # All but the burst.
        assert time.monotonic() - begun_s >= (received - 4 * UNIT) / (8 << 20)

    sizes = one_each(UNIT, 8 * UNIT, 8 * UNIT)
    run(tmp_path, sizes, 1, body, parity__rate_bytes_s=8 << 20)


def test_more_contributions_than_streams(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        group.encode("n1")
        assert await group.answer("n1") == ""
        published = group.published("n1")
        assert published is not None
        assert published[0] == parity_of(group.plan, 0, group.shards)

    run(tmp_path, one_each(*[2 * UNIT + n for n in range(6)]), 2, body, bulk__max_streams=1)


def test_parity_goes_to_nvme_with_the_layouts(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        group.encode("n1")
        assert await group.answer("n1") == ""
        node = group.nodes["n1"]
        group.perform("n1", actions.FlushParity(group.plan))
        assert await node.pipeline.idle(DEADLINE_S)
        assert group.encodings["n1"].counters["stored"] == 1
        assert node.nvme.parity.verify(JOB, group.plan.plan_id) == []
        with node.nvme.parity.open(JOB, group.plan.plan_id) as stored:
            assert bytes(stored.image) == parity_of(group.plan, 0, group.shards)
            published = group.published("n1")
            assert published is not None
            assert stored.manifest == published[1]
        assert node.nvme.layout(JOB, LAYOUT_ID) == LAYOUT

    run(tmp_path, FOUR, 1, body)


def test_parity_that_cannot_be_stored_is_counted(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        group.encode("n1")
        assert await group.answer("n1") == ""
        node = group.nodes["n1"]
        with node.parity.open(JOB, group.plan.plan_id) as image, image.path.open("r+b") as file:
            file.write(b"rotten")
        group.perform("n1", actions.FlushParity(group.plan))
        assert await node.pipeline.idle(DEADLINE_S)
        assert group.encodings["n1"].counters["store_failed"] == 1
        assert node.nvme.parity.manifests(JOB) == []

    run(tmp_path, FOUR, 1, body)


def test_the_same_plan_is_not_encoded_twice_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go = held_at_unit(monkeypatch)

    async def body(group: Group) -> None:
        group.encode("n1")
        await eventually(reached.is_set, "it never encodes")
        assert "already" in await group.encodings["n1"].make(group.plan)
        go.set()
        assert await group.answer("n1") == ""
        assert await group.encodings["n1"].make(group.plan) == ""

    run(tmp_path, FOUR, 1, body)


def test_a_plan_without_this_node_is_refused(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        other = Shards({"n2": {0: 5}, "n3": {1: 5}}, SnapshotId(2, 41)).plan(1)
        assert "does not name this node" in await group.encodings["n1"].make(other)

    run(tmp_path, FOUR, 1, body)
