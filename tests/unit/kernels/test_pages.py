"""Pages of a mapped file: there before they are touched, and let go of without a loss."""

import ctypes
import mmap
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from everstep.kernels import pages
from everstep.kernels.native import Bytes

SIZE = 64 * mmap.PAGESIZE


@pytest.fixture
def file() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(SIZE)
        yield file


def resident_bytes(address: int) -> int:
    """What of the mapping at an address is in this process's page table."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{address:x}-.*?^Rss: +(\d+) kB", maps, re.MULTILINE | re.DOTALL)
    assert found is not None
    return int(found[1]) * 1024


def test_all_pages_come_and_go_and_keep_their_bytes(file: IO[bytes]) -> None:
    memory = mmap.mmap(file.fileno(), SIZE)
    address = Bytes(memory).address
    assert resident_bytes(address) == 0
    assert pages.populate(address, SIZE)
    assert resident_bytes(address) == SIZE
    memory[SIZE - 4 :] = b"kept"
    assert pages.let_go(address, SIZE)
    assert resident_bytes(address) == 0
    assert memory[SIZE - 4 :] == b"kept"
    memory.close()


def test_a_range_that_is_not_mapped_is_told() -> None:
    assert not pages.populate(mmap.PAGESIZE, mmap.PAGESIZE)
    assert not pages.let_go(mmap.PAGESIZE, mmap.PAGESIZE)


def test_others_run_python_meanwhile() -> None:
    """ctypes gives the GIL up in calls of such libraries, and in no others."""
    assert not pages._libc._func_flags_ & ctypes._FUNCFLAG_PYTHONAPI  # type: ignore[attr-defined]
