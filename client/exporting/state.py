"""The state of a snapshot as torch's programs have it, before a tensor is read.

Owns the tree ``{part: state}``: what each part's ``state_dict()`` returned, tied tensors tied, plus
"rng" (the generators' states) and "everstep" (job, step, rank). What ranks had parts of is whole;
what only other ranks had (pipeline stages) is there too. State that differs between ranks is one
rank's. An optimizer's state has torch's own indices again where the order of its parameters can be
proven (`client/exporting/indices.py`); else it stays under names, and the report says so.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from everstep.client.attachment import decode_torch_value
from everstep.client.exporting.decoding import decoded
from everstep.client.exporting.indices import indexed
from everstep.client.exporting.loadable import loadable
from everstep.client.exporting.placeholders import Placeholders, room
from everstep.client.saved import Form, Saved, is_within
from everstep.snapshot import values
from everstep.snapshot.consolidating import Whole, part_names
from everstep.snapshot.layout import Part
from everstep.snapshot.reading import Shard

_RNG = "rng"
_ABOUT = "everstep"
_DECODED_AT_MOST = 9
"""Times the bytes of codes: fp32 of 4-bit codes, and what aligning adds."""


@dataclass(slots=True)
class Exported:
    """A state that is to be written.

    Attributes:
        tree: With placeholders, and some ordinary tensors.
        placeholders: What they stand for.
        by_name: Optimizers whose state is still under names.
        left_out: Names of tensors that other ranks had for themselves.
    """

    tree: dict[str, Any]
    placeholders: Placeholders
    by_name: list[str]
    left_out: list[str]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors, each once, in the order of the tree."""
        found = {id(leaf): leaf for leaf in leaves(self.tree) if isinstance(leaf, torch.Tensor)}
        return list(found.values())

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors)


def leaves(thing: Any) -> Iterator[Any]:
    """What is in nested containers, in the order in which pickle comes to it."""
    if isinstance(thing, dict):
        for value in thing.values():
            yield from leaves(value)
    elif isinstance(thing, list | tuple | set | frozenset):
        for value in thing:
            yield from leaves(value)
    else:
        yield thing


def exported(
    shards: Mapping[int, Shard], rank: int, parts: Sequence[str] = (), *, decode: bool = False
) -> Exported:
    """The state of one rank, and whatever it shares with others.

    Args:
        shards: Of all ranks.
        rank: Whose state, where ranks differ.
        parts: Only these; all, and the generators, if empty.
        decode: Optimizer state that is held in codes becomes fp32.

    Raises:
        FormatInvalid: If what the ranks hold contradicts itself.
        Refused: If it is unknown how a state is to be decoded.
    """
    layouts = {holder: shard.layout for holder, shard in shards.items()}
    records = {holder: shard.record for holder, shard in shards.items()}
    saved = Saved.of(layouts, records, rank)
    whole = Whole.of(layouts, rank, parts)
    chosen = [name for name in part_names(layouts, rank) if not parts or name in parts]
    own = {p.name for x in layouts.values() for p in x.parts if _is_own(p)}
    stored = sum(room(tensor) for tensor in whole.tensors.values())
    placeholders = Placeholders(stored + (_DECODED_AT_MOST * stored if decode else 0))
    made: dict[str, torch.Tensor] = {}
    state: dict[str, Any] = {}
    by_name = []
    left_out = list(whole.left_out)
    modules = [name for name in saved.kinds if saved.kinds[name] == "module"]
    for part in chosen:
        names = [name for name in saved.forms_of(part) if name in whole.tensors]
        others = [] if part in own else list(saved.values_of(part).values())
        texts, hidden = _united(_within(saved.values, part), others, names)
        left_out += hidden
        tensors = {}
        for name in names:
            tensor = whole.tensors[name]
            if name not in hidden:
                if tensor.name not in made:
                    made[tensor.name] = placeholders.stand_for(tensor)
                tensors[name] = made[tensor.name]
        tree = saved.tree(part, tensors, texts)
        if saved.kinds[part] == "optimizer":
            forms = {n: f for module in modules for n, f in _parameters(saved, module).items()}
            named = list(tree["state"])
            tree, proven = indexed(tree, list(forms))
            if not proven:
                by_name.append(part)
            if decode:
                owners = dict(zip(tree["state"], named, strict=True))
                shapes = {name: form.shape for name, form in forms.items()}
                tree = decoded(tree, owners, shapes, placeholders)
        state[part] = tree
    if not parts and _RNG in saved.values:
        state[_RNG] = values.decode(saved.values[_RNG], hook=decode_torch_value, where=_RNG)
    if _ABOUT not in state:
        state[_ABOUT] = _about(shards[rank])
    return Exported(loadable(state), placeholders, by_name, left_out)


def _about(shard: Shard) -> dict[str, Any]:
    record = shard.record
    about = {"job": record.job, "step": record.step, "rank": shard.rank, "world": record.world}
    return {**about, "incarnation": record.incarnation, "producer": record.producer}


def _is_own(part: Part) -> bool:
    """Whether a part's values are one rank's: what a user's object says belongs together."""
    return part.per_rank or part.kind == "stateful"


def _within(texts: Mapping[str, str], part: str) -> dict[str, str]:
    return {path: text for path, text in texts.items() if is_within(path, part)}


def _united(
    own: dict[str, str], others: Iterable[Mapping[str, str]], tensors: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """One rank's values, and those that only others have; and the tensors that have no place
    beside them.

    A subtree without tensors is one value: on one rank it may be an empty dict, where on another
    there are tensors in it.
    """
    inner = {above for name in tensors for above in _above(name)}
    found = {path: text for path, text in own.items() if path not in inner or not _is_empty(text)}
    hidden = [name for name in tensors if any(above in found for above in _above(name))]
    inner |= {above for path in found for above in _above(path)}
    for held in others:
        for path, text in held.items():
            if path in found or path in inner or any(above in found for above in _above(path)):
                continue
            found[path] = text
            inner |= set(_above(path))
    return found, hidden


def _above(path: str) -> Iterator[str]:
    """The paths of the containers that it is in."""
    at = path.rfind("/")
    while at > 0:
        yield path[:at]
        at = path.rfind("/", 0, at)


def _is_empty(text: str) -> bool:
    value = values.decode(text, hook=decode_torch_value, where="an empty container")
    return isinstance(value, dict | list | tuple) and not value


def _parameters(saved: Saved, module: str) -> dict[str, Form]:
    """A module's tensors by the names that an optimizer's state has, in the module's order."""
    return {name.replace("/", ".", 1): form for name, form in saved.forms_of(module).items()}
