"""The few functions of the CUDA runtime that capture needs beside torch.

Owns the search for the runtime library that this process has loaded already (torch's; none is ever
loaded here), the check of every return code, and the loop over many copies. Promises that a call
which fails raises `CudaFailure` and leaves no error behind: the runtime remembers the last one for
each thread, and torch would blame it on the next innocent kernel. Promises that a forked child
never reaches the library through a `CudaRuntime` of its parent. Does not check addresses, keep
memory alive, or wait for anything that it enqueued.
"""

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy
from numpy.typing import NDArray

from everstep.kernels.native import Isa, library

_REGISTER_PORTABLE = 1
_COPY_DEFAULT = 4
"""The runtime sees from the addresses which of the two is on a device."""
_CAPTURE_MODE_RELAXED = 2
_INITIALIZATION_ERROR = 3
_GOING_AWAY = frozenset({4, 709})
"""cudaErrorCudartUnloading and cudaErrorContextIsDestroyed: what it held is gone already."""

_LIBRARY_PATH = re.compile(r"\S*/libcudart[^/\s]*\.so[.\d]*$")
_ADDRESS = ctypes.c_void_p
_SIGNATURES = {
    "cudaHostRegister": (_ADDRESS, ctypes.c_size_t, ctypes.c_uint),
    "cudaHostUnregister": (_ADDRESS,),
    "cudaMemcpyAsync": (_ADDRESS, _ADDRESS, ctypes.c_size_t, ctypes.c_int, _ADDRESS),
    "cudaGetDevice": (ctypes.POINTER(ctypes.c_int),),
    "cudaSetDevice": (ctypes.c_int,),
    "cudaThreadExchangeStreamCaptureMode": (ctypes.POINTER(ctypes.c_int),),
    "cudaGetLastError": (),
}


class CudaFailure(RuntimeError):
    """The runtime refused a call.

    Attributes:
        code: The runtime's number, e.g. 1.
        name: Its name, e.g. ``cudaErrorInvalidValue``.
        row: Of `CudaRuntime.copy_async`: the copy that was refused. Those before it are enqueued.
    """

    def __init__(self, call: str, code: int, name: str, meaning: str, row: int = 0) -> None:
        super().__init__(f"{call}: {name} ({code}), {meaning}")
        self.code = code
        self.name = name
        self.row = row

    @property
    def is_shutdown(self) -> bool:
        """Whether it says no more than that the runtime or the device's context has ended."""
        return self.code in _GOING_AWAY


class CudaRuntime:
    """A CUDA runtime library, for the process that made this object.

    Args:
        loaded: The library.

    Raises:
        AttributeError: If it lacks a function.
    """

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._pid = os.getpid()
        self._library = loaded
        for name, arguments in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype = ctypes.c_int
            function.argtypes = arguments
        for name in ("cudaGetErrorName", "cudaGetErrorString"):
            function = getattr(loaded, name)
            function.restype = ctypes.c_char_p
            function.argtypes = (ctypes.c_int,)
        self._copy = ctypes.cast(loaded.cudaMemcpyAsync, ctypes.c_void_p).value

    @classmethod
    def find(cls, maps: Path = Path("/proc/self/maps")) -> "CudaRuntime | None":
        """Return the runtime that this process has loaded; None without one that can be used.

        Args:
            maps: The list of what the process has mapped.
        """
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:
            return None
        found = (_LIBRARY_PATH.search(line) for line in lines)
        for path in dict.fromkeys(match[0] for match in found if match):
            try:
                # What has been deleted or lies in another namespace must not be loaded anew.
                return cls(ctypes.CDLL(path, mode=os.RTLD_NOLOAD))
            except (OSError, AttributeError):
                continue
        return None

    def register(self, address: int, size: int) -> None:
        """Pin host memory, for all devices.

        Raises:
            CudaFailure: If it cannot be, or is already.
        """
        code = self._function("cudaHostRegister")(address, size, _REGISTER_PORTABLE)
        self._check(code, f"cudaHostRegister({address:#x}, {size})")

    def unregister(self, address: int) -> None:
        """Undo `register`, given the same address.

        Raises:
            CudaFailure: If nothing is registered there.
        """
        code = self._function("cudaHostUnregister")(address)
        self._check(code, f"cudaHostUnregister({address:#x})")

    def copy_async(self, table: NDArray[numpy.uint64], stream: int, isa: Isa = 0) -> None:
        """Enqueue copies between any two of host and devices, in order.

        Sources and targets have to stay where they are until the stream has come past. A copy
        from or to host memory that is not pinned may block this thread.

        Args:
            table: One (target, source, bytes) a row.
            stream: The stream's handle, `torch.cuda.Stream.cuda_stream`.
            isa: "reference" for the Python reference; the native code knows no other choice.

        Raises:
            ValueError: If the table has another shape or type, or is not contiguous.
            CudaFailure: If a copy is refused. None after it was tried.
        """
        if table.dtype != numpy.uint64 or table.ndim != 2 or table.shape[1] != 3:
            raise ValueError(f"a table of {table.dtype} {table.shape}; uint64 [n, 3] is needed")
        if not table.flags.c_contiguous:
            raise ValueError("the table of copies is not contiguous")
        if isa == "reference":
            self._reference_copies(table, stream)
            return
        self._function("cudaMemcpyAsync")
        done = ctypes.c_uint64()
        code = library.everstep_copy_each(
            self._copy,
            table.ctypes.data,
            len(table),
            _COPY_DEFAULT,
            stream,
            ctypes.addressof(done),
        )
        if code:
            self._refuse_row(code, table, done.value)

    def current_device(self) -> int:
        """The device that this thread uses unless told otherwise.

        Raises:
            CudaFailure: If there is none.
        """
        device = ctypes.c_int()
        code = self._function("cudaGetDevice")(ctypes.byref(device))
        self._check(code, "cudaGetDevice")
        return device.value

    def enter_thread(self, device: int) -> None:
        """Make this thread, one of our own, one that disturbs nobody.

        It uses `device` from now on: a thread that never said so takes device 0, and every rank of
        a node would allocate a context there. And nothing it does breaks a CUDA graph that
        another thread is recording at the time.

        Raises:
            CudaFailure: If the device cannot be used.
        """
        code = self._function("cudaSetDevice")(device)
        self._check(code, f"cudaSetDevice({device})")
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        code = self._function("cudaThreadExchangeStreamCaptureMode")(ctypes.byref(mode))
        self._check(code, "cudaThreadExchangeStreamCaptureMode")

    def _reference_copies(self, table: NDArray[numpy.uint64], stream: int) -> None:
        copy = self._function("cudaMemcpyAsync")
        for row, (target, source, size) in enumerate(table.tolist()):
            code = copy(target, source, size, _COPY_DEFAULT, stream) if size else 0
            if code:
                self._refuse_row(code, table, row)

    def _refuse_row(self, code: int, table: NDArray[numpy.uint64], row: int) -> None:
        target, source, size = table[row].tolist()
        self._check(code, f"copy {row}, cudaMemcpyAsync({target:#x}, {source:#x}, {size})", row)

    def _function(self, name: str) -> Callable[..., int]:
        if os.getpid() != self._pid:
            raise CudaFailure(
                name, _INITIALIZATION_ERROR, "cudaErrorInitializationError", "CUDA after a fork"
            )
        function: Callable[..., int] = getattr(self._library, name)
        return function

    def _check(self, code: int, call: str, row: int = 0) -> None:
        if not code:
            return
        self._library.cudaGetLastError()
        name = self._library.cudaGetErrorName(code) or b"unknown"
        meaning = self._library.cudaGetErrorString(code) or b"unknown"
        raise CudaFailure(call, code, name.decode(), meaning.decode(), row)
