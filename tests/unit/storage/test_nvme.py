"""The NVMe level's own promises; those of every level are in tests/contract/test_level.py."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from everstep.proto.errors import FormatInvalid, InvalidConfiguration, OutOfSpace, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES
from everstep.storage.nvme import NvmeLevel


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[NvmeLevel]:
    with NvmeLevel(tmp_path / "nvme", chunk_bytes=UNIT_BYTES) as level:
        yield level


def names(nvme: NvmeLevel) -> list[str]:
    return sorted(os.listdir(nvme.root / "job"))


def test_files_are_where_the_module_says(nvme: NvmeLevel, take) -> None:
    snapshot = take(1, 1234)
    snapshot.save(nvme)
    step = nvme.root / "job/step-000000001234"
    assert sorted(os.listdir(step)) == [
        "commit",
        "rank-00000.record",
        "rank-00000.safetensors",
        "rank-00001.record",
        "rank-00001.safetensors",
    ]
    assert (step / "rank-00000.safetensors").read_bytes() == snapshot.image(0)
    assert os.listdir(nvme.root / "job/layouts") == [snapshot.layout_id]


def test_a_file_system_without_direct_writes_gets_the_same_bytes(ramfs: Path, take) -> None:
    with NvmeLevel(ramfs / "nvme") as nvme:
        snapshot = take(1, 5, sizes=(9 * UNIT_BYTES + 1, 0))
        snapshot.save(nvme)
        snapshot.assert_whole(nvme)


def test_a_full_disk_refuses_and_older_snapshots_stay(small_tmpfs: Path, take) -> None:
    with NvmeLevel(small_tmpfs / "nvme") as nvme:
        older = take(1, 5)
        older.save(nvme)
        with pytest.raises(OutOfSpace) as caught:
            take(1, 6, sizes=(6 * UNIT_BYTES,)).save(nvme)
        assert caught.value.needed_bytes == 6 * UNIT_BYTES
        assert nvme.snapshots("job") == [older.id]
        older.assert_whole(nvme)
        assert os.listdir(small_tmpfs / "nvme/job/step-000000000006") == []
        assert nvme.sweep("job") != []
        take(1, 7).save(nvme)


def test_rotten_bytes_of_records_commits_and_layouts_are_repaired(
    nvme: NvmeLevel, take, flip
) -> None:
    snapshot = take(1, 5)
    snapshot.save(nvme)
    step = nvme.root / "job/step-000000000005"
    for path in (
        step / "commit",
        step / "rank-00000.record",
        nvme.root / "job/layouts" / snapshot.layout_id,
    ):
        flip(path, 33, 3)
    assert nvme.problems("job") == []
    snapshot.assert_whole(nvme)


def test_swapped_files_are_refused(nvme: NvmeLevel, take) -> None:
    first, second = take(1, 5), take(1, 6)
    for snapshot in (first, second):
        snapshot.save(nvme)
    job = nvme.root / "job"
    for end in ("record", "safetensors"):
        shutil.copy(
            job / f"step-000000000005/rank-00000.{end}",
            job / f"step-000000000006/rank-00000.{end}",
        )
    with pytest.raises(FormatInvalid):
        nvme.open_shard("job", second.id, 0)
    shutil.copy(job / "step-000000000005/commit", job / "step-000000000006/commit")
    assert nvme.snapshots("job") == [first.id]
    assert [Path(problem.where).name for problem in nvme.problems("job")] == ["commit"]
    first.assert_whole(nvme)


def test_a_whole_shard_of_another_take_of_the_step_is_refused(
    nvme: NvmeLevel, take, tmp_path: Path
) -> None:
    """Same job, step, incarnation, rank and length, but not what was committed."""
    snapshot, stranger = take(1, 5), take(1, 5, seed=" other")
    snapshot.save(nvme)
    with NvmeLevel(tmp_path / "other") as other:
        stranger.save(other)
    for end in ("record", "safetensors"):
        name = f"job/step-000000000005/rank-00000.{end}"
        shutil.copy(tmp_path / "other" / name, nvme.root / name)
    with pytest.raises(FormatInvalid):
        nvme.open_shard("job", snapshot.id, 0)


def test_swapped_ranks_are_refused(nvme: NvmeLevel, take) -> None:
    snapshot = take(1, 5, sizes=(5000, 5000))
    snapshot.save(nvme)
    step = nvme.root / "job/step-000000000005"
    shutil.copy(step / "rank-00001.record", step / "rank-00000.record")
    with pytest.raises(FormatInvalid):
        nvme.open_shard("job", snapshot.id, 0)


@pytest.mark.parametrize("length", [0, 4999, 5001])
def test_an_image_of_another_length_is_refused(nvme: NvmeLevel, take, length: int) -> None:
    snapshot = take(1, 5, sizes=(5000,))
    snapshot.save(nvme)
    path = nvme.root / "job/step-000000000005/rank-00000.safetensors"
    os.truncate(path, length)
    with pytest.raises(FormatInvalid):
        nvme.open_shard("job", snapshot.id, 0)
    assert [problem.where for problem in nvme.problems("job")] == [str(path)]


def test_a_missing_shard_of_a_commit_is_not_a_mixture(nvme: NvmeLevel, take) -> None:
    """Ranks of other nodes are in the commit and not on this disk."""
    snapshot = take(1, 5)
    snapshot.save(nvme)
    for path in (nvme.root / "job/step-000000000005").glob("rank-00001*"):
        path.unlink()
    assert nvme.ranks("job", snapshot.id) == [0]
    assert nvme.problems("job") == []
    with pytest.raises(FormatInvalid):
        nvme.open_shard("job", snapshot.id, 1)


def test_a_shard_is_committed_only_with_its_image(nvme: NvmeLevel, take) -> None:
    snapshot = take(1, 5)
    snapshot.begin_and_store(nvme)
    (nvme.root / "job/step-000000000005/rank-00001.safetensors").unlink()
    with pytest.raises(FormatInvalid):
        nvme.commit("job", snapshot.id, snapshot.commit())
    assert nvme.snapshots("job") == []


def test_a_later_incarnation_takes_the_place_at_its_commit_and_not_before(
    nvme: NvmeLevel, take
) -> None:
    old, new = take(1, 5), take(2, 5)
    old.save(nvme)
    new.begin_and_store(nvme)
    assert nvme.snapshots("job") == [old.id]
    old.assert_whole(nvme)
    nvme.commit("job", new.id, new.commit())
    assert nvme.snapshots("job") == [new.id]
    new.assert_whole(nvme)
    assert names(nvme) == ["layouts", "step-000000000005"]


def test_a_successor_that_never_came_is_swept_and_the_old_one_brought_back(
    nvme: NvmeLevel, take
) -> None:
    old, new, newer = take(1, 5), take(2, 5), take(3, 5)
    old.save(nvme)
    new.begin_and_store(nvme)
    newer.begin_and_store(nvme)
    assert nvme.snapshots("job") == [old.id]
    nvme.sweep("job")
    assert names(nvme) == ["layouts", "step-000000000005"]
    assert nvme.snapshots("job") == [old.id]
    old.assert_whole(nvme)


def test_what_is_moved_aside_can_be_deleted(nvme: NvmeLevel, take) -> None:
    old, new = take(1, 5), take(2, 5)
    old.save(nvme)
    new.begin_and_store(nvme)
    nvme.delete("job", old.id)
    assert nvme.snapshots("job") == []
    nvme.commit("job", new.id, new.commit())
    assert nvme.snapshots("job") == [new.id]


def test_a_leftover_of_another_incarnation_is_cleared(nvme: NvmeLevel, take) -> None:
    leftover, snapshot = take(1, 5, sizes=(100, 200, 300)), take(2, 5)
    leftover.begin_and_store(nvme)
    snapshot.save(nvme)
    assert nvme.ranks("job", snapshot.id) == [0, 1]
    snapshot.assert_whole(nvme)


def test_a_late_shard_of_an_ended_incarnation_stops_the_commit(nvme: NvmeLevel, take) -> None:
    late, snapshot = take(1, 5), take(2, 5)
    snapshot.begin_and_store(nvme)
    nvme.store("job", late.id, 1, memoryview(late.image(1)), late.record(1))
    with pytest.raises(FormatInvalid):
        nvme.commit("job", snapshot.id, snapshot.commit())
    assert nvme.snapshots("job") == []


def test_a_committed_shard_cannot_be_changed_but_repaired(nvme: NvmeLevel, take, flip) -> None:
    snapshot = take(1, 5)
    snapshot.save(nvme)
    other = take(1, 5, sizes=(4096, 4096))
    with pytest.raises(FormatInvalid):
        nvme.store("job", snapshot.id, 0, memoryview(other.image(0)), other.record(0))
    flip(nvme.root / "job/step-000000000005/rank-00000.safetensors", 2 * UNIT_BYTES, 1)
    assert nvme.verify("job", snapshot.id, 0) == [2]
    nvme.store("job", snapshot.id, 0, memoryview(snapshot.image(0)), snapshot.record(0))
    snapshot.assert_whole(nvme)


def test_an_unreadable_commit_is_kept_by_sweep_and_gives_way_to_a_new_one(
    nvme: NvmeLevel, take
) -> None:
    snapshot = take(1, 5)
    snapshot.save(nvme)
    (nvme.root / "job/step-000000000005/commit").write_bytes(b"rot")
    assert nvme.sweep("job") == []
    assert names(nvme) == ["layouts", "step-000000000005"]
    take(2, 5).save(nvme)
    assert nvme.snapshots("job") == [take(2, 5).id]
    assert nvme.problems("job") == []


def test_a_snapshot_moved_aside_outlives_a_successor_that_rotted(nvme: NvmeLevel, take) -> None:
    old, new = take(1, 5), take(2, 5)
    old.save(nvme)
    new.begin_and_store(nvme)
    (nvme.root / "job/step-000000000005/commit").write_bytes(b"rot")
    nvme.sweep("job")
    take(3, 5).begin_and_store(nvme)
    assert nvme.snapshots("job") == [old.id]
    old.assert_whole(nvme)


def test_a_corrupt_source_stops_all_threads_and_leaves_no_file(nvme: NvmeLevel, take) -> None:
    snapshot = take(1, 5, sizes=(32 * UNIT_BYTES,))
    image = bytearray(snapshot.image(0))
    image[3 * UNIT_BYTES] ^= 1
    nvme.begin("job", snapshot.id)
    with pytest.raises(ShardCorrupt):
        nvme.store("job", snapshot.id, 0, memoryview(image), snapshot.record(0))
    assert os.listdir(nvme.root / "job/step-000000000005") == []


@pytest.mark.parametrize("root", ["file", "file/below"])
def test_a_root_that_is_a_file_is_a_mistake_of_configuration(
    tmp_path: Path, take, root: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with NvmeLevel(tmp_path / root) as nvme, pytest.raises(InvalidConfiguration):
        take(1, 5).save(nvme)
