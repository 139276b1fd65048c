"""Staging buffers, with a fake CUDA runtime and real threads and forks."""

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

from everstep.snapshot.pinning import StagingRing
from tests.unit.fake_cuda import FakeCuda, Mapping, can_compile, in_child

pytestmark = pytest.mark.skipif(not can_compile(), reason="no g++ to build the fake runtime with")
KIB = 1024
DEADLINE_S = 30.0


@pytest.fixture
def ring(cuda: FakeCuda) -> Iterator[StagingRing]:
    ring = StagingRing(cuda.runtime, buffers=2, buffer_bytes=8 * KIB)
    yield ring
    assert ring.close(DEADLINE_S)


def test_buffers_are_pinned_and_bounded(cuda: FakeCuda, ring: StagingRing) -> None:
    assert cuda.ranges() == [] and not ring.pinned
    first, second = ring.acquire(DEADLINE_S), ring.acquire(DEADLINE_S)
    assert first is not None and second is not None
    assert ring.pinned and first.pinned and second.pinned
    assert {row[:2] for row in cuda.ranges()} == {(first.address, 8192), (second.address, 8192)}
    assert ring.acquire(0.0) is None
    first.release()
    first.release()
    again = ring.acquire(0.0)
    assert again is not None and again.address == first.address
    assert ring.acquire(0.0) is None, "released twice is one buffer"
    again.release()
    second.release()
    assert ring.close()
    assert cuda.ranges() == []
    assert ring.acquire(DEADLINE_S) is None
    assert ring.problem == ""


def test_a_released_buffer_wakes_who_waits(ring: StagingRing) -> None:
    held = [ring.acquire(DEADLINE_S), ring.acquire(DEADLINE_S)]
    got: list[bool] = []

    def wait() -> None:
        buffer = ring.acquire(DEADLINE_S)
        got.append(buffer is not None)
        if buffer is not None:
            buffer.release()

    waiting = threading.Thread(target=wait)
    waiting.start()
    for buffer in held:
        assert buffer is not None
        buffer.release()
    waiting.join(DEADLINE_S)
    assert got == [True]


def test_buffers_that_cannot_be_pinned_are_used_unpinned(cuda: FakeCuda, ring: StagingRing) -> None:
    cuda.control.fake_fail_register(0, 2)
    buffer = ring.acquire(DEADLINE_S)
    assert buffer is not None
    assert not buffer.pinned and not ring.pinned and "(2)" in ring.problem
    source = Mapping(8 * KIB)
    source.bytes[:3] = b"abc"
    row = (buffer.address, source.address, buffer.bytes)
    cuda.runtime.copy_async(numpy.array([row], dtype=numpy.uint64), 0)
    buffer.release()


def test_a_ring_needs_no_runtime() -> None:
    ring = StagingRing(None, buffers=1, buffer_bytes=8 * KIB)
    buffer = ring.acquire(0.0)
    assert buffer is not None and buffer.address and not buffer.pinned
    assert not ring.close(0.0), "a buffer is out"
    buffer.release()
    assert ring.close()


def test_a_ring_that_was_never_used_reserves_nothing(cuda: FakeCuda) -> None:
    ring = StagingRing(cuda.runtime)
    assert ring.close()
    assert cuda.control.fake_registrations() == 0


def test_a_forked_child_gets_no_buffer(cuda: FakeCuda, ring: StagingRing) -> None:
    buffer = ring.acquire(DEADLINE_S)
    assert buffer is not None

    def check() -> bool:
        buffer.release()
        return ring.acquire(DEADLINE_S) is None and ring.close() and len(cuda.ranges()) == 2

    assert in_child(check)
    assert len(cuda.ranges()) == 2
    buffer.release()


def test_a_forked_child_has_other_memory_in_place_of_the_buffers(ring: StagingRing) -> None:
    """Else either's next write makes the kernel move the page, which a device may write to."""
    buffer = ring.acquire(DEADLINE_S)
    assert buffer is not None
    ctypes.memmove(buffer.address, b"abc", 3)
    assert in_child(lambda: ctypes.string_at(buffer.address, 3) == bytes(3))
    assert ctypes.string_at(buffer.address, 3) == b"abc"
    buffer.release()


def test_buffers_lie_in_huge_pages_if_the_kernel_has_them(ring: StagingRing) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without huge pages")
    buffer = ring.acquire(DEADLINE_S)
    assert buffer is not None
    flags, here = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            begin, end = (int(each, 16) for each in first.split("-"))
            here = begin <= buffer.address < end
        elif here and first == "VmFlags:":
            flags = rest.split()
    assert "hg" in flags
    buffer.release()
