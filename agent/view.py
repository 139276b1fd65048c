"""Who belongs to the cluster: one entry for each node id.

Owns the entry, the view and their merging. Promises that merging is commutative, associative and
idempotent, so that views which travelled any way through any network end up the same, and that a
view's epoch never falls by merging. Does not judge who is alive.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A node's place in the cluster, and the agent process that holds it."""

    node_id: str
    since_epoch: int
    boot_id: str
    replaced_by: str = ""
    """The node that took this one's place; empty while it is a member."""
    address: str = ""
    """``HOST:PORT`` of its gRPC server for other agents."""
    labels: tuple[tuple[str, str], ...] = ()
    """Its failure domains."""

    # The order of the fields is the order of claims: of two entries for one node the higher one
    # holds. The fields behind the first three only make that a total order.

    @property
    def label(self) -> Mapping[str, str]:
        """Its failure domains by key."""
        return MappingProxyType(dict(self.labels))


class View:
    """Entries by node id. Never changes; merging makes another one."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries: dict[str, Entry] = {}
        for entry in entries:
            self._entries[entry.node_id] = max(entry, self._entries.get(entry.node_id, entry))

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._entries

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, View) and self._entries == other._entries)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"View({list(self)!r})"

    def get(self, node_id: str) -> Entry | None:
        """The entry of a node, replaced or not."""
        return self._entries.get(node_id)

    @cached_property
    def epoch(self) -> int:
        """The highest of all entries; 0 of an empty view."""
        return max((entry.since_epoch for entry in self._entries.values()), default=0)

    def members(self) -> tuple[Entry, ...]:
        """Entries of nodes that were not replaced, by ascending node id."""
        return self._members

    @cached_property
    def _members(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self if not entry.replaced_by)

    def merge(self, other: "View") -> "View":
        """Of each node the higher claim of both views."""
        if other is self or self._entries == other._entries:
            return self
        return View((*self._entries.values(), *other._entries.values()))

    def without(self, node_id: str) -> "View":
        """The same, lacking one node."""
        return View(entry for entry in self._entries.values() if entry.node_id != node_id)
