"""The pool of parity files in memory; what every store does is in tests/contract."""

import errno
import mmap
import os
import resource
import threading
from pathlib import Path

import psutil
import pytest

from everstep.kernels.digest import digest_units
from everstep.proto import state_pb2
from everstep.proto.envelope import open_envelope
from everstep.proto.errors import FormatInvalid, OutOfSpace
from everstep.proto.ids import UNIT_BYTES
from everstep.storage.arena import MemoryLevel
from everstep.storage.parity_memory import MAX_FILES, ParityMemory


@pytest.fixture
def store(tmp_path: Path) -> ParityMemory:
    return ParityMemory(tmp_path, keep_free_bytes=0)


def pool(store: ParityMemory) -> dict[int, int]:
    """The inode and length of each file of the pool."""
    return {path.stat().st_ino: path.stat().st_size for path in store.root.rglob("*.parity")}


def plans(store: ParityMemory) -> list[str]:
    return [manifest.plan.plan_id for manifest in store.manifests("job")]


def test_reserved_pages_are_all_there(store: ParityMemory) -> None:
    with store.reserve("job", "p1", 3 * UNIT_BYTES + 1) as room:
        status = room.path.stat()
        assert room.view.nbytes == 3 * UNIT_BYTES + 1
        assert status.st_blocks * 512 >= status.st_size == 3 * UNIT_BYTES + 4096
        assert status.st_mode & 0o777 == 0o600
        assert room.path.parent.stat().st_mode & 0o777 == 0o700
    assert plans(store) == []


def test_a_room_is_mapped_before_it_is_written_to(store: ParityMemory) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as probe:
        try:
            probe.madvise(23)
        except OSError:
            pytest.skip("the kernel is older than 5.14")
    pages = 16 * UNIT_BYTES // mmap.PAGESIZE
    store.reserve("job", "p1", 16 * UNIT_BYTES).close()
    with store.reserve("job", "p2", 16 * UNIT_BYTES) as room:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for offset in range(0, 16 * UNIT_BYTES, mmap.PAGESIZE):
            room.view[offset] = 1
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    assert faults < pages // 4


def test_rounds_use_the_same_files_again(store: ParityMemory, parity) -> None:
    for number in range(6):
        parity(f"p{number}", step=number).encode(store)
        if number:
            store.delete("job", f"p{number - 1}")
        if number == 1:
            files = pool(store)
            assert len(files) == 2
    assert pool(store) == files
    parity("p5", step=5).assert_whole(store)


def test_a_restart_adopts_the_pool(store: ParityMemory, parity) -> None:
    kept, free = parity("p1"), parity("p2")
    for one in (kept, free):
        one.encode(store)
    store.delete("job", "p2")
    before = pool(store)
    again = ParityMemory(store.root, keep_free_bytes=0)
    assert again.sweep("job") == []
    parity("p3").encode(again)
    assert pool(again) == before
    kept.assert_whole(again)


def test_a_free_file_grows(store: ParityMemory, parity) -> None:
    parity("p1", size=UNIT_BYTES).encode(store)
    store.delete("job", "p1")
    (inode,) = pool(store)
    large = parity("p2", size=4 * UNIT_BYTES)
    large.encode(store)
    assert pool(store) == {inode: 4 * UNIT_BYTES}
    (path,) = store.root.rglob("*.parity")
    assert path.stat().st_blocks * 512 >= 4 * UNIT_BYTES
    large.assert_whole(store)


def test_the_smallest_file_that_fits_is_taken(store: ParityMemory, parity) -> None:
    for plan_id, size in (("p1", 4 * UNIT_BYTES), ("p2", UNIT_BYTES), ("p3", 2 * UNIT_BYTES)):
        parity(plan_id, size=size).encode(store)
    for plan_id in ("p1", "p2", "p3"):
        store.delete("job", plan_id)
    with store.reserve("job", "p4", UNIT_BYTES + 1) as room:
        assert room.path.stat().st_size == 2 * UNIT_BYTES


def test_there_are_never_more_files_than_allowed(store: ParityMemory, parity) -> None:
    for number in range(MAX_FILES):
        parity(f"p{number}", step=number).encode(store)
    before = {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    with pytest.raises(OutOfSpace, match="deleted"):
        store.reserve("job", "more", 10)
    assert {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()} == before
    store.delete("job", "p1")
    parity("more").encode(store)
    assert sorted(plans(store)) == ["more", "p0", "p2"]
    assert len(pool(store)) == MAX_FILES


def test_files_being_written_are_nobody_elses(store: ParityMemory) -> None:
    rooms = [store.reserve("job", f"p{number}", 100) for number in range(MAX_FILES)]
    assert len({room.path for room in rooms}) == MAX_FILES
    with pytest.raises(OutOfSpace):
        store.reserve("job", "more", 100)
    with store.reserve("other", "p0", 100) as elsewhere:
        assert elsewhere.path not in {room.path for room in rooms}
    rooms[1].close()
    rooms[1].close()
    with store.reserve("job", "more", 100) as room:
        assert room.path == rooms[1].path
    for room in rooms:
        room.close()


def test_an_abandoned_round_leaves_nothing_listed(store: ParityMemory, parity) -> None:
    old = parity("p1")
    old.encode(store)
    with pytest.raises(RuntimeError), store.reserve("job", "p2", old.size) as room:
        room.view[:] = bytes(old.size)
        raise RuntimeError("the round was aborted")
    assert plans(store) == ["p1"]
    old.assert_whole(store)
    with pytest.raises(FormatInvalid, match="reserved"):
        store.publish("job", parity("p2").manifest)


def test_a_room_that_is_still_looked_at_is_not_used_again(store: ParityMemory) -> None:
    room = store.reserve("job", "p1", 4096)
    stray = room.view[10:20]
    (inode,) = pool(store)
    room.close()
    with store.reserve("job", "p2", 4096) as other:
        other.view[:] = bytes(4096)
        stray[:] = b"x" * 10
        assert bytes(other.view) == bytes(4096)
        assert inode not in pool(store)


def test_published_parity_stays_although_the_room_is_looked_at(store, parity) -> None:
    one = parity("p1")
    with store.reserve("job", "p1", one.size) as room:
        room.view[:] = one.data
        stray = room.view[:]
        store.publish("job", one.manifest)
    one.assert_whole(store)
    stray.release()


def test_a_manifest_must_fit_its_room(store: ParityMemory, parity) -> None:
    one = parity("p1")
    with store.reserve("job", "p1", one.size - 1) as room:
        with pytest.raises(FormatInvalid, match="bytes"):
            store.publish("job", one.manifest)
        with pytest.raises(FormatInvalid, match="job"):
            store.publish("other", one.manifest)
        assert room.path.exists()
    assert plans(store) == []


def test_a_job_removed_meanwhile(store: ParityMemory, parity) -> None:
    one = parity("p1")
    with store.reserve("job", "p1", one.size) as room:
        room.view[:] = one.data
        MemoryLevel(store.root, keep_free_bytes=0).remove_job("job")
        with pytest.raises(FormatInvalid, match="removed"):
            store.publish("job", one.manifest)
    assert not (store.root / "job").exists()
    one.encode(store)
    one.assert_whole(store)


def test_unused_memory_can_be_given_back(store: ParityMemory, parity) -> None:
    kept = parity("p1")
    kept.encode(store)
    parity("p2").encode(store)
    store.delete("job", "p2")
    with store.reserve("job", "p3", 10) as room:
        store.release_unused("job")
        assert room.path.exists()
    store.release_unused("job")
    assert len(pool(store)) == 1
    kept.assert_whole(store)


def test_damaged_manifests_give_way_only_when_they_must(store: ParityMemory, parity) -> None:
    for number in range(MAX_FILES):
        parity(f"p{number}").encode(store)
    (damaged,) = store.root.rglob("*-p1.manifest")
    damaged.write_bytes(b"rot")
    store.delete("job", "p0")
    parity("p3").encode(store)
    assert damaged.exists()
    parity("p4").encode(store)
    assert not damaged.exists()
    assert plans(store) == ["p2", "p3", "p4"]
    for plan_id in plans(store):
        parity(plan_id).assert_whole(store)


def test_a_full_tmpfs_refuses_and_changes_nothing(small_tmpfs: Path, parity) -> None:
    store = ParityMemory(small_tmpfs / "memory", keep_free_bytes=0)
    kept, freed = parity("p1", size=2 * UNIT_BYTES), parity("p2", size=UNIT_BYTES)
    kept.encode(store)
    freed.encode(store)
    store.delete("job", "p2")
    before = pool(store)
    # First by growing the free file, then, once that is taken, by making another one.
    with pytest.raises(OutOfSpace) as caught:
        store.reserve("job", "p3", 7 * UNIT_BYTES)
    assert caught.value.needed_bytes == 6 * UNIT_BYTES
    assert pool(store) == before
    with store.reserve("job", "p3", UNIT_BYTES):
        with pytest.raises(OutOfSpace):
            store.reserve("job", "p4", 7 * UNIT_BYTES)
        assert pool(store) == before
    assert not list(store.root.rglob("*.partial"))
    kept.assert_whole(store)


def test_others_keep_their_memory(tmp_path: Path, parity) -> None:
    available = psutil.virtual_memory().available
    store = ParityMemory(tmp_path, keep_free_bytes=2 * available)
    with pytest.raises(OutOfSpace, match="everyone else"):
        store.reserve("job", "p1", UNIT_BYTES)
    assert pool(store) == {}
    parity("p1", size=UNIT_BYTES).encode(ParityMemory(tmp_path, keep_free_bytes=0))
    store.delete("job", "p1")
    before = pool(store)
    with pytest.raises(OutOfSpace, match="everyone else"):
        store.reserve("job", "p2", 2 * UNIT_BYTES)
    assert pool(store) == before
    # What is there already takes nothing from anyone.
    store.reserve("job", "p2", UNIT_BYTES).close()


def test_no_room_for_the_manifest(small_tmpfs: Path, parity) -> None:
    store = ParityMemory(small_tmpfs / "memory", keep_free_bytes=0)
    one = parity("p1", size=UNIT_BYTES)
    with store.reserve("job", "p1", one.size) as room:
        room.view[:] = one.data
        filler = small_tmpfs / "filler"
        status = os.statvfs(small_tmpfs)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
        with pytest.raises(OutOfSpace):
            store.publish("job", one.manifest)
        assert plans(store) == []
        filler.unlink()
        store.publish("job", one.manifest)
    one.assert_whole(store)
    assert not list(store.root.rglob("*.partial"))


def test_reservations_of_many_threads(store: ParityMemory, parity) -> None:
    errors: list[BaseException] = []

    def rounds(job: str) -> None:
        try:
            for number in range(8):
                one = parity(f"p{number}", job=job, size=5000)
                one.encode(store)
                one.assert_whole(store)
                store.delete(job, f"p{number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rounds, args=(f"job-{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(pool(store)) == 3


def test_the_memory_level_knows_the_folders(store: ParityMemory, parity) -> None:
    memory = MemoryLevel(store.root, keep_free_bytes=0)
    parity("p1").encode(store)
    partial = store.root / "job/parity/.000002.parity.1-1.partial"
    partial.write_bytes(b"half")
    assert memory.jobs() == ["job"]
    assert memory.problems("job") == []
    assert memory.snapshots("job") == memory.records("job") == memory.arenas("job") == []
    assert memory.sweep("job") == [f"removed half-written {partial}"]
    parity("p1").assert_whole(store)
    memory.remove_job("job")
    assert memory.jobs() == plans(store) == []
    assert list(store.root.iterdir()) == []


def test_what_the_manifest_says_of_whole_units(store: ParityMemory, parity) -> None:
    """The length may be left out where it follows from the digests."""
    one = parity("p1", size=2 * UNIT_BYTES)
    manifest = state_pb2.ParityManifest.FromString(
        open_envelope("parity_manifest", one.manifest, "test")
    )
    assert manifest.parity_bytes == 2 * UNIT_BYTES
    assert manifest.unit_digests == digest_units(one.data, UNIT_BYTES)
    one.encode(store)
    assert store.manifests("job") == [manifest]


def test_a_file_that_the_kernel_does_not_let_grow(store: ParityMemory, parity, monkeypatch) -> None:
    parity("p1", size=UNIT_BYTES).encode(store)
    store.delete("job", "p1")
    before = pool(store)

    def half(descriptor: int, offset: int, length: int) -> None:
        os.truncate(descriptor, offset + length // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", half)
    with pytest.raises(OutOfSpace, match="No space left"):
        store.reserve("job", "p2", 2 * UNIT_BYTES)
    assert pool(store) == before


def test_a_new_file_never_takes_a_lost_ones_place(store: ParityMemory, parity) -> None:
    parity("p1").encode(store)
    (path,) = store.root.rglob("*.parity")
    path.unlink()
    parity("p2").encode(store)
    assert plans(store) == ["p2"]
    with pytest.raises(FormatInvalid, match="missing"):
        store.open("job", "p1")
    parity("p2").assert_whole(store)


def test_the_same_plan_gives_its_earlier_file_back(store: ParityMemory, parity) -> None:
    for size in (10, 20, 30, 40):
        one = parity("p1", size=size)
        one.encode(store)
        one.assert_whole(store)
    assert len(pool(store)) == 2


def test_a_room_of_a_removed_job_never_publishes_anothers_file(store, parity) -> None:
    old, new = parity("p1"), parity("p2")
    with store.reserve("job", "p1", old.size) as room:
        room.view[:] = old.data
        MemoryLevel(store.root, keep_free_bytes=0).remove_job("job")
        new.encode(store)
        with pytest.raises(FormatInvalid, match="removed"):
            store.publish("job", old.manifest)
    assert plans(store) == ["p2"]
    new.assert_whole(store)
