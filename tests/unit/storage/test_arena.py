"""The memory level's own promises; those of every level are in tests/contract/test_level.py."""

import mmap
import os
from pathlib import Path

import psutil
import pytest

from everstep.kernels.digest import digest_units
from everstep.proto.errors import FormatInvalid, InvalidConfiguration, OutOfSpace
from everstep.proto.ids import UNIT_BYTES
from everstep.storage.arena import ArenaFile, MemoryLevel

SLOT_BYTES = 4 * UNIT_BYTES


@pytest.fixture
def memory(tmp_path: Path) -> MemoryLevel:
    return MemoryLevel(tmp_path, keep_free_bytes=0)


def reserve(memory: MemoryLevel, rank: int = 0, generation: int = 1) -> ArenaFile:
    return memory.reserve("job", rank, generation, slot_count=2, slot_bytes=SLOT_BYTES)


def capture(memory: MemoryLevel, arena: ArenaFile, slot: int, image: bytes) -> None:
    """What a trainer does: maps the file by its path and writes."""
    with (
        arena.path.open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as mapping,
    ):
        mapping[slot * arena.slot_bytes : slot * arena.slot_bytes + len(image)] = image


def test_reserved_pages_are_all_there(memory: MemoryLevel) -> None:
    arena = reserve(memory)
    status = arena.path.stat()
    assert status.st_size == arena.total_bytes == 2 * SLOT_BYTES
    assert status.st_blocks * 512 >= arena.total_bytes
    assert arena.path.name == "rank-00000-g000001-s2.arena"
    assert status.st_mode & 0o777 == 0o600


def test_reserving_again_returns_the_same_file(memory: MemoryLevel) -> None:
    inode = reserve(memory).path.stat().st_ino
    assert reserve(memory).path.stat().st_ino == inode
    with pytest.raises(FormatInvalid):
        memory.reserve("job", 0, 1, slot_count=3, slot_bytes=SLOT_BYTES)
    with pytest.raises(FormatInvalid):
        memory.reserve("job", 0, 1, slot_count=2, slot_bytes=2 * SLOT_BYTES)
    assert len(memory.arenas("job")) == 1


def test_a_full_tmpfs_refuses_and_leaves_nothing(small_tmpfs: Path) -> None:
    memory = MemoryLevel(small_tmpfs / "everstep", keep_free_bytes=0)
    kept = memory.reserve("job", 0, 1, slot_count=1, slot_bytes=SLOT_BYTES)
    with pytest.raises(OutOfSpace) as caught:
        memory.reserve("job", 1, 1, slot_count=2, slot_bytes=SLOT_BYTES)
    assert caught.value.needed_bytes == 2 * SLOT_BYTES
    assert "shm" in str(caught.value)
    assert memory.arenas("job") == [kept]
    assert os.listdir(kept.path.parent) == [kept.path.name]


def test_memory_that_must_stay_free_is_not_reserved(tmp_path: Path) -> None:
    available = psutil.virtual_memory().available
    memory = MemoryLevel(tmp_path, keep_free_bytes=available * 2)
    with pytest.raises(OutOfSpace) as caught:
        reserve(memory)
    assert "free for everyone else" in str(caught.value)
    assert memory.arenas("job") == []


def test_a_slot_is_written_by_a_trainer_and_read_by_the_agent(memory: MemoryLevel, take) -> None:
    arena = reserve(memory)
    snapshot = take(1, 7, sizes=(3 * UNIT_BYTES + 5,))
    capture(memory, arena, 1, snapshot.image(0))
    memory.publish("job", 0, 1, 1, snapshot.record(0))
    (held,) = MemoryLevel(memory.root, keep_free_bytes=0).records("job")
    assert (held.rank, held.generation, held.slot) == (0, 1, 1)
    assert (held.snapshot, held.envelope) == (snapshot.id, snapshot.record(0))
    with memory.image(arena, 1, held.record.image_bytes) as shard:
        assert bytes(shard.image) == snapshot.image(0)
    assert memory.snapshots("job") == [snapshot.id]


def test_dropping_a_record_ends_the_snapshot(memory: MemoryLevel, take) -> None:
    arena = reserve(memory)
    snapshot = take(1, 7, sizes=(5000,))
    capture(memory, arena, 0, snapshot.image(0))
    memory.publish("job", 0, 1, 0, snapshot.record(0))
    memory.drop("job", 0, 1, 0)
    memory.drop("job", 0, 1, 0)
    assert memory.snapshots("job") == []
    assert memory.arenas("job") == [arena]


def test_a_snapshot_needs_all_ranks_of_its_world(memory: MemoryLevel, take) -> None:
    snapshot, next_one = take(1, 7, sizes=(100, 200)), take(1, 8, sizes=(100, 200))
    for rank in (0, 1):
        reserve(memory, rank)
    memory.publish("job", 0, 1, 0, snapshot.record(0))
    memory.publish("job", 1, 1, 0, next_one.record(1))
    assert memory.snapshots("job") == []
    memory.publish("job", 1, 1, 1, snapshot.record(1))
    assert memory.snapshots("job") == [snapshot.id]


def test_records_are_refused_that_cannot_be_true(memory: MemoryLevel, take) -> None:
    reserve(memory)
    snapshot = take(1, 7, sizes=(100,))
    too_large = take(1, 7, sizes=(SLOT_BYTES + 1,))
    for rank, generation, slot, record in [
        (0, 2, 0, snapshot.record(0)),
        (0, 1, 2, snapshot.record(0)),
        (0, 1, 0, too_large.record(0)),
        (1, 1, 0, snapshot.record(0)),
        (0, 1, 0, take(1, 7, sizes=(100,), job="other").record(0)),
        (0, 1, 0, b"no envelope"),
    ]:
        with pytest.raises(FormatInvalid):
            memory.publish("job", rank, generation, slot, record)
    assert memory.records("job") == []
    assert memory.problems("job") == []


def test_a_record_without_its_arena_is_a_problem(memory: MemoryLevel, take) -> None:
    arenas = [reserve(memory, rank) for rank in (0, 1)]
    snapshot = take(1, 7, sizes=(SLOT_BYTES, SLOT_BYTES))
    for rank in (0, 1):
        memory.publish("job", rank, 1, 1, snapshot.record(rank))
    arenas[0].path.unlink()
    os.truncate(arenas[1].path, SLOT_BYTES)
    problems = memory.problems("job")
    assert memory.records("job") == []
    assert memory.snapshots("job") == []
    assert [Path(problem.where).name for problem in problems] == [
        "rank-00000-g000001-slot-1.record",
        "rank-00001-g000001-slot-1.record",
    ]


def test_an_arena_cut_short_is_refused_and_not_a_sigbus(memory: MemoryLevel) -> None:
    arena = reserve(memory)
    os.truncate(arena.path, 4096)
    with pytest.raises(FormatInvalid):
        memory.image(arena, 1, 100)
    arena.path.unlink()
    with pytest.raises(FormatInvalid):
        memory.image(arena, 1, 100)


def test_a_slot_is_filled_in_place(memory: MemoryLevel) -> None:
    arena = reserve(memory)
    with memory.writable(arena, 1, 5000) as view:
        view[:] = b"x" * 5000
    data = arena.path.read_bytes()
    assert data[SLOT_BYTES : SLOT_BYTES + 5000] == b"x" * 5000
    assert not any(data[:SLOT_BYTES])
    assert not any(data[SLOT_BYTES + 5000 :])


def test_store_takes_a_slot_without_a_record(memory: MemoryLevel, take) -> None:
    reserve(memory)
    first, second, third = (take(1, step, sizes=(5000,)) for step in (7, 8, 9))
    for snapshot in (first, second):
        snapshot.save(memory)
    assert len(memory.arenas("job")) == 1
    third.save(memory)
    assert len(memory.arenas("job")) == 2
    for snapshot in (first, second, third):
        snapshot.assert_whole(memory)


def test_release_removes_one_generation(memory: MemoryLevel, take) -> None:
    reserve(memory, generation=1)
    kept = reserve(memory, generation=10)
    memory.publish("job", 0, 1, 0, take(1, 7, sizes=(100,)).record(0))
    memory.publish("job", 0, 10, 0, take(1, 8, sizes=(100,)).record(0))
    memory.release("job", 0, 1)
    assert memory.arenas("job") == [kept]
    assert memory.snapshots("job") == [take(1, 8).id]
    assert memory.problems("job") == []


def test_membership_is_replaced_whole(memory: MemoryLevel) -> None:
    assert memory.membership("job") is None
    memory.write_membership("job", b"one")
    memory.write_membership("job", b"another")
    assert memory.membership("job") == b"another"
    memory.remove_job("job")
    assert memory.membership("job") is None


def test_record_that_gained_its_digests_replaces_the_one_without(memory: MemoryLevel, take) -> None:
    arena = reserve(memory)
    snapshot = take(1, 7, sizes=(5000,))
    capture(memory, arena, 0, snapshot.image(0))
    memory.publish("job", 0, 1, 0, snapshot.record(0))
    with memory.open_shard("job", snapshot.id, 0) as shard:
        assert digest_units(shard.image, UNIT_BYTES) == digest_units(snapshot.image(0), UNIT_BYTES)
    capture(memory, arena, 0, b"torn")
    assert memory.verify("job", snapshot.id, 0) == [0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_directory_of_another_user_is_refused(memory: MemoryLevel) -> None:
    reserve(memory)
    os.chown(memory.root, 1234, -1)
    os.chown(memory.root / "job", 4321, -1)
    pid = os.fork()
    if pid == 0:
        os.seteuid(1234)
        try:
            os.chmod(memory.root, 0o700)
            memory.write_membership("job", b"mine")
        except (InvalidConfiguration, PermissionError):
            os._exit(0)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
