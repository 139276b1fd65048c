"""What was committed as one bears one commit id: where it is made, kept and told."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from everstep.agent import events
from everstep.agent.actions import Place
from everstep.agent.attempts import commit_id_of
from everstep.agent.holdings import ShardFact, SnapshotFact
from everstep.agent.keeping import known_of
from everstep.agent.state import Rules, State
from everstep.agent.tables import SnapshotTable
from everstep.proto.ids import SnapshotId

from .small_nodes import JOB, SNAPSHOT, Shards, SmallNode

FIRST, SECOND = b"1" * 16, b"2" * 16


def digest(rank: int, version: int = 0) -> bytes:
    return bytes([rank, version] * 8)


def part(*ranks: int, version: int = 0) -> SnapshotFact:
    shards = tuple(ShardFact(rank, "layout", 1, digest(rank, version), b"") for rank in ranks)
    return SnapshotFact(SNAPSHOT, 3, "sealed", shards)


def test_the_coordinator_orders_the_id_that_recovery_adds_up() -> None:
    table = SnapshotTable(3)
    table.add("n1", part(0, 1))
    table.add("n2", part(2))
    whole = table.commit_id
    assert whole == commit_id_of({rank: digest(rank) for rank in range(3)})
    assert whole != commit_id_of({rank: digest(rank, rank == 1) for rank in range(3)})
    table.add("n3", part(1))
    assert table.commit_id == whole
    table.remove("n1")
    table.add("n1", part(0))
    assert table.commit_id == whole


def test_what_is_not_known_of_all_ranks_is_ordered_without_an_id() -> None:
    table = SnapshotTable(3)
    table.add("n1", part(0, 1))
    assert table.commit_id == b""
    table.add("n3", part(1, version=1))  # as many records as ranks, but not of all
    assert table.commit_id == b""
    table.remove("n3")
    table.add("n2", part(2))
    table.add("n3", part(2, version=1))  # another run's: which is of the commit?
    assert table.commit_id == b""
    table.remove("n2")
    table.remove("n3")
    table.add("n2", part(2))
    assert table.commit_id == commit_id_of({rank: digest(rank) for rank in range(3)})


def installed(state: State, rank: int, commit_id: bytes) -> bytes:
    """The commit id of the snapshot once a shard was installed in it."""
    shard = events.AdoptedShard(
        SNAPSHOT, rank, 3, Place(1, 0), "layout", 1, b"", 0.0, b"e", digest(rank), commit_id
    )
    state.handle(events.Installed(JOB, events.ArenaReserved(JOB, rank, 1, 4096, 2), shard), 0.0)
    return state.jobs[JOB].snapshots[SNAPSHOT].commit_id


def test_an_installed_shard_does_not_lend_its_commit_id_to_others() -> None:
    state = State(Rules(clustered=True, node_id="n1", nvme=False), lambda known: [])
    assert installed(state, 0, FIRST) == FIRST
    assert installed(state, 1, FIRST) == FIRST
    assert installed(state, 2, SECOND) == b""
    assert installed(state, 1, SECOND) == b""
    # Of a single shard that is replaced nothing is left.
    alone = State(Rules(clustered=True, node_id="n1", nvme=False), lambda known: [])
    installed(alone, 0, FIRST)
    assert installed(alone, 0, SECOND) == SECOND


def test_an_order_without_an_id_takes_none_away() -> None:
    state = State(Rules(clustered=True, node_id="n1", nvme=False), lambda known: [])
    installed(state, 0, FIRST)
    for commit_id, then in ((b"", FIRST), (SECOND, SECOND)):
        state.handle(events.CommitOrdered(JOB, SNAPSHOT, commit_id), 0.0)
        assert state.jobs[JOB].snapshots[SNAPSHOT].commit_id == then


def on_a_node(root: Path, body: Callable[[SmallNode], None]) -> None:
    async def run() -> None:
        node = SmallNode("n1", root)
        try:
            body(node)
        finally:
            await node.close()

    asyncio.run(run())


def test_memory_and_disk_tell_each_the_commit_id_that_it_has(tmp_path: Path) -> None:
    def body(node: SmallNode) -> None:
        sizes = {"n1": {0: 100, 1: 50}}
        node.hold(Shards(sizes, commit_id=FIRST))
        node.hold_on_disk(Shards(sizes, commit_id=SECOND))
        node.hold(Shards(sizes, SnapshotId(2, 41)), slot=1)
        known = known_of(node.state.jobs[JOB])
        found = {one.snapshot: one for one in node.serving.keeping.inventory(JOB, known).snapshots}
        told = {(s.rank, s.level): s.commit_id for s in found[SNAPSHOT].shards}
        assert told == {
            (0, "memory"): FIRST,
            (1, "memory"): FIRST,
            (0, "nvme"): SECOND,
            (1, "nvme"): SECOND,
        }
        assert {s.commit_id for s in found[SnapshotId(2, 41)].shards} == {b""}

    on_a_node(tmp_path, body)
