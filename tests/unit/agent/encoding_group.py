"""Nodes with an encoding each, all of one plan, and the parity that they should have in the end.

What the tests of encoding begin with.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import numpy

from everstep.agent import actions, events
from everstep.agent.encoding import Encoding
from everstep.agent.job import Job, Round
from everstep.agent.plans import ParityPlan
from everstep.kernels.gf256 import INVERSES, PRODUCTS
from everstep.proto.ids import UNIT_BYTES
from everstep.proto.state_pb2 import ParityManifest

from .small_nodes import JOB, InProcess, Shards, SmallNode, small_nodes

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


async def nothing_is_published(group: Group, node_id: str) -> None:
    assert group.published(node_id) is None
    store = group.nodes[node_id].parity
    # What was reserved is free again, and is not held by anybody's view of it.
    files = len(list((group.nodes[node_id].memory.root / JOB / "parity").glob("*.parity")))
    with store.reserve(JOB, "next", UNIT):
        pass
    after = list((group.nodes[node_id].memory.root / JOB / "parity").glob("*.parity"))
    assert len(after) == max(files, 1)
