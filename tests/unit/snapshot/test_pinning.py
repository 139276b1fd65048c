"""Pinned arenas, with a fake CUDA runtime and real threads and forks."""

import atexit
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.kernels.cuda_runtime import CudaFailure
from everstep.snapshot.pinning import PinnedArena
from tests.unit.fake_cuda import PORTABLE, FakeCuda, Mapping, can_compile, in_child

pytestmark = pytest.mark.skipif(not can_compile(), reason="no g++ to build the fake runtime with")
KIB = 1024
SLOT_BYTES = 40 * KIB
PIECE_BYTES = 16 * KIB  # two and a half a slot
SLOTS = 3
DEADLINE_S = 30.0


class Scene:
    """An arena's mapping, its pinning, and what was said of it."""

    def __init__(self, cuda: FakeCuda, device: int | None = None, path: Path | None = None) -> None:
        self.memory = Mapping(SLOTS * SLOT_BYTES, path)
        self.problems: list[str] = []
        self.arena = PinnedArena(
            self.memory.address,
            SLOT_BYTES,
            SLOTS,
            cuda.runtime,
            self.problems.append,
            device=device,
            piece_bytes=PIECE_BYTES,
        )


@pytest.fixture
def scene(cuda: FakeCuda) -> Iterator[Scene]:
    scene = Scene(cuda)
    yield scene
    cuda.control.fake_gate(0)
    assert scene.arena.close(DEADLINE_S)


def pieces(address: int, slots: int = SLOTS) -> list[tuple[int, int]]:
    """The registered pieces of an arena's first slots."""
    sizes = ((0, 16 * KIB), (16 * KIB, 16 * KIB), (32 * KIB, 8 * KIB))
    return [
        (address + slot * SLOT_BYTES + begin, size)
        for slot in range(slots)
        for begin, size in sizes
    ]


def test_all_slots_are_pinned_and_unpinned_in_pieces(cuda: FakeCuda, scene: Scene) -> None:
    assert scene.arena.wait(DEADLINE_S)
    assert [row[:2] for row in cuda.ranges()] == pieces(scene.memory.address)
    assert {row[2] for row in cuda.ranges()} == {PORTABLE}
    assert [scene.arena.is_pinned(slot) for slot in range(SLOTS + 1)] == [True] * SLOTS + [False]
    assert scene.arena.close()
    assert cuda.ranges() == []
    assert not scene.arena.is_pinned(0)
    assert scene.arena.close(), "again does nothing"
    assert (scene.problems, scene.arena.problem) == ([], "")


def test_pinning_happens_in_the_background_slot_by_slot(cuda: FakeCuda) -> None:
    cuda.control.fake_gate(1)
    scene = Scene(cuda)
    assert cuda.control.fake_wait_at_gate(int(DEADLINE_S * 1000))
    assert not scene.arena.is_pinned(0)
    assert not scene.arena.wait(0.0)
    cuda.control.fake_gate(0)
    assert scene.arena.wait(DEADLINE_S)
    assert scene.arena.close()


def test_all_pages_are_there_before_a_slot_is_pinned(cuda: FakeCuda) -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(SLOTS * SLOT_BYTES)
        file.seek(SLOT_BYTES)
        file.write(b"kept")
        file.flush()
        memory = Mapping(SLOTS * SLOT_BYTES, Path(f"/proc/self/fd/{file.fileno()}"))
        cuda.control.fake_gate(1)
        arena = PinnedArena(
            memory.address,
            SLOT_BYTES,
            SLOTS,
            cuda.runtime,
            piece_bytes=PIECE_BYTES,
            populate_threads=2,
        )
        try:
            assert cuda.control.fake_wait_at_gate(int(DEADLINE_S * 1000))
            # The first slot's, and the page of the second one that was written to.
            assert os.fstat(file.fileno()).st_blocks * 512 == SLOT_BYTES + mmap.PAGESIZE
            cuda.control.fake_gate(0)
            assert arena.wait(DEADLINE_S)
            assert os.fstat(file.fileno()).st_blocks * 512 == SLOTS * SLOT_BYTES
            assert memory.bytes[SLOT_BYTES : SLOT_BYTES + 4] == b"kept"
        finally:
            cuda.control.fake_gate(0)
            assert arena.close(DEADLINE_S)


@pytest.mark.parametrize(("wanted", "expected"), [(None, 0), (5, 5)])
def test_the_thread_uses_the_device_and_breaks_no_graph(
    cuda: FakeCuda, wanted: int | None, expected: int
) -> None:
    scene = Scene(cuda, device=wanted)
    assert scene.arena.wait(DEADLINE_S)
    assert {row[3] for row in cuda.ranges()} == {expected}
    assert cuda.control.fake_relaxed_calls() == len(cuda.ranges())
    assert (cuda.control.fake_capture_mode(), cuda.runtime.current_device()) == (0, 0)
    assert scene.arena.close()


def test_the_device_is_that_of_the_constructing_thread(cuda: FakeCuda) -> None:
    cuda.runtime.enter_thread(2)
    scene = Scene(cuda)
    assert scene.arena.wait(DEADLINE_S)
    assert {row[3] for row in cuda.ranges()} == {2}
    assert scene.arena.close()


@pytest.mark.parametrize("fails_at", range(3 * SLOTS))
def test_a_refused_piece_costs_its_slot_and_the_later_ones(cuda: FakeCuda, fails_at: int) -> None:
    cuda.control.fake_fail_register(fails_at, 2)
    scene = Scene(cuda)
    assert not scene.arena.wait(DEADLINE_S)
    whole = fails_at // 3
    assert [scene.arena.is_pinned(slot) for slot in range(SLOTS)] == [
        slot < whole for slot in range(SLOTS)
    ]
    assert scene.arena.close()
    assert len(scene.problems) == 1
    assert scene.problems[0] == scene.arena.problem
    assert "cudaHostRegister(0x" in scene.arena.problem and "(2)" in scene.arena.problem
    assert cuda.ranges() == []


def test_half_a_slot_does_not_stay_pinned(cuda: FakeCuda) -> None:
    told = threading.Event()
    memory = Mapping(SLOTS * SLOT_BYTES)
    cuda.control.fake_fail_register(5, 2)
    arena = PinnedArena(
        memory.address,
        SLOT_BYTES,
        SLOTS,
        cuda.runtime,
        lambda problem: told.set(),
        piece_bytes=PIECE_BYTES,
    )
    assert told.wait(DEADLINE_S)
    assert [row[:2] for row in cuda.ranges()] == pieces(memory.address, slots=1)
    assert arena.close()


def test_without_a_runtime_nothing_is_pinned() -> None:
    problems: list[str] = []
    arena = PinnedArena(0, SLOT_BYTES, SLOTS, None, problems.append)
    assert problems == [arena.problem] == ["no CUDA runtime library is loaded in this process"]
    assert not arena.wait(0.0)
    assert not arena.is_pinned(0)
    assert arena.split(0, 7) == [(0, 7)]
    assert arena.close()


def test_without_a_device_nothing_is_pinned(cuda: FakeCuda) -> None:
    cuda.control.fake_fail_device(100)
    scene = Scene(cuda)
    assert len(scene.problems) == 1 and "(100)" in scene.problems[0]
    assert scene.arena.close()


def test_a_device_that_cannot_be_used_is_a_problem(cuda: FakeCuda) -> None:
    scene = Scene(cuda, device=8)
    assert not scene.arena.wait(DEADLINE_S)
    assert scene.arena.close()
    assert len(scene.problems) == 1 and "cudaSetDevice(8)" in scene.arena.problem


def test_close_waits_for_the_piece_under_way_and_for_no_other(cuda: FakeCuda) -> None:
    cuda.control.fake_gate(1)
    scene = Scene(cuda)
    assert cuda.control.fake_wait_at_gate(int(DEADLINE_S * 1000))
    assert not scene.arena.close(0.01), "the driver is still inside the memory"
    cuda.control.fake_gate(0)
    assert scene.arena.close(DEADLINE_S)
    assert cuda.control.fake_registrations() == 1
    assert cuda.ranges() == []
    assert (scene.problems, scene.arena.problem) == ([], "")


def test_a_failure_while_closing_is_no_problem(cuda: FakeCuda) -> None:
    cuda.control.fake_fail_register(0, 2)
    cuda.control.fake_gate(1)
    scene = Scene(cuda)
    assert cuda.control.fake_wait_at_gate(int(DEADLINE_S * 1000))
    assert not scene.arena.close(0.0)
    cuda.control.fake_gate(0)
    assert scene.arena.close(DEADLINE_S)
    assert (scene.problems, scene.arena.problem) == ([], "")


@pytest.mark.parametrize(("code", "silent"), [(4, True), (709, True), (1, False)])
def test_unregistering_is_silent_only_at_the_end(
    cuda: FakeCuda, scene: Scene, code: int, silent: bool
) -> None:
    assert scene.arena.wait(DEADLINE_S)
    cuda.control.fake_fail_unregister(code)
    assert scene.arena.close()
    assert (scene.arena.problem == "") == silent
    assert scene.problems == []


def test_an_arena_can_be_pinned_again_and_by_another_mapping(
    cuda: FakeCuda, tmp_path: Path
) -> None:
    path = tmp_path / "arena"
    first = Scene(cuda, path=path)
    other = Scene(cuda, path=path)  # of the same file, as another process has it
    for scene in (first, other):
        assert scene.arena.wait(DEADLINE_S)
    assert len(cuda.ranges()) == 2 * len(pieces(0))
    assert first.arena.close()
    assert [row[:2] for row in cuda.ranges()] == pieces(other.memory.address)
    again = PinnedArena(first.memory.address, SLOT_BYTES, SLOTS, cuda.runtime)
    assert again.wait(DEADLINE_S)
    assert again.close() and other.arena.close()


def test_memory_that_is_pinned_already_is_a_problem(cuda: FakeCuda, scene: Scene) -> None:
    assert scene.arena.wait(DEADLINE_S)
    second = PinnedArena(scene.memory.address, SLOT_BYTES, SLOTS, cuda.runtime)
    assert not second.wait(DEADLINE_S)
    assert second.close()
    assert "(712)" in second.problem
    assert [row[:2] for row in cuda.ranges()] == pieces(scene.memory.address)


def test_a_forked_child_leaves_everything_registered(cuda: FakeCuda, scene: Scene) -> None:
    assert scene.arena.wait(DEADLINE_S)
    before = cuda.control.fake_registrations()

    def check() -> bool:
        try:
            cuda.runtime.unregister(scene.memory.address)
        except CudaFailure:
            untouched = scene.arena.close() and len(cuda.ranges()) == len(pieces(0))
            blind = not scene.arena.is_pinned(0) and not scene.arena.wait(DEADLINE_S)
            PinnedArena(scene.memory.address, SLOT_BYTES, SLOTS, cuda.runtime).close()
            return untouched and blind and cuda.control.fake_registrations() == before
        return False

    assert in_child(check)
    assert scene.arena.is_pinned(SLOTS - 1)
    assert len(cuda.ranges()) == len(pieces(0))


def test_a_fork_while_registering_harms_neither(cuda: FakeCuda) -> None:
    cuda.control.fake_gate(1)
    scene = Scene(cuda)
    assert cuda.control.fake_wait_at_gate(int(DEADLINE_S * 1000))
    assert in_child(lambda: scene.arena.close(0.0) and not scene.arena.wait(DEADLINE_S))
    cuda.control.fake_gate(0)
    assert scene.arena.wait(DEADLINE_S)
    assert scene.arena.close()


def test_the_interpreters_exit_unregisters(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Callable[[], object]] = []
    monkeypatch.setattr(atexit, "register", kept.append)
    monkeypatch.setattr(atexit, "unregister", kept.remove)
    scene = Scene(cuda)
    assert scene.arena.wait(DEADLINE_S)
    (at_exit,) = kept
    at_exit()
    assert cuda.ranges() == []
    assert kept == []


def test_a_process_that_never_closes_ends(cuda: FakeCuda) -> None:
    script = f"""
import ctypes, mmap
from everstep.kernels.cuda_runtime import CudaRuntime
from everstep.snapshot.pinning import PinnedArena
loaded = ctypes.CDLL({str(cuda.path)!r})
memory = (ctypes.c_char * {SLOT_BYTES}).from_buffer(mmap.mmap(-1, {SLOT_BYTES}))
arena = PinnedArena(ctypes.addressof(memory), {SLOT_BYTES}, 1, CudaRuntime(loaded))
assert arena.wait({DEADLINE_S})
loaded.fake_fail_unregister(4)
"""
    outcome = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (0, b"", b"")


def test_a_copy_across_a_border_is_refused_whole_and_taken_split(
    cuda: FakeCuda, scene: Scene
) -> None:
    assert scene.arena.wait(DEADLINE_S)
    source = Mapping(SLOT_BYTES)
    source.bytes[:4] = b"abcd"
    target = scene.memory.address + SLOT_BYTES - 2
    whole = numpy.array([(target, source.address, 4)], dtype=numpy.uint64)
    with pytest.raises(CudaFailure, match="cudaErrorInvalidValue"):
        cuda.runtime.copy_async(whole, 0)
    cuda.runtime.copy_async(scene.arena.split_copies(whole), 0)
    assert scene.memory.bytes[SLOT_BYTES - 2 : SLOT_BYTES + 2] == b"abcd"


BASE = 1 << 20
TOTAL = SLOTS * SLOT_BYTES
EDGES = sorted({0, TOTAL, *(at + shift for at, _ in pieces(0) for shift in (-1, 0, 1) if at)})
OFFSETS = st.one_of(st.sampled_from(EDGES), st.integers(0, TOTAL))


def unpinned() -> PinnedArena:
    return PinnedArena(BASE, SLOT_BYTES, SLOTS, None, piece_bytes=PIECE_BYTES)


@given(OFFSETS, OFFSETS)
def test_parts_cover_the_range_and_cross_nothing(left: int, right: int) -> None:
    begin, end = sorted((left, right))
    parts = unpinned().split(BASE + begin, end - begin)
    at = BASE + begin
    for address, size in parts:
        assert address == at and size > 0
        assert any(
            border <= address and address + size <= border + length
            for border, length in pieces(BASE)
        )
        at += size
    assert at == BASE + end
    touched = [row for row in pieces(BASE) if row[0] < at and BASE + begin < row[0] + row[1]]
    assert len(parts) == (len(touched) if end > begin else 0), "no cut without a border"


@pytest.mark.parametrize(
    ("address", "size"), [(BASE - 1, 1), (BASE + TOTAL, 1), (BASE, TOTAL + 1), (BASE + 5, -1)]
)
def test_what_is_not_in_the_arena_is_refused(address: int, size: int) -> None:
    with pytest.raises(ValueError, match="not inside the arena"):
        unpinned().split(address, size)
    if size > 0:
        for column in (0, 1):
            row = [7, 7, size]
            row[column] = address
            with pytest.raises(ValueError, match="not inside the arena"):
                unpinned().split_copies(numpy.array([row], dtype=numpy.uint64), column)


@given(st.lists(st.tuples(OFFSETS, OFFSETS), max_size=20), st.sampled_from([0, 1]))
def test_a_table_is_split_as_its_rows_are(spans: list[tuple[int, int]], column: int) -> None:
    arena = unpinned()
    rows, expected = [], []
    for number, span in enumerate(spans):
        begin, end = sorted(span)
        inside, outside = BASE + begin, (1 << 47) + number * (1 << 30)
        rows.append((inside, outside, end - begin))
        expected += [(at, outside + at - inside, size) for at, size in arena.split(*rows[-1][::2])]
    order = [0, 1, 2] if column == 0 else [1, 0, 2]
    table = numpy.array(rows, dtype=numpy.uint64).reshape(len(rows), 3)[:, order]
    split = arena.split_copies(table, column)
    kept = [tuple(row) for row in split[:, order].tolist() if row[2]]
    assert kept == expected
    assert (split is table) == (len(expected) == sum(begin != end for begin, end in spans))
