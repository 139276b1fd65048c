"""A checkpoint of torch.distributed.checkpoint, tensor by tensor, mapped.

Owns the reading of its `.metadata`, which is a pickle, as data: only the few types of torch's that
belong there are accepted, and none of them is made. Promises that files stay in their directory,
that a chunk is what the metadata says it is, and that values are read by torch's ``weights_only``
reader alone.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from everstep.client.importing.mapped import MappedFile
from everstep.client.importing.pickled import (
    MAX_PICKLE_BYTES,
    Call,
    Global,
    Instance,
    unpickled,
)
from everstep.client.importing.saved_tensor import Slice, read_tensor
from everstep.client.importing.sources import Chunks, Later
from everstep.proto.errors import FormatInvalid, Refused

_METADATA = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_ALLOWED = (
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_SHARDED, "TensorProperties"),
    (_SHARDED, "MEM_FORMAT_ENCODING"),
    (_FILESYSTEM, "_StorageInfo"),
    (_FILESYSTEM, "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
)
_Offset = tuple[int, ...]


def read_dcp(source: Path) -> dict[str, Any]:
    """The checkpoint's tree, nested as it was saved; tensors and values are read when wanted.

    Raises:
        FormatInvalid: If the metadata is damaged, or names what does not belong there.
    """
    return _Checkpoint(source).tree()


class _Checkpoint:
    def __init__(self, source: Path) -> None:
        self._source = source
        self._where = str(source / ".metadata")
        metadata = _state(_metadata(source / ".metadata"), "Metadata", self._where)
        self._described = _dict(metadata.get("state_dict_metadata"), self._where)
        self._paths = metadata.get("planner_data")
        self._stored = self._storage(_dict(metadata.get("storage_data"), self._where))
        self._files: dict[str, MappedFile] = {}

    def _storage(self, entries: Mapping[Any, Any]) -> dict[tuple[str, _Offset], Mapping[str, Any]]:
        found = {}
        for index, info in entries.items():
            key = _state(index, "MetadataIndex", self._where)
            offset = key.get("offset")
            place = () if offset is None else _size(offset, self._where)
            found[str(key.get("fqn")), place] = _state(info, "_StorageInfo", self._where)
        return found

    def tree(self) -> dict[str, Any]:
        root: dict[Any, Any] = {}
        paths = self._paths if isinstance(self._paths, dict) else {}
        for name, description in self._described.items():
            path = paths.get(name) or (name,)
            if not isinstance(path, tuple) or not all(type(key) in (str, int) for key in path):
                raise FormatInvalid(self._where, f"{str(name)[:80]!r} has no place in it")
            _plant(root, path, self._leaf(str(name), description), self._where)
        grown = _grown(root)
        return grown if isinstance(grown, dict) else {"": grown}

    def _leaf(self, name: str, description: object) -> Later:
        if not isinstance(description, Instance):
            raise FormatInvalid(self._where, f"{name[:80]!r} is not described")
        read: Callable[[], Any]
        if description.cls.name == "TensorStorageMetadata":
            read = partial(self._tensor, name, description)
            return Later(True, read)
        return Later(False, partial(self._value, name))

    def _tensor(self, name: str, description: Instance) -> torch.Tensor | Chunks:
        state = _state(description, "TensorStorageMetadata", self._where)
        shape = _size(state.get("size"), self._where)
        dtype = _dtype(state.get("properties"), f"{self._where}, {name[:80]}")
        parts = []
        for chunk in state.get("chunks") or ():
            one = _state(chunk, "ChunkStorageMetadata", self._where)
            offset, sizes = (_size(one.get(key), self._where) for key in ("offsets", "sizes"))
            places = list(zip(offset, sizes, shape, strict=False))
            fits = len(offset) == len(sizes) == len(shape)
            if not fits or any(begin + n > whole for begin, n, whole in places):
                raise FormatInvalid(self._where, f"a chunk of {name[:80]!r} is outside of it")
            file, begin, length = self._place(name, offset)
            parts.append((offset, read_tensor(file, begin, length, dtype, sizes)))
        if len(parts) == 1 and tuple(parts[0][1].shape) == shape:
            return parts[0][1]
        parts = [part for part in parts if part[1].numel()]
        if sum(part.numel() for _, part in parts) != math.prod(shape):
            raise FormatInvalid(self._where, f"the chunks of {name[:80]!r} do not make it up")
        return Chunks(shape, tuple(parts)) if parts else torch.empty(shape, dtype=dtype)

    def _value(self, name: str) -> Any:
        file, begin, length = self._place(name, ())
        if length > MAX_PICKLE_BYTES:
            raise FormatInvalid(str(file.path), f"the value {name[:80]!r} has {length} bytes")
        try:
            stream: Any = Slice(file, begin, length)
            return torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:
            # Whatever it is that torch's reader raises.
            text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise Refused(
                f"{name} in {self._source} can only be loaded by executing what it says, which "
                f"Everstep does not ({text}). Take the parts without it: --part NAME=KEY. Nothing "
                "was imported."
            ) from error

    def _place(self, name: str, offset: _Offset) -> tuple[MappedFile, int, int]:
        """The file in which something is, where, and how many bytes it has."""
        info = self._stored.get((name, offset)) or self._stored.get((name, ()))
        if info is None:
            raise FormatInvalid(self._where, f"it does not say where {name[:80]!r} is")
        if info.get("transform_descriptors"):
            raise Refused(
                f"{name} in {self._source} is compressed or otherwise transformed, which cannot be "
                "mapped. Save it again without an extension. Nothing was imported."
            )
        file, begin, length = (info.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise FormatInvalid(self._where, f"{str(file)[:80]!r} is no name of a file beside it")
        if type(begin) is not int or type(length) is not int or min(begin, length) < 0:
            raise FormatInvalid(self._where, f"{name[:80]!r} has no place in {file[:80]}")
        if file not in self._files:
            self._files[file] = MappedFile(self._source / file)
        if begin + length > self._files[file].size:
            raise FormatInvalid(str(self._source / file), f"it is too short for {name[:80]!r}")
        return self._files[file], begin, length


def _metadata(path: Path) -> object:
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise FormatInvalid(str(path), "it is too long for metadata")
        return unpickled(path.read_bytes(), _ALLOWED, str(path))
    except OSError as error:
        raise FormatInvalid(str(path), f"it cannot be read: {error}") from error


def _state(thing: object, name: str, where: str) -> Mapping[str, Any]:
    if isinstance(thing, Instance) and thing.cls.name == name and isinstance(thing.state, dict):
        return thing.state
    raise FormatInvalid(where, f"something is no {name}")


def _dict(thing: object, where: str) -> Mapping[Any, Any]:
    if isinstance(thing, dict):
        return thing
    raise FormatInvalid(where, "something is missing")


def _size(thing: object, where: str) -> tuple[int, ...]:
    """A torch.Size, as lengths or as an offset."""
    numbers = thing.arguments[0] if isinstance(thing, Call) and thing.arguments else thing
    if isinstance(numbers, list | tuple) and all(type(n) is int and n >= 0 for n in numbers):
        return tuple(numbers)
    raise FormatInvalid(where, "something is no size")


def _dtype(properties: object, where: str) -> torch.dtype:
    state = properties.state if isinstance(properties, Instance) else None
    named = state[0] if isinstance(state, tuple) and state else None
    dtype = getattr(torch, named.name, None) if isinstance(named, Global) else None
    if isinstance(dtype, torch.dtype):
        return dtype
    raise FormatInvalid(where, "it has no type")


class _Branch(dict[Any, Any]):
    """A container under construction; a list if its keys are numbers."""


def _plant(root: dict[Any, Any], path: tuple[Any, ...], leaf: object, where: str) -> None:
    branch = root
    for key in path[:-1]:
        branch = branch.setdefault(key, _Branch())
        if not isinstance(branch, _Branch):
            raise FormatInvalid(where, f"something lies inside of {str(key)[:80]!r}, a leaf")
    if path[-1] in branch:
        raise FormatInvalid(where, f"{str(path[-1])[:80]!r} is there twice")
    branch[path[-1]] = leaf


def _grown(branch: dict[Any, Any]) -> Any:
    grown = {key: _grown(x) if isinstance(x, _Branch) else x for key, x in branch.items()}
    if grown and all(type(key) is int for key in grown) and set(grown) == set(range(len(grown))):
        return [grown[index] for index in range(len(grown))]
    return grown
