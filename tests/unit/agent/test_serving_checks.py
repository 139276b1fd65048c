"""What a node says when it is asked to describe or to check what it holds: damage is named."""

import os
from pathlib import Path
from typing import Any

import pytest

from everstep.agent.inventory import MEMORY
from everstep.agent.job import Stage
from everstep.proto import peer_pb2
from everstep.proto.ids import UNIT_BYTES
from everstep.snapshot.record import open_record

from .serving_node import ALONE, GROUP, LEVELS, pins, publish_parity, run
from .small_nodes import JOB, LAYOUT, SNAPSHOT, SmallNode


def describing(*ranks: int) -> peer_pb2.DescribeRequest:
    return peer_pb2.DescribeRequest(
        job=JOB, incarnation=SNAPSHOT.incarnation, step=SNAPSHOT.step, ranks=ranks
    )


@pytest.mark.parametrize("level", LEVELS)
def test_shards_are_described(tmp_path: Path, level: str) -> None:
    async def body(node: SmallNode) -> None:
        (node.hold if level == MEMORY else node.hold_on_disk)(ALONE)
        reply = await node.serving.describe(describing(1, 7))
        assert [(s.rank, s.record, s.layout) for s in reply.shards] == [
            (1, ALONE.records[1], LAYOUT)
        ]
        assert [s.rank for s in (await node.serving.describe(describing())).shards] == [0, 1]

    run(tmp_path, body)


def test_a_manifest_describes_shards_of_others(tmp_path: Path) -> None:
    async def body(node: SmallNode) -> None:
        publish_parity(node, GROUP, 0, bytes(UNIT_BYTES))
        reply = await node.serving.describe(describing(1, 2))
        assert [(s.rank, s.record) for s in reply.shards] == [
            (1, GROUP.records[1]),
            (2, GROUP.records[2]),
        ]
        assert not reply.shards[0].layout
        node.memory.put_layout(JOB, open_record(GROUP.records[1], "").layout_id, LAYOUT)
        reply = await node.serving.describe(describing(1))
        assert reply.shards[0].layout == LAYOUT

    run(tmp_path, body)


def checking(level: str, *ranks: int, parity: bool = False) -> peer_pb2.CheckRequest:
    return peer_pb2.CheckRequest(
        job=JOB,
        incarnation=SNAPSHOT.incarnation,
        step=SNAPSHOT.step,
        ranks=ranks,
        level=level,
        parity=parity,
    )


@pytest.mark.parametrize("level", LEVELS)
def test_damage_is_named_and_changes_nothing(tmp_path: Path, level: str) -> None:
    async def body(node: SmallNode) -> None:
        node.hold(ALONE)
        node.hold_on_disk(ALONE)
        reply = await node.serving.check(checking(level, 0, 1))
        assert not reply.damaged
        if level == MEMORY:
            node.overwrite(0, 2 * UNIT_BYTES + 9, b"rotten")
        else:
            path = next((tmp_path / "n1" / "nvme").rglob("rank-00000.safetensors"))
            with path.open("r+b") as file:
                file.seek(2 * UNIT_BYTES + 9)
                file.write(b"rotten")
        reply = await node.serving.check(checking(level, 0, 1, 5))
        named = [(c.incarnation, c.step, c.rank, c.level) for c in reply.damaged]
        assert named == [(2, 40, 0, level), (2, 40, 5, level)]
        assert "(2)" in reply.damaged[0].reason
        assert node.state.jobs[JOB].snapshots[SNAPSHOT].stage is Stage.COMMITTED
        assert pins(node) == 0

    run(tmp_path, body)


@pytest.mark.parametrize("level", LEVELS)
def test_parity_is_checked(tmp_path: Path, level: str) -> None:
    async def body(node: SmallNode) -> None:
        data = os.urandom(GROUP.plan(1).rows().parity_file_units(0) * UNIT_BYTES)
        reply = await node.serving.check(checking(level, parity=True))
        assert "there is no parity" in reply.parity_problem
        envelope = publish_parity(node, GROUP, 0, data)
        node.nvme.parity.store(JOB, SNAPSHOT, memoryview(data), envelope)
        reply = await node.serving.check(checking(level, parity=True))
        assert reply.parity_problem == ""
        store: Any = node.parity if level == MEMORY else node.nvme.parity
        with store.open(JOB, "plan-1") as image, image.path.open("r+b") as file:
            file.seek(UNIT_BYTES + 1)
            file.write(b"rotten")
        reply = await node.serving.check(checking(level, parity=True))
        assert "(1)" in reply.parity_problem

    run(tmp_path, body)
