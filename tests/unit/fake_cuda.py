"""The CUDA runtime of `fake_cudart.cpp`, compiled once and loaded anew for each test."""

import ctypes
import functools
import itertools
import mmap
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from everstep.kernels.cuda_runtime import CudaRuntime

SOURCE = Path(__file__).with_name("fake_cudart.cpp")
PORTABLE = 1
_numbers = itertools.count()


@functools.cache
def _compiled() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "libcudart.so"
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*command, SOURCE, "-o", target], check=True, timeout=60)
        return target.read_bytes()


class FakeCuda:
    """A fresh runtime without a device: its state is its own, since its file is.

    Attributes:
        path: Of the library.
        control: The library, for the functions that begin with `fake_`.
        runtime: The same, as the product sees it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"libcudart-{next(_numbers)}.so.99"
        self.path.write_bytes(_compiled())
        self.control = ctypes.CDLL(str(self.path))
        self.runtime = CudaRuntime(self.control)

    def ranges(self) -> list[tuple[int, int, int, int]]:
        """What is registered: (address, bytes, flags, device of the thread), sorted."""
        rows = (ctypes.c_uint64 * 4 * 256)()
        count = self.control.fake_ranges(rows, ctypes.c_uint64(256))
        return [(row[0], row[1], row[2], row[3]) for row in rows[:count]]


class Mapping:
    """A tmpfs file's mapping as an arena is: shared, and of a file if one is given."""

    def __init__(self, size: int, path: Path | None = None) -> None:
        if path is None:
            self._memory = mmap.mmap(-1, size)
        else:
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.truncate(size)
                self._memory = mmap.mmap(file.fileno(), size)
        self.bytes = (ctypes.c_char * size).from_buffer(self._memory)
        self.address = ctypes.addressof(self.bytes)


def can_compile() -> bool:
    """Whether this machine can build the fake."""
    return shutil.which("g++") is not None


def in_child(check: Callable[[], bool]) -> bool:
    """Whether `check` holds in a forked child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads are running: the point
        child = os.fork()
    if child == 0:
        held = False
        try:
            held = check()
        finally:
            os._exit(0 if held else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
