"""Which nodes form a parity group.

Owns the rule: groups of `group_size` nodes or a few more for any number of nodes, at most as many
members in one failure domain as the group has parities, nodes of like size together. Promises that
the answer depends on the nodes alone, not on their order, that every node is in exactly one group
(unless it is the only node), and that each domain whose loss would be too much is named in a
warning. Looks for a placement without such a domain for a bounded time: if there is one, finds it
where nodes carry one label, and nearly always where they carry several, which is a hard problem.

A failure domain is one value of one label (``rack=a``). A node without a label shares no domain.
"""

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from everstep.erasure.rows import MAX_MEMBERS

_GROUP_SIZE = 8
_EXCHANGES_TRIED = 300_000
_ORDERS = 32
_NODES_FILLED = 4096
_GROUPS_NAMED = 4
_NODES_NAMED = 16

Domain = tuple[str, str]


@dataclass(frozen=True)
class PlacedNode:
    """What the placement wants to know of a node.

    Attributes:
        node_id: Its name.
        labels: Its failure domains, e.g. ``{"rack": "a", "power": "2"}``.
        stream_bytes: How much it has to protect.
    """

    node_id: str
    labels: Mapping[str, str]
    stream_bytes: int


@dataclass(frozen=True)
class Group:
    """Nodes that protect each other.

    Attributes:
        members: Their names, sorted.
        parities: How many of them may be lost.
    """

    members: tuple[str, ...]
    parities: int


@dataclass(frozen=True)
class Placement:
    """All groups, by their first member, and what is not as it should be."""

    groups: tuple[Group, ...]
    warnings: tuple[str, ...]


def place(nodes: Sequence[PlacedNode], group_size: int = 0, parities: int = 0) -> Placement:
    """Divide nodes into parity groups.

    Args:
        nodes: All nodes, in any order.
        group_size: How many nodes a group has at least, if there are so many; 0: 8.
        parities: How many nodes of a group may be lost; 0: 2 from eight nodes on, else 1.

    Raises:
        ValueError: If a node is named twice, or no group can have these numbers.
    """
    if len({node.node_id for node in nodes}) != len(nodes):
        raise ValueError("a node is named twice")
    if not (group_size == 0 or 2 <= group_size <= MAX_MEMBERS) or not 0 <= parities < MAX_MEMBERS:
        raise ValueError(f"no group has {group_size} nodes and {parities} parities")
    if group_size and parities >= group_size:
        raise ValueError(f"{parities} parities need more than {group_size} nodes")
    size = group_size or min(max(_GROUP_SIZE, 2 * parities), MAX_MEMBERS)
    allowed = parities or (2 if min(size, len(nodes)) >= _GROUP_SIZE else 1)
    if len(nodes) < 2:
        return Placement((), tuple(_alone(nodes)) if parities else ())
    filled = _searched(nodes, _group_sizes(len(nodes), size), allowed)
    for members in filled:
        members.sort(key=lambda node: node.name)
    filled.sort(key=lambda members: members[0].name)
    groups = tuple(
        Group(tuple(node.name for node in members), min(allowed, len(members) - 1))
        for members in filled
    )
    return Placement(groups, (*_too_few(groups, allowed), *_overfull(filled, groups)))


def _group_sizes(nodes: int, size: int) -> list[int]:
    """As many groups as have `size` nodes each, what remains spread over them; largest first."""
    groups = max(1, nodes // size, -(-nodes // MAX_MEMBERS))
    smallest, larger = divmod(nodes, groups)
    return [smallest + (group < larger) for group in range(groups)]


@dataclass(frozen=True)
class _Node:
    """A node as it is moved about."""

    name: str
    stream_bytes: int
    domains: frozenset[Domain]


class _Filling:
    """One group as it is filled, and which domains it must take from for the later ones' sake."""

    def __init__(self, size: int, allowed: int, remaining: Counter[Domain], later: int) -> None:
        self.size = size
        self.allowed = allowed
        self.taken: Counter[Domain] = Counter()
        self.nodes: list[_Node] = []
        # The later groups can take `allowed` nodes of a domain each; the rest belongs in here.
        self.owed = {
            domain: count - allowed * later
            for domain, count in remaining.items()
            if count > allowed * later
        }

    def urgent(self) -> set[str]:
        """The labels whose owed domains need every place that is left."""
        owed_of: Counter[str] = Counter()
        for (label, _), count in self.owed.items():
            owed_of[label] += count
        left = self.size - len(self.nodes)
        return {label for label, count in owed_of.items() if count >= left}

    def cost(self, domains: frozenset[Domain], urgent: set[str]) -> tuple[int, int]:
        """How ill a node fits: domains it makes too full, urgent labels it does not serve."""
        full = sum(self.taken[domain] >= self.allowed for domain in domains)
        return full, len(urgent) - sum(d in self.owed and d[0] in urgent for d in domains)

    def take(self, node: _Node) -> None:
        """Add a node."""
        self.nodes.append(node)
        for domain in node.domains:
            self.taken[domain] += 1
            if domain in self.owed:
                self.owed[domain] -= 1
                if not self.owed[domain]:
                    del self.owed[domain]


def _searched(nodes: Iterable[PlacedNode], sizes: Sequence[int], allowed: int) -> list[list[_Node]]:
    """The groups; if the order by size leads nowhere, the best of a few random orders."""
    order = [_Node(n.node_id, n.stream_bytes, frozenset(n.labels.items())) for n in nodes]
    order.sort(key=lambda node: (-node.stream_bytes, node.name))
    everywhere = Counter(domain for node in order for domain in node.domains)
    hopeless = {domain for domain, n in everywhere.items() if n > allowed * len(sizes)}
    best: list[list[_Node]] = []
    lowest = -1
    for attempt in range(1 if hopeless else max(1, min(_ORDERS, _NODES_FILLED // len(order)))):
        if attempt:
            random.Random(attempt).shuffle(order)
        groups = _fill(order, sizes, allowed)
        too_full = _exchange(groups, allowed, hopeless)
        if not best or too_full < lowest:
            best, lowest = groups, too_full
        if not too_full:
            break
    return best


def _fill(order: Sequence[_Node], sizes: Sequence[int], allowed: int) -> list[list[_Node]]:
    """Fill group after group, each with the first nodes left that fit."""
    remaining = list(order)
    counts = Counter(domain for node in remaining for domain in node.domains)
    kinds = Counter(node.domains for node in remaining)
    groups = []
    for number, size in enumerate(sizes, 1):
        filling = _Filling(size, allowed, counts, len(sizes) - number)
        while len(filling.nodes) < size:
            node = remaining.pop(_best(remaining, +kinds, filling))
            filling.take(node)
            counts.subtract(node.domains)
            kinds[node.domains] -= 1
        groups.append(filling.nodes)
    return groups


def _best(remaining: Sequence[_Node], kinds: Collection[object], filling: _Filling) -> int:
    """The position of the first node that fits best; nodes in the same domains fit alike."""
    urgent = filling.urgent()
    first_of_kind: dict[frozenset[Domain], tuple[tuple[int, int], int]] = {}
    for position, node in enumerate(remaining):
        if node.domains in first_of_kind:
            continue
        cost = filling.cost(node.domains, urgent)
        if cost == (0, 0):
            return position
        first_of_kind[node.domains] = (cost, position)
        if len(first_of_kind) == len(kinds):
            break
    return min(first_of_kind.values())[1]


def _exchange(groups: list[list[_Node]], allowed: int, hopeless: Collection[Domain]) -> int:
    """Exchange nodes between groups while that makes domains less full, like for like.

    Returns:
        By how many nodes domains are still too full.
    """
    counts = [Counter(d for node in group for d in node.domains) for group in groups]
    left = _EXCHANGES_TRIED
    moved = True
    while moved:
        moved = False
        for here, group in enumerate(groups):
            for position, node in enumerate(group):
                if all(counts[here][d] <= allowed or d in hopeless for d in node.domains):
                    continue
                if left <= 0:
                    break
                left -= sum(map(len, groups))
                moved |= _move(groups, counts, (here, position), allowed)
    return sum(max(0, n - allowed) for counter in counts for n in counter.values())


def _move(
    groups: list[list[_Node]],
    counts: Sequence[Counter[Domain]],
    place: tuple[int, int],
    allowed: int,
) -> bool:
    """Exchange one node for the one elsewhere that gains most; whether there is one."""
    here, position = place
    node = groups[here][position]
    gains = (
        (-gain, abs(node.stream_bytes - other.stream_bytes), other.name, there, index)
        for there, group in enumerate(groups)
        if there != here
        for index, other in enumerate(group)
        if (gain := _gain(node, other, counts[here], counts[there], allowed)) > 0
    )
    best = min(gains, default=None)
    if best is None:
        return False
    there, index = best[3:]
    other = groups[there][index]
    groups[here][position], groups[there][index] = other, node
    for number, gone, come in ((here, node, other), (there, other, node)):
        counts[number].subtract(gone.domains)
        counts[number].update(come.domains)
    return True


def _gain(
    node: _Node, other: _Node, here: Mapping[Domain, int], there: Mapping[Domain, int], allowed: int
) -> int:
    """How much less too full domains are when `node` goes there and `other` comes here."""
    leaving, coming = node.domains - other.domains, other.domains - node.domains
    return (
        sum(here[domain] > allowed for domain in leaving)
        - sum(there[domain] >= allowed for domain in leaving)
        + sum(there[domain] > allowed for domain in coming)
        - sum(here[domain] >= allowed for domain in coming)
    )


def _alone(nodes: Sequence[PlacedNode]) -> Iterable[str]:
    for node in nodes:
        yield f"{node.node_id} is the only node: nothing replaces its memory if it is lost."


def _too_few(groups: Iterable[Group], allowed: int) -> Iterable[str]:
    for group in groups:
        if group.parities < allowed:
            yield (
                f"{_named(group.members)} form a group that survives the loss of "
                f"{group.parities}, not of {allowed}: it has only {len(group.members)} nodes."
            )


def _overfull(filled: Sequence[Sequence[_Node]], groups: Sequence[Group]) -> Iterable[str]:
    """One warning for each domain of which a group has more members than parities."""
    found: dict[Domain, list[str]] = {}
    for members, group in zip(filled, groups, strict=True):
        inside: dict[Domain, list[str]] = {}
        for node in members:
            for domain in sorted(node.domains):
                inside.setdefault(domain, []).append(node.name)
        for domain, names in inside.items():
            if len(names) > group.parities:
                found.setdefault(domain, []).append(
                    f"{_named(names)} ({len(names)} nodes, {group.parities} may be lost)"
                )
    for (label, value), places in sorted(found.items()):
        more = len(places) - _GROUPS_NAMED
        yield (
            f"the loss of {label}={value} would take more nodes of a group than its parities "
            f"replace: {'; '.join(places[:_GROUPS_NAMED])}"
            f"{f'; and {more} groups more' if more > 0 else ''}. Snapshots in memory would not "
            "survive it. Use more parities, smaller groups, or nodes elsewhere."
        )


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NODES_NAMED
    return ", ".join(names[:_NODES_NAMED]) + (f" and {more} more" if more > 0 else "")
