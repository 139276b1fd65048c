"""Which snapshots can be recovered, from where, and what they would still survive.

Owns the decision, as a pure function of what the nodes hold; `agent/stock.py` says which copies
belong together and when a row can be decoded, `agent/rebuilding.py` what carrying a plan out costs.
Promises (P0) that a plan never mixes copies that were not committed together, and that it is whole
or says in words what is missing. A shard is taken from memory before NVMe, from the wanted node
before others, and decoded only if nobody has it. `further_losses` is exact, unless the search for
it would take more than `MAX_CHECKS` looks: then it is what the groups guarantee, or better, never
too much.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from everstep.agent.display import ranks as ranks_in_words
from everstep.agent.inventory import MEMORY, NodeInventory
from everstep.agent.rebuilding import Movement, Segment, expected_s, movements, rebuild_work
from everstep.agent.sources import Decoded, Held, ParityAt, SnapshotPlan, Source
from everstep.agent.stock import Erasure, Group, Stock, stocks
from everstep.proto.ids import SnapshotId

__all__ = [
    "Decoded",
    "Erasure",
    "Held",
    "Movement",
    "ParityAt",
    "Segment",
    "SnapshotPlan",
    "Source",
    "expected_s",
    "movements",
    "plan_snapshots",
    "rebuild_work",
]

MAX_CHECKS = 20_000
"""How many sets of lost nodes are tried for one snapshot."""


def plan_snapshots(
    inventories: Sequence[NodeInventory],
    *,
    levels: Collection[str] = frozenset(),
    to_step: int | None = None,
    erasures: Collection[Erasure] = (),
    prefer_node: Mapping[int, str] | None = None,
    preference: Callable[[SnapshotId], Any] | None = None,
) -> list[SnapshotPlan]:
    """What is left of each snapshot, the most wanted first.

    Args:
        inventories: Of the nodes that live: all others are lost.
        levels: Those that may be used; empty for all.
        to_step: Only this step.
        erasures: Copies found damaged.
        prefer_node: By rank, the node that shall have it.
        preference: Orders snapshots, most wanted last; default: by incarnation, then step. See
            `Job.preference`.
    """
    found = stocks(inventories, levels, erasures)
    in_memory = {stock.snapshot: stock for stock in stocks(inventories, {MEMORY}, erasures)}
    may_use_memory = not levels or MEMORY in levels
    order = preference or (lambda snapshot: snapshot)
    planned = []
    for stock in sorted(found, key=lambda stock: order(stock.snapshot), reverse=True):
        if to_step in (None, stock.snapshot.step):
            memory = in_memory[stock.snapshot] if may_use_memory else None
            planned.append(_plan(stock, memory, len(inventories), prefer_node or {}))
    return planned


def _plan(
    stock: Stock, memory: Stock | None, nodes: int, prefer_node: Mapping[int, str]
) -> SnapshotPlan:
    if stock.problem:
        return SnapshotPlan(stock.snapshot, stock.world, (), (stock.problem,))
    each = {rank: _source(stock, rank, prefer_node.get(rank, "")) for rank in range(stock.world)}
    sources = tuple(source for source in each.values() if source is not None)
    lost = [rank for rank, source in each.items() if source is None]
    if lost:
        missing = _missing(stock, lost)
        return SnapshotPlan(
            stock.snapshot, stock.world, sources, missing, commit_id=stock.commit_id
        )
    used = dict.fromkeys(source.plan for source in sources if isinstance(source, Decoded))
    return SnapshotPlan(
        stock.snapshot,
        stock.world,
        sources,
        further_losses=max(0, _further_losses(stock, nodes)),
        memory_losses=_memory_losses(memory, nodes),
        parities=tuple(
            ParityAt(plan.plan_id, copy.node_id, copy.level)
            for plan in used
            for _, copies in sorted(stock.groups[plan].parities.items())
            for copy in copies
        ),
        commit_id=stock.commit_id,
    )


def _source(stock: Stock, rank: int, preferred: str) -> Source | None:
    copies = stock.copies.get(rank)
    if copies:
        best = min(copies, key=lambda c: (c.order[0], c.node_id != preferred, c.node_id))
        return Held(rank, best.node_id, best.level, stock.image_bytes[rank])
    usable = [
        (group.plan, member)
        for group, member in stock.groups_of(rank)
        if stock.decodable(group, member, rank)
    ]
    if not usable:
        return None
    plan, member = min(usable, key=lambda one: one[0].plan_id)
    return Decoded(rank, plan, member, stock.image_bytes[rank])


def _missing(stock: Stock, lost: Iterable[int]) -> tuple[str, ...]:
    """What is missing, in words: ranks together that are missing alike."""
    alike: dict[str, list[int]] = defaultdict(list)
    for rank in lost:
        alike[_why_lost(stock, rank) + _aside(stock, rank)].append(rank)
    return tuple(f"{_named(ranks)}: {why}" for why, ranks in alike.items())


def _named(ranks: Sequence[int]) -> str:
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {ranks_in_words(ranks)}"


def _why_lost(stock: Stock, rank: int) -> str:
    lacking = [
        (max((stock.lacking(group, row) for row in group.rows_of(member, rank)), default=1), index)
        for index, (group, member) in enumerate(stock.groups_of(rank))
    ]
    if not lacking:
        return "no intact copy is in reach, and no parity that protects it"
    symbols, index = min(lacking)
    group, member = stock.groups_of(rank)[index]
    words = (
        f"last held by {group.plan.members[member].node_id}; decoding takes "
        f"{group.rows.data_symbols} symbols of each row, and {symbols} "
        f"{'is' if symbols == 1 else 'are'} lacking"
    )
    gone = _gone(stock, group)
    return words + (f"; nothing is in reach of {', '.join(gone)}" if gone else "")


def _aside(stock: Stock, rank: int) -> str:
    places = [f"{copy.node_id}/{copy.level}" for copy in stock.aside.get(rank, ())]
    if not places:
        return ""
    return (
        f"; what {', '.join(places)} has is of another snapshot of the same name, or cannot be "
        "shown to be of this one"
    )


def _gone(stock: Stock, group: Group) -> list[str]:
    """Members of whom there is neither the parity nor any shard."""
    return [
        member.node_id
        for index, member in enumerate(group.plan.members)
        if index not in group.parities
        and not any(stock.copies.get(shard.rank) for shard in member.shards)
    ]


def _memory_losses(memory: Stock | None, nodes: int) -> int | None:
    if memory is None or memory.problem:
        return None
    losses = _further_losses(memory, nodes)
    return losses if losses >= 0 else None


def _further_losses(stock: Stock, nodes: int) -> int:
    """How many nodes may be lost, any of them; -1 if the snapshot is not there as it is.

    Ranks with the same holders and the same parity are lost together, and each such lot depends on
    few nodes, so that the search is small however many nodes there are.
    """
    lots: dict[tuple[frozenset[str], tuple[Group, ...]], list[int]] = defaultdict(list)
    for rank in range(stock.world):
        groups = tuple(group for group, _ in stock.groups_of(rank))
        lots[stock.nodes_of(rank), groups].append(rank)
    bounded = [
        (min(_guaranteed(stock, rank) for rank in ranks), key, ranks) for key, ranks in lots.items()
    ]
    survived, budget = nodes, MAX_CHECKS
    for guaranteed, (holders, groups), ranks in sorted(bounded, key=lambda lot: lot[0]):
        if guaranteed >= survived:
            break
        near = sorted(_nodes_near(stock, groups) - holders)
        most = min(survived, len(holders) + len(near))
        for size in range(max(guaranteed + 1, len(holders)), most + 1):
            fatal, tries = _fatal(stock, ranks, holders, near, size, budget)
            budget -= tries
            if fatal or budget <= 0:
                survived = size - 1
                break
    return survived


def _guaranteed(stock: Stock, rank: int) -> int:
    """How many losses a rank is sure to survive, by its copies alone or its parity alone; -1 for
    one that is not there."""
    best = len(stock.nodes_of(rank)) - 1
    for group, member in stock.groups_of(rank):
        if stock.decodable(group, member, rank):
            rows = group.rows_of(member, rank)
            best = max(best, min((_spare(stock, group, row) for row in rows), default=0))
    return best


def _spare(stock: Stock, group: Group, row: int) -> int:
    """How many nodes a row can spare at least."""
    usable = [need for need in stock.needs(group, row) if all(need)]
    # A node that took over shards of lost ones takes several symbols with it.
    carried: dict[str, int] = defaultdict(int)
    for need in usable:
        for node in frozenset[str]().union(*need):
            carried[node] += 1
    return (len(usable) - group.rows.data_symbols) // max(carried.values(), default=1)


def _nodes_near(stock: Stock, groups: Iterable[Group]) -> set[str]:
    """All nodes that decoding in these groups could use."""
    return {
        node
        for group in groups
        for row in range(group.rows.members)
        for need in stock.needs(group, row)
        for nodes in need
        for node in nodes
    }


def _fatal(
    stock: Stock,
    ranks: Sequence[int],
    holders: frozenset[str],
    near: Sequence[str],
    size: int,
    budget: int,
) -> tuple[bool, int]:
    """Whether the loss of some `size` nodes, the holders among them, loses one of the ranks; and
    how many such sets were tried."""
    tries = 0
    for others in combinations(near, size - len(holders)):
        if tries >= budget:
            break
        tries += 1
        lost = holders.union(others)
        if not all(stock.available(rank, lost) for rank in ranks):
            return True, tries
    return False, tries
