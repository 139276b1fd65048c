"""Loads libeverstep_kernels.so and gives its functions their types.

Owns the search for the library and the check that it was built from these sources' ABI. Promises
that an import either yields a library that fits or raises ImportError with the way out. Does not
check arguments: `digest`, `capture`, `gf256`, `cuda_runtime` and `optimizer_native` do, and nobody
else calls `library`.
"""

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy

from everstep import kernels

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ABI = 4
LIBRARY_NAME = "libeverstep_kernels.so"
DIGEST_BYTES = 16

Isa: TypeAlias = int | Literal["reference"]
"""Which code runs: 0 the best there is, 1 scalar, 2 AVX2, 3 AVX-512, or the Python reference."""

_ADDRESS = ctypes.c_void_p
_BYTE = ctypes.c_char
_SIZE = ctypes.c_uint64
_ISA = ctypes.c_int
_RANGE = (_ADDRESS, _SIZE, _ADDRESS, _SIZE, _SIZE, _SIZE, _SIZE)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "everstep_abi": (ctypes.c_uint32, ()),
    "everstep_best_isa": (_ISA, ()),
    "everstep_digest_units": (None, (_ADDRESS, _SIZE, _SIZE, _ADDRESS, _ISA)),
    "everstep_verify_units": (_SIZE, (_ADDRESS, _SIZE, _SIZE, _ADDRESS, _ADDRESS, _ISA)),
    "everstep_capture_units": (None, (*_RANGE, _ADDRESS, _ISA)),
    "everstep_restore_units": (_SIZE, (*_RANGE, _ADDRESS, _ADDRESS, _ISA)),
    "everstep_sample": (
        None,
        (_ADDRESS, _ADDRESS, _SIZE, ctypes.c_uint32, _SIZE, _ADDRESS),
    ),
    "everstep_gf256_accumulate": (None, (ctypes.c_uint8, _ADDRESS, _ADDRESS, _SIZE, _ISA)),
    "everstep_gf256_dots": (
        None,
        (_ADDRESS, _SIZE, _SIZE, _ADDRESS, _ADDRESS, _ADDRESS, _SIZE, _ISA),
    ),
    "everstep_optimizer_step": (
        None,
        (_ADDRESS, _SIZE, ctypes.c_int, _ADDRESS, _ADDRESS, _SIZE, _SIZE, _ISA),
    ),
    "everstep_copy_each": (
        ctypes.c_int,
        (_ADDRESS, _ADDRESS, _SIZE, ctypes.c_int, _ADDRESS, _ADDRESS),
    ),
}


def find_library(folders: Iterable[str]) -> Path:
    """Return the library in `folders`, the newest if several hold one.

    Raises:
        ImportError: If there is none.
    """
    candidates = [Path(folder) / LIBRARY_NAME for folder in folders]
    found = [path for path in candidates if path.exists()]
    if not found:
        looked = ", ".join(str(path.parent) for path in candidates) or "no folder at all"
        raise ImportError(
            f"{LIBRARY_NAME} was not found; looked in {looked}. Build it with `make kernels` in a "
            "checkout, or install Everstep again (`pip install everstep`)."
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def load_library(path: Path) -> ctypes.CDLL:
    """Load the library at `path` and type its functions.

    Raises:
        ImportError: If it cannot be loaded, or was built for another ABI.
    """
    try:
        loaded = ctypes.CDLL(str(path))
        found = int(loaded.everstep_abi())
    except (OSError, AttributeError) as error:
        raise ImportError(
            f"{path} cannot be used: {error}. Build it for this machine with `make kernels`, or "
            "install Everstep again."
        ) from error
    if found != ABI:
        raise ImportError(
            f"{path} was built for ABI {found}, and this version of Everstep needs {ABI}. Build "
            "it anew with `make kernels`, or install Everstep again."
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = arguments
    return loaded


# `__path__` and not `__file__`: in an editable install the sources lie in the checkout and pip's
# build of the library in site-packages, where it grows old once `make kernels` has built another.
library = load_library(find_library(kernels.__path__))


def best_isa() -> int:
    """The number of the best instruction set that this machine has, see `Isa`."""
    return int(library.everstep_best_isa())


class Bytes:
    """The address of a buffer, which cannot move or be freed while this object lives.

    Args:
        buffer: Anything contiguous with the buffer protocol.
        writable: Whether native code will write to it.

    Raises:
        ValueError: If it is to be written and is read-only.
        BufferError: If it is not contiguous.

    Attributes:
        address: Of the first byte; 0 for an empty buffer.
        bytes: How many there are.
    """

    __slots__ = ("_held", "address", "bytes")

    def __init__(self, buffer: "ReadableBuffer", writable: bool = False) -> None:
        view = memoryview(buffer)
        if writable and view.readonly:
            raise ValueError("this buffer is read-only and was to be written")
        self.bytes = view.nbytes
        self.address = 0
        if not self.bytes:
            return
        # ctypes' from_buffer refuses what is read-only, such as bytes or a mapped file.
        if view.readonly or not view.c_contiguous:
            array = numpy.frombuffer(view, dtype=numpy.uint8)
            self._held: object = array
            self.address = int(array.ctypes.data)
        else:
            # Five times as fast, which a call with ten buffers of 64 KiB feels.
            self._held = _BYTE.from_buffer(view)
            self.address = ctypes.addressof(self._held)
