"""Whose memory the attached tensors are: what only an optimizer changes, what ranks hold alike.

Owns the look at optimizers, DistributedDataParallel and distributed tensors that says so, and the
names of the leaves that a distributed tensor is stored as. Promises that memory is called guarded
only if a hooked optimizer changes it, and replicated only if its structure says so: placements,
DDP, the word of the user, or a number that goes with such a tensor and is so small that every
snapshot compares it whole. Compares no values itself (see `client/arrangement.py`), and
communicates nothing.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from everstep.snapshot.layout import Block
from everstep.snapshot.placement import (
    Dimensions,
    Placed,
    dimensions_of,
    group_of,
    is_distributed,
    local_of,
    mesh_ranks,
    portions,
)

SMALL_BYTES = 256
"""Fingerprints see every bit of a tensor that small (`snapshot.device.REPLICA_SAMPLES` words): it
may be taken for a replica where nothing but its equality says so, for a drift is noticed in the
very snapshot that has it."""
Ranks = tuple[int, ...]
"""A group of ranks, ascending; empty: all of the world."""


class Attached(Protocol):
    """What is looked at of an attached object: see `client.attachment.Attachment`."""

    @property
    def kind(self) -> str:
        """Of its part."""

    target: Any
    partial: bool
    replicated: bool


@dataclass(frozen=True, slots=True)
class LeafSource:
    """One leaf, and the memory that it is read from.

    Attributes:
        name: Of the leaf.
        tensor: Its memory here.
        block: Where it lies in a tensor that is spread over ranks; None if it is one of its own.
    """

    name: str
    tensor: torch.Tensor
    block: Block | None = None


def leaves_of(name: str, tensor: Placed) -> list[LeafSource]:
    """What this rank holds of a tensor: one leaf, or for strided shards several.

    Raises:
        Misplaced: If mesh and placements contradict each other.
    """
    if isinstance(tensor, torch.Tensor) and not is_distributed(tensor):
        return [LeafSource(name, tensor)]
    found = portions(name, tensor)
    shape = tuple(tensor.shape)
    if len(found) == 1 and found[0].box.shape == shape and isinstance(tensor, torch.Tensor):
        return [LeafSource(name, found[0].tensor)]
    return [
        LeafSource(
            name if len(found) == 1 else f"{name}{portion.box}",
            portion.tensor,
            Block(name, shape, portion.box.offset),
        )
        for portion in found
    ]


def pointer(tensor: Placed) -> int:
    """Where the memory begins that this rank has of a tensor."""
    return local_of(tensor).data_ptr()


def guarded_memory(attachments: Mapping[str, Attached], frozen: bool) -> dict[int, int]:
    """Where the memory lies that only hooked optimizers change, and how many bytes it has."""
    extents: dict[int, int] = {}
    for attached in attachments.values():
        found: Iterable[torch.Tensor] = ()
        if attached.kind == "optimizer":
            found = _optimizer_tensors(attached.target)
        elif frozen and attached.kind == "module":
            # An EMA copy is frozen, too, and changes: that shows as any change between snapshot and
            # update does, and from then on it is not guarded.
            found = (p for p in attached.target.parameters() if not p.requires_grad)
        for tensor in found:
            # A larger tensor that begins at the same place is not theirs alone.
            local = local_of(tensor)
            extents[local.data_ptr()] = max(local.nbytes, extents.get(local.data_ptr(), 0))
    return extents


def shared_memory(
    attachments: Mapping[str, Attached], ddp: frozenset[str], divided: Container[int] = ()
) -> dict[int, Ranks]:
    """Where the memory lies that a group of ranks should hold alike, and which ranks.

    Of DDP the parameters and the optimizer state that follows from them, not the buffers, which
    ranks update alone. Of a distributed tensor what its placements say, and that what is on a part
    of the model's mesh is on all of the rest; and the small numbers that an optimizer keeps for it
    (its step), or its module beside it.

    Args:
        attachments: By name.
        ddp: Names of modules that DistributedDataParallel replicates.
        divided: The id() of parameters of which the user has said that every rank has a part.
    """
    groups: dict[int, Ranks] = {}
    owners: dict[int, Ranks] = {}
    modules = [attached for attached in attachments.values() if attached.kind == "module"]
    beside = dimensions_of(p for attached in modules for p in attached.target.parameters())
    for name, attached in attachments.items():
        if attached.kind == "module":
            _module_groups(attached, name in ddp, groups, owners, beside)
        elif attached.replicated and attached.kind == "tree":
            groups |= {pointer(tensor): () for tensor in tensors_in(attached.target)}
    for attached in attachments.values():
        if attached.kind == "optimizer" and not attached.partial:
            for parameter, state in attached.target.state.items():
                _state_groups(parameter, state, groups, owners, beside)
                if id(parameter) in divided:
                    small = (
                        t for t in tensors_in(state) if t.nbytes <= SMALL_BYTES and not t.dim()
                    )
                    groups |= {tensor.data_ptr(): () for tensor in small}
    groups.pop(0, None)
    return groups


def _module_groups(
    attached: Attached,
    ddp: bool,
    groups: dict[int, Ranks],
    owners: dict[int, Ranks],
    beside: Dimensions,
) -> None:
    whole = ddp or attached.replicated
    parameters = list(attached.target.parameters())
    meshes = [mesh_ranks(p, beside) for p in parameters if is_distributed(p)]
    for parameter in parameters:
        if is_distributed(parameter):
            _note(parameter, groups, beside)
        elif whole:
            groups[parameter.data_ptr()] = owners[id(parameter)] = ()
    for buffer in attached.target.buffers():
        if is_distributed(buffer):
            _note(buffer, groups, beside)
        elif attached.replicated:
            groups[buffer.data_ptr()] = ()
        elif meshes and buffer.nbytes <= SMALL_BYTES:
            groups[buffer.data_ptr()] = max(meshes, key=len)


def _state_groups(
    parameter: torch.Tensor,
    state: object,
    groups: dict[int, Ranks],
    owners: dict[int, Ranks],
    beside: Dimensions,
) -> None:
    spread = is_distributed(parameter)
    for tensor in tensors_in(state):
        if is_distributed(tensor):
            _note(tensor, groups, beside)
        elif id(parameter) in owners:
            groups[tensor.data_ptr()] = owners[id(parameter)]
        elif spread and tensor.nbytes <= SMALL_BYTES:
            groups[tensor.data_ptr()] = mesh_ranks(parameter, beside)


def _note(tensor: torch.Tensor, groups: dict[int, Ranks], beside: Dimensions) -> None:
    ranks = group_of(tensor, beside)
    if len(ranks) > 1:
        groups[pointer(tensor)] = ranks


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from tensors_in(state)


def tensors_in(thing: object) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from tensors_in(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors_in(value)
