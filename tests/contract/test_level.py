"""The contract of `everstep.storage.level.Level`, held against every level.

A new level joins by adding its factory to `FACTORIES`.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from everstep.kernels.digest import digest_units
from everstep.proto import state_pb2
from everstep.proto.envelope import open_envelope, seal
from everstep.proto.errors import FormatInvalid, InvalidName, ShardCorrupt
from everstep.proto.ids import UNIT_BYTES, SnapshotId
from everstep.storage.arena import MemoryLevel
from everstep.storage.level import Level
from everstep.storage.nvme import NvmeLevel

JOB = "gpt-2.1"
FIRST = SnapshotId(incarnation=1, step=1234)
SIZES = [0, 1, 4095, 4096, 4097, UNIT_BYTES - 1, UNIT_BYTES, 3 * UNIT_BYTES + 4097, 9 * UNIT_BYTES]

Factory = Callable[[Path], Level]
FACTORIES: dict[str, Factory] = {
    "memory": lambda root: MemoryLevel(root, keep_free_bytes=0),
    "nvme": lambda root: NvmeLevel(root),
    "nvme-buffered": lambda root: NvmeLevel(root, direct=False, chunk_bytes=UNIT_BYTES),
}


@pytest.fixture(params=list(FACTORIES))
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Level]]:
    """Opens the same level again, as a new process would."""
    opened: list[Level] = []

    def open_again() -> Level:
        opened.append(FACTORIES[request.param](tmp_path / "level"))
        return opened[-1]

    yield open_again
    for level in opened:
        if isinstance(level, NvmeLevel):
            level.close()


@pytest.fixture
def level(reopen: Callable[[], Level]) -> Level:
    return reopen()


LAYOUT_BODY = state_pb2.Layout(image_bytes=1).SerializeToString()
LAYOUT = seal("layout", LAYOUT_BODY)
LAYOUT_ID = hashlib.blake2b(LAYOUT_BODY, digest_size=16).hexdigest()


def image_of(snapshot: SnapshotId, rank: int, size: int) -> bytes:
    return random.Random(f"{snapshot} {rank} {size}").randbytes(size)


def record_of(
    image: bytes, snapshot: SnapshotId, rank: int = 0, world: int = 1, job: str = JOB
) -> bytes:
    record = state_pb2.Record(
        job=job,
        incarnation=snapshot.incarnation,
        step=snapshot.step,
        rank=rank,
        world=world,
        layout_id=LAYOUT_ID,
        image_bytes=len(image),
        unit_bytes=UNIT_BYTES,
        unit_digests=digest_units(image, UNIT_BYTES),
    )
    return seal("record", record.SerializeToString())


def commit_of(snapshot: SnapshotId, records: list[bytes], job: str = JOB) -> bytes:
    commit = state_pb2.Commit(
        job=job, incarnation=snapshot.incarnation, step=snapshot.step, world=len(records)
    )
    for rank, envelope in enumerate(records):
        body = open_envelope("record", envelope, "test")
        record = state_pb2.Record.FromString(body)
        commit.shards.add(
            rank=rank,
            layout_id=record.layout_id,
            image_bytes=record.image_bytes,
            record_digest=digest_units(body, len(body)),
        )
    return seal("commit", commit.SerializeToString())


def save(level: Level, snapshot: SnapshotId, sizes: list[int], job: str = JOB) -> list[bytes]:
    """Take a whole snapshot through the level, and return its images."""
    images = [image_of(snapshot, rank, size) for rank, size in enumerate(sizes)]
    records = [
        record_of(image, snapshot, rank, len(sizes), job) for rank, image in enumerate(images)
    ]
    level.put_layout(job, LAYOUT_ID, LAYOUT)
    level.begin(job, snapshot)
    for rank, (image, record) in enumerate(zip(images, records, strict=True)):
        level.store(job, snapshot, rank, memoryview(image), record)
    level.commit(job, snapshot, commit_of(snapshot, records, job))
    return images


def load(level: Level, snapshot: SnapshotId, rank: int = 0, job: str = JOB) -> bytes:
    with level.open_shard(job, snapshot, rank) as shard:
        return bytes(shard.image)


def files(level: Level, ending: str) -> list[Path]:
    root: Path = level.root  # type: ignore[attr-defined]
    return sorted(path for path in root.rglob("*") if path.name.endswith(ending))


def flip(path: Path, offset: int, count: int = 1) -> None:
    data = bytearray(path.read_bytes())
    for position in range(offset, offset + count):
        data[position] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("size", SIZES)
def test_image_and_record_come_back_bit_exact(reopen: Callable[[], Level], size: int) -> None:
    save(reopen(), FIRST, [size])
    image = image_of(FIRST, 0, size)
    with reopen().open_shard(JOB, FIRST, 0) as shard:
        assert bytes(shard.image) == image
        assert shard.record == record_of(image, FIRST)
        with shard.path.open("rb") as file:
            file.seek(shard.offset)
            assert file.read(size) == image
    assert list(reopen().verify(JOB, FIRST, 0)) == []


def test_image_cannot_be_written_through(level: Level) -> None:
    save(level, FIRST, [4096])
    with level.open_shard(JOB, FIRST, 0) as shard:
        assert shard.image.readonly


def test_an_unaligned_view_is_stored_right(level: Level) -> None:
    padded = image_of(FIRST, 0, 5 * UNIT_BYTES + 3)
    image = memoryview(padded)[1:-1]
    record = record_of(bytes(image), FIRST)
    level.put_layout(JOB, LAYOUT_ID, LAYOUT)
    level.begin(JOB, FIRST)
    level.store(JOB, FIRST, 0, image, record)
    level.commit(JOB, FIRST, commit_of(FIRST, [record]))
    assert load(level, FIRST) == bytes(image)


def test_storing_and_committing_again_changes_nothing(level: Level) -> None:
    save(level, FIRST, [5000, 7000])
    images = save(level, FIRST, [5000, 7000])
    assert level.snapshots(JOB) == [FIRST]
    assert level.ranks(JOB, FIRST) == [0, 1]
    assert [load(level, FIRST, rank) for rank in (0, 1)] == images
    assert level.problems(JOB) == []


def test_layout_is_content_addressed(level: Level) -> None:
    level.put_layout(JOB, LAYOUT_ID, LAYOUT)
    level.put_layout(JOB, LAYOUT_ID, LAYOUT)
    assert level.layout(JOB, LAYOUT_ID) == LAYOUT
    with pytest.raises(FormatInvalid):
        level.put_layout(JOB, "0" * 32, LAYOUT)
    for missing in ("0" * 32, "../" + LAYOUT_ID, ""):
        with pytest.raises(FormatInvalid):
            level.layout(JOB, missing)
    with pytest.raises(FormatInvalid):
        level.layout("unknown", LAYOUT_ID)


def test_uncommitted_is_invisible(level: Level) -> None:
    image = image_of(FIRST, 0, 5000)
    level.put_layout(JOB, LAYOUT_ID, LAYOUT)
    level.begin(JOB, FIRST)
    level.store(JOB, FIRST, 0, memoryview(image), record_of(image, FIRST, 0, world=2))
    assert level.snapshots(JOB) == []
    assert level.ranks(JOB, FIRST) == [0]
    assert level.problems(JOB) == []


def test_nothing_at_all_is_no_error(level: Level) -> None:
    assert level.jobs() == []
    assert level.snapshots(JOB) == []
    assert level.ranks(JOB, FIRST) == []
    assert level.problems(JOB) == []
    assert level.sweep(JOB) == []
    level.delete(JOB, FIRST)
    level.remove_job(JOB)
    with pytest.raises(FormatInvalid):
        level.open_shard(JOB, FIRST, 0)


def test_jobs_are_apart(level: Level) -> None:
    save(level, FIRST, [5000], job="a")
    save(level, FIRST, [6000], job="b")
    assert level.jobs() == ["a", "b"]
    level.delete("a", FIRST)
    assert level.snapshots("a") == []
    assert load(level, FIRST, job="b") == image_of(FIRST, 0, 6000)
    level.remove_job("b")
    assert level.jobs() == ["a"]


def test_delete_removes_one_snapshot_only(level: Level) -> None:
    second = SnapshotId(1, 1244)
    save(level, FIRST, [5000])
    save(level, second, [5000])
    level.delete(JOB, FIRST)
    level.delete(JOB, FIRST)
    assert level.snapshots(JOB) == [second]
    assert load(level, second) == image_of(second, 0, 5000)
    with pytest.raises(FormatInvalid):
        level.open_shard(JOB, FIRST, 0)
    with pytest.raises(FormatInvalid):
        level.open_shard(JOB, second, 1)
    assert level.problems(JOB) == []


def test_snapshots_do_not_mix(level: Level) -> None:
    """Ranks of different steps, or of incarnations of one step, are never one snapshot."""
    level.put_layout(JOB, LAYOUT_ID, LAYOUT)
    again = SnapshotId(2, FIRST.step)
    images = {}
    for rank, snapshot in enumerate((FIRST, again)):
        images[rank] = image_of(snapshot, rank, 5000)
        level.begin(JOB, snapshot)
        record = record_of(images[rank], snapshot, rank, world=2)
        level.store(JOB, snapshot, rank, memoryview(images[rank]), record)
    assert level.snapshots(JOB) == []
    mixed = [record_of(images[rank], again, rank, world=2) for rank in (0, 1)]
    try:
        level.commit(JOB, again, commit_of(again, mixed))
    except FormatInvalid:
        return
    # A level of one node of several may commit the ranks that it has, and those only.
    assert level.ranks(JOB, again) == [1]
    with pytest.raises(FormatInvalid):
        level.open_shard(JOB, again, 0)


def test_snapshots_order_by_incarnation(level: Level) -> None:
    ids = [SnapshotId(2, 10), SnapshotId(1, 30), SnapshotId(1, 20), SnapshotId(3, 5)]
    for snapshot in ids:
        save(level, snapshot, [100])
    assert level.snapshots(JOB) == sorted(ids)
    assert level.snapshots(JOB)[-1] == SnapshotId(3, 5)


@pytest.mark.parametrize("job", ["", "..", "a/b", ".hidden", "x" * 129, "a\0b", "a b"])
def test_harmful_job_names_are_refused(level: Level, tmp_path: Path, job: str) -> None:
    image = image_of(FIRST, 0, 100)
    record = record_of(image, FIRST, job=job)
    calls: list[Callable[[], object]] = [
        lambda: level.put_layout(job, LAYOUT_ID, LAYOUT),
        lambda: level.layout(job, LAYOUT_ID),
        lambda: level.snapshots(job),
        lambda: level.ranks(job, FIRST),
        lambda: level.begin(job, FIRST),
        lambda: level.store(job, FIRST, 0, memoryview(image), record),
        lambda: level.commit(job, FIRST, commit_of(FIRST, [record], job)),
        lambda: level.open_shard(job, FIRST, 0),
        lambda: level.verify(job, FIRST, 0),
        lambda: level.delete(job, FIRST),
        lambda: level.remove_job(job),
        lambda: level.sweep(job),
        lambda: level.problems(job),
    ]
    for call in calls:
        with pytest.raises(InvalidName):
            call()
    assert os.listdir(tmp_path) in ([], ["level"])


@pytest.mark.parametrize("unit", [0, 2, 5])
def test_a_wrong_image_is_not_stored(level: Level, unit: int) -> None:
    image = bytearray(image_of(FIRST, 0, 5 * UNIT_BYTES + 100))
    record = record_of(bytes(image), FIRST)
    image[unit * UNIT_BYTES + 17] ^= 1
    level.put_layout(JOB, LAYOUT_ID, LAYOUT)
    level.begin(JOB, FIRST)
    with pytest.raises(ShardCorrupt) as caught:
        level.store(JOB, FIRST, 0, memoryview(image), record)
    assert caught.value.units == (unit,)
    assert level.ranks(JOB, FIRST) == []
    assert level.snapshots(JOB) == []
    assert files(level, ".partial") == []


def test_a_record_of_another_shard_is_refused(level: Level) -> None:
    image = image_of(FIRST, 0, 5000)
    level.put_layout(JOB, LAYOUT_ID, LAYOUT)
    level.begin(JOB, FIRST)
    for record in (
        record_of(image, SnapshotId(2, FIRST.step)),
        record_of(image, SnapshotId(1, FIRST.step + 1)),
        record_of(image, FIRST, rank=1, world=2),
        record_of(image, FIRST, job="other"),
        record_of(image[:-1], FIRST),
        b"",
        seal("record", b"\xff" * 20),
        seal("commit", b""),
    ):
        with pytest.raises(FormatInvalid):
            level.store(JOB, FIRST, 0, memoryview(image), record)
    assert level.ranks(JOB, FIRST) == []


def test_a_commit_that_does_not_fit_is_refused(level: Level) -> None:
    image = image_of(FIRST, 0, 5000)
    record = record_of(image, FIRST)
    level.put_layout(JOB, LAYOUT_ID, LAYOUT)
    level.begin(JOB, FIRST)
    level.store(JOB, FIRST, 0, memoryview(image), record)
    other = SnapshotId(1, FIRST.step + 1)
    for commit in (
        commit_of(other, [record_of(image, other)]),
        commit_of(FIRST, [record], job="other"),
        commit_of(FIRST, [record_of(image[::-1], FIRST)]),
        commit_of(FIRST, []),
        seal("commit", b"\xff" * 20),
        b"",
    ):
        with pytest.raises(FormatInvalid):
            level.commit(JOB, FIRST, commit)


def test_a_snapshot_whose_layout_is_missing_is_not_committed(level: Level) -> None:
    image = image_of(FIRST, 0, 5000)
    record = record_of(image, FIRST)
    level.begin(JOB, FIRST)
    level.store(JOB, FIRST, 0, memoryview(image), record)
    with pytest.raises(FormatInvalid):
        level.commit(JOB, FIRST, commit_of(FIRST, [record]))


@pytest.mark.parametrize("ending", [".record", LAYOUT_ID, "commit"])
@pytest.mark.parametrize("damage", ["emptied", "overwritten", "from the future"])
def test_damaged_metadata_is_a_problem_and_no_exception(
    level: Level, ending: str, damage: str
) -> None:
    second = SnapshotId(1, 1244)
    save(level, FIRST, [5000])
    save(level, second, [5000])
    found = files(level, ending)
    if not found:
        pytest.skip(f"{level.name} keeps no {ending}")
    data = found[0].read_bytes()
    if damage == "emptied":
        found[0].write_bytes(b"")
    elif damage == "overwritten":
        found[0].write_bytes(bytes(len(data)))
    else:
        found[0].write_bytes(data[:4] + b"\xff\xff" + data[6:] + b"more")
    assert [problem.where for problem in level.problems(JOB)] == [str(found[0])]
    # Layouts are looked for when a snapshot is opened; a snapshot does not vanish for one.
    assert second in level.snapshots(JOB)
    assert load(level, second) == image_of(second, 0, 5000)
    if ending != LAYOUT_ID:
        with pytest.raises(FormatInvalid):
            level.open_shard(JOB, FIRST, 0)


def test_a_damaged_layout_is_refused_and_can_be_put_again(level: Level) -> None:
    level.put_layout(JOB, LAYOUT_ID, LAYOUT)
    (path,) = files(level, LAYOUT_ID)
    other = seal("layout", LAYOUT_BODY + b"\x28\x02")
    path.write_bytes(other)
    with pytest.raises(FormatInvalid):
        level.layout(JOB, LAYOUT_ID)
    level.put_layout(JOB, LAYOUT_ID, LAYOUT)
    assert level.layout(JOB, LAYOUT_ID) == LAYOUT


def test_verify_names_the_units_that_rotted(level: Level) -> None:
    save(level, FIRST, [5 * UNIT_BYTES + 100])
    with level.open_shard(JOB, FIRST, 0) as shard:
        path, offset = shard.path, shard.offset
    flip(path, offset + 2 * UNIT_BYTES)
    flip(path, offset + 5 * UNIT_BYTES + 99)
    assert list(level.verify(JOB, FIRST, 0)) == [2, 5]


def test_directories_and_files_are_private(level: Level) -> None:
    save(level, FIRST, [5000])
    for path in files(level, ""):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_link_is_not_followed(level: Level, tmp_path: Path) -> None:
    save(level, FIRST, [5000])
    root: Path = level.root  # type: ignore[attr-defined]
    (root / JOB).rename(tmp_path / "elsewhere")
    (root / JOB).symlink_to(tmp_path / "elsewhere")
    assert level.jobs() == []
    with pytest.raises(FormatInvalid):
        level.begin(JOB, FIRST)


def test_a_removed_job_leaves_nothing(level: Level) -> None:
    save(level, FIRST, [5000])
    level.remove_job(JOB)
    assert files(level, "") == []
