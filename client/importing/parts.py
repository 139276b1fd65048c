"""Which attached objects a checkpoint becomes.

Owns the choice: what looks like a model's state_dict (tensors by name) becomes a part of kind
"module", so that a program that attaches its model under the same name restores it, alone with
`restore(weights_only=True)`; anything else becomes a tree. Promises that tensors which were stored
in parts become blocks of global tensors, and that nothing is left out unless parts were chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from everstep.client.importing.sources import Chunks, Later, has_tensors, is_tensor
from everstep.proto.errors import Refused
from everstep.snapshot.placement import Extent
from everstep.snapshot.tree import Key, join

MODEL = "model"
_FURTHER = "everstep.chunks"
_LOOSE = "loose"
_RNG, _ABOUT = "rng", "everstep"


class StateDict(torch.nn.Module):
    """A module that has a state and nothing else."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self._state = state

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state, as it was imported."""
        return self._state


@dataclass(slots=True)
class Part:
    """An object to attach.

    Attributes:
        name: Of the part.
        target: What to attach.
        kind: "module" or "tree".
        tensors: How many it has.
        nbytes: Of these.
    """

    name: str
    target: Any
    kind: str
    tensors: int = 0
    nbytes: int = 0
    _extents: dict[int, Extent] = field(default_factory=dict)

    def place(self, _: str, tensor: torch.Tensor) -> Sequence[Extent] | None:
        """Where a tensor lies in a global one; None if it is one of its own."""
        extent = self._extents.get(id(tensor))
        if extent is None:
            return None
        # A second box, of nothing: only leaves of several boxes are named by them, and the other
        # parts of the global tensor are leaves, too.
        nothing = (0, *tensor.shape[1:])
        return [extent, replace(extent, shape=nothing, local_offset=(0,) * len(nothing))]


def about(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an export of ours says of itself, and the random generators in it; else nothing."""
    said = tree.get(_ABOUT) if isinstance(tree, dict) else None
    said = _resolved_values(said) if isinstance(said, dict) else {}
    if not {"job", "step", "producer"} <= said.keys():
        return {}, {}
    rng = _resolved_values(tree.get(_RNG))
    return said, rng if isinstance(rng, dict) else {}


def chosen(tree: Any, wanted: Sequence[str]) -> dict[str, Any]:
    """The subtrees to import, by the names of their parts.

    Args:
        tree: The checkpoint.
        wanted: "NAME" or "NAME=KEY" each, KEY being the way to a subtree: "state/model". If there
            are none, a model's state_dict is the part "model", and of anything else each dict or
            list at the top is a part of its own name, with what lies beside them in "loose".

    Raises:
        Refused: If there is no such subtree; says what there is.
    """
    if not isinstance(tree, dict) or not has_tensors(tree):
        raise Refused("the checkpoint has no tensors by name. Nothing was imported.")
    if not wanted:
        return {MODEL: tree} if _is_flat(tree) else _by_key(tree)
    found = {}
    for one in wanted:
        name, equals, way = one.partition("=")
        if name in found:
            raise Refused(f"--part {name} is there twice. Nothing was imported.")
        keys = way.split("/") if equals else ([name] if name in tree else [])
        found[name] = _subtree(tree, keys, one)
    return found


def _by_key(tree: dict[Any, Any]) -> dict[str, Any]:
    ours = about(tree)[0]
    parts: dict[str, Any] = {}
    loose: dict[Any, Any] = {}
    for key, value in tree.items():
        if ours and key in (_RNG, _ABOUT):
            continue
        if isinstance(value, dict | list):
            parts[str(key)] = value
        else:
            loose[key] = value
    if loose:
        if _LOOSE in parts:
            raise Refused(
                f"the checkpoint has {_LOOSE!r}, and things beside it. Name the parts with --part "
                "NAME=KEY. Nothing was imported."
            )
        parts[_LOOSE] = loose
    unfit = [name for name in parts if not name.isidentifier() or name == _RNG]
    if unfit:
        raise Refused(
            f"{', '.join(map(repr, unfit[:5]))} cannot name parts. Say how they are to be called: "
            "--part NAME=KEY. Nothing was imported."
        )
    return parts


def _subtree(tree: Any, keys: Sequence[str], what: str) -> Any:
    for key in keys:
        below = tree.get(key) if isinstance(tree, dict) else None
        if not isinstance(below, dict | list):
            known = ", ".join(map(str, list(tree)[:10])) if isinstance(tree, dict) else "a list"
            raise Refused(f"--part {what}: no {key!r} in the checkpoint, but {known}.")
        tree = below
    return tree


def _is_flat(tree: Any) -> bool:
    """Whether it is as a module's state_dict is: all tensors by their names."""
    return (
        isinstance(tree, dict)
        and all(type(key) is str for key in tree)
        and any(map(is_tensor, tree.values()))
        and not any(has_tensors(value) for value in tree.values() if not is_tensor(value))
    )


def part_of(name: str, tree: Any) -> Part:
    """The object to attach for a subtree; what is read later is read now.

    Raises:
        Refused: If something in it cannot be loaded without executing what it says.
        FormatInvalid: If something in it is damaged.
    """
    reading = _Reading(name)
    state = reading.resolved(tree, ())
    if reading.further:
        if not isinstance(state, dict):
            raise Refused(f"{name} is a list with tensors in parts; import what it is in.")
        state[_FURTHER] = reading.further
    flat = _is_flat(tree)
    target = StateDict(state) if flat else state
    return Part(
        name,
        target,
        "module" if flat else "tree",
        reading.tensors,
        reading.nbytes,
        reading.extents,
    )


class _Reading:
    def __init__(self, part: str) -> None:
        self.part = part
        self.further: dict[str, torch.Tensor] = {}
        self.extents: dict[int, Extent] = {}
        self.tensors = 0
        self.nbytes = 0

    def resolved(self, thing: Any, path: tuple[Key, ...]) -> Any:
        """With what was to be read later read, and the first part of a tensor in its place."""
        if isinstance(thing, Later):
            thing = thing.read()
        if isinstance(thing, dict):
            kind = type(thing)
            return kind((k, self.resolved(value, (*path, k))) for k, value in thing.items())
        if type(thing) in (list, tuple):
            return type(thing)(self.resolved(x, (*path, i)) for i, x in enumerate(thing))
        if isinstance(thing, Chunks):
            return self._first(thing, path)
        if isinstance(thing, torch.Tensor):
            self._count(thing)
            self.tensors += 1
            return thing.detach()
        return thing

    def _first(self, chunks: Chunks, path: tuple[Key, ...]) -> torch.Tensor:
        name = f"{self.part}/{join(*path)}"
        self.tensors += 1
        for offset, tensor in chunks.parts:
            self._count(tensor)
            self.extents[id(tensor)] = Extent(name, chunks.shape, offset)
        first, *others = (tensor for _, tensor in chunks.parts)
        for tensor in others:
            self.further[str(len(self.further))] = tensor
        return first

    def _count(self, tensor: torch.Tensor) -> None:
        self.nbytes += tensor.nbytes


def _resolved_values(thing: Any) -> Any:
    """Plain values, read now if they were to be read later."""
    if isinstance(thing, Mapping):
        return {key: _resolved_values(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [_resolved_values(item) for item in thing]
    return thing.read() if isinstance(thing, Later) and not thing.is_tensor else thing
