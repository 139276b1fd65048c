"""On which node each rank's shard shall be in memory again.

Owns the choice, as a pure function of where the ranks ran, of the plan, and of who lives. Promises
that a rank whose node lives stays there, that ranks which were lost together stay together, and
that a node which takes a lost one's place is preferred to one that only has room. Moves nothing.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from everstep.agent.inventory import MEMORY
from everstep.agent.sources import Held, SnapshotPlan, Source


@dataclass(frozen=True, slots=True)
class Home:
    """A rank's node from now on."""

    rank: int
    node_id: str
    reason: str
    """In words, after "rank 3 on n2: "."""


def destinations(
    plan: SnapshotPlan,
    runs_on: Mapping[int, str],
    live: Collection[str],
    replaced_by: Mapping[str, str],
) -> tuple[Home, ...]:
    """Where each rank of a recoverable plan belongs, ascending by rank.

    Args:
        plan: The snapshot.
        runs_on: By rank, the node where it runs or ran last, as far as anyone knows.
        live: The nodes that can be given something.
        replaced_by: By node, the one that took its place.
    """
    if not live:
        return ()
    homes: dict[int, Home] = {}
    lost: dict[str, list[int]] = defaultdict(list)
    for source in plan.sources:
        last, why = _last_node(source, runs_on)
        if last in live:
            homes[source.rank] = Home(source.rank, last, why)
            continue
        successor = _successor(last, live, replaced_by)
        if successor:
            homes[source.rank] = Home(source.rank, successor, f"{successor} replaces {last}")
        else:
            lost[last].append(source.rank)
    sizes = {source.rank: source.image_bytes for source in plan.sources}
    load = dict.fromkeys(live, 0)
    for home in homes.values():
        load[home.node_id] += sizes[home.rank]
    # Those with the most to hold choose first.
    by_size = sorted(lost.items(), key=lambda one: (-sum(sizes[r] for r in one[1]), one[0]))
    for last, ranks in by_size:
        spare = min(live, key=lambda node: (load[node], node))
        why = f"{last} is gone, and {spare} has {'nothing' if not load[spare] else 'the least'}"
        for rank in ranks:
            load[spare] += sizes[rank]
            homes[rank] = Home(rank, spare, f"{why} of this job")
    return tuple(home for _, home in sorted(homes.items()))


def to_be_moved(plan: SnapshotPlan, homes: Iterable[Home]) -> dict[str, list[int]]:
    """By node, the ranks whose shards are to be brought into its memory."""
    found: dict[str, list[int]] = defaultdict(list)
    for home in homes:
        source = plan.source_of(home.rank)
        there = isinstance(source, Held) and (source.node_id, source.level) == (
            home.node_id,
            MEMORY,
        )
        if not there:
            found[home.node_id].append(home.rank)
    return dict(found)


def _last_node(source: Source, runs_on: Mapping[int, str]) -> tuple[str, str]:
    known = runs_on.get(source.rank)
    if known is not None:
        return known, "it runs or ran there"
    if isinstance(source, Held):
        return source.node_id, "it is held there"
    return source.plan.members[source.member].node_id, "it was held there"


def _successor(node_id: str, live: Collection[str], replaced_by: Mapping[str, str]) -> str:
    """The living node that took a lost one's place, maybe by way of others; empty if none did."""
    seen: set[str] = set()
    while node_id and node_id not in live and node_id not in seen:
        seen.add(node_id)
        node_id = replaced_by.get(node_id, "")
    return node_id if node_id in live else ""
