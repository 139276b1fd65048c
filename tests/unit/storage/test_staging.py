"""Staged shards: memory behind the units that were asked for, and nowhere else."""

import errno
import os
from pathlib import Path

import psutil
import pytest

from everstep.proto.errors import FormatInvalid, InvalidConfiguration, InvalidName, OutOfSpace
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.storage.arena import MemoryLevel
from everstep.storage.staging import Staging

SNAPSHOT = SnapshotId(2, 1234)
BYTES = 8 * UNIT_BYTES + 100
NAME = "inc-000002-step-000000001234-rank-00003.image"


@pytest.fixture
def staging(small_tmpfs: Path) -> Staging:
    """On a tmpfs: only there is a hole a hole."""
    return Staging(small_tmpfs / "memory", keep_free_bytes=0)


def used_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_only_what_was_asked_for_is_allocated(staging: Staging) -> None:
    with staging.create("job", SNAPSHOT, 3, BYTES, [range(8, 9), range(1, 3)]) as file:
        assert file.path == staging.root / "job/staged" / NAME
        assert file.path.stat().st_size == file.image_bytes == BYTES
        assert used_bytes(file.path) == 2 * UNIT_BYTES + 4096
        assert file.path.stat().st_mode & 0o777 == 0o600
        assert file.path.parent.stat().st_mode & 0o777 == 0o700
        assert file.unit_ranges == (range(1, 3), range(8, 9))
        for unit in (1, 2, 8):
            with file.writable(unit) as view:
                assert view.nbytes == file.unit_bytes(unit) == (100 if unit == 8 else UNIT_BYTES)
                view[:] = bytes([unit]) * view.nbytes
        assert used_bytes(file.path) == 2 * UNIT_BYTES + 4096
    # Read, not mapped: a page of a hole that is touched through a mapping takes memory.
    expected = b"".join(
        bytes([unit if unit in (1, 2, 8) else 0]) * (100 if unit == 8 else UNIT_BYTES)
        for unit in range(9)
    )
    assert file.path.read_bytes() == expected


def test_other_units_cannot_be_written(staging: Staging) -> None:
    with staging.create("job", SNAPSHOT, 3, BYTES, [range(1, 3)]) as file:
        for unit in (-1, 0, 3, 8, 9):
            with pytest.raises(AssertionError):
                file.writable(unit)
    file.close()
    with pytest.raises(AssertionError):
        file.writable(1)


def test_units_asked_for_twice(staging: Staging) -> None:
    ranges = [range(2, 5), range(0, 3), range(4, 4), range(3, 4), range(6, 7)]
    with staging.create("job", SNAPSHOT, 3, BYTES, ranges) as file:
        assert sorted(unit for units in file.unit_ranges for unit in units) == [0, 1, 2, 3, 4, 6]
        assert used_bytes(file.path) == 6 * UNIT_BYTES


@pytest.mark.parametrize(("image_bytes", "ranges"), [(0, []), (5, []), (5, [range(1)])])
def test_small_ones(staging: Staging, image_bytes: int, ranges: list[range]) -> None:
    with staging.create("job", SNAPSHOT, 3, image_bytes, ranges) as file:
        assert file.path.stat().st_size == image_bytes
        for units in ranges:
            for unit in units:
                with file.writable(unit) as view:
                    view[:] = b"a" * 5
    assert file.path.read_bytes() == (b"a" * 5 if ranges else bytes(image_bytes))


@pytest.mark.parametrize(
    ("rank", "image_bytes", "units"),
    [
        (3, BYTES, range(8, 10)),
        (3, BYTES, range(-1, 1)),
        (3, 0, range(1)),
        (-1, BYTES, range(1)),
        (1 << 20, BYTES, range(1)),
        (3, 1 << 50, range(1)),
        (3, -1, range(0)),
    ],
)
def test_impossible_ones_are_refused(
    staging: Staging, rank: int, image_bytes: int, units: range
) -> None:
    with pytest.raises(FormatInvalid):
        staging.create("job", SNAPSHOT, rank, image_bytes, [units])
    assert not staging.root.exists()


def test_again_replaces_it(staging: Staging) -> None:
    with staging.create("job", SNAPSHOT, 3, BYTES, [range(1)]) as file, file.writable(0) as view:
        view[:4] = b"once"
        with staging.create("job", SNAPSHOT, 3, BYTES, [range(1)]) as again:
            assert again.path == file.path
        # Whoever has the earlier one mapped keeps it.
        assert bytes(view[:4]) == b"once"
        assert file.path.read_bytes()[:4] == bytes(4)


def test_too_little_memory_leaves_nothing(staging: Staging) -> None:
    with staging.create("job", SNAPSHOT, 0, 4 * UNIT_BYTES, [range(4)]) as kept:
        pass
    with pytest.raises(OutOfSpace) as caught:
        staging.create("job", SNAPSHOT, 3, BYTES, [range(6)])
    assert caught.value.needed_bytes == 6 * UNIT_BYTES
    assert list((staging.root / "job/staged").iterdir()) == [kept.path]
    greedy = Staging(staging.root, keep_free_bytes=2 * psutil.virtual_memory().available)
    with pytest.raises(OutOfSpace, match="everyone else"):
        greedy.create("job", SNAPSHOT, 3, BYTES, [range(1)])
    # Holes need no memory: a shard far larger than the tmpfs.
    staging.create("job", SNAPSHOT, 3, 1 << 30, [range(9, 10)]).close()


def test_dropped_and_swept(staging: Staging) -> None:
    staging.drop("job")
    assert staging.sweep("job") == []
    staging.create("job", SNAPSHOT, 3, BYTES, [range(1)]).close()
    staging.create("other", SNAPSHOT, 3, BYTES, [range(1)]).close()
    staging.drop("job")
    staging.drop("job")
    assert list((staging.root / "job").iterdir()) == []
    again = Staging(staging.root, keep_free_bytes=0)
    (done,) = again.sweep("other")
    assert "staged" in done
    assert again.sweep("other") == []
    assert os.statvfs(staging.root).f_bavail * 4096 > 7 * UNIT_BYTES


@pytest.mark.parametrize("name", ["", "..", "a/b", ".x"])
def test_names_are_checked(staging: Staging, name: str) -> None:
    with pytest.raises(InvalidName):
        staging.create(name, SNAPSHOT, 3, BYTES, [range(1)])
    for call in (staging.drop, staging.sweep):
        with pytest.raises(InvalidName):
            call(name)


def test_links_are_not_followed(staging: Staging, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (staging.root / "job").mkdir(parents=True)
    (staging.root / "job/staged").symlink_to(elsewhere)
    with pytest.raises((FormatInvalid, InvalidConfiguration)):
        staging.create("job", SNAPSHOT, 3, BYTES, [range(1)])
    assert list(elsewhere.iterdir()) == []


def test_the_memory_level_knows_the_folder(staging: Staging) -> None:
    memory = MemoryLevel(staging.root, keep_free_bytes=0)
    staging.create("job", SNAPSHOT, 3, BYTES, [range(1)]).close()
    partial = staging.root / "job/staged" / f".{NAME}.1-1.partial"
    partial.write_bytes(b"half")
    assert memory.jobs() == ["job"]
    assert memory.problems("job") == []
    assert memory.sweep("job") == [f"removed half-written {partial}"]
    assert (staging.root / "job/staged" / NAME).exists()
    memory.remove_job("job")
    assert list(staging.root.iterdir()) == []


def test_what_the_kernel_refuses_costs_nothing(staging: Staging, monkeypatch) -> None:
    staging.create("job", SNAPSHOT, 3, BYTES, [range(1)]).close()
    path = staging.root / "job/staged" / NAME
    before = path.stat()

    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OutOfSpace, match="No space left"):
        staging.create("job", SNAPSHOT, 3, BYTES, [range(2)])
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_ino == before.st_ino


def test_more_units_are_added_to_what_is_there(staging: Staging) -> None:
    with staging.create("job", SNAPSHOT, 3, BYTES, [range(1, 3)]) as file:
        with file.writable(1) as view:
            view[:] = b"a" * UNIT_BYTES
        with file.path.open("rb") as reader:
            with staging.extend("job", SNAPSHOT, 3, BYTES, [range(8, 9), range(5, 6)]) as more:
                assert more.path == file.path and more.unit_ranges == (range(5, 6), range(8, 9))
                with more.writable(8) as view:
                    view[:] = b"b" * 100
                with pytest.raises(AssertionError):
                    more.writable(1)
            assert used_bytes(file.path) == 3 * UNIT_BYTES + 4096
            # Whoever has it open sees both.
            found = reader.read()
    assert found[UNIT_BYTES : 2 * UNIT_BYTES] == b"a" * UNIT_BYTES
    assert found[8 * UNIT_BYTES :] == b"b" * 100


def test_there_is_nothing_to_add_to(staging: Staging) -> None:
    with pytest.raises(FormatInvalid, match="gone"):
        staging.extend("job", SNAPSHOT, 3, BYTES, [range(1)])
    staging.create("job", SNAPSHOT, 3, BYTES, [range(1)]).close()
    with pytest.raises(FormatInvalid, match="not of"):
        staging.extend("job", SNAPSHOT, 3, BYTES - 1, [range(1, 2)])
    with pytest.raises(FormatInvalid, match="not all"):
        staging.extend("job", SNAPSHOT, 3, BYTES, [range(1, 20)])


def test_more_units_than_there_is_room_for(staging: Staging) -> None:
    staging.create("job", SNAPSHOT, 3, BYTES, [range(1)]).close()
    none_left = Staging(staging.root, keep_free_bytes=1 << 60)
    with pytest.raises(OutOfSpace):
        none_left.extend("job", SNAPSHOT, 3, BYTES, [range(1, 2)])
    with staging.extend("job", SNAPSHOT, 3, BYTES, [range(1, 2)]) as file:
        assert used_bytes(file.path) == 2 * UNIT_BYTES
