"""What a module or an optimizer is made of, so that it is cheap to see that it is the same still.

Owns the comparison. Promises that a form which `holds` stands for a `state_dict` with the same
names in the same order, of the same tensor objects, and that `values` are those of now; together
with `Sources` that these tensors lie where they lay. Objects are compared with `is` alone: nothing
is compared by value that a user may have defined, or that a device would have to tell. So a form
may fail to hold although nothing has changed, never the other way around. Does not cover what it
cannot see into, for which there is no form: modules and optimizers with a `state_dict` of their
own, with hooks on it or extra state, and optimizers whose state is nested.
"""

import functools
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from itertools import chain, repeat
from typing import Any, Protocol, Self

import torch

from everstep.client.attachment import encoded, optimizer_tree
from everstep.snapshot import tree
from everstep.snapshot.placement import is_distributed
from everstep.snapshot.tree import Flat

_SCALARS = frozenset({type(None), bool, int, float, str})
_DICTS = (dict, OrderedDict)

_OVERRIDABLE = (
    "state_dict", "_save_to_state_dict", "named_parameters", "parameters", "named_modules",
    "_named_members",
)  # fmt: skip
"""Methods of a module that say what its state is; looked up in the object, then in its class."""
_OF_CLASS = (*_OVERRIDABLE, "get_extra_state", "__getattribute__", "__eq__", "__hash__")
_CONTAINERS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")
_NOT_KEPT = "_non_persistent_buffers_set"
_HELD = (*_CONTAINERS, *_HOOKS, _NOT_KEPT)
_held = operator.itemgetter(*_HELD)
_local = operator.attrgetter("_local_tensor")
"""As `placement.local_of`, of what is known to be distributed."""
_OPTIMIZER_HOOKS = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")


class Form(Protocol):
    """What a part is made of.

    Attributes:
        tensors: All that its state depends on.
    """

    tensors: list[torch.Tensor]

    def take(self, flat: Flat, values: Iterable[tuple[str, str]], names: Mapping[int, str]) -> None:
        """Note the part's state, collected from what the form was made of."""

    def holds(self) -> bool:
        """Whether nothing but plain values has changed."""

    def values(self) -> list[tuple[str, str]]:
        """Paths and texts of the plain values now; only if it `holds`."""


class Sources:
    """Where tensors lie, and in which shape.

    Args:
        tensors: Live ones.
        gradients: Whether it matters which of them need one.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], *, gradients: bool) -> None:
        given = list({id(tensor): tensor for tensor in tensors}.values())
        self._spread = [tensor for tensor in given if is_distributed(tensor)]
        self._whole = [tensor for tensor in given if not is_distributed(tensor)]
        self._gradients = gradients
        self._shapes: list[torch.Size] = []
        self._strides: list[tuple[int, ...]] = []
        self._seen: tuple[list[object], ...] = ()
        self._nowhere: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._guards: Any = None
        try:
            tensors = self._tensors()
            self._nowhere = [tensor for tensor in tensors if not tensor.data_ptr()]
            self._seen = self._look(tensors)
            self._shapes = list(map(torch.Tensor.size, tensors))
            self._strides = list(map(torch.Tensor.stride, tensors))
            self._addresses = list(map(torch.Tensor.data_ptr, tensors))
            self._guards = _guards(tensors, self._shapes, self._strides)
        except RuntimeError:  # a tensor without an address
            self._seen = ()

    def unchanged(self) -> bool:
        """Whether all is where it was, as it was; `p.data = other` leaves no other trace."""
        try:
            tensors = self._tensors()
            if self._is_guarded(tensors):
                return True
            # Compared one by one: many new tuples at once would wake the garbage collector.
            return (
                self._look(tensors) == self._seen
                and all(map(operator.eq, map(torch.Tensor.size, tensors), self._shapes))
                and all(map(operator.eq, map(torch.Tensor.stride, tensors), self._strides))
            )
        except RuntimeError:
            return False

    def _is_guarded(self, tensors: list[torch.Tensor]) -> bool:
        """Whether torch sees at a glance that nothing has changed. It may not though it is so."""
        return (
            self._guards is not None
            and list(map(torch.Tensor.data_ptr, tensors)) == self._addresses
            and bool(self._guards.check(*tensors))
        )

    def _tensors(self) -> list[torch.Tensor]:
        """This rank's memory: of distributed tensors it may be another one than before."""
        return [*self._whole, *map(_local, self._spread)] if self._spread else self._whole

    def _look(self, tensors: list[torch.Tensor]) -> tuple[list[object], ...]:
        """All but shapes; the layout is strided, for others have no address.

        Of a device the number is enough, and cheaper, as no two of them use the same addresses;
        but that of an empty tensor is 0 on all.
        """
        return (
            list(map(torch.Tensor.data_ptr, tensors)),
            list(map(type, tensors)),
            [tensor.dtype for tensor in tensors],
            list(map(torch.Tensor.get_device, tensors)),
            [tensor.device for tensor in self._nowhere],
            [tensor.requires_grad for tensor in tensors] if self._gradients else [],
        )


def _guards(
    tensors: Sequence[torch.Tensor],
    shapes: Sequence[torch.Size],
    strides: Sequence[tuple[int, ...]],
) -> Any:
    """What torch.compile checks its inputs with: types, devices, dtypes, shapes and strides of all
    by one call, in a sixth of the time that one of Python's for each takes. None where this torch
    has no such thing, or another; it is not public."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: Any = [list(shape) for shape in shapes]
        steps: Any = [list(stride) for stride in strides]
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=steps)
    except Exception:  # whatever another version of torch makes of the call
        return None


class ModuleForm:
    """Of a module whose state is all in its parameters and buffers; made by `of`."""

    def __init__(self, modules: list[torch.nn.Module]) -> None:
        self._modules = modules
        self._classes = list(map(type, modules))
        self._own = list(map(vars, modules))
        self._held = list(chain.from_iterable(map(_held, self._own)))
        self._hooks = [held for own in self._own for held in map(own.get, _HOOKS)]
        self._names: list[Any] = [own[_NOT_KEPT] for own in self._own]
        self._not_kept = [frozenset(names) for names in self._names]
        self._dicts = [own[name] for own in self._own for name in _CONTAINERS]
        self._keys = _Keys(self._dicts)
        places = [(held, key) for held in self._dicts for key in held]
        not_kept = {
            (id(module._buffers), name)
            for module, names in zip(modules, self._not_kept, strict=True)
            for name in names
        }
        kept = [(held, key) for held, key in places if (id(held), key) not in not_kept]
        self._places = [held for held, _ in kept], [key for _, key in kept]
        self._contents: list[Any] = list(map(operator.getitem, *self._places))
        self._values: list[tuple[str, str]] = []
        self.tensors: list[torch.Tensor] = [
            thing for thing in self._contents if isinstance(thing, torch.Tensor)
        ]

    @classmethod
    def of(cls, root: torch.nn.Module) -> Self | None:
        """None if the module's state may be more than that."""
        modules = _reachable(root)
        return cls(modules) if modules is not None and _are_regular(modules) else None

    def take(self, flat: Flat, values: Iterable[tuple[str, str]], names: Mapping[int, str]) -> None:
        """Note the part's state, collected from what the form was made of."""
        paths = {path for path, _ in flat.values}
        self._values = [(path, text) for path, text in values if path in paths]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        modules = self._modules
        try:
            return (
                _same(list(map(type, modules)), self._classes)
                and _same(list(map(vars, modules)), self._own)
                and _same(list(chain.from_iterable(map(_held, self._own))), self._held)
                and self._names == self._not_kept
                and not any(self._hooks)
                and _have_own_state(self._classes, self._own)
                and self._keys.hold()
                and _same(list(map(operator.getitem, *self._places)), self._contents)
            )
        except KeyError:  # something was deleted that all modules have
            return False

    def values(self) -> list[tuple[str, str]]:
        """A module without any tensor is a value."""
        return self._values


class OptimizerForm:
    """Of an optimizer with tensors and plain values by parameter; made by `of`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._state, self._groups = optimizer.state, optimizer.param_groups
        self._entries: list[Any] = [*self._state.values(), *self._groups]
        self._outer = [*self._state, *self._entries]
        self._keys = _Keys(self._entries)
        self._contents = self._inner()
        lists = [thing for thing in self._contents if type(thing) is list]
        self._items = _Keys(lists)
        self._texts: list[tuple[str, str]] = []
        self._paths: list[tuple[str, tuple[tree.Key, ...]]] = []
        self._named: Any = {}
        self._members: list[object] = []
        found = chain(self._contents, chain.from_iterable(lists))
        self.tensors: list[torch.Tensor] = [
            thing for thing in found if isinstance(thing, torch.Tensor)
        ]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> Self | None:
        """None if the optimizer's state may be more than that."""
        if not _is_own(optimizer) or type(optimizer.state) not in (dict, defaultdict):
            return None
        groups = optimizer.param_groups
        entries: list[Any] = [*optimizer.state.values(), *groups]
        if type(groups) is not list or any(type(entry) is not dict for entry in entries):
            return None
        if any(type(group.get("params")) is not list for group in groups):
            return None
        others = [*chain.from_iterable(entry.values() for entry in optimizer.state.values())]
        others += [group[key] for group in groups for key in group if key != "params"]
        return cls(optimizer) if all(map(_is_shallow, others)) else None

    def take(self, flat: Flat, values: Iterable[tuple[str, str]], names: Mapping[int, str]) -> None:
        """Note the part's state, collected from what the form was made of."""
        now = optimizer_tree(self._optimizer, names)
        self._named = now["state"]
        self._members = [group["params"] for group in now["param_groups"]]
        self._paths = [(path, tree.split(path)[1:]) for path, _ in flat.values]
        paths = {path for path, _ in flat.values}
        self._texts = [(path, text) for path, text in values if path in paths]

    def holds(self) -> bool:
        """Whether nothing but plain values has changed."""
        optimizer = self._optimizer
        state, groups = optimizer.state, optimizer.param_groups
        if state is not self._state or groups is not self._groups or not _is_own(optimizer):
            return False
        if not _same([*state, *state.values(), *groups], self._outer) or not self._keys.hold():
            return False
        contents = self._inner()
        if not _same(contents, self._contents):
            for now, before in zip(contents, self._contents, strict=True):
                if now is not before and not (_is_plain(now) and _is_plain(before)):
                    return False
            self._contents, self._texts = contents, []
        return self._items.hold()

    def values(self) -> list[tuple[str, str]]:
        """Paths and texts of the plain values now; only if it `holds`."""
        if not self._texts:
            now: Any = {"state": self._named, "param_groups": self._options()}
            self._texts = [
                (path, encoded(functools.reduce(operator.getitem, keys, now), path))
                for path, keys in self._paths
            ]
        return self._texts

    def _inner(self) -> list[object]:
        return list(chain.from_iterable(map(dict.values, self._entries)))

    def _options(self) -> list[dict[str, Any]]:
        """As in `optimizer_tree`."""
        return [
            {**{key: group[key] for key in group if key != "params"}, "params": members}
            for group, members in zip(self._groups, self._members, strict=True)
        ]


class _Keys:
    """What is in some dicts or lists, in order; of dicts, the keys."""

    def __init__(self, containers: Sequence[Any]) -> None:
        self._containers = containers
        self._lengths = self._count()
        self._keys = list(chain.from_iterable(containers))

    def hold(self) -> bool:
        now: list[object] = list(chain.from_iterable(self._containers))
        return _same(now, self._keys) and self._count() == self._lengths

    def _count(self) -> list[int]:
        containers: Sequence[Sized] = self._containers
        return list(map(len, containers))


def _same(now: Sequence[object], before: Sequence[object]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _reachable(root: torch.nn.Module) -> list[torch.nn.Module] | None:
    found: dict[int, torch.nn.Module] = {}
    waiting: list[object] = [root]
    while waiting:
        module = waiting.pop()
        if not isinstance(module, torch.nn.Module) or type(module._modules) not in _DICTS:
            return None
        if id(module) not in found:
            found[id(module)] = module
            waiting += [below for below in module._modules.values() if below is not None]
    return list(found.values())


def _are_regular(modules: list[torch.nn.Module]) -> bool:
    own = list(map(vars, modules))
    return (
        all(type(held.get(name)) in _DICTS for held in own for name in (*_CONTAINERS, *_HOOKS))
        and all(type(held.get(_NOT_KEPT)) is set for held in own)
        and not any(held[name] for held in own for name in _HOOKS)
        and _have_own_state(list(map(type, modules)), own)
    )


def _have_own_state(classes: list[type], own: list[dict[str, Any]]) -> bool:
    """Whether torch's own methods say what the modules' state is."""
    patched = (any(map(dict.__contains__, own, repeat(name))) for name in _OVERRIDABLE)
    return all(map(_is_own_class, set(classes))) and not any(patched)


def _is_own_class(kind: type) -> bool:
    module = torch.nn.Module
    overridden = any(getattr(kind, name) is not getattr(module, name) for name in _OF_CLASS)
    return not overridden and not any(hasattr(kind, name) for name in _HELD)


def _is_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's own method says what the optimizer's state is, and no hook changes it."""
    kind, own = type(optimizer), vars(optimizer)
    return (
        kind.state_dict is torch.optim.Optimizer.state_dict
        and kind.__getattribute__ is torch.optim.Optimizer.__getattribute__
        and "state_dict" not in own
        and not any(own.get(name, True) for name in _OPTIMIZER_HOOKS)
        and not any(hasattr(kind, name) for name in ("state", "param_groups"))
    )


def _is_plain(value: object) -> bool:
    """Whether the value cannot change without being another object, and has no tensor in it."""
    return type(value) in _SCALARS or (type(value) is tuple and _are_scalars(value))


def _is_shallow(value: object) -> bool:
    if type(value) is list:
        return _are_scalars(value)
    return isinstance(value, torch.Tensor) or _is_plain(value)


def _are_scalars(values: Any) -> bool:
    return all(type(value) in _SCALARS for value in values)
