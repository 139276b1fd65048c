"""What a rank that joins live takes from other nodes passes their bucket, held or decoded."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from everstep.agent.executing import Executing
from everstep.agent.fetching import Fetching
from everstep.agent.rates import Rate, join_rate
from everstep.proto.ids import UNIT_BYTES

from .several_nodes import JOB, Group, group_of

MIB = 1 << 20


class Counted(Rate):
    """A bucket without a limit that counts what passes."""

    def __init__(self) -> None:
        super().__init__(None)
        self.passed_bytes = 0

    def take(
        self,
        count_bytes: int,
        deadline_s: float | None = None,
        cancelled: threading.Event | None = None,
    ) -> bool:
        self.passed_bytes += count_bytes
        return super().take(count_bytes, deadline_s, cancelled)


def metered(group: Group) -> dict[str, Counted]:
    """Give every node a bucket for ranks that join."""
    buckets = {name: Counted() for name in group.nodes}
    for name, node in group.nodes.items():
        node.serving._join_rate = buckets[name]
        group.executing[name].close()
        group.executing[name] = Executing(
            group.calls[name],
            group.stores(node),
            node.bulk,
            node.config.bulk,
            join_rate=buckets[name],
        )
    return buckets


async def taken(
    root: Path, lost: Sequence[str], rank: int, *, joining: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """By node, what passed its bucket and what it sent, when a spare node is given a shard."""
    async with group_of(root, 1, spare=["spare"]) as group:
        buckets = metered(group)
        plan = await group.plan_of(lost)
        node = group.nodes["spare"]
        fetching = Fetching(group.calls["spare"], node.config.bulk, joining=joining)
        image = memoryview(bytearray(len(group.shards[rank].image)))

        def fetch() -> None:
            until_s = time.monotonic() + 30.0
            record = fetching.records(JOB, plan, [rank], until_s)[rank].record
            fetching.fetch(
                plan,
                rank,
                None,
                lambda unit: image[unit * UNIT_BYTES : (unit + 1) * UNIT_BYTES],
                record,
                deadline_s=until_s,
            )

        await asyncio.to_thread(fetch)
        assert image == group.shards[rank].image
        return (
            {name: bucket.passed_bytes for name, bucket in buckets.items()},
            {name: node.bulk.counters.get("bytes_sent", 0) for name, node in group.nodes.items()},
        )


@pytest.mark.parametrize("lost", [(), ("n3",)], ids=["held", "decoded"])
def test_all_that_is_sent_to_a_rank_that_joins_passes_the_bucket(
    tmp_path: Path, lost: tuple[str, ...]
) -> None:
    passed, sent = asyncio.run(taken(tmp_path, lost, 2, joining=True))
    assert passed == sent
    holders = {name for name, amount in passed.items() if amount}
    # What is decoded is sent by those who decode, and its symbols were sent to them.
    assert holders == {"n3"} if not lost else len(holders) > 1


@pytest.mark.parametrize("lost", [(), ("n3",)], ids=["held", "decoded"])
def test_no_other_restore_is_slowed(tmp_path: Path, lost: tuple[str, ...]) -> None:
    passed, sent = asyncio.run(taken(tmp_path, lost, 2, joining=False))
    assert sum(sent.values()) >= 3 * UNIT_BYTES
    assert set(passed.values()) == {0}


@pytest.mark.parametrize(
    ("bytes_s", "burst_bytes"), [(2 * MIB, MIB // 4), (1, 1), (1 << 40, 4 * MIB)]
)
def test_a_join_takes_at_least_its_bytes_by_the_rate(bytes_s: int, burst_bytes: int) -> None:
    rate = join_rate(bytes_s)
    assert rate is not None
    chunks, now_s = 64, 1000.0
    for _ in range(chunks):
        wait_s = rate.reserve(burst_bytes, now_s)
        now_s += wait_s
    assert now_s - 1000.0 == pytest.approx((chunks - 1) * burst_bytes / bytes_s, rel=1e-3)


def test_without_a_limit_there_is_no_bucket() -> None:
    assert join_rate(0) is None
