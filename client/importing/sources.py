"""What a checkpoint holds, before it is decided what becomes of it.

Owns the tree that all formats are read as. Its leaves are tensors that lie in files, plain values,
`Chunks` of tensors that were stored in parts, and `Later` for what is read only if it is wanted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everstep.proto.errors import Refused

FORMATS = ("auto", "dcp", "safetensors", "torch")
INDEX_SUFFIX = ".safetensors.index.json"
_ZIP_MARK = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Chunks:
    """A tensor that was stored in parts.

    Attributes:
        shape: Of the whole.
        parts: Offset in it, and tensor, of each.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], torch.Tensor], ...]


@dataclass(frozen=True, slots=True)
class Later:
    """A leaf that is read when it is wanted."""

    is_tensor: bool
    read: Callable[[], Any]


def is_tensor(leaf: object) -> bool:
    """Whether a leaf is a tensor, or will be one."""
    return isinstance(leaf, torch.Tensor | Chunks) or (isinstance(leaf, Later) and leaf.is_tensor)


def has_tensors(thing: object) -> bool:
    """Whether there is one in it."""
    return any(map(is_tensor, leaves(thing)))


def leaves(thing: Any) -> Iterator[Any]:
    """All leaves of a tree."""
    if isinstance(thing, dict):
        for value in thing.values():
            yield from leaves(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from leaves(value)
    else:
        yield thing


def format_of(source: Path) -> str:
    """Which format a checkpoint has, by what it is.

    Raises:
        Refused: If it is none that can be imported.
    """
    if source.is_dir():
        if (source / ".metadata").is_file():
            return "dcp"
        if list(source.glob(f"*{INDEX_SUFFIX}")) or list(source.glob("*.safetensors")):
            return "safetensors"
        raise Refused(
            f"{source} has neither a .metadata of a distributed checkpoint nor safetensors in it. "
            "Name the checkpoint itself. Nothing was imported."
        )
    if not source.is_file():
        raise Refused(f"{source} is not there. Nothing was imported.")
    if source.name.endswith((".safetensors", INDEX_SUFFIX)):
        return "safetensors"
    with source.open("rb") as file:
        begin = file.read(16)
    if begin.startswith(_ZIP_MARK):
        return "torch"
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < 1 << 30:
        return "safetensors"
    raise Refused(
        f"{source} is no safetensors file, and no file that torch.save writes today. One of an "
        "older torch: load it with the program that wrote it, and save it again. Nothing was "
        "imported."
    )
