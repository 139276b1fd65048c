"""What the user attached, as parts: modules, optimizers, stateful objects, plain trees.

Owns the way from live objects to named leaves and values. Promises names that do not depend on
rank or on the order of parameters (an optimizer's state is filed under its parameters' names),
and that a leaf is called guarded only if a hooked optimizer, or `Client.updating`, is all that
changes it. Copies nothing: the tensors it returns are the live ones. So it never waits for a
device either, unless a user's own `state_dict` does. The way back is `client/loading.py`.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from everstep.client import scaling
from everstep.client.sharing import (
    LeafSource,
    Ranks,
    guarded_memory,
    leaves_of,
    shared_memory,
)
from everstep.proto.errors import Misplaced, NotCapturable, Refused
from everstep.snapshot import values
from everstep.snapshot.capture_plan import check_capturable, dtype_name, value_bytes
from everstep.snapshot.layout import Block, Part
from everstep.snapshot.placement import (
    Extent,
    FlatExtent,
    Placed,
    Placement,
    Spread,
    local_of,
)
from everstep.snapshot.tree import Flat, flatten, split

INLINE_BYTES = 64 * 1024
"""Small tensors inside stateful objects (a sampler's generator, say) travel as values: their
shapes may change from step to step, and the layout must not. Not those on a device: to look at
their values is to wait for it, and a new layout now and then costs less than that every time."""


@dataclass(slots=True)
class Attachment:
    """One attached object."""

    part: Part
    target: Any
    guarded: bool = False
    """Attached as changed only inside `Client.updating`."""
    replicated: bool = False
    """Attached as equal on all ranks."""
    partial: bool = False
    """An optimizer that has the state of some of the parameters, other ranks that of others."""
    placement: Placement | None = None
    """Says where plain tensors lie in global ones."""
    outer: Any = None
    """What was attached, if the target is inside of it and it has options of its own."""

    @property
    def kind(self) -> str:
        """Of its part."""
        return self.part.kind


@dataclass(slots=True)
class Collected:
    """The live state of everything attached, at one moment."""

    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    values: list[tuple[str, str]] = field(default_factory=list)
    containers: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    guarded: set[str] = field(default_factory=set)
    groups: dict[str, Ranks] = field(default_factory=dict)
    """Of leaves that should be equal on several ranks: which ranks."""
    blocks: dict[str, Block] = field(default_factory=dict)
    """Of leaves that are a part of a tensor that is spread over ranks: which part."""
    form: object = field(default_factory=object)
    """The same object only as long as everything but the values is the same, and every tensor is
    where it was, in the same shape. See `client/recollecting.py`."""

    def add(self, leaves: Sequence[LeafSource], *, guarded: bool, group: Ranks | None) -> None:
        """The leaves of one tensor."""
        for leaf in leaves:
            self.tensors.append((leaf.name, leaf.tensor))
            if guarded:
                self.guarded.add(leaf.name)
            if group is not None:
                self.groups[leaf.name] = group
            if leaf.block is not None:
                self.blocks[leaf.name] = leaf.block


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the parts say about each other's tensors."""

    names: dict[int, str]
    """Of the parameters, by their id()."""
    guarded: dict[int, int]
    """Where the memory lies that only hooked optimizers change, and how many bytes it has."""
    shared: dict[int, Ranks]
    """Where the memory lies that a group of ranks should hold alike."""


def attachment(
    name: str,
    target: Any,
    *,
    per_rank: bool = False,
    guarded: bool = False,
    replicated: bool = False,
    placement: Placement | None = None,
) -> Attachment:
    """Describe an object by what it offers.

    Raises:
        Refused: If the name cannot be one.
        NotCapturable: If the object has no state that could be stored.
    """
    if not name.isidentifier() or name == "rng":
        raise Refused(f"{name!r} cannot name an attached object: use an identifier, not 'rng'.")
    outer, target = target, unwrapped(target)
    if isinstance(target, torch.nn.Module):
        kind = "module"
    elif isinstance(target, torch.optim.Optimizer):
        kind = "optimizer"
    elif hasattr(target, "state_dict") and hasattr(target, "load_state_dict"):
        kind = "stateful"
    elif isinstance(target, dict | list):
        kind = "tree"
    else:
        hint = "attach modules, optimizers, objects with state_dict/load_state_dict, dicts or lists"
        raise NotCapturable(name, type(target).__qualname__, hint)
    class_name = f"{type(target).__module__}.{type(target).__qualname__}"
    part = Part(name, kind, class_name, per_rank)
    if kind == "optimizer" and outer is not target:
        return Attachment(part, target, guarded, replicated, partial=True, outer=outer)
    return Attachment(part, target, guarded, replicated, placement=placement)


def unwrapped(target: Any) -> Any:
    """The module behind DistributedDataParallel and torch.compile, so that names stay its own; and
    the optimizer inside of ZeroRedundancyOptimizer, which has this rank's share of the state."""
    if type(target).__name__ == "ZeroRedundancyOptimizer":
        inner = getattr(target, "optim", None)
        return inner if isinstance(inner, torch.optim.Optimizer) else target
    while isinstance(target, torch.nn.Module):
        inner = getattr(target, "_orig_mod", None)
        if inner is None and isinstance(target, torch.nn.parallel.DistributedDataParallel):
            inner = target.module
        if inner is None:
            break
        target = inner
    return target


def encode_torch_value(value: object, path: str = "") -> Any:
    """Torch's own plain values, and small tensors, for `snapshot.values`.

    Raises:
        NotCapturable: If a tensor's bytes are not its whole value, or lie on a device.
    """
    if isinstance(value, torch.Size):
        return "torch.Size", list(value)
    if isinstance(value, torch.dtype):
        return "torch.dtype", dtype_name(value)
    if isinstance(value, torch.device):
        return "torch.device", str(value)
    if isinstance(value, torch.Tensor):
        check_capturable(path, value)
        if scaling.on_device(value):
            # Everywhere else it is a leaf; a set has no names for what is in it.
            detail = f"on {value.device}, in a container that is no dict, list or tuple"
            raise NotCapturable(path, type(value).__name__, detail)
        data = value_bytes(value).numpy().tobytes()
        return "torch.Tensor", [dtype_name(value.dtype), list(value.shape), data]
    return NotImplemented


def decode_torch_value(tag: str, payload: Any) -> Any:
    """The inverse of `encode_torch_value`."""
    if tag == "torch.Size":
        return torch.Size(payload)
    if tag == "torch.dtype":
        return dtype_named(payload)
    if tag == "torch.device":
        return torch.device(payload)
    if tag == "torch.Tensor":
        dtype, shape, data = payload
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        return flat.to(torch.uint8).view(dtype_named(dtype)).reshape(shape)
    return NotImplemented


def dtype_named(name: str) -> torch.dtype:
    """Torch's dtype of this name.

    Raises:
        ValueError: If this torch has none.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of this torch")
    return dtype


class Names(dict[int, str]):
    """The names of parameters, by their id().

    Attributes:
        extents: By name, of those that the user has placed in global tensors.
        divided: The id() of those that have a part of one only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.extents: dict[str, Sequence[Extent | FlatExtent]] = {}
        self.divided: set[int] = set()


def parameter_names(attachments: Mapping[str, Attachment]) -> Names:
    """The name of each parameter of the attached modules: the global tensor's, if it is a part."""
    names = Names()
    for part, attached in reversed(list(attachments.items())):
        if attached.kind != "module":
            continue
        for parameter_name, parameter in attached.target.named_parameters():
            name = f"{part}.{parameter_name}"
            found = attached.placement and attached.placement(f"{part}/{parameter_name}", parameter)
            if found:
                name = ".".join(found[0].tensor.split("/", 1))
                names.extents[name] = found
                if tuple(found[0].global_shape) != tuple(parameter.shape):
                    names.divided.add(id(parameter))
            names[id(parameter)] = name
    return names


def parameters_by_index(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> list[tuple[str, torch.Tensor]]:
    """Name and parameter at each index that the optimizer's state_dict uses."""
    ordered: dict[int, tuple[str, torch.Tensor]] = {}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = names.get(id(parameter), f"group{group_index}.{index}")
            ordered.setdefault(id(parameter), (name, parameter))
    return list(ordered.values())


def grouping(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[str]:
    """For each group, which parameters it has: their number and a digest of their names."""
    by_id = {id(p): name for name, p in parameters_by_index(optimizer, names)}
    return [
        f"{len(group['params'])}:"
        + hashlib.blake2b(
            "\n".join(by_id[id(parameter)] for parameter in group["params"]).encode(),
            digest_size=8,
        ).hexdigest()
        for group in optimizer.param_groups
    ]


def optimizer_tree(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """The optimizer's state_dict with names in place of indices."""
    state = dict(optimizer.state_dict())
    by_index = [name for name, _ in parameters_by_index(optimizer, names)]
    state["state"] = {
        by_index[key] if isinstance(key, int) and key < len(by_index) else key: value
        for key, value in state["state"].items()
    }
    state["param_groups"] = [
        {**group, "params": members}
        for group, members in zip(state["param_groups"], grouping(optimizer, names), strict=True)
    ]
    return state


def is_leaf(kind: str, thing: object) -> bool:
    """Whether a tensor found in a part of this kind has a place in the image."""
    if not isinstance(thing, torch.Tensor):
        return False
    inline = kind == "stateful" and thing.numel() * thing.element_size() <= INLINE_BYTES
    return not inline or scaling.on_device(thing)


def flat_part(attached: Attachment, names: Mapping[int, str]) -> Flat:
    """One part's live state, taken apart; its names begin with the part's."""
    kind = attached.part.kind
    if kind == "optimizer":
        tree: Any = optimizer_tree(attached.target, names)
    elif kind == "tree":
        tree = attached.target
    elif scaling.is_scaler(attached.target):
        tree = scaling.captured(attached.target)
    else:
        tree = attached.target.state_dict()
    part = attached.part.name
    try:
        flat = flatten(tree, lambda thing: is_leaf(kind, thing))
    except NotCapturable as error:
        raise NotCapturable(within(part, error.path), error.type_name, error.detail) from None
    return Flat(
        [_placed(attached, names, within(part, path), tensor) for path, tensor in flat.tensors],
        [(within(part, path), value) for path, value in flat.values],
        {within(part, path): container for path, container in flat.containers.items()},
    )


def _placed(
    attached: Attachment, names: Mapping[int, str], name: str, tensor: Any
) -> tuple[str, Any]:
    """A tensor under its global name, with its place if the user has said one."""
    if attached.kind == "optimizer":
        found = _state_extents(names, name, tensor)
    else:
        found = attached.placement(name, tensor) if attached.placement else None
    if not found:
        return name, tensor
    spread = Spread(name, tensor, found)
    return spread.tensor, spread


def _state_extents(
    names: Mapping[int, str], name: str, tensor: torch.Tensor
) -> Sequence[Extent | FlatExtent] | None:
    """An optimizer's state of the form of its parameter lies as its parameter does."""
    extents = names.extents if isinstance(names, Names) else {}
    path = split(name) if extents else ()
    found = extents.get(str(path[2])) if len(path) > 3 and path[1] == "state" else None
    if found is None or not tensor.dim() or path[-1] == "step":
        return None
    return [replace(extent, tensor=name) for extent in found]


def within(part: str, path: str) -> str:
    """The name of a part's path among all parts' names."""
    return f"{part}/{path}" if path else part


def collect(
    attachments: Mapping[str, Attachment],
    ddp: frozenset[str] = frozenset(),
    *,
    frozen_guarded: bool = False,
) -> Collected:
    """The live state of everything attached.

    Args:
        attachments: By name.
        ddp: Names of modules that are replicated by DistributedDataParallel.
        frozen_guarded: Whether parameters that need no gradient count as guarded.

    Raises:
        NotCapturable: If something in it cannot be expressed; names path and type.
    """
    around = surroundings(attachments, ddp, frozen_guarded)
    return combined(attachments, around, lambda attached: flat_part(attached, around.names))


def surroundings(
    attachments: Mapping[str, Attachment], ddp: frozenset[str], frozen_guarded: bool
) -> Surroundings:
    """For `combined`; the arguments are those of `collect`."""
    names = parameter_names(attachments)
    return Surroundings(
        names,
        guarded_memory(attachments, frozen_guarded),
        shared_memory(attachments, ddp, names.divided),
    )


def combined(
    attachments: Mapping[str, Attachment],
    around: Surroundings,
    read: Callable[[Attachment], Flat],
) -> Collected:
    """All parts together, each as `read` finds it.

    Raises:
        NotCapturable: If something in it cannot be expressed; names path and type.
        Misplaced: If tensors cannot lie where they are said to, or two leaves have one name.
    """
    collected = Collected()
    first_names: dict[tuple[object, ...], str] = {}
    problems: list[str] = []
    for attached in attachments.values():
        flat = read(attached)
        collected.containers |= flat.containers
        collected.values += encoded_values(flat)
        for name, tensor in flat.tensors:
            assert isinstance(tensor, torch.Tensor | Spread)
            local = local_of(tensor)
            check_capturable(name, local)
            if local.numel():
                first = first_names.setdefault(place(tensor), name)
                if first is not name:
                    collected.aliases[name] = first
                    continue
            guarded = around.guarded.get(local.data_ptr(), -1) >= local.nbytes or attached.guarded
            group = None if attached.part.per_rank else around.shared.get(local.data_ptr())
            try:
                leaves = leaves_of(name, tensor)
            except Misplaced as error:
                problems += error.problems
                continue
            collected.add(leaves, guarded=guarded, group=group)
    names = Counter(name for name, _ in collected.tensors)
    problems += [f"{n}: {count} tensors are called that" for n, count in names.items() if count > 1]
    if problems:
        raise Misplaced(*problems)
    return collected


def encoded_values(flat: Flat) -> list[tuple[str, str]]:
    """Path and text of each value.

    Raises:
        NotCapturable: If one has no text.
    """
    return [(path, encoded(value, path)) for path, value in flat.values]


def place(tensor: Placed) -> tuple[object, ...]:
    """Equal for two tensors exactly if they are one under two names."""
    tensor = local_of(tensor)
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)


def encoded(value: object, path: str, depth: int = 0) -> str:
    """The text of a value found at this path.

    Raises:
        NotCapturable: If it has none; names the part of the value that is to blame.
    """
    try:
        return values.encode(value, path, hook=functools.partial(encode_torch_value, path=path))
    except NotCapturable:
        # The error names the whole value; the user wants to know which part of it.
        if depth < values.MAX_DEPTH and isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                encoded(item, f"{path}/{key}", depth + 1)
        raise
