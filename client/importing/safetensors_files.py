"""Safetensors, mapped: one file, or several with a Hugging Face index.

Owns the reading of headers and of the index. Promises that sizes are checked before anything is
believed, that names of files in an index stay in its directory, and that what two files claim is an
error.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from everstep.client.importing.mapped import MappedFile
from everstep.client.importing.sources import INDEX_SUFFIX
from everstep.proto.errors import FormatInvalid, Refused
from everstep.snapshot.tree import unflatten

_MAX_HEADER_BYTES = 100_000_000  # safetensors refuses longer ones
_MAX_DIMENSIONS = 64
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(source: Path) -> dict[str, Any]:
    """The tensors by name; those of an export of several parts as a tree.

    Raises:
        FormatInvalid: If a file is damaged, or missing.
        Refused: If it is not clear which file is meant.
    """
    ours = False
    found: dict[str, Any] = {}
    for path, wanted in _files(source):
        tensors, metadata = _read(path)
        ours = ours or "everstep" in metadata
        if wanted is not None and not wanted <= tensors.keys():
            missing = ", ".join(sorted(wanted - tensors.keys())[:5])
            raise FormatInvalid(str(path), f"the index says that it holds {missing}")
        chosen = tensors if wanted is None else {n: t for n, t in tensors.items() if n in wanted}
        twice = chosen.keys() & found.keys()
        if twice:
            raise FormatInvalid(str(path), f"{min(twice)} is in another file, too")
        found |= chosen
    if ours and found and all("/" in name for name in found):
        # Names are paths there, unless a single part was exported.
        return dict(unflatten(found, {}, {}))
    return found


def _files(source: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The files, and which of their tensors count; None for all."""
    if source.is_dir():
        indices = sorted(source.glob(f"*{INDEX_SUFFIX}"))
        files = sorted(source.glob("*.safetensors"))
        if len(indices) > 1 or (not indices and len(files) > 1):
            raise Refused(
                f"{source} holds several checkpoints, or files without an index. Name the file, or "
                "the index. Nothing was imported."
            )
        source = (indices or files)[0]
    if not source.name.endswith(INDEX_SUFFIX):
        yield source, None
        return
    by_file: dict[str, set[str]] = {}
    for name, file in _weight_map(source).items():
        by_file.setdefault(file, set()).add(name)
    for file, names in by_file.items():
        yield source.parent / file, names


def _weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > _MAX_HEADER_BYTES:
            raise FormatInvalid(str(index), "it is too long for an index")
        weight_map = json.loads(index.read_bytes())["weight_map"]
        pairs = list(weight_map.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatInvalid(str(index), f"not an index: {error}") from error
    for _, file in pairs:
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise FormatInvalid(str(index), f"{str(file)[:80]!r} is no name of a file beside it")
    return dict(pairs)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    file = MappedFile(path)
    length = int.from_bytes(file.read(0, 8), "little")
    if file.size < 8 or length > min(_MAX_HEADER_BYTES, file.size - 8):
        raise FormatInvalid(str(path), f"a header of {length} bytes in a file of {file.size}")
    try:
        entries = json.loads(file.read(8, length))
        metadata = entries.pop("__metadata__", {})
        tensors = {
            str(name): _tensor(file, 8 + length, entry, f"{path}, {str(name)[:80]}")
            for name, entry in entries.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatInvalid(str(path), f"its header cannot be read: {error}") from error
    return tensors, metadata if isinstance(metadata, dict) else {}


def _tensor(file: MappedFile, data: int, entry: dict[str, Any], where: str) -> torch.Tensor:
    begin, end = (_whole(number, where) for number in entry["data_offsets"])
    shape = tuple(_whole(length, where) for length in entry["shape"])
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise FormatInvalid(where, f"is of type {str(entry['dtype'])[:20]!r}, unknown here")
    if len(shape) > _MAX_DIMENSIONS or math.prod(shape) * dtype.itemsize != end - begin:
        raise FormatInvalid(where, f"{end - begin} bytes for a shape of {list(shape)[:8]}")
    return file.tensor(dtype, data + begin, end - begin, shape)


def _whole(number: object, where: str) -> int:
    if type(number) is not int or number < 0:
        raise FormatInvalid(where, f"{str(number)[:20]!r} is no size")
    return number
