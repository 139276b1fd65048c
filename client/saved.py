"""A snapshot as one rank sees it, before anything is read: tensors, values, names.

Owns the union of what all ranks have saved, seen by a rank that may not have been among them.
Promises that a rank of the same number sees its own shard first, others' only for what it has not;
that values which differ between ranks are told, not merged; and that names are the ones that the
live objects have, if they were renamed meanwhile. Reads no tensor, touches no live object.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from everstep.client.attachment import decode_torch_value, dtype_named
from everstep.client.terms import Terms
from everstep.proto.errors import Refused
from everstep.proto.state_pb2 import Record
from everstep.snapshot import values
from everstep.snapshot.capture_plan import dtype_name
from everstep.snapshot.layout import Layout
from everstep.snapshot.placement import Placed
from everstep.snapshot.reshard import Holdings, Tensor
from everstep.snapshot.tree import join, split, unflatten


@dataclass(frozen=True, slots=True)
class Form:
    """What is known of a saved tensor before its bytes are read. The shape is the global one."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    def fits(self, tensor: Placed) -> bool:
        """Whether a tensor, distributed or not, can take the values bit for bit."""
        return (dtype_name(tensor.dtype), tuple(tensor.shape)) == (self.dtype, self.shape)

    def empty(self, device: torch.device | None = None) -> torch.Tensor:
        """A tensor that can take them."""
        return torch.empty(self.shape, dtype=dtype_named(self.dtype), device=device)

    def empty_as(self, local: torch.Tensor) -> torch.Tensor:
        """Memory for the part of it that is spread as another tensor's."""
        return torch.empty(local.shape, dtype=dtype_named(self.dtype), device=local.device)


@dataclass(slots=True)
class Saved:
    """What the snapshot says of all parts.

    Attributes:
        forms: Of the tensors, by name: first those of this rank's own shard, or of the lowest
            rank's if it has none.
        values: The values in that shard, by path.
        containers: Of all shards.
        classes: Of the attached objects.
        kinds: Of the parts.
        aliases: Further names of tensors.
        expected: Names of tensors that this rank must have a use for.
        own: Names of tensors in that shard.
        resized: Whether the snapshot has another number of ranks than there are now.
        rank: Whose shard that is.
    """

    forms: dict[str, Form]
    values: dict[str, str]
    containers: dict[str, str]
    classes: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    expected: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()
    resized: bool = False
    rank: int = 0
    holdings: Holdings = field(default_factory=lambda: Holdings({}))
    _records: Mapping[int, Record] = field(default_factory=dict)
    _sources: dict[str, str] = field(default_factory=dict)
    _terms: Terms | None = None

    @classmethod
    def of(
        cls,
        layouts: Mapping[int, Layout],
        records: Mapping[int, Record],
        rank: int,
        world: int | None = None,
        holdings: Holdings | None = None,
    ) -> "Saved":
        """Read it from the shards' descriptions.

        Args:
            layouts: By rank, of all.
            records: Likewise.
            rank: Who looks.
            world: How many ranks there are now; None: as many as then.
            holdings: Of these layouts, if they were made before.
        """
        base = rank if rank in layouts else min(layouts)
        holdings = holdings or Holdings(layouts)
        resized = world not in (None, len(layouts))
        own = [leaf.tensor for leaf in layouts[base].leaves]
        tensors = dict.fromkeys([*own, *holdings.tensors])
        forms = {n: _form(holdings.tensors[n].of(base)) for n in tensors}
        forms |= {n: forms[of] for n, of in holdings.aliases.items() if of in forms}
        common = set(own)
        for layout in layouts.values() if resized else ():
            common &= {leaf.tensor for leaf in layout.leaves}
        aliases = {n: of for n, of in holdings.aliases.items() if of in common}
        containers: dict[str, str] = {}
        classes: dict[str, str] = {}
        kinds: dict[str, str] = {}
        for layout in (layouts[base], *layouts.values()):
            containers = {**layout.containers, **containers}
            classes = {**{p.name: p.class_name for p in layout.parts}, **classes}
            kinds = {**{p.name: p.kind for p in layout.parts}, **kinds}
        return cls(
            forms,
            {value.path: value.json for value in records[base].values},
            containers,
            classes,
            dict(holdings.aliases),
            kinds,
            frozenset(common | aliases.keys()),
            frozenset({*own, *layouts[base].aliases}),
            resized,
            base,
            holdings,
            records,
        )

    def origin(self, name: str) -> str:
        """The one name of a tensor that was saved under several."""
        return self.aliases.get(name, name)

    def source(self, name: str) -> str:
        """The name that a tensor was saved under."""
        return self._sources.get(name, name)

    def tensor(self, name: str) -> Tensor:
        """What the shards hold of a tensor."""
        found = self.holdings.find(self.source(name))
        assert found is not None
        return found

    def forms_of(self, part: str, *, own: bool = False) -> dict[str, Form]:
        """The saved tensors of a part; with `own` those of one rank's shard alone."""
        return {
            name: form
            for name, form in self.forms.items()
            if is_within(name, part) and (not own or name in self.own)
        }

    def tree(
        self, part: str, tensors: Mapping[str, object], others: Mapping[str, str] | None = None
    ) -> Any:
        """The part's saved tree, with the given tensors in their places.

        Args:
            part: Its name.
            tensors: By name.
            others: Values to be used instead of this rank's.
        """
        decoded = {
            path[len(part) + 1 :]: values.decode(json, hook=decode_torch_value, where=path)
            for path, json in (self.values if others is None else others).items()
            if is_within(path, part)
        }
        containers = {
            path[len(part) + 1 :]: kind
            for path, kind in self.containers.items()
            if is_within(path, part)
        }
        inner = {name[len(part) + 1 :]: tensor for name, tensor in tensors.items()}
        return unflatten(inner, decoded, containers)

    def values_of(self, part: str) -> dict[int, dict[str, str]]:
        """Every rank's values of a part, by rank and path."""
        return {
            rank: {self._named(v.path): v.json for v in record.values if is_within(v.path, part)}
            for rank, record in self._records.items()
        }

    def without(self, names: Iterable[str]) -> None:
        """Leave out tensors that were not asked for."""
        left = set(names)
        self.forms = {name: form for name, form in self.forms.items() if name not in left}
        self.expected &= self.forms.keys()

    def rename(self, terms: Terms) -> None:
        """Give everything the name that it has now.

        Raises:
            Refused: If two things get the same name.
        """
        if not terms.rename:
            return
        now = {name: self._renamed(name, terms) for name in self.forms}
        self._sources = {new: old for old, new in now.items() if new != old}
        if not self._sources:
            return
        twice = sorted(name for name, count in Counter(now.values()).items() if count > 1)
        if twice:
            raise Refused(f"rename gives several leaves the name {', '.join(twice[:5])}.")
        self.forms = {now[name]: form for name, form in self.forms.items()}
        self.aliases = {now[n]: now[of] for n, of in self.aliases.items() if n in now}
        self.expected = frozenset(now[name] for name in self.expected)
        self.own = frozenset(now[name] for name in self.own if name in now)
        self.values = {self._renamed(path, terms): json for path, json in self.values.items()}
        self.containers = {self._renamed(p, terms): kind for p, kind in self.containers.items()}
        self._terms = terms

    def _named(self, path: str) -> str:
        return path if self._terms is None else self._renamed(path, self._terms)

    def _renamed(self, name: str, terms: Terms) -> str:
        """An optimizer's state is filed under its parameters' names, which follow the modules'."""
        path = split(name)
        if self.kinds.get(name.partition("/")[0]) != "optimizer":
            return terms.renamed(name)
        if len(path) < 3 or path[1] != "state":
            return name
        module, _, parameter = str(path[2]).partition(".")
        owner = terms.renamed(f"{module}/{join(parameter)}")
        module, _, parameter = owner.partition("/")
        renamed = f"{module}.{split(parameter)[0]}" if parameter else path[2]
        return join(path[0], path[1], renamed, *path[3:])


def is_within(path: str, part: str) -> bool:
    """Whether a name belongs to a part."""
    return path == part or path.startswith(part + "/")


def differing(by_rank: Mapping[int, Mapping[str, str]]) -> Iterator[str]:
    """Paths whose values are not the same on all ranks that have them."""
    seen: dict[str, str] = {}
    told: set[str] = set()
    for held in by_rank.values():
        for path, json in held.items():
            if seen.setdefault(path, json) != json and path not in told:
                told.add(path)
                yield path


def _form(tensor: Tensor) -> Form:
    return Form(tensor.dtype, tensor.shape)
