"""The CUDA runtime through a fake of it: real ctypes calls, real error codes, the native loop."""

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels.cuda_runtime import CudaFailure, CudaRuntime
from everstep.kernels.native import Isa
from tests.unit.fake_cuda import PORTABLE, FakeCuda, Mapping, can_compile

pytestmark = pytest.mark.skipif(not can_compile(), reason="no g++ to build the fake runtime with")
ISAS: list[Isa] = [0, "reference"]
PAGE = mmap.PAGESIZE


@pytest.fixture
def cuda(tmp_path: Path) -> FakeCuda:
    return FakeCuda(tmp_path)


def table(*rows: tuple[int, int, int]) -> numpy.ndarray[Any, numpy.dtype[numpy.uint64]]:
    return numpy.array(rows, dtype=numpy.uint64).reshape(len(rows), 3)


def maps_file(folder: Path, *paths: str) -> Path:
    rows = (f"7f00-7f10 r-xp 00000000 00:1f 12345          {path}\n" for path in paths)
    maps = folder / "maps"
    maps.write_text("7ffc1000-7ffc2000 rw-p 00000000 00:00 0    [stack]\n" + "".join(rows))
    return maps


def test_the_library_that_is_loaded_is_found(cuda: FakeCuda, tmp_path: Path) -> None:
    assert str(cuda.path) in Path("/proc/self/maps").read_text()
    found = CudaRuntime.find(maps_file(tmp_path, "/usr/lib/libc.so.6", str(cuda.path)))
    assert found is not None
    memory = Mapping(PAGE)
    found.register(memory.address, PAGE)
    assert [row[0] for row in cuda.ranges()] == [memory.address]


def test_what_cannot_be_used_is_passed_over(cuda: FakeCuda, tmp_path: Path) -> None:
    deleted = "/nowhere/libcudart.so.12 (deleted)"
    missing = "/nowhere/libcudart-d0da41ae.so.11.0"
    assert CudaRuntime.find(maps_file(tmp_path, deleted, missing, str(cuda.path))) is not None


def test_without_a_loaded_library_none_is_found(tmp_path: Path) -> None:
    not_loaded = tmp_path / "libcudart.so.12"
    not_loaded.write_bytes(b"")
    assert CudaRuntime.find(maps_file(tmp_path, str(not_loaded))) is None
    assert CudaRuntime.find(maps_file(tmp_path, "/usr/lib/libcudart_helper.txt")) is None
    assert CudaRuntime.find(tmp_path / "no such file") is None


def test_a_file_that_is_not_loaded_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "libcudart.so.12"
    path.write_bytes(FakeCuda(tmp_path).path.read_bytes())
    assert CudaRuntime.find(maps_file(tmp_path, str(path))) is None
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_memory_is_registered_portably_and_unregistered(cuda: FakeCuda) -> None:
    memory = Mapping(2 * PAGE)
    cuda.runtime.register(memory.address, 2 * PAGE)
    assert cuda.ranges() == [(memory.address, 2 * PAGE, PORTABLE, 0)]
    cuda.runtime.unregister(memory.address)
    assert cuda.ranges() == []


def provocations(cuda: FakeCuda) -> dict[str, Callable[[], object]]:
    memory = Mapping(PAGE)
    cuda.runtime.register(memory.address, PAGE)
    cuda.control.fake_fail_device(100)
    crossing = table((memory.address - 1, memory.address, 2))
    return {
        "register": lambda: cuda.runtime.register(memory.address, PAGE),
        "unregister": lambda: cuda.runtime.unregister(memory.address + 1),
        "copy": lambda: cuda.runtime.copy_async(crossing, 0),
        "reference copy": lambda: cuda.runtime.copy_async(crossing, 0, isa="reference"),
        "current device": cuda.runtime.current_device,
        "enter thread": lambda: cuda.runtime.enter_thread(8),
    }


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("register", 712),
        ("unregister", 713),
        ("copy", 1),
        ("reference copy", 1),
        ("current device", 100),
        ("enter thread", 101),
    ],
)
def test_a_failure_is_named_and_leaves_no_error(cuda: FakeCuda, call: str, code: int) -> None:
    with pytest.raises(CudaFailure) as caught:
        provocations(cuda)[call]()
    name = "cudaErrorInvalidValue" if code == 1 else "cudaErrorOther"
    assert (caught.value.code, caught.value.name) == (code, name)
    assert f"{name} ({code}), " in str(caught.value)
    assert cuda.control.fake_last_error() == 0


@pytest.mark.parametrize(("code", "says_shutdown"), [(4, True), (709, True), (1, False)])
def test_a_shutdown_is_told_from_an_error(code: int, says_shutdown: bool) -> None:
    assert CudaFailure("call", code, "name", "meaning").is_shutdown == says_shutdown


@pytest.mark.parametrize("isa", ISAS)
def test_copies_happen_in_order(cuda: FakeCuda, isa: Isa) -> None:
    memory = Mapping(PAGE)
    memory.bytes[:6] = b"abcdef"
    at = memory.address
    # The second reads what the first wrote; the empty one has no memory behind it.
    cuda.runtime.copy_async(table((at + 8, at, 3), (3, 5, 0), (at + 16, at + 8, 2)), 0, isa)
    assert memory.bytes[8:18] == b"abc\0\0\0\0\0ab"
    assert cuda.control.fake_copies() == 2


@pytest.mark.parametrize("isa", ISAS)
def test_no_copies_are_none(cuda: FakeCuda, isa: Isa) -> None:
    cuda.runtime.copy_async(table(), 7, isa)
    assert cuda.control.fake_copies() == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("row", [0, 3, 9])
def test_the_first_refused_copy_ends_the_loop(cuda: FakeCuda, isa: Isa, row: int) -> None:
    memory = Mapping(PAGE)
    memory.bytes[:10] = b"0123456789"
    copies = table(*((memory.address + 64 + at, memory.address + at, 1) for at in range(10)))
    cuda.control.fake_fail_copy(row)
    with pytest.raises(CudaFailure, match=f"copy {row}, cudaMemcpyAsync") as caught:
        cuda.runtime.copy_async(copies, 0, isa)
    assert (caught.value.code, caught.value.row) == (999, row)
    assert memory.bytes[64:74] == b"0123456789"[:row] + bytes(10 - row)
    assert cuda.control.fake_last_error() == 0
    cuda.runtime.copy_async(copies[row:], 0, isa)
    assert memory.bytes[64:74] == b"0123456789"


SPANS = st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(0, 100))


@given(st.lists(SPANS, max_size=20), st.integers(-1, 20))
def test_native_and_reference_do_the_same(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int, int]], fails_at: int
) -> None:
    cuda = shared_fake(tmp_path_factory)
    outcomes = []
    for isa in ISAS:
        memory = Mapping(2 * PAGE)
        memory.bytes[:1000] = bytes(index % 251 for index in range(1000))
        at = memory.address
        # Not overlapping, as the kernels' contract is: from the first page to the second.
        copies = table(*((at + PAGE + to, at + start, size) for to, start, size in spans))
        cuda.control.fake_fail_copy(fails_at)
        try:
            cuda.runtime.copy_async(copies, 0, isa)
            failed = None
        except CudaFailure as failure:
            failed = (failure.code, failure.row)
        outcomes.append((failed, memory.bytes.raw))
    assert outcomes[0] == outcomes[1]


_shared: list[FakeCuda] = []


def shared_fake(factory: pytest.TempPathFactory) -> FakeCuda:
    if not _shared:
        _shared.append(FakeCuda(factory.mktemp("fake")))
    return _shared[0]


@pytest.mark.parametrize(
    "wrong",
    [
        numpy.zeros((2, 3), dtype=numpy.int64),
        numpy.zeros((2, 2), dtype=numpy.uint64),
        numpy.zeros(3, dtype=numpy.uint64),
        numpy.zeros((4, 3), dtype=numpy.uint64)[::2],
    ],
)
def test_a_wrong_table_is_refused(cuda: FakeCuda, wrong: Any) -> None:
    with pytest.raises(ValueError, match="table"):
        cuda.runtime.copy_async(wrong, 0)


def test_a_thread_chooses_its_device_and_relaxes(cuda: FakeCuda) -> None:
    assert cuda.runtime.current_device() == 0
    cuda.runtime.enter_thread(3)
    assert cuda.runtime.current_device() == 3
    assert cuda.control.fake_capture_mode() == 2


def test_a_forked_child_reaches_nothing(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = provocations(cuda)
    before = cuda.control.fake_registrations(), cuda.control.fake_copies()
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    for call in calls.values():
        with pytest.raises(CudaFailure, match="after a fork"):
            call()
    assert (cuda.control.fake_registrations(), cuda.control.fake_copies()) == before


def test_a_library_that_lacks_a_function_is_none() -> None:
    with pytest.raises(AttributeError):
        CudaRuntime(ctypes.CDLL("libc.so.6"))
