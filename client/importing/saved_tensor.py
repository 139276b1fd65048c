"""One tensor that torch.save wrote into a stretch of a file.

Owns the reading of the zip file that this is, and of the pickle in it as data, so that the tensor's
bytes can stay where they are.
"""

import io
import struct
from collections.abc import Sequence
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import torch

from everstep.client.importing.mapped import MappedFile
from everstep.client.importing.pickled import Call, Persistent, unpickled
from everstep.proto.errors import FormatInvalid

_LOCAL = struct.Struct("<4s22xHH")
_LOCAL_MARK = b"PK\x03\x04"
_MAX_PICKLE_BYTES = 1 << 20
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
_ALLOWED = (
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.storage", "UntypedStorage"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in _STORAGES),
    *(("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
)


class Slice(io.RawIOBase):
    """A stretch of a mapped file, as a file of its own."""

    def __init__(self, file: MappedFile, begin: int, size: int) -> None:
        super().__init__()
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As for any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """As for any file."""
        return self._at

    def readinto(self, target: Any) -> int:
        """As for any file."""
        room = memoryview(target).cast("B")
        size = max(0, min(len(room), self._size - self._at))
        room[:size] = self._file.read(self._begin + self._at, size)
        self._at += size
        return size


def read_tensor(
    file: MappedFile, begin: int, size: int, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """The tensor, mapped.

    Args:
        file: Where it is.
        begin: Where what torch.save wrote begins.
        size: How many bytes that has.
        dtype: What it should be.
        shape: Likewise.

    Raises:
        FormatInvalid: If it is not that, or damaged.
    """
    where = f"{file.path}, bytes {begin} to {begin + size}"
    stretch: Any = Slice(file, begin, size)
    try:
        with ZipFile(stretch) as archive:
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    except (BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise FormatInvalid(where, f"not what torch.save writes: {error}") from error
    at, length = _place(file, begin, size, entries.get("data.pkl"), where)
    if length > _MAX_PICKLE_BYTES:
        raise FormatInvalid(where, f"{length} bytes describe one tensor")
    rebuilt = unpickled(file.read(at, length), _ALLOWED, where)
    key, found, first, own_shape, stride = _described(rebuilt, where)
    if found != dtype or tuple(own_shape) != tuple(shape):
        raise FormatInvalid(where, f"it holds {found}{list(own_shape)[:8]}, not {dtype}{shape}")
    at, length = _place(file, begin, size, entries.get(f"data/{key}"), where)
    return file.tensor(dtype, at, length, shape, stride, first)


def _place(
    file: MappedFile, begin: int, size: int, info: ZipInfo | None, where: str
) -> tuple[int, int]:
    """Where a member's bytes are in the file, and how many there are."""
    if info is None or info.compress_type != ZIP_STORED:
        raise FormatInvalid(where, "something is missing in it, or compressed")
    header = file.read(begin + info.header_offset, _LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(_LOCAL_MARK):
        raise FormatInvalid(where, "a member of it is not where it should be")
    _, name, extra = _LOCAL.unpack(header)
    at = info.header_offset + _LOCAL.size + name + extra
    if at + info.file_size > size:
        raise FormatInvalid(where, "a member of it is longer than all of it")
    return begin + at, info.file_size


def _described(
    rebuilt: object, where: str
) -> tuple[str, torch.dtype, int, tuple[int, ...], tuple[int, ...]]:
    """Key of the storage, type, first element, shape and stride."""
    if isinstance(rebuilt, Call) and rebuilt.function.name == "_rebuild_parameter":
        rebuilt = rebuilt.arguments[0] if rebuilt.arguments else None
    try:
        if not isinstance(rebuilt, Call) or not isinstance(rebuilt.arguments[0], Persistent):
            raise ValueError("no storage")
        storage, first, shape, stride, *rest = rebuilt.arguments
        _, kind, key, _, _ = storage.key
        untyped = kind.name == "UntypedStorage"
        dtype = getattr(torch, rest[2].name, None) if untyped else _STORAGES.get(kind.name)
        if not isinstance(dtype, torch.dtype) or type(first) is not int:
            raise ValueError("no type")
        return str(key), dtype, first, _numbers(shape), _numbers(stride)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise FormatInvalid(where, "it is no tensor as torch.save writes one") from error


def _numbers(thing: object) -> tuple[int, ...]:
    numbers = thing.arguments[0] if isinstance(thing, Call) else thing
    if isinstance(numbers, tuple | list) and all(type(number) is int for number in numbers):
        return tuple(numbers)
    raise ValueError("no numbers")
