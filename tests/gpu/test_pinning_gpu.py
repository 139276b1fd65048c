"""A tmpfs arena registered with a real CUDA runtime: copies, refusals, forks, two processes."""

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from everstep.kernels.cuda_runtime import CudaFailure, CudaRuntime
from everstep.snapshot.pinning import PinnedArena, StagingRing
from tests.unit.fake_cuda import in_child

pytestmark = pytest.mark.gpu
MIB = 1 << 20
SLOTS = 4
SLOT_BYTES = 16 * MIB
PIECE_BYTES = 6 * MIB
DEADLINE_S = 60.0


class Arena:
    """A tmpfs file's mapping, registered slot by slot."""

    def __init__(self, path: Path, runtime: CudaRuntime) -> None:
        size = SLOTS * SLOT_BYTES
        with path.open("r+b" if path.exists() else "w+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            memory = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.bytes = (ctypes.c_uint8 * size).from_buffer(memory)
        self.address = ctypes.addressof(self.bytes)
        self.array = numpy.frombuffer(self.bytes, dtype=numpy.uint8)
        self.pinned = PinnedArena(
            self.address, SLOT_BYTES, SLOTS, runtime, piece_bytes=PIECE_BYTES, keep=self.bytes
        )


@pytest.fixture
def runtime() -> CudaRuntime:
    torch.zeros(1, device="cuda")
    found = CudaRuntime.find()
    assert found is not None, "torch has a device, and no CUDA runtime was found"
    return found


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder) / "arena"


@pytest.fixture
def arena(path: Path, runtime: CudaRuntime) -> Iterator[Arena]:
    arena = Arena(path, runtime)
    assert arena.pinned.wait(DEADLINE_S), arena.pinned.problem
    yield arena
    torch.cuda.synchronize()
    assert arena.pinned.close(DEADLINE_S)
    assert arena.pinned.problem == ""


def noise(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(256, (size,), dtype=torch.uint8, device="cuda", generator=generator)


def table(*rows: tuple[int, int, int]) -> numpy.ndarray[tuple[int, int], numpy.dtype[numpy.uint64]]:
    return numpy.array(rows, dtype=numpy.uint64)


def copy_and_compare(runtime: CudaRuntime, arena: Arena, seed: int) -> None:
    """Copy almost the whole arena out of the device, across all borders, and back."""
    source = noise(SLOTS * SLOT_BYTES - 1000, seed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    rows = table((arena.address + 500, source.data_ptr(), source.numel()))
    rows = arena.pinned.split_copies(rows)
    assert len(rows) == 3 * SLOTS
    runtime.copy_async(rows, stream.cuda_stream)
    stream.synchronize()
    assert numpy.array_equal(arena.array[500:-500], source.cpu().numpy())
    back = torch.zeros_like(source)
    stream.wait_stream(torch.cuda.current_stream())
    rows = table((back.data_ptr(), arena.address + 500, back.numel()))
    runtime.copy_async(arena.pinned.split_copies(rows, column=1), stream.cuda_stream)
    stream.synchronize()
    assert torch.equal(back, source)


def test_copies_cross_borders_once_they_are_split(runtime: CudaRuntime, arena: Arena) -> None:
    copy_and_compare(runtime, arena, seed=1)


def test_the_memory_is_really_pinned(runtime: CudaRuntime, arena: Arena) -> None:
    for slot in range(SLOTS):
        begin = slot * SLOT_BYTES
        assert torch.from_numpy(arena.array[begin : begin + 4096]).is_pinned()
    assert arena.pinned.close(DEADLINE_S)
    assert not torch.from_numpy(arena.array[:4096]).is_pinned()


def test_a_refused_copy_leaves_no_error_behind(runtime: CudaRuntime, arena: Arena) -> None:
    source = noise(MIB, 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    border = arena.address + SLOT_BYTES
    for _ in range(2):
        with pytest.raises(CudaFailure, match="cudaErrorInvalidValue") as caught:
            rows = table(
                (arena.address, source.data_ptr(), 4096),
                (border - 4096, source.data_ptr(), 8192),
            )
            runtime.copy_async(rows, stream.cuda_stream)
        assert (caught.value.code, caught.value.row) == (1, 1)
    # Torch asks for the last error after each launch of its own.
    assert torch.ones(1000, device="cuda").sum().item() == 1000
    stream.synchronize()
    copy_and_compare(runtime, arena, seed=3)


def test_refused_registrations_leave_no_error_behind(runtime: CudaRuntime, arena: Arena) -> None:
    with pytest.raises(CudaFailure, match="cudaErrorHostMemoryAlreadyRegistered"):
        runtime.register(arena.address, PIECE_BYTES)
    with pytest.raises(CudaFailure):
        runtime.register(mmap.PAGESIZE, mmap.PAGESIZE)  # nothing is ever mapped there
    with pytest.raises(CudaFailure):
        runtime.unregister(mmap.PAGESIZE)
    assert torch.ones(1000, device="cuda").sum().item() == 1000
    copy_and_compare(runtime, arena, seed=4)


def test_pinning_again_after_another_mapping(path: Path, runtime: CudaRuntime) -> None:
    for seed in (5, 6):
        arena = Arena(path, runtime)
        assert arena.pinned.wait(DEADLINE_S), arena.pinned.problem
        copy_and_compare(runtime, arena, seed)
        assert arena.pinned.close(DEADLINE_S)


def test_a_forked_child_disturbs_nothing(runtime: CudaRuntime, arena: Arena) -> None:
    def let_go() -> bool:
        held = arena.pinned.close() and not arena.pinned.is_pinned(0)
        arena.array[:1000] = 7  # the file is shared
        return held

    assert in_child(let_go)
    assert (arena.array[:1000] == 7).all()
    assert arena.pinned.is_pinned(SLOTS - 1)
    copy_and_compare(runtime, arena, seed=7)


OTHER = """
import ctypes, mmap, sys
import numpy, torch
from everstep.kernels.cuda_runtime import CudaRuntime
from everstep.snapshot.pinning import PinnedArena

slots, slot_bytes = int(sys.argv[2]), int(sys.argv[3])
with open(sys.argv[1], "r+b") as file:
    memory = (ctypes.c_uint8 * (slots * slot_bytes)).from_buffer(mmap.mmap(file.fileno(), 0))
source = torch.full((slot_bytes,), 9, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
runtime = CudaRuntime.find()
arena = PinnedArena(ctypes.addressof(memory), slot_bytes, slots, runtime, print)
assert arena.wait(60)
target = ctypes.addressof(memory) + slot_bytes
row = numpy.array([(target, source.data_ptr(), slot_bytes)], dtype=numpy.uint64)
stream = torch.cuda.Stream()
runtime.copy_async(row, stream.cuda_stream)
stream.synchronize()
print("copied", flush=True)
sys.stdin.readline()
assert arena.close() and not arena.problem
"""


def test_two_processes_pin_the_same_file(path: Path, runtime: CudaRuntime, arena: Arena) -> None:
    command = [sys.executable, "-c", OTHER, str(path), str(SLOTS), str(SLOT_BYTES)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "copied\n"
        assert (arena.array[SLOT_BYTES : 2 * SLOT_BYTES] == 9).all()
        copy_and_compare(runtime, arena, seed=8)
        other.communicate("\n", timeout=DEADLINE_S)
        assert other.returncode == 0
    finally:
        other.kill()
        other.wait()
    copy_and_compare(runtime, arena, seed=9)


def test_a_graph_can_be_recorded_meanwhile(path: Path, runtime: CudaRuntime) -> None:
    static = torch.zeros(1000, device="cuda")
    static.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # forbids unsafe calls in all threads
        static.add_(1)
        arena = Arena(path, runtime)
        assert arena.pinned.wait(DEADLINE_S), arena.pinned.problem
        static.add_(1)
    graph.replay()
    assert static.sum().item() == 3000
    copy_and_compare(runtime, arena, seed=10)
    assert arena.pinned.close(DEADLINE_S)


def test_staging_buffers_are_pinned(runtime: CudaRuntime) -> None:
    ring = StagingRing(runtime, buffers=2, buffer_bytes=4 * MIB)
    buffer = ring.acquire(DEADLINE_S)
    assert buffer is not None and buffer.pinned, ring.problem
    source = noise(buffer.bytes, 11)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    rows = table((buffer.address, source.data_ptr(), buffer.bytes))
    runtime.copy_async(rows, stream.cuda_stream)
    stream.synchronize()
    assert ctypes.string_at(buffer.address, buffer.bytes) == source.cpu().numpy().tobytes()
    buffer.release()
    assert ring.close(DEADLINE_S)


def test_a_process_that_never_closes_ends_cleanly(path: Path, runtime: CudaRuntime) -> None:
    arena = Arena(path, runtime)  # makes the file
    assert arena.pinned.close(DEADLINE_S)
    script = OTHER.partition("sys.stdin.readline()")[0]
    command = [sys.executable, "-c", script, str(path), str(SLOTS), str(SLOT_BYTES)]
    outcome = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)
    assert (outcome.returncode, outcome.stdout) == (0, b"copied\n")
    assert b"Traceback" not in outcome.stderr and b"cuda" not in outcome.stderr.lower()
