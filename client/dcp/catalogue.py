"""What a snapshot has, as `torch.distributed.checkpoint` sees it: names, chunks, objects.

Owns the translation, in one direction, of snapshots that `EverstepWriter` has made and of those of
`Client.snapshot`. Promises that nothing is unpickled for it. For the latter, a name is the path
with dots in place of slashes, as DCP flattens a nested state dict whose top keys are the names that
were given to `attach`; optimizer state is filed under its parameter's name in the model, as
`get_optimizer_state_dict` has it. Which parameters an optimizer's groups have is not kept in
snapshots, and is left out.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from everstep.client.attachment import decode_torch_value, dtype_named
from everstep.client.dcp.packing import FORMAT, OBJECTS_PART, STATE_PART
from everstep.client.rng import RNG_PATH
from everstep.client.saved import Saved, is_within
from everstep.proto.errors import FormatInvalid
from everstep.snapshot import values
from everstep.snapshot.reshard import Box, Tensor, box_of
from everstep.snapshot.tree import Key, join, split, unflatten

Path = tuple[str | int, ...]
_WHERE = "the objects of a checkpoint"


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """An object whose bytes lie in a tensor.

    Attributes:
        tensor: Its name.
        begin: First of the bytes.
        end: One past the last.
    """

    tensor: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class StoredValue:
    """An object that the record says."""

    value: object

    def stream(self) -> io.BytesIO:
        """As a planner wants it."""
        stream = io.BytesIO()
        torch.save(self.value, stream)
        stream.seek(0)
        return stream


@dataclass(slots=True)
class Catalogue:
    """What a snapshot has, by fully qualified name.

    Attributes:
        tensors: The names of the saved tensors.
        objects: Everything else.
        paths: The keys that lead there in the nested state dict.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    objects: dict[str, StoredBytes | StoredValue] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)

    def metadata(self, saved: Saved) -> Metadata:
        """For DCP's planners."""
        found: dict[str, STORAGE_TYPES] = {}
        for fqn, name in self.tensors.items():
            found[fqn] = _tensor_metadata(saved.tensor(name))
        found |= dict.fromkeys(self.objects, BytesStorageMetadata())
        version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
        return Metadata(found, planner_data=dict(self.paths), version=version)


def catalogue_of(saved: Saved) -> Catalogue:
    """Read it from the shards' descriptions.

    Raises:
        FormatInvalid: If they contradict themselves.
    """
    shares = dict(_shares(saved))
    return _of_checkpoint(saved, shares) if shares else _of_snapshot(saved)


def _shares(saved: Saved) -> Iterator[tuple[int, Mapping[str, object]]]:
    """What each rank says of its objects; nothing if the snapshot is none of DCP's."""
    for rank, held in saved.values_of(OBJECTS_PART).items():
        decoded = {
            path[len(OBJECTS_PART) + 1 :]: values.decode(json, hook=decode_torch_value, where=path)
            for path, json in held.items()
        }
        tree = unflatten({}, decoded, {}) if decoded else None
        share = tree.get(str(rank)) if isinstance(tree, dict) else None
        if not isinstance(share, dict) or "format" not in share:
            continue
        if share["format"] != FORMAT:
            raise FormatInvalid(_WHERE, f"form {share['format']!r} is not known here")
        yield rank, share


def _of_checkpoint(saved: Saved, shares: Mapping[int, Mapping[str, object]]) -> Catalogue:
    found = Catalogue()
    for name in [*saved.holdings.tensors, *saved.holdings.aliases]:
        path = split(name)
        if path[0] == STATE_PART and len(path) == 2:
            found.tensors[str(path[1])] = name
    for rank, share in shares.items():
        blob = join(OBJECTS_PART, str(rank), "bytes")
        tensor = saved.holdings.find(blob)
        size = tensor.elements if tensor is not None else 0
        for fqn, place in _dict(share, "index").items():
            found.objects[fqn] = StoredBytes(blob, *_range(fqn, place, size))
        for fqn, keys in _dict(share, "mappings").items():
            found.paths[fqn] = _path(fqn, keys)
    return found


def _dict(share: Mapping[str, object], key: str) -> dict[str, object]:
    entries = share.get(key)
    if not isinstance(entries, dict) or not all(type(name) is str for name in entries):
        raise FormatInvalid(_WHERE, f"{key!r} is missing or malformed")
    return entries


def _range(fqn: str, place: object, size: int) -> tuple[int, int]:
    match place:
        case [int(begin), int(end)] if 0 <= begin <= end <= size:
            return begin, end
    raise FormatInvalid(_WHERE, f"{fqn[:80]!r} cannot be {place!r} of {size} bytes")


def _path(fqn: str, path: object) -> Path:
    if not isinstance(path, list) or not all(type(key) in (str, int) for key in path):
        raise FormatInvalid(_WHERE, f"the path of {fqn[:80]!r} is malformed")
    return tuple(path)


def _of_snapshot(saved: Saved) -> Catalogue:
    found = Catalogue()
    modules = [name for name, kind in saved.kinds.items() if kind == "module"]
    for name in [*saved.holdings.tensors, *saved.holdings.aliases]:
        path = _keys(saved, name, modules)
        fqn = ".".join(map(str, path))
        found.tensors.setdefault(fqn, name)
        found.paths.setdefault(fqn, path)
    for name, json in saved.values.items():
        if is_within(name, RNG_PATH):
            continue
        value = values.decode(json, hook=decode_torch_value, where=name)
        for path, leaf in _leaves(_keys(saved, name, modules), value):
            fqn = ".".join(map(str, path))
            groups = saved.kinds.get(str(path[0])) == "optimizer" and path[1:2] == ("param_groups",)
            if fqn not in found.tensors and not (groups and path[-1] == "params"):
                found.objects.setdefault(fqn, StoredValue(leaf))
                found.paths.setdefault(fqn, path)
    return found


def _keys(saved: Saved, name: str, modules: list[str]) -> Path:
    """The keys as DCP has them: indices of lists are numbers, keys of dicts are text."""
    elements = split(name)
    keys: list[str | int] = []
    for depth, element in enumerate(elements):
        kind = saved.containers.get(join(*elements[:depth]), "") if depth else ""
        in_list = kind in ("list", "tuple") and isinstance(element, int)
        keys.append(element if in_list and isinstance(element, int) else _text(element))
    if saved.kinds.get(str(keys[0])) == "optimizer" and keys[1:2] == ["state"] and len(keys) > 2:
        module, _, parameter = str(keys[2]).partition(".")
        if modules == [module] and parameter:
            keys[2] = parameter
    return tuple(keys)


def _text(element: Key) -> str:
    return str(element)


def _leaves(path: Path, value: object) -> Iterator[tuple[Path, object]]:
    """What DCP makes of a nested value: dicts, and lists with dicts in them, are taken apart."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves((*path, str(key)), inner)
    elif isinstance(value, list) and not _is_whole(value):
        for index, inner in enumerate(value):
            yield from _leaves((*path, index), inner)
    else:
        yield path, value


def _is_whole(value: object) -> bool:
    if isinstance(value, Mapping | torch.Tensor):
        return False
    return not isinstance(value, list) or all(map(_is_whole, value))


def _tensor_metadata(tensor: Tensor) -> TensorStorageMetadata:
    boxes = {box_of(leaf): None for leaves in tensor.leaves.values() for leaf in leaves}
    chunks = [
        _chunk(box.offset, box.shape)
        for box in sorted(boxes, key=lambda box: box.offset)
        if box.elements or box == Box.whole(tensor.shape)
    ]
    properties = TensorProperties(dtype=dtype_named(tensor.dtype))
    return TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)


def _chunk(offset: tuple[int, ...], shape: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
